"""The page in a real browser, against the real application with a real engine on a tiny model."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from ray_jobs.config import Config
from ray_jobs.registry.digests import weights_digest
from ray_jobs.registry.models import RegisteredModel
from serving.feedback.database import open_database
from serving.feedback.store import FeedbackStore
from serving.http.api_keys import add_key
from tests.serving.conftest import save_adapters, wait_until
from tests.serving.page_server import page_server

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium on the PATH")
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1200, "height": 900}

# What a person sees of a drawing, in order: the number of each unfinished picture, and "done".
WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const image = document.querySelector(".picture img");
    const now = image && !image.hidden && (image.dataset.partial ?? "done");
    if (now && window.seen.at(-1) !== now) window.seen.push(now);
  }).observe(document.body, {subtree: true, childList: true, attributes: true});
}"""

# Contrast of each visible text with what lies behind it, by WCAG 2.2's formula.
FAINT = """() => {
  const parts = colour => {
    const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number);
    return {rgb: [r, g, b], a};
  };
  const luminance = rgb => {
    const [r, g, b] = rgb.map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let each = element; each; each = each.parentElement) {
      const {rgb, a} = parts(getComputedStyle(each).backgroundColor);
      if (a === 1) return rgb;
    }
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const written = [...element.childNodes].some(each => each.nodeType === 3 && each.data.trim());
    if (!(written || element.matches("input, select, textarea")) || !element.checkVisibility()) continue;
    const [a, b] = [parts(getComputedStyle(element).color).rgb, behind(element)].map(luminance);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push([element.outerHTML.slice(0, 80), ratio]);
  }
  return found;
}"""

UNNAMED = """() => [...document.querySelectorAll(
  "input, select, textarea, button, a, progress, dialog, section")].filter(each => {
    const labels = [...(each.labels ?? [])].map(label => label.textContent);
    const by = (each.getAttribute("aria-labelledby") ?? "").split(" ").filter(Boolean);
    const named = by.map(id => document.getElementById(id).textContent);
    const written = each.matches("button, a") ? each.textContent : "";
    return ![...labels, ...named, each.getAttribute("aria-label") ?? "", written].join("").trim();
  }).map(each => each.outerHTML)"""

TOO_WIDE = """() => [...document.querySelectorAll("body *")]
  .filter(each => each.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
  .map(each => each.outerHTML.slice(0, 80))"""


# The bytes of the oldest entry's PNG.
FIRST_PNG = """async () => {
  const {entries} = await import("/web/history.js");
  return [...new Uint8Array(await (await entries())[0].pictures[0].blob.arrayBuffer())];
}"""


@pytest.fixture(scope="module")
def versions(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[RegisteredModel]:
    """Champion and candidate."""
    folders = [
        str(save_adapters(tiny_model, tmp_path_factory.mktemp("web") / "lora", seed)) for seed in (1, 2)
    ]
    return [
        RegisteredModel("served", number, each, weights_digest(each), str(tiny_model), None, "lora", {})
        for number, each in enumerate(folders, 1)
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeedbackStore]:
    file = tmp_path_factory.mktemp("feedback") / "feedback.db"
    store = FeedbackStore(open_database(f"sqlite:///{file}"))
    yield store
    store.close()


def settings_of(config: Config, **changes: Any) -> Config:
    # So many replicas leave each one thread of the machine's.
    settings: dict[str, Any] = {"max_queued_requests": 64, "requests_per_minute": 1000, "replicas": 64}
    settings |= {"keys": None, "allow_anonymous": True, **changes}
    return config.model_copy(update={"serve": config.serve.model_copy(update=settings)})


@pytest.fixture(scope="module")
def url(config: Config, versions: list[RegisteredModel], store: FeedbackStore) -> Iterator[str]:
    with page_server(settings_of(config), versions[0], versions[1], store) as address:
        yield address


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser while the block runs."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


def until(page: Any, expression: str) -> None:
    """Playwright's own `wait_for_function` needs eval, which the page's policy forbids."""
    wait_until(lambda: page.evaluate(expression), timeout_s=15)


@contextmanager
def opened(browser: Any, url: str, **settings: Any) -> Iterator[Any]:
    """The page in a browser that was never here before; fails if the page reports an error of its own."""
    context = browser.new_context(**{"viewport": DESK, **settings})
    context.set_default_timeout(15_000)
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda each: errors.append(each.text) if "Content Security" in each.text else None)
    page.goto(url)
    until(page, "document.getElementById('model').options.length > 1 || key.checkVisibility()")
    try:
        yield page
    finally:
        context.close()
    assert not errors


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    with opened(browser, url, permissions=["clipboard-read", "clipboard-write"]) as page:
        yield page


def draw(page: Any, prompt: str = "a red apple", **fields: Any) -> None:
    """Fill the form, draw, and wait for the end."""
    page.fill("#prompt", prompt)
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.click("#draw")
    page.wait_for_selector("#cancel", state="hidden")
    page.wait_for_selector(".entry:first-child .picture.done")


def copied(page: Any) -> str:
    until(page, "document.getElementById('status').textContent.startsWith('Copied')")
    return str(page.evaluate("navigator.clipboard.readText()"))


def test_a_picture_appears_progressively(page: Any) -> None:
    page.evaluate(WATCH)
    draw(page, steps=60)
    seen = page.evaluate("window.seen")
    assert seen[-1] == "done" and len(seen) > 1 and seen[:-1] == sorted(seen[:-1])
    assert page.inner_text("#status") == "Done."
    assert page.evaluate("document.querySelector('.picture img').naturalWidth") == 64


def test_several_pictures_have_seeds_in_a_row(page: Any) -> None:
    draw(page, n=3, seed=5)
    until(page, "document.querySelectorAll('.picture.done').length === 3")
    seeds = page.eval_on_selector_all(".meta", "all => all.map(each => each.textContent)")
    assert [re.search(r"seed (\d+)", each)[1] for each in seeds] == ["5", "6", "7"]  # type: ignore[index]


def test_the_page_works_by_keyboard_alone(page: Any) -> None:
    def tab_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"Tab does not reach {selector}")

    tab_to("#prompt")
    page.keyboard.type("a blue circle")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".picture.done")
    tab_to(".up")
    page.keyboard.press("Enter")
    page.wait_for_selector(".up[aria-pressed=true]")
    tab_to(".delete")
    page.keyboard.press("Enter")
    page.wait_for_selector("#empty")
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_a_drawing_can_be_cancelled_and_tried_again(page: Any) -> None:
    page.fill("#prompt", "a long one")
    page.fill("#steps", "100")
    page.fill("#n", "8")
    page.click("#draw")
    page.wait_for_selector("[data-partial]")
    page.click("#cancel")
    page.wait_for_selector("#cancel", state="hidden")
    assert page.inner_text("#status") == "Cancelled."
    failed = page.locator(".failed").count()
    assert failed > 0
    page.locator(".again:visible").first.click()
    until(page, f"document.querySelectorAll('.failed').length === {failed - 1}")
    page.wait_for_selector(".picture.done")


def test_a_comparison_is_blind_until_the_vote_and_the_vote_is_stored(page: Any, store: FeedbackStore) -> None:
    page.check("#compare")
    assert [page.input_value(each) for each in ("#model", "#rival")] == [
        "served:champion",
        "served:candidate",
    ]
    draw(page, "a green square", seed=9)
    page.wait_for_selector(".question")
    assert "served" not in page.inner_text("#entries")
    page.click(".picture:nth-child(2) .prefer")
    page.wait_for_selector(".winner")
    metas = page.eval_on_selector_all(".meta", "all => all.map(each => each.textContent)")
    assert {each.split(" · ")[0] for each in metas} == {"served@1", "served@2"}
    assert all("seed 9" in each for each in metas)
    (vote,) = store.votes()
    won, lost = (store.generations([each])[0] for each in (vote.winner_id, vote.loser_id))
    assert [f"served@{each.version}" for each in (lost, won)] == [each.split(" · ")[0] for each in metas]


def test_a_rating_is_stored_and_can_be_taken_back(page: Any, store: FeedbackStore) -> None:
    before = len(store.ratings())
    draw(page)
    for button, rating in ((".up", 1), (".down", -1), (".down", 0)):
        page.click(button)
        pressed = "false" if rating == 0 else "true"
        page.wait_for_selector(f"{button}[aria-pressed={pressed}]")
        assert rating in {each.rating for each in store.ratings()}
    assert len(store.ratings()) == before + 1


def test_the_history_outlives_the_page_and_can_be_deleted(page: Any) -> None:
    draw(page, "kept")
    page.click(".up")
    page.wait_for_selector(".up[aria-pressed=true]")
    page.reload()
    page.wait_for_selector(".up[aria-pressed=true]")
    assert page.inner_text(".prompt") == "kept"
    page.click("#clear")
    page.click("#clear-dialog [value=delete]")
    page.wait_for_selector("#empty")
    page.reload()
    page.wait_for_selector("#empty")


def test_the_history_is_bounded(page: Any) -> None:
    page.evaluate("""async () => {
      const {keep} = await import("/web/history.js");
      for (let i = 0; i < 70; i++) await keep({request: {prompt: String(i)}, pictures: [], winner: null});
    }""")
    page.reload()
    page.wait_for_selector(".entry")
    assert page.locator(".prompt").all_inner_texts() == [str(i) for i in range(69, 9, -1)]


def test_the_copied_curl_draws_the_same_picture(page: Any, tmp_path: Path) -> None:
    draw(page, 'it\'s a "red" $HOME `apple` \\n é', seed=4, negative_prompt="blue")
    page.click(".curl")
    subprocess.run(["bash", "-ec", copied(page)], cwd=tmp_path, check=True, timeout=60)
    shown = bytes(page.evaluate(FIRST_PNG))
    drawn = [Image.open(file).tobytes() for file in (BytesIO(shown), tmp_path / "picture.png")]
    assert len(drawn[0]) == 64 * 64 * 3 and drawn[0] == drawn[1]


def test_drawing_begins_with_a_picture_that_is_chosen(page: Any, store: FeedbackStore) -> None:
    assert not page.is_visible("#strength") and page.get_attribute("#image", "multiple") is None
    file = BytesIO()
    Image.new("RGB", (80, 60), "red").save(file, "PNG")
    page.set_input_files("#image", {"name": "red.png", "mimeType": "image/png", "buffer": file.getvalue()})
    assert page.get_attribute("#strength", "placeholder") == "0.8"
    draw(page, strength=0.3, steps=10)
    (sent,) = store.generations(
        [
            page.evaluate("""async () => {
      const {entries} = await import("/web/history.js");
      return (await entries())[0].pictures[0].image_id;
    }""")
        ]
    )
    assert sent.strength == 0.3
    page.click("#without")
    assert not page.is_visible("#strength")
    page.reload()
    page.click(".reuse")
    assert page.input_value("#strength") == "0.3" and page.is_visible("#chosen img")
    page.set_input_files("#image", {"name": "text.png", "mimeType": "image/png", "buffer": b"a text"})
    page.click("#draw")
    page.wait_for_selector("#image[aria-invalid=true]")
    assert page.inner_text("#image-error").startswith("Not a picture in one of PNG")


def test_the_copied_python_runs(page: Any, tmp_path: Path) -> None:
    draw(page, 'a "quoted" apple', guidance_scale=2.5)
    page.click(".python")
    subprocess.run([sys.executable, "-c", copied(page)], cwd=tmp_path, check=True, timeout=60)
    assert Image.open(tmp_path / "picture.png").size == (64, 64)


def test_without_a_clipboard_the_text_is_shown(browser: Any, url: str) -> None:
    with opened(browser, url) as page:
        page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
        draw(page)
        page.click(".curl")
        assert page.input_value("#text").startswith("curl ")


def test_a_wrong_size_is_told_at_its_field(page: Any) -> None:
    page.fill("#prompt", "a red apple")
    page.fill("#size", "63x63")
    page.click("#draw")
    page.wait_for_selector("#size[aria-invalid=true]")
    assert page.inner_text("#size-error") == page.inner_text("#status") != ""
    assert page.evaluate("document.activeElement.id") == "size"
    assert page.locator(".entry").count() == 0
    draw(page, size="64x128")
    assert page.locator("[aria-invalid]").count() == 0
    assert "64\u2009×\u2009128" in page.inner_text(".meta")


def test_an_empty_prompt_asks_for_one(page: Any) -> None:
    page.click("#draw")
    assert page.inner_text("#prompt-error") == "Describe what to draw."


def test_a_server_that_is_gone_is_told_in_plain_words(page: Any) -> None:
    page.context.set_offline(True)
    page.fill("#prompt", "a red apple")
    page.click("#draw")
    page.wait_for_selector(".failed")
    assert page.inner_text(".message").startswith("The server cannot be reached.")


def test_a_key_is_asked_for_and_what_waited_for_it_is_drawn(
    browser: Any, config: Config, versions: list[RegisteredModel], store: FeedbackStore, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    token = add_key(file, "test", frozenset({"generate", "feedback"}))
    settings = settings_of(config, keys=str(file), allow_anonymous=False)
    with page_server(settings, versions[0], versions[1], store) as url, opened(browser, url) as page:
        page.fill("#prompt", "a red apple")
        page.click("#draw")
        page.wait_for_selector(".failed")
        for wrong in ("wrong", "\N{CYRILLIC SMALL LETTER A}"):
            page.fill("#key", wrong)
            page.keyboard.press("Enter")
            until(page, "document.getElementById('key-reason').textContent.includes('unknown')")
        page.fill("#key", token)
        page.keyboard.press("Enter")
        page.wait_for_selector(".picture.done")
        page.click(".up")
        page.wait_for_selector(".up[aria-pressed=true]")
        kept = page.evaluate("JSON.stringify([localStorage, document.cookie, location.href])")
        assert token not in kept and token in page.evaluate("JSON.stringify(sessionStorage)")


def test_a_limit_is_waited_for_with_a_countdown(
    browser: Any, config: Config, versions: list[RegisteredModel], store: FeedbackStore
) -> None:
    settings = settings_of(config, requests_per_minute=20)
    with page_server(settings, versions[0], versions[1], store) as url, opened(browser, url) as page:
        page.fill("#prompt", "a red apple")
        page.fill("#n", "2")
        # On a busy machine the limit recovers meanwhile.
        while httpx.post(f"{url}/v1/images/generations", json={"prompt": ""}).status_code != 429:
            pass
        page.click("#draw")
        until(page, "/Next try in [1-6] s/.test(document.getElementById('entries').textContent)")
        until(page, "document.querySelectorAll('.picture.done').length === 2")


@pytest.mark.parametrize("viewport", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_names_are_told_and_its_texts_can_be_read(
    browser: Any, url: str, viewport: dict[str, int], scheme: str
) -> None:
    with opened(browser, url, viewport=viewport, color_scheme=scheme) as page:
        page.evaluate("settings.open = true")
        draw(page, "a very-long-word-" * 12)
        page.check("#compare")
        draw(page)
        page.wait_for_selector(".question")
        page.fill("#size", "63x63")
        page.click("#draw")
        page.wait_for_selector("#size[aria-invalid=true]")
        assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
        assert page.evaluate(TOO_WIDE) == []
        assert page.evaluate(UNNAMED) == []
        assert page.evaluate(FAINT) == []


def test_the_colours_follow_dark_mode(page: Any) -> None:
    def brightness() -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)))

    page.emulate_media(color_scheme="light")
    light = brightness()
    page.emulate_media(color_scheme="dark")
    assert brightness() < light / 4


def test_nothing_moves_where_less_motion_is_wanted(browser: Any, url: str) -> None:
    with opened(browser, url, reduced_motion="reduce") as page:
        draw(page)
        still = "getComputedStyle(document.querySelector('.frame')).animationName"
        page.evaluate("document.querySelector('.picture').className = 'picture busy'")
        assert page.evaluate(still) == "none"
        page.emulate_media(reduced_motion="no-preference")
        assert page.evaluate(still) == "breathe"


def test_the_page_is_small_cached_and_takes_nothing_from_elsewhere(url: str) -> None:
    answer = httpx.get(url)
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    files = re.findall(r'(?:href|src)="(web/[^"]+)"', answer.text)
    loaded = [answer] + [httpx.get(f"{url}/{each}") for each in files]
    assert all(each.status_code == 200 for each in loaded)
    assert sum(len(each.content) for each in loaded) < 64_000
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//|\son\w+=|style=", answer.text)
    tagged = {"If-None-Match": answer.headers["etag"]}
    assert httpx.get(url, headers=tagged).status_code == 304


def test_below_the_page_unknown_paths_answer_as_the_api_does(url: str) -> None:
    assert httpx.get(f"{url}/v1/images/generations").status_code == 405
    missing = httpx.get(f"{url}/web/nothing.js")
    assert missing.status_code == 404 and "error" in missing.json()
