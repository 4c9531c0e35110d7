"""The page in a real Chromium: a wrong value is an error at its field; a chat has a system prompt and edits."""

import pytest

from tests.serving.test_page import Page, browser, pytestmark  # noqa: F401 - a fixture, and why a test is left out


@pytest.fixture
def page(browser, server):  # noqa: F811 - the fixture
    opened = Page(browser, server.url, viewport={"width": 1280, "height": 900})
    yield opened
    opened.context.close()
    assert opened.errors == []


def test_55_stays_an_error_at_its_field_until_it_is_right(page):
    page.set("Once", temperature=55, length=5)
    field = page.page.locator("#temperature input[type=number]")
    assert field.input_value() == "55"
    assert "from 0 to 2" in page.page.inner_text("#temperature .field-error")
    assert field.get_attribute("aria-invalid") == "true"
    for send in (
        lambda: page.press("continue"),
        lambda: page.page.locator("#sheet textarea").press("Control+Enter"),
    ):
        send()
        page.wait(lambda: page.page.evaluate("() => document.activeElement.closest('#temperature') !== null"))
        assert page.text == "Once"
    page.set(temperature=1.5)
    assert page.page.locator(".field-error").count() == 0
    assert page.page.locator("#preset input[value=Custom]").is_checked()
    page.press("continue")
    page.finish()


@pytest.mark.parametrize("seed", ["minus one", "-1", "4294967296", "1.5"])
def test_a_wrong_seed_is_shown_at_the_seed(page, seed):
    page.set("Once", seed=seed)
    page.press("continue")
    assert "whole number from 0 to 4,294,967,295" in page.page.inner_text("#seed .field-error")
    page.page.wait_for_timeout(300)
    assert page.page.locator(".toast-body").count() == 0
    assert page.text == "Once"


def test_a_moved_value_makes_the_preset_custom_and_a_preset_sets_the_values(page):
    page.set(temperature=0.5)
    page.wait(lambda: page.page.locator("#preset input[value=Custom]").is_checked())
    page.page.click("#preset input[value=Story]")
    page.wait(lambda: page.page.input_value("#temperature input[type=number]") == "0.9")
    page.page.click("#preset input[value=Custom]")
    page.page.wait_for_timeout(300)
    assert page.page.input_value("#temperature input[type=number]") == "0.9"


def say(page, message):
    page.page.fill("#message textarea", message)
    page.page.locator("#message textarea").press("Enter")
    page.page.wait_for_selector("#stop-send", state="visible")
    page.page.wait_for_selector("#send", state="visible")
    page.wait(lambda: "reached" in page.page.inner_text("#chat-status"))


def test_a_turn_is_edited_and_answered_again_without_the_turns_after_it(page):
    page.page.get_by_role("tab", name="Chat").click()
    page.set(length=5, seed=1)
    for message in ("first <b>", "second", "third"):
        say(page, message)
    users = page.page.locator(".user.message")
    page.wait(lambda: users.count() == 3)
    page.page.fill("#message textarea", "not sent")
    users.nth(1).hover()
    page.page.get_by_role("button", name="Edit", exact=False).nth(1).click()
    editor = page.page.locator("#chat-view textarea").first
    editor.fill("second & <better>")
    page.page.get_by_role("button", name="Submit").first.click()
    page.wait(lambda: users.count() == 2)
    page.wait(lambda: "reached" in page.page.inner_text("#chat-status"))
    assert users.nth(0).inner_text().strip() == "first <b>"
    assert users.nth(1).inner_text().strip() == "second & <better>"
    assert page.page.locator(".bot.message").count() == 2
    assert page.page.input_value("#message textarea") == "not sent"


def test_a_system_prompt_changes_the_answer_and_survives_a_reload(page):
    page.page.get_by_role("tab", name="Chat").click()
    page.set(length=20, seed=1)
    say(page, "Who are you?")
    answer = page.page.locator(".bot.message").last.inner_text()
    page.page.fill("#system textarea", "You are a crab.")
    page.page.wait_for_timeout(1_000)
    page.press("again-send")
    page.wait(lambda: page.page.locator(".bot.message").last.inner_text() not in {answer, ""})
    page.page.wait_for_selector("#send", state="visible")
    page.page.reload()
    page.notebook()
    page.page.get_by_role("tab", name="Chat").click()
    page.wait(lambda: page.page.input_value("#system textarea") == "You are a crab.")
