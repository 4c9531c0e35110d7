"""The page in a real Chromium: text streams, stops, goes on; browsers take turns; nothing leaves the machine."""

import shutil
import time
from urllib.parse import urlsplit

import pytest

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

from smollm_jax.config.recipes import QUESTIONS  # noqa: E402

CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine (apt-get install chromium)"),
]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
WAIT = 60_000  # milliseconds; the machine may be busy
IMAGE = "<img src='http://198.51.100.1/x.png'>![x](http://198.51.100.2/y.png)"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


class Page:
    """The page as a person uses it; every request it makes is kept."""

    def __init__(self, browser, url, **context):
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.requests, self.errors = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector(":is(#message, #sheet) textarea")
        selected = self.page.get_by_role("tab", selected=True)
        self.opened_on = selected.inner_text() if selected.count() else ""
        self.notebook()

    def notebook(self):
        """Change to the notebook: a model with a template opens on the chat."""
        self.page.wait_for_selector(":is(#message, #sheet) textarea")
        if (tab := self.page.get_by_role("tab", name="Notebook")).count():
            tab.click()
        self.page.wait_for_selector("#sheet textarea")
        self.page.wait_for_function("() => document.querySelector('#continue')?.offsetParent")

    @property
    def text(self):
        return self.page.input_value("#sheet textarea")

    @property
    def status(self):
        return self.page.inner_text("#status")

    def set(self, text=None, **numbers):
        if text is not None:
            self.page.fill("#sheet textarea", text)
        for label, value in numbers.items():
            self.page.locator(f"#{label} input, #{label} textarea").first.fill(str(value))
            self.page.keyboard.press("Tab")
        self.page.wait_for_timeout(300)  # Gradio takes a value a moment after its field was left

    def press(self, name):
        self.page.click(f"#{name}")

    def wait(self, condition, seconds=WAIT / 1_000):
        ends = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < ends, f"waited in vain; the status is {self.status!r}"
            self.page.wait_for_timeout(50)

    def finish(self):
        """Wait until the text has ended, and give it."""
        self.wait(lambda: "reached" in (line := self.status) or "ended" in line)
        self.page.wait_for_selector("#continue", state="visible")
        return self.text

    def hosts(self):
        return {urlsplit(url).hostname for url in self.requests if urlsplit(url).scheme not in ("data", "blob")}


@pytest.fixture
def page(browser, server):
    clipboard = ["clipboard-read", "clipboard-write"]
    opened = Page(browser, server.url, viewport={"width": 1280, "height": 900}, permissions=clipboard)
    yield opened
    opened.context.close()
    assert opened.errors == []
    assert opened.hosts() == {"127.0.0.1"}


def test_text_streams_in_place_stops_and_goes_on(page):
    page.set("Once upon a time", length=2_000, seed=1)
    page.press("continue")
    lengths = set()
    page.wait(lambda: lengths.add(len(page.text)) or len(lengths) > 4)
    assert "tokens/s" in page.status
    assert "first after" in page.status
    page.press("stop-continue")
    page.page.wait_for_selector("#continue", state="visible")
    stopped = page.text
    assert "stopped by you" in page.status
    page.page.wait_for_timeout(1_000)
    assert page.text == stopped
    assert stopped.startswith("Once upon a time")
    page.set(length=20)
    page.press("continue")
    page.wait(lambda: "length reached" in page.status)
    assert page.text.startswith(stopped)
    assert len(page.text) > len(stopped)
    page.press("undo-continue")
    page.wait(lambda: page.text == stopped)
    page.press("undo-continue")
    page.wait(lambda: page.text == "Once upon a time")


def test_the_same_seed_gives_the_same_text_and_another_another(page):
    texts = []
    for seed in (7, 7, 8):
        page.set("Once upon a time", length=40, seed=seed)
        page.press("continue")
        page.wait(lambda seed=seed: f"seed {seed} · length reached" in page.status)
        texts.append(page.finish())
        page.set("")
        page.press("undo-continue")
        page.wait(lambda: page.status == "")
    assert texts[0] == texts[1] != texts[2]


def test_without_a_seed_writing_again_gives_another_text_and_tells_the_seed(page):
    page.set("The water cycle", length=30)
    page.press("continue")
    first, told = page.finish(), page.status
    page.press("again-continue")
    page.wait(lambda: "reached" in (line := page.status) and line.split("seed")[1] != told.split("seed")[1])
    second = page.finish()
    assert second != first
    assert second.startswith("The water cycle")
    page.press("undo-continue")
    page.wait(lambda: page.text == "The water cycle")
    seed = told.split("seed ")[1].split()[0]
    page.set(seed=seed)
    page.press("continue")
    page.wait(lambda: f"seed {seed} · length reached" in page.status)
    assert page.text == first


def test_a_second_browser_waits_for_its_turn_and_is_served(page, browser, server):
    other = Page(browser, server.url)
    page.set("Once", length=400, seed=1)
    other.set("Once", length=20, seed=1)
    page.press("continue")
    page.wait(lambda: "writing" in page.status)
    other.press("continue")
    other.wait(lambda: "1 before you" in other.status)
    assert "reached" not in page.status
    page.wait(lambda: "reached" in page.status)
    assert other.finish().startswith("Once")
    other.context.close()


def test_a_browser_that_closes_lets_the_next_one_in(page, browser, server):
    other = Page(browser, server.url)
    other.set("Once", length=2_000, seed=1)
    other.press("continue")
    other.wait(lambda: "writing" in other.status)
    other.context.close()
    page.set("Once", length=5, seed=1)
    page.press("continue")
    page.wait(lambda: "reached" in page.status, seconds=8)


@pytest.mark.parametrize(
    ("text", "seed", "words"),
    [
        ("", "", "prompt is empty"),
        ("x" * 100_001, "", "100,001 characters"),
    ],
    ids=["empty", "long"],
)
def test_a_mistake_is_a_toast_in_words_and_the_page_goes_on(page, text, seed, words):
    page.set(text, seed=seed, length=5)
    page.press("continue")
    page.page.wait_for_selector(
        f".toast-body :text({words!r})" if "'" not in words else f'.toast-body :text("{words}")'
    )
    page.page.wait_for_selector("#continue", state="visible")
    page.wait(lambda: "reading" not in page.status)
    page.set("Once", seed=3)
    page.press("continue")
    assert page.finish().startswith("Once")


def test_the_page_fits_a_phone(browser, server):
    phone = Page(browser, server.url, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    width = phone.page.evaluate("() => document.documentElement.scrollWidth")
    assert width <= 390
    box = phone.page.locator("#continue").bounding_box()
    assert box["y"] + box["height"] < 844
    phone.page.click("#settings > button")  # they are folded
    phone.set("Once", length=10)
    phone.press("continue")
    assert phone.finish().startswith("Once")
    assert phone.hosts() == {"127.0.0.1"}
    phone.context.close()


def test_dark_is_a_press_away_and_is_remembered(page):
    def dark():
        return page.page.evaluate("() => document.body.classList.contains('dark')")

    assert not dark()
    page.press("dark")
    page.wait(dark)
    page.page.reload()
    page.notebook()
    page.wait(dark)


def test_a_model_with_a_template_opens_on_the_chat(page):
    assert page.opened_on == "Chat"


def test_a_chat_answers_again_and_takes_back(page):
    chat = page.page
    chat.get_by_role("tab", name="Chat").click()
    page.set(length=20, seed="", message="Who are you?")
    chat.locator("#message textarea").press("Enter")
    said = chat.locator(".bot.message")
    page.wait(lambda: "reached" in chat.inner_text("#chat-status"))
    first, told = said.last.inner_text(), chat.inner_text("#chat-status")
    assert first
    assert chat.input_value("#message textarea") == ""
    chat.click("#copy")
    page.wait(lambda: chat.evaluate("() => navigator.clipboard.readText()").strip() == first.strip())
    chat.click("#again-send")
    page.wait(lambda: "reached" in chat.inner_text("#chat-status") and chat.inner_text("#chat-status") != told)
    assert said.count() == 1
    page.wait(lambda: said.last.inner_text() != first)
    chat.click("#undo-send")
    page.wait(lambda: said.count() == 0)
    assert chat.input_value("#message textarea") == "Who are you?"


def test_a_question_is_put_into_the_message_and_replaces_nothing_that_was_typed(page):
    chat = page.page
    chat.get_by_role("tab", name="Chat").click()
    message = chat.locator("#message textarea")
    page.set(message="")
    for question in QUESTIONS:
        chat.locator("#questions").get_by_text(question).click()
        page.wait(lambda question=question: message.input_value() == question)
    assert chat.evaluate("() => document.activeElement === document.querySelector('#message textarea')")
    page.set(message="Listen.")
    chat.locator("#questions").get_by_text(QUESTIONS[0]).click()
    page.wait(lambda: message.input_value() == f"Listen.\n{QUESTIONS[0]}")


def test_a_chat_shows_an_image_from_elsewhere_as_words(page):
    page.page.get_by_role("tab", name="Chat").click()
    page.set(length=5, message=IMAGE)
    page.press("send")
    page.wait(lambda: "reached" in page.page.inner_text("#chat-status"))
    assert page.page.locator(".user.message").last.inner_text().strip() == IMAGE
