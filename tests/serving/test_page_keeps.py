"""The page in a real Chromium: the view follows the text, nothing typed is lost, Continue goes on after an end."""

import pytest

from tests.serving.test_page import Page, browser, pytestmark  # noqa: F401 - a fixture, and why a test is left out
from tests.support.server import Server, export_model


@pytest.fixture
def page(browser, server):  # noqa: F811 - the fixture
    opened = Page(browser, server.url, viewport={"width": 1280, "height": 800})
    yield opened
    opened.context.close()
    assert opened.errors == []
    assert opened.hosts() == {"127.0.0.1"}


@pytest.fixture(scope="module")
def short_texts(tmp_path_factory):
    """A server over a model whose likeliest token is nearly always an end of text."""
    folder = export_model(tmp_path_factory.mktemp("short"), ends=True)
    with Server(folder, "--backend", "jax") as running:
        yield running


def scroll(page):
    return page.page.evaluate(
        "() => { const t = document.querySelector('#sheet textarea');"
        " return [t.scrollTop, t.scrollHeight - t.clientHeight] }"
    )


def reload(page):
    page.page.reload()
    page.notebook()


def test_the_view_follows_the_text_unless_the_reader_scrolled_up(page):
    page.set("Once upon a time\n" * 30, length=2_000, seed=1)
    page.press("continue")
    page.wait(lambda: "tokens/s" in page.status)
    start = len(page.text)
    page.wait(lambda: len(page.text) > start + 60)
    page.wait(lambda: (found := scroll(page))[1] - found[0] < 60 < found[1])
    page.page.hover("#sheet textarea")
    page.page.mouse.wheel(0, -400)
    page.wait(lambda: (found := scroll(page))[1] - found[0] > 200)
    length, (top, _) = len(page.text), scroll(page)
    page.wait(lambda: len(page.text) > length + 60)
    assert abs(scroll(page)[0] - top) < 150  # the wheel may still have been rolling
    page.press("stop-continue")
    page.page.wait_for_selector("#continue", state="visible")


def test_an_opening_an_edit_and_an_undo_lose_no_word(page):
    page.set("My own words.", length=10, seed=1)
    page.page.click("#openings button >> nth=0")
    page.wait(lambda: page.text.startswith("Photosynthesis"))
    page.press("undo-continue")
    page.wait(lambda: page.text == "My own words.")
    page.press("redo-continue")
    page.wait(lambda: page.text.startswith("Photosynthesis"))
    page.press("continue")
    written = page.finish()
    page.set(f"{written} An edit.")
    page.press("undo-continue")
    page.wait(lambda: page.text == written)
    page.press("redo-continue")
    page.wait(lambda: page.text == f"{written} An edit.")


def test_a_reload_keeps_the_text_its_history_and_the_settings(page):
    page.set("My own words.", length=10, seed=5)
    page.press("continue")
    written = page.finish()
    page.set(f"{written} And typed.")
    reload(page)
    page.wait(lambda: page.text == f"{written} And typed.")
    assert page.page.input_value("#length input[type=number]") == "10"
    assert page.page.input_value("#seed textarea, #seed input") == "5"
    page.press("undo-continue")
    page.wait(lambda: page.text == written)
    page.press("undo-continue")
    page.wait(lambda: page.text == "My own words.")


def test_a_restart_of_the_server_keeps_text_and_conversation(browser, folder_of_chat_model):  # noqa: F811
    with Server(folder_of_chat_model) as first:
        page, port = Page(browser, first.url), first.url.rpartition(":")[2]
        page.page.get_by_role("tab", name="Chat").click()
        page.set(length=5, message="Who are you?")
        page.press("send")
        page.wait(lambda: "reached" in page.page.inner_text("#chat-status"))
        answer = page.page.locator(".bot.message").last.inner_text()
        page.set(message="Not sent yet.")
        page.page.get_by_role("tab", name="Notebook").click()
        page.set("My own words.")
        page.page.wait_for_timeout(1_000)
    with Server(folder_of_chat_model, "--port", port) as second:
        assert second.url.endswith(port)
        page.page.goto(second.url)
        page.notebook()
        page.wait(lambda: page.text == "My own words.")
        page.page.get_by_role("tab", name="Chat").click()
        page.wait(lambda: page.page.locator(".bot.message").count() == 1)
        assert page.page.locator(".bot.message").last.inner_text() == answer
        assert page.page.input_value("#message textarea") == "Not sent yet."
        page.press("again-send")
        page.wait(lambda: "reached" in page.page.inner_text("#chat-status"))
        assert page.page.locator(".bot.message").count() == 1
        assert page.page.input_value("#message textarea") == "Not sent yet."
        page.context.close()


def test_every_continue_adds_a_token_and_what_changed_nothing_is_not_history(browser, short_texts):  # noqa: F811
    page = Page(browser, short_texts.url)
    page.set("Once upon a time", length=50)
    texts = ["Once upon a time"]
    for seed in range(10):
        page.set(seed=seed)
        page.press("continue")
        page.wait(lambda seed=seed: f"seed {seed} · the model ended" in page.status)
        page.page.wait_for_selector("#continue", state="visible")
        assert page.status.startswith("1 token ·")
        assert page.text.startswith(texts[-1])
        texts += [page.text] * (page.text != texts[-1])  # a page shows no NUL
    assert len(texts) > 5
    for text in texts[-2::-1]:
        page.press("undo-continue")
        page.wait(lambda text=text: page.text == text)
    page.set("")
    for _ in range(3):
        page.press("continue")  # refused
        page.page.wait_for_selector("#continue", state="visible")
    page.press("undo-continue")
    page.wait(lambda: page.text == "Once upon a time")
    assert page.errors == []
    page.context.close()


def test_keys_continue_and_stop_and_the_focus_stays(page):
    page.set("Once", length=2_000, seed=1)
    page.page.focus("#sheet textarea")
    page.page.keyboard.press("Control+Enter")
    page.wait(lambda: "tokens/s" in page.status)
    page.page.keyboard.press("Escape")
    page.page.wait_for_selector("#continue", state="visible")
    page.wait(lambda: "stopped by you" in page.status)
    page.page.focus("#continue")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#stop-continue", state="visible")
    page.wait(lambda: page.page.evaluate("() => document.activeElement.id") == "stop-continue")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#continue", state="visible")
    page.wait(lambda: page.page.evaluate("() => document.activeElement.id") == "continue")
    status = page.page.locator("#status")
    assert (status.get_attribute("role"), status.get_attribute("aria-live")) == ("status", "polite")
