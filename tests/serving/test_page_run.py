"""The page over a run in a real Chromium: it follows a training, offers checkpoints, and compares two of them."""

import pytest

from tests.serving.test_page import Page, browser, pytestmark  # noqa: F401 - a fixture, and why a test is left out
from tests.support.runs import ended
from tests.support.server import Server

FLAGS = "--steps 60 --checkpoint-every 5".split()
SMALL = {"width": 1280, "height": 900}


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def choose(page, picker, label):
    page.page.click(f"#{picker} input")
    page.page.get_by_role("option", name=label, exact=True).click()
    page.page.wait_for_timeout(300)


def write(page, text="the cat", **numbers):
    page.set(text, **numbers)
    page.press("continue")
    page.wait(lambda: page.text != text)  # the status is still of the text before
    return page.finish()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, train_in):
    """A run of three checkpoints (5, 10, 15) that has ended, and its export."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    ended(train_in(folder, "--steps", "15", "--checkpoint-every", "5"))
    return folder


def test_a_page_follows_a_run_that_trains_without_a_reload(browser, train, tmp_path):  # noqa: F811
    ended(train(*FLAGS, "--stop-after", "10"), code=0)
    with Server(tmp_path / "run") as running:
        page = Page(browser, running.url, viewport=SMALL)
        loads = [url for url in page.requests if url.rstrip("/") == running.url.rstrip("/")]
        page.wait(lambda: "step 10 of 60" in page.page.inner_text("#live"))
        assert "over 10 steps" in page.page.locator("#facts svg").get_attribute("aria-label")  # unfolded
        write(page, length=5, seed=1)
        assert "step 10" in page.status
        ended(train(*FLAGS, "--stop-after", "40"), code=0)
        page.wait(lambda: "step 40 of 60" in page.page.inner_text("#live"))
        page.wait(lambda: "over 40 steps" in page.page.locator("#facts svg").get_attribute("aria-label"))
        page.wait(lambda: "serves step 40" in page.page.inner_text("#live"))
        page.wait(lambda: page.page.input_value("#weights input") == "Newest (step 40)")
        write(page, length=5, seed=1)
        assert "step 40" in page.status
        assert [url for url in page.requests if url.rstrip("/") == running.url.rstrip("/")] == loads
        ended(train(*FLAGS), code=0)
        page.wait(lambda: page.page.inner_text("#live").strip() == "")
        page.wait(lambda: "step 60 of 60" in page.page.inner_text("#facts"))
        assert page.errors == []
        page.context.close()


def test_the_picker_changes_the_weights_between_requests_and_writes_nothing(browser, finished):  # noqa: F811
    before = snapshot(finished)
    with Server(finished) as running:
        page = Page(browser, running.url, viewport=SMALL)
        texts = {}
        labels = {"Step 5": "step 5", "Step 15": "step 15", "Export": "export", "Newest (step 15)": "step 15"}
        for label, told in (labels | {"Step 10": "step 10"}).items():
            page.wait(lambda: page.page.input_value("#weights input") != "Newest")
            choose(page, "weights", label)
            texts[label] = write(page, length=20, seed=3)
            page.wait(lambda told=told: f"· {told} ·" in page.status)
        assert texts["Export"] == texts["Step 15"] == texts["Newest (step 15)"]
        assert texts["Step 5"] != texts["Step 15"] != texts["Step 10"]
        assert page.errors == []
        page.context.close()
    assert snapshot(finished) == before


def test_two_checkpoints_write_from_one_seed_and_equal_ones_the_same(browser, finished):  # noqa: F811
    with Server(finished) as running:
        page = Page(browser, running.url, viewport=SMALL)
        page.page.get_by_role("tab", name="Compare").click()
        page.set(length=20, seed="")
        page.page.fill("#compare-prompt textarea", "the cat")

        def compared():
            page.press("compare")
            page.page.wait_for_selector("#stop-compare", state="visible")
            page.page.wait_for_selector("#compare", state="visible")
            sides = [page.page.inner_text(f"#{side}-status") for side in ("left", "right")]
            assert len({line.split("seed")[1].split()[0] for line in sides}) == 1
            return [page.page.input_value(f"#text-{side} textarea") for side in ("left", "right")], sides

        page.wait(lambda: page.page.input_value("#weights-left input") == "Step 5")
        texts, sides = compared()
        assert "step 5" in sides[0]
        assert "step 15" in sides[1]
        assert texts[0] != texts[1]
        choose(page, "weights-left", "Step 15")
        texts, _ = compared()
        assert texts[0] == texts[1] != ""
        assert page.errors == []
        page.context.close()


def test_a_folder_has_no_picker_and_nothing_to_compare(browser, server):  # noqa: F811
    page = Page(browser, server.url)
    assert not page.page.locator("#weights").is_visible()
    assert page.page.get_by_role("tab", name="Compare").count() == 0
    page.context.close()
