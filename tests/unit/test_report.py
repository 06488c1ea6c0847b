"""The report: what it says, that it is self-contained, and that nothing a user wrote becomes markup."""

import math
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image

from ray_jobs.report import (
    COLUMNS,
    SHEET_PICTURE,
    PictureRow,
    Strip,
    closed_share,
    grid_image,
    headline,
    write_report,
)

WINNER: dict[str, Any] = {
    "trial_id": "a_00001",
    "learning_rate": 3e-4,
    "step": 400,
    "validation_fid": 99.5,
    "test_fid": 110.0,
    "base_validation_fid": 214.6,
    "base_test_fid": 210.0,
    "test_floor_fid": 70.0,
    "feature_network": "inception-2015-12-05@sha256:7ff4a85c3a63",
    "num_samples": 96,
    "registry_version": 3,
}
MANIFEST: dict[str, Any] = {
    "train": 1420,
    "validation": 90,
    "test": 91,
    "class": 0,
    "rejected": {"truncated": 2},
    "source": [{"name": "pictures", "rows": 1601, "share": 1.0}],
    "measures": {},
    "duplicates": {"groups": 0, "pictures": 0, "mode": "drop"},
    "buckets": {},
    "folds": [],
    "held_out": True,
    "captions": {"different": 1601},
    "digest": "9f" * 32,
}


def rung(trial: int, rate: float, step: int, fid: float | None) -> dict[str, Any]:
    return {
        "trial_id": f"a_{trial:05d}",
        "learning_rate": rate,
        "step": step,
        "fid": fid,
        "train_loss": 0.125,
        "images_per_second": 31.5,
        "checkpoint": "checkpoints/x",
    }


RESULTS = [
    rung(0, 1e-4, 100, 180.0),
    rung(1, 3e-4, 100, 150.0),
    rung(1, 3e-4, 400, 99.5),
    rung(2, 1e-2, 100, None),
]


def picture_row(caption: str = "a red apple") -> PictureRow:
    return PictureRow(caption, *(Image.new("RGB", (64, 64), color) for color in ("red", "green", "blue")))


def report(**changes: Any) -> str:
    values: dict[str, Any] = {
        "winner": WINNER,
        "results": RESULTS,
        "manifest": MANIFEST,
        "config_yaml": "name: demo\nlearning_rates: [1.0e-4]\n",
        "rows": [picture_row()],
        "run_name": "demo",
    }
    return write_report(**{**values, **changes})


class Page(HTMLParser):
    """Collects tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_headline_names_the_winner_and_the_share_closed() -> None:
    # (210 - 110) / (210 - 70)
    assert closed_share(WINNER) == pytest.approx(100 / 140)
    sentence = "A learning rate of 0.0003 for 400 steps closed 71% of the distance"
    assert headline(WINNER).startswith(sentence)
    assert sentence in Page(report()).text


def test_a_worse_winner_is_called_worse() -> None:
    assert "further from real pictures" in headline({**WINNER, "test_fid": 250.0})


@pytest.mark.parametrize("base", [70.0, 60.0, math.nan])
def test_without_a_distance_to_close_there_is_no_share(base: float) -> None:
    winner = {**WINNER, "base_test_fid": base}
    assert closed_share(winner) is None
    assert "no distance" in headline(winner)
    assert "nan%" not in report(winner=winner)


def test_the_page_shows_every_score_with_its_network_and_sample_count() -> None:
    text = Page(report()).text
    assert WINNER["feature_network"] in text
    for part in ("210.0", "110.0", "70.0", "214.6", "99.5", "96 pictures", "version 3"):
        assert part in text


def test_the_page_shows_the_dataset_and_the_configuration() -> None:
    text = Page(report()).text
    for part in ("1,420", "truncated", "9f9f9f9f9f9f9f9f", "learning_rates: [1.0e-4]"):
        assert part in text


def test_the_plot_has_a_line_a_learning_rate_and_marks_the_stopped() -> None:
    text = Page(report()).text
    for label in ("0.0001 (stopped)", "0.0003", "0.01 (stopped)", "base model"):
        assert label in text
    assert "0.0003 (stopped)" not in text


def test_the_page_fetches_nothing() -> None:
    page = Page(report())
    assert not [tag for tag, _ in page.tags if tag in {"script", "link", "iframe", "object"}]
    sources = [attrs["src"] or "" for _, attrs in page.tags if "src" in attrs]
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    links = [v or "" for _, attrs in page.tags for k, v in attrs.items() if k in {"href", "xlink:href"}]
    assert all(link.startswith("#") for link in links)


def test_captions_configuration_and_names_are_text_never_markup() -> None:
    evil = '<script>alert("x")</script> "&\' $headline'
    page = Page(
        report(
            rows=[picture_row(evil)],
            config_yaml=evil,
            run_name=evil,
            manifest={**MANIFEST, "rejected": {evil: 1}},
        )
    )
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.text.count(evil) == 5  # title, run, caption, reason, configuration
    alternatives = [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
    assert alternatives == [f"{evil}: {name}" for name in COLUMNS]


def strip(*steps: str, winner: str, captions: tuple[str, ...] = ("a red apple", "a pear")) -> Strip:
    """A picture of another colour for each caption and step."""
    colours = iter(range(10, 250, 20))
    columns = [
        (step, [Image.new("RGB", (64, 64), (next(colours), 0, 0)) for _ in captions])
        for step in ("base", *steps)
    ]
    return Strip(captions, columns, winner)


def test_the_strip_shows_each_caption_at_the_base_and_every_rung_with_the_winner_marked() -> None:
    page = Page(report(strip=strip("80", "1,600", winner="80")))
    pictures = [attrs for tag, attrs in page.tags if tag == "img" and "real" not in (attrs["alt"] or "")]
    shown = [attrs["alt"] for attrs in pictures if (attrs["alt"] or "").split(": ")[1] not in COLUMNS[1:]]
    assert shown == ["a red apple: ★ 80", "a red apple: 1,600", "a pear: ★ 80", "a pear: 1,600"]
    assert "a pear: base" in [attrs["alt"] for attrs in pictures]
    assert len({attrs["src"] for attrs in pictures if "a red apple: " in (attrs["alt"] or "")}) == 5
    marked = [tag for tag, attrs in page.tags if attrs.get("class") == "winner"]
    assert marked == ["th", "td", "td"]


def test_without_samples_of_the_rungs_there_is_no_strip() -> None:
    assert "How it learned" in report(strip=strip("80", winner="80"))
    assert "How it learned" not in report()


def test_captions_of_the_strip_are_text_never_markup() -> None:
    evil = '"><script>alert(1)</script>'
    page = Page(report(strip=strip("80", winner="80", captions=(evil,))))
    assert "script" not in [tag for tag, _ in page.tags]
    assert evil in page.text


def test_the_same_run_gives_the_same_page() -> None:
    assert report() == report()


def test_the_sheet_shows_real_base_and_fine_tuned_of_each_caption() -> None:
    sheet = grid_image([picture_row(f"caption {i}") for i in range(4)])
    colors = dict((color, count) for count, color in sheet.getcolors(maxcolors=1 << 16) or [])
    for color in ((255, 0, 0), (0, 128, 0), (0, 0, 255)):
        assert colors[color] == 4 * SHEET_PICTURE**2


def test_a_sheet_without_captions_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one caption"):
        grid_image([])
