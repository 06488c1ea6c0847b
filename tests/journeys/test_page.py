"""`diffray ui` in a real browser, from a folder of pictures to a picture of the deployed model."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from diffray.jobs import RECORDS, Job
from tests.serving.http_server import eventually

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
SETTINGS = """data.resolution=64
data.validation=0.2
data.test=0.2
train.batch_size=4
train.num_workers=1
train.lora.target_modules=[to_q, to_v]
search.learning_rates=[1e-3]
search.pack=off
evaluate.inference_steps=2
evaluate.num_actors=1
publish.model_name=tiny"""
LONG = 300_000  # timeout of a stage, in milliseconds


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture_folder: Path) -> Iterator[Path]:
    """The folder of the user, with pictures; what was started from it is stopped."""
    (tmp_path / ".cache").symlink_to(ROOT / ".cache")
    shutil.copytree(picture_folder, tmp_path / "shapes")
    monkeypatch.setenv("DIFFRAY_HOME", str(tmp_path))
    yield tmp_path
    for record in (tmp_path / RECORDS).rglob("job.json"):
        Job(str(record.parent.relative_to(tmp_path / RECORDS))).stop()


@contextmanager
def ui() -> Iterator[str]:
    """The address of the page, served by its command."""
    command = [sys.executable, "-m", "diffray", "ui", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, text=True) as served:
        assert served.stdout
        try:
            found = re.match(r"page: (http://\S+) ", served.stdout.readline())
            assert found
            yield found[1]
        finally:
            served.terminate()


@contextmanager
def opened(url: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, errors = browser.new_page(viewport={"width": 390, "height": 800}), list[str]()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        yield page
        browser.close()
        assert not errors


def fill(page: Any, base: Path, name: str, epochs: str) -> None:
    page.locator("#recipe").select_option("demo")
    page.locator("#data").fill("shapes")
    page.locator("#base").fill(str(base))
    page.locator("#epochs").fill(epochs)
    page.locator("#name").fill(name)
    page.locator("#more").evaluate("each => each.open = true")
    page.locator("#hour_price").fill("2")
    page.locator("#settings").fill(SETTINGS)


@pytest.mark.ray
@pytest.mark.journeys
@pytest.mark.skipif(not CHROMIUM, reason="needs chromium on the PATH")
def test_a_person_trains_deploys_and_draws_on_the_page(tiny_model: Path, home: Path) -> None:
    with ui() as url, opened(f"{url}/#/new") as page:
        fill(page, tiny_model, "first", "0.25")
        page.locator("#preview").click()
        page.get_by_text("These pictures can be used.").wait_for(timeout=LONG)
        kept = page.frame_locator("#preview-result iframe").locator("h1")
        kept.wait_for()
        assert "Of 41 pictures" in kept.text_content() and "1 rejected" in kept.text_content()
        page.locator("#plan").click()
        page.get_by_text("It fits.").wait_for(timeout=LONG)
        assert "memory per worker" in page.locator(".essence").text_content()
        page.locator("#start").click()
        page.locator("#run-state.running").wait_for(timeout=LONG)
        page.goto(f"{url}/#/new")
        fill(page, tiny_model, "second", "200")  # runs until it is stopped
        page.locator("#start").click()
        page.locator("#run-state.waiting").wait_for()
    with ui() as url, opened(url) as page:  # neither the page nor its command is needed by a run
        page.get_by_role("link", name="first").click()
        page.locator("#run-state.finished").wait_for(timeout=LONG)
        assert page.locator("#charts .point").count() > 1
        page.locator("#strip th.winner").wait_for()
        assert "cost 0.0" in page.locator("#run-facts").text_content()
        page.locator("#version:not(:empty)").wait_for(timeout=LONG)
        if page.locator("#promote").is_visible():  # a random model may draw as badly as its base
            page.locator("#promote").click()
        page.get_by_text("It is the champion").wait_for(timeout=LONG)
        page.locator("#deploy").click()
        page.locator("#try").wait_for(timeout=LONG)
        page.locator("#prompt").fill("a red circle")
        page.locator("#draw").click()
        drawn = page.locator("#drawn img")
        drawn.wait_for(timeout=LONG)
        eventually(lambda: drawn.evaluate("each => each.naturalWidth") == 64)
        page.locator("#undeploy").click()
        page.locator("#deploy").wait_for()
        with page.expect_popup() as report:
            page.locator("#report").click()
        assert "first" in report.value.title()

        page.goto(f"{url}/#/runs/second")
        page.locator("#run-state.running").wait_for(timeout=LONG)
        page.locator("#stop").click()
        page.locator("#run-state.stopped").wait_for(timeout=LONG)
        page.locator("#delete").click()
        page.locator("#delete-dialog button.primary").click()
        page.locator("#list-view").wait_for()
        page.locator("#runs a").first.wait_for()
        assert page.locator("#runs a").all_text_contents() == ["first"]
        assert not (home / "runs" / "second").exists()
