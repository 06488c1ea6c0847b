"""The report in a real browser: it fits a phone and a wide window, and its charts have their marks."""

import json
import shutil
import subprocess
from html import escape, unescape
from typing import Any

import pytest

from ray_jobs.report import Spent, TrialCost
from tests.unit.test_report import (
    measured,
    memorisation,
    picture_row,
    png,
    strip,
    subject,
    with_measures,
)

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium on the PATH")
WIDTHS = (360, 1200)
MARKS = {
    "#fid .curve .point": 3,
    "#fid .star": 1,
    "#fid .stopped": 1,
    "#fid .error": 4,
    "#fid line.level": 1,
    "#heat-map .cell": 4,
    "#heat-map .frame": 1,
    "#kid .curve .point": 3,
    "#fid-2 .curve .point": 3,
    "#loss-0 .mark line": 1,
    ".tile.pair img": 6,
    ".pairs td:nth-child(3)": 7,
}

# Each frame has the page at one width, of the same origin, so that the script outside can measure it. What
# lies in a box that scrolls by itself may be wider than the page.
MEASURE = """
window.onload = () => {
  const seen = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement, found = {};
    for (const mark of %s)
      found[mark] = [...page.querySelectorAll(mark)].filter(each => {
        const box = each.getBoundingClientRect();
        return box.width + box.height > 0 && box.left >= 0 && box.right <= root.clientWidth;
      }).length;
    const texts = [...page.querySelectorAll(".chart text")].filter(each => {
      const box = each.getBoundingClientRect(), chart = each.closest(".chart").getBoundingClientRect();
      return box.width && (box.left < chart.left - 1 || box.right > chart.right + 1);
    });
    const scroller = ".wide:not(:has(.scores, .pairs)), pre";  // a table of scores must not need to scroll
    const wide = [...page.querySelectorAll("body *")].filter(each =>
      !each.closest(scroller) && each.getBoundingClientRect().right > root.clientWidth + 1);
    return {
      width: root.clientWidth, scrolls: root.scrollWidth, marks: found,
      wide: wide.map(each => each.outerHTML.slice(0, 90)), texts: texts.map(each => each.textContent),
    };
  });
  document.body.innerHTML = "<pre id=seen></pre>";
  document.getElementById("seen").textContent = JSON.stringify(seen);
};
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What the browser made of the page, a dict a width."""
    page = measured(
        winner={
            **with_measures(),
            "test_kid": 0.0061,
            "test_kid_error": 0.0004,
            "test_fid_2": 31.2,
            "base_test_fid_2": 60.0,
        },
        rows=[picture_row("a very long caption " * 12)],
        strip=strip("100", "200", "400", winner="400"),
        memorisation=memorisation(pairs=[(png("red"), png("blue"), 0.01)] * 3),
        subjects=[subject()],
        spent=Spent([TrialCost("a", 100, 80, 60.0, 0.5, saved_steps=300)], price=2.0),
    ).replace("<details>", "<details open>")
    frames = "".join(
        f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{escape(page)}"></iframe>'
        for width in WIDTHS
    )
    folder = tmp_path_factory.mktemp("browser")
    file = folder / "frames.html"
    file.write_text(f"<!doctype html><body>{frames}<script>{MEASURE % json.dumps(list(MARKS))}</script>")
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}/profile",
    ]
    command += [
        "--window-size=1400,1000",
        "--hide-scrollbars",
        "--virtual-time-budget=10000",
        "--dump-dom",
        file.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    _, found, rest = done.stdout.partition('<pre id="seen">')
    assert found, done.stderr[-2000:]
    measurements = json.loads(unescape(rest[: rest.index("</pre>")]))
    return {each["width"]: each for each in measurements}


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window(seen: dict[int, dict[str, Any]], width: int) -> None:
    assert seen[width]["wide"] == []
    assert seen[width]["scrolls"] == width


@pytest.mark.parametrize("width", WIDTHS)
def test_the_charts_have_their_marks_within_the_window(seen: dict[int, dict[str, Any]], width: int) -> None:
    assert seen[width]["marks"] == MARKS


@pytest.mark.parametrize("width", WIDTHS)
def test_the_words_of_a_chart_lie_within_it(seen: dict[int, dict[str, Any]], width: int) -> None:
    assert seen[width]["texts"] == []
