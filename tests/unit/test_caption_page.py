"""The page of `ray_jobs.captions --review` in a real browser: captions are found, corrected and saved."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.review.app import PAGE_ROWS, Review, create_app
from ray_jobs.review.captions import METADATA
from tests.serving.http_server import eventually, http_server
from tests.unit.test_caption_review import configured, read
from tests.unit.test_sources import lines, picture, write

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium on the PATH")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"file_name": f"{n:02d}.png", "text": f"<b>a {n}</b>"} for n in range(PAGE_ROWS + 2)]
    rows[3]["text"] = ""
    pictures: dict[str, bytes | str] = {str(row["file_name"]): picture(0) for row in rows}
    return write(tmp_path / "set", {METADATA: lines(rows), **pictures})


@pytest.fixture
def page(browser: Any, folder: Path) -> Iterator[Any]:
    with http_server(create_app(Review(configured(folder)))) as url:
        page, errors = browser.new_page(viewport={"width": 390, "height": 800}), list[str]()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda each: errors.append(each.text) if "Content Security" in each.text else None)
        page.goto(url)
        page.locator("textarea").first.wait_for()
        yield page
        page.close()
        assert not errors


def names(page: Any) -> list[str]:
    return [str(text).split(" ")[0] for text in page.locator("figure small:not(.told)").all_text_contents()]


def test_a_person_corrects_captions_with_the_keyboard(page: Any, folder: Path) -> None:
    assert page.locator("textarea").first.input_value() == "<b>a 0</b>"
    assert names(page) == [f"{n:02d}.png" for n in range(PAGE_ROWS)]
    assert page.locator("#place").text_content() == "page 1 of 2"
    eventually(lambda: page.evaluate("document.querySelector('img').naturalWidth") == 8)
    # Those below the window are not fetched.
    assert page.evaluate("[...document.images].filter(each => !each.complete).length") > 0
    assert page.evaluate("document.documentElement.scrollWidth") == 390

    page.locator("textarea").first.fill("a cat")
    page.keyboard.press("Enter")
    eventually(lambda: read(folder)[0] == ("00.png", "a cat"))
    eventually(lambda: page.evaluate("document.activeElement.ariaLabel") == "Caption of 01.png")
    page.keyboard.type("not this")
    page.keyboard.press("Escape")
    assert page.locator("textarea").nth(1).input_value() == "<b>a 1</b>"
    page.keyboard.press("Alt+ArrowRight")
    eventually(lambda: names(page) == ["48.png", "49.png"])
    page.reload()
    eventually(lambda: names(page) == ["48.png", "49.png"])
    page.locator("#show").select_option("empty")
    eventually(lambda: names(page) == ["03.png"])
    page.locator("textarea").fill("a bee")
    page.locator("#find").focus()  # leaving a caption saves it
    eventually(lambda: read(folder)[3] == ("03.png", "a bee"))
    page.locator("#show").select_option("edited")
    eventually(lambda: names(page) == ["00.png", "03.png"])
    page.locator("#find").fill("CAT")
    eventually(lambda: names(page) == ["00.png"])


def test_words_that_cannot_be_saved_stay_on_the_page_and_the_reason_is_told(page: Any, folder: Path) -> None:
    (folder / METADATA).write_text((folder / METADATA).read_text().replace("a 2", "two"))
    first = page.locator("figure").first
    first.locator("textarea").fill("a cat")
    page.keyboard.press("Enter")
    eventually(lambda: "was changed meanwhile; reload" in str(first.locator(".told").text_content()))
    assert first.locator("textarea").input_value() == "a cat"
    assert "failed" in str(first.get_attribute("class"))
    questions = list[str]()

    def stay(dialog: Any) -> None:
        questions.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", stay)
    page.locator("#next").click()
    eventually(lambda: page.evaluate("document.querySelector('textarea').value") == "a cat" and questions)
    assert names(page)[0] == "00.png" and "not saved would be lost" in questions[0]
    first.locator("textarea").fill("<b>a 0</b>")  # nothing is unsaved when the page closes
