"""The page in a real Chromium: contrast, widths, Markdown, facts of a run, links, and a curve that grows."""

import json
from pathlib import Path

import pytest

from smollm_jax.runs.convert import import_run
from tests.serving.test_page import Page, browser, pytestmark  # noqa: F401 - a fixture, and why a test is left out
from tests.support.server import Server

CONTRAST = Path(__file__).with_name("contrast.js").read_text()
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
ANSWER = (
    "# A title\n\n**bold** `a < b`\n\n<img src='http://198.51.100.1/x.png'> ![x](http://198.51.100.2/y.png)"
    " [here](http://198.51.100.3/) <script>document.title = 'run'</script>"
)


@pytest.fixture
def page(browser, server):  # noqa: F811 - the fixture
    opened = Page(browser, server.url, viewport=DESKTOP, permissions=["clipboard-read", "clipboard-write"])
    yield opened
    opened.context.close()
    assert opened.errors == []
    assert opened.hosts() == {"127.0.0.1"}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_text_has_the_contrast_of_wcag_aa(browser, server, size, dark):  # noqa: F811
    page = Page(browser, server.url, viewport=size)
    if dark:
        page.press("dark")
    for tab in ("Notebook", "Chat"):
        page.page.get_by_role("tab", name=tab).click()
        while (folded := page.page.locator("button.label-wrap:not(.open)")).count():
            folded.first.click()
            page.page.wait_for_timeout(200)
        page.page.wait_for_timeout(600)  # colours change slowly
        assert page.page.evaluate(CONTRAST) == []
    page.context.close()


def test_both_tabs_are_as_wide_as_the_page(page):
    wide = page.page.locator("#sheet").bounding_box()["width"]
    page.page.get_by_role("tab", name="Chat").click()
    page.page.wait_for_selector("#chat-view")
    assert abs(page.page.locator("#chat-view").bounding_box()["width"] - wide) < 8
    assert wide > 800


def test_a_phone_shows_the_settings_folded(browser, server):  # noqa: F811
    phone = Page(browser, server.url, viewport=PHONE, is_mobile=True, has_touch=True)
    phone.wait(lambda: not phone.page.locator("#seed").is_visible())
    phone.page.click("#settings > button")
    phone.wait(lambda: phone.page.locator("#seed").is_visible())
    assert phone.page.evaluate("() => document.documentElement.scrollWidth") <= PHONE["width"]
    phone.context.close()


def test_an_answer_is_rendered_and_nothing_in_it_is_fetched_linked_or_run(page):
    talk = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": ANSWER}]
    page.page.evaluate("(talk) => localStorage.setItem('smollm-jax', JSON.stringify({ talk }))", talk)
    page.page.add_init_script(
        f"const talk = {json.dumps(talk)}; localStorage.setItem('smollm-jax', JSON.stringify({{ talk }}))"
    )
    page.page.reload()
    page.page.get_by_role("tab", name="Chat").click()
    answer = page.page.locator(".bot.message .rendered")
    page.wait(lambda: answer.count() == 1)
    assert answer.locator("h1").inner_text() == "A title"
    assert answer.locator("strong").inner_text() == "bold"
    assert answer.locator("code").inner_text() == "a < b"
    assert answer.locator("img, a, script").count() == 0
    assert page.page.title() != "run"
    page.page.click("#markdown input")
    page.wait(lambda: not answer.is_visible())
    assert page.page.locator(".bot.message .source").inner_text() == ANSWER


def test_commands_hold_the_real_address_and_a_preset_follows_the_sliders(page, server):
    page.page.click("text=Use it from a program")
    page.wait(lambda: f"curl {server.url}/v1/completions" in page.page.inner_text("#program"))
    assert "ADDRESS" not in page.page.inner_text("#program")
    greedy = page.page.locator("#preset input[value=Greedy]")
    greedy.click()
    page.wait(lambda: page.page.input_value("#temperature input[type=number]") == "0")
    page.set(temperature=0.5)
    page.wait(lambda: not greedy.is_checked())


def test_a_link_carries_prompt_and_settings(page, browser, server):  # noqa: F811
    page.set("Once & again\n", length=12, seed=77)
    page.press("link")
    page.wait(lambda: "clipboard" in page.status)
    link = page.page.evaluate("() => navigator.clipboard.readText()")
    assert link.startswith(f"{server.url}/#prompt=")
    other = Page(browser, link)
    other.wait(lambda: other.text == "Once & again\n")
    assert other.page.input_value("#seed textarea, #seed input") == "77"
    assert other.page.input_value("#length input[type=number]") == "12"
    other.context.close()


def test_stop_strings_and_the_token_counter(page):
    page.set("Once upon a time", length=300, seed=1)
    page.wait(lambda: page.page.inner_text("#count").endswith("of 8,192"))
    page.press("continue")
    text = page.finish().removeprefix("Once upon a time")
    middle = text[100:103].replace("\n", "\\n")
    page.set("Once upon a time")
    page.page.fill("#stop-strings textarea", middle)
    page.press("continue")
    page.wait(lambda: "stop string reached" in page.status)
    written = page.text.removeprefix("Once upon a time")
    assert text.startswith(written)
    assert text[100:103] not in written


def test_a_run_shows_its_facts_its_openings_and_a_curve_that_grows(browser, folder_of_chat_model, tmp_path):  # noqa: F811
    import_run(folder_of_chat_model, tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["run"]["sample_prompts"] = ["An opening of the run"]
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    held_out = {"step": 0, "eval_loss": 5.9, "eval_bits_per_byte": 2.125}
    lines = [held_out, {"step": 1, "loss": 5.5}, {"step": 2, "loss": 5.0}]
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Server(tmp_path / "run") as running:
        page = Page(browser, running.url)
        page.page.click("#openings button")
        page.wait(lambda: page.text == "An opening of the run")
        page.page.click("#about > button")
        facts = page.page.locator("#facts")
        page.wait(lambda: "parameters" in facts.inner_text().lower())
        assert "step 0 of" in facts.inner_text()
        assert "2.125 bits per byte" in facts.inner_text()
        assert "over 2 steps" in facts.locator("svg").get_attribute("aria-label")
        with (tmp_path / "run/metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 9, "loss": 4.0}) + "\n")
        page.wait(lambda: "over 9 steps" in facts.locator("svg").get_attribute("aria-label"), seconds=30)
        assert "is at step 9" in facts.inner_text()
        page.context.close()
