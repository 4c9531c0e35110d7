"""The page in a real Chromium: what the model wrote has a tint, and a token under the pointer its probability."""

import pytest

from tests.serving.test_page import Page, browser, pytestmark  # noqa: F401 - a fixture, and why a test is left out
from tests.support.server import Server


@pytest.fixture
def page(browser, server):  # noqa: F811 - the fixture
    opened = Page(browser, server.url, viewport={"width": 1280, "height": 900})
    yield opened
    opened.context.close()
    assert opened.errors == []
    assert opened.hosts() == {"127.0.0.1"}


def written(page):
    return page.page.locator("#sheet .written").all_text_contents()


def point(page):
    """Rest the pointer on the second character that the model wrote."""
    x, y = page.page.evaluate(
        "() => { const r = document.querySelector('#sheet .written').getClientRects()[0];"
        " return [r.left + 12, (r.top + r.bottom) / 2] }"
    )
    page.page.mouse.move(x, y)
    page.page.mouse.move(x + 1, y)


def test_what_the_model_wrote_is_tinted_through_edits_undo_and_a_reload(page):
    page.set("Once upon", length=40, seed=1)
    assert written(page) == []
    page.press("continue")
    first = page.finish().removeprefix("Once upon")
    page.wait(lambda: written(page) == [first])
    page.set(f"Once upon{first[:20]}typed{first[20:]}")
    page.wait(lambda: written(page) == [first[:20], first[20:]])
    page.page.wait_for_timeout(1_000)
    page.page.reload()
    page.notebook()
    page.wait(lambda: written(page) == [first[:20], first[20:]])
    page.press("undo-continue")
    page.wait(lambda: written(page) == [first])
    page.press("undo-continue")
    page.wait(lambda: written(page) == [])


def test_a_text_keeps_its_tint_if_its_page_is_left_while_it_is_written(page):
    page.set("Once upon", length=200, seed=1)
    page.press("continue")
    page.wait(lambda: len(page.page.input_value("#sheet textarea")) > 30)
    page.page.evaluate("() => dispatchEvent(new Event('pagehide'))")
    text = page.finish()
    assert len(text) > 60
    page.wait(lambda: written(page) == [text.removeprefix("Once upon")])


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_pointing_at_a_token_shows_its_probability_and_five_alternatives(browser, folder_of_chat_model, backend):  # noqa: F811
    if backend == "torch":
        pytest.importorskip("torch")
    with Server(folder_of_chat_model, "--backend", backend) as running:
        page = Page(browser, running.url, viewport={"width": 1280, "height": 900})
        page.set("<b>Once</b> upon", length=30, seed=1)
        page.press("continue")
        page.finish()
        before = len(page.requests)
        page.page.wait_for_timeout(1_500)
        assert not [url for url in page.requests[before:] if "queue/join" in url]  # nobody looks
        point(page)
        tip = page.page.locator("#token-tip")
        page.wait(lambda: tip.locator(".others tr").count() == 5)
        likeliest = [
            float(one.split()[0]) for one in tip.locator(".others .p").all_text_contents() if "<" not in one
        ]
        assert likeliest == sorted(likeliest, reverse=True)
        assert "%" in tip.locator(".head .p").inner_text()
        assert tip.locator(".head .token").inner_text() != ""
        assert "before temperature" in tip.inner_text()
        page.page.mouse.move(2, 2)
        page.wait(lambda: not tip.is_visible())
        assert page.errors == []
        page.context.close()
