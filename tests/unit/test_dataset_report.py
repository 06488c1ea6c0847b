"""The page of a data set: what it counts, shows and explains, and that nothing a user wrote is markup."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ray_jobs.config import CleaningConfig
from ray_jobs.data.curation.cleaning import QUALITY_CHECKS as JUDGED
from ray_jobs.report.dataset_page import (
    REASONS,
    THUMBNAIL,
    Example,
    data_uri,
    dataset_section,
    histogram,
    write_dataset_page,
)
from ray_jobs.run.manifest import Histogram, Manifest

SHARPNESS: dict[str, Any] = {
    "edges": [1.0, 10.0, 100.0, 1000.0],
    "counts": [12, 400, 300],
    "threshold": 10.0,
    "side": "below",
    "field": "data.cleaning.min_sharpness",
    "set_aside": 12,
}
DARK: dict[str, Any] = {
    "edges": [0.0, 0.5, 1.0],
    "counts": [700, 5],
    "threshold": 0.75,
    "side": "above",
    "field": "data.cleaning.max_dark",
    "set_aside": 5,
}
MANIFEST: dict[str, Any] = {
    "train": 1420,
    "validation": 90,
    "test": 91,
    "class": 0,
    "rejected": {"too_dark": 5, "blurred": 12},
    "left_out": {},
    "no_pictures": {},
    "source": [{"name": "examples/fluent-emoji", "rows": 1601, "share": 1.0}],
    "measures": {"sharpness": SHARPNESS, "dark": DARK},
    "duplicates": {"groups": 3, "pictures": 7, "mode": "drop"},
    "buckets": {"64x64": {"rows": 1601, "steps": 200, "rows_over": 1}},
    "folds": [],
    "held_out": True,
    "captions": {"different": 1599, "repaired": 0, "of_lines": 0},
    "digest": "9f" * 32,
}


def example(**changes: Any) -> Example:
    values: dict[str, Any] = {
        "reason": "blurred",
        "name": "fog.png",
        "caption": "a harbour in fog",
        "detail": "sharpness 3.1 is below data.cleaning.min_sharpness 10",
        "picture": Image.new("RGB", (300, 200), "grey"),
        "twin": None,
    }
    return Example(**{**values, **changes})


def page_of(*examples: Example, **changes: Any) -> str:
    values: dict[str, Any] = {
        "source": "examples/fluent-emoji",
        "manifest": MANIFEST,
        "examples": examples,
        "seen": 1625,
        "max_rejected": 0.2,
    }
    values |= changes
    return write_dataset_page(**values | {"manifest": Manifest.model_validate(values["manifest"])})


class Page(HTMLParser):
    """Collects tags with their attributes, and the text, a space between elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def section_html(**changes: Any) -> str:
    return dataset_section(Manifest.model_validate(MANIFEST | changes))


def drawn(name: str, values: dict[str, Any]) -> str:
    return histogram(name, Histogram.model_validate(values))


def section(**changes: Any) -> str:
    """The text of the section for a manifest with these changes."""
    return Page(section_html(**changes)).text


def bars(svg: str) -> list[tuple[str, float, float]]:
    """(class, left, right) of every bar of a histogram."""
    rects = [attrs for tag, attrs in Page(svg).tags if tag == "rect"]
    return [
        (str(attrs["class"]), float(attrs["x"] or 0), float(attrs["x"] or 0) + float(attrs["width"] or 0))
        for attrs in rects
    ]


def test_the_section_counts_pictures_by_split_and_reason() -> None:
    text = section()
    for part in ("train 1,420", "validation 90", "test 91", "blurred 12", "too_dark 5"):
        assert part in text
    assert "1,599 different captions." in text
    assert "Duplicates: 3 groups, the first picture of each is kept; 7 pictures rejected." in text


def test_pictures_of_prior_preservation_are_counted_where_there_are_any() -> None:
    assert "class 200" in section(**{"class": 200})
    assert "class" not in section()


def test_a_clean_set_is_called_clean() -> None:
    assert "No picture is rejected." in section(rejected={})
    clean = {**MANIFEST, "rejected": {}}
    assert "No picture would be rejected." in Page(page_of(manifest=clean)).text


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        ("keep", "each kept within one split; 7 pictures rejected"),
        ("ignore", "data.cleaning.duplicates is ignore"),
    ],
)
def test_the_section_says_how_near_duplicates_were_treated(mode: str, sentence: str) -> None:
    assert sentence in section(duplicates={**MANIFEST["duplicates"], "mode": mode})


def test_several_sources_are_shown_with_their_shares_and_one_is_not() -> None:
    two = [{"name": "cats", "rows": 1000, "share": 0.625}, {"name": "dogs", "rows": 601, "share": 0.375}]
    text = section(source=two)
    assert "cats 1,000 62.5%" in text
    assert "dogs 601 37.5%" in text
    assert "share of an epoch" not in section()


def test_several_buckets_are_shown_with_what_they_carry_over_and_one_is_not() -> None:
    wide = {"rows": 43, "steps": 5, "rows_over": 3}
    assert "80x48 43 5 3" in section(buckets={**MANIFEST["buckets"], "80x48": wide})
    assert "80x48" not in section()
    assert "carried over" not in section()


def test_folds_are_shown_with_their_sizes() -> None:
    assert "3 folds of training and validation pictures: 504, 503, 503." in section(folds=[504, 503, 503])
    assert "folds" not in section()


def test_a_set_too_small_to_hold_pictures_out_is_told_what_its_scores_mean() -> None:
    assert "scores compare with the training pictures" in section(held_out=False)
    assert "too few pictures" not in section()


def test_every_measure_of_the_data_stage_can_be_shown() -> None:
    text = section(measures=dict.fromkeys(JUDGED, DARK))
    assert all(name.capitalize() in text for name in JUDGED)


def test_each_measure_shows_its_threshold_its_field_and_what_it_set_aside() -> None:
    text = section()
    assert "12 pictures rejected: below data.cleaning.min_sharpness (10)." in text
    assert "5 pictures rejected: above data.cleaning.max_dark (0.75)." in text
    assert len(re.findall('class="threshold"', section_html())) == 2


def test_a_threshold_that_is_off_is_said_to_be_off() -> None:
    off = {**SHARPNESS, "threshold": None, "set_aside": 0}
    html = section_html(measures={"sharpness": off})
    assert "Off, because data.cleaning.min_sharpness is empty" in html
    assert 'class="threshold"' not in html
    assert {kind for kind, _, _ in bars(html)} == {"kept"}


def test_bars_below_the_threshold_are_tinted() -> None:
    assert [kind for kind, _, _ in bars(drawn("sharpness", SHARPNESS))] == ["beyond", "kept", "kept"]


def test_a_bar_that_the_threshold_divides_is_tinted_beyond_it_only() -> None:
    # Two bins of 120 units each; 0.75 lies in the middle of the second.
    assert [(kind, left) for kind, left, _ in bars(drawn("dark", DARK))] == [
        ("kept", 0.0),
        ("kept", 120.0),
        ("beyond", 180.0),
    ]


@pytest.mark.parametrize(("threshold", "kinds"), [(0.5, {"kept"}), (5000.0, {"beyond"})])
def test_a_threshold_outside_the_histogram_is_drawn_at_its_end(threshold: float, kinds: set[str]) -> None:
    svg = drawn("sharpness", {**SHARPNESS, "threshold": threshold})
    assert {kind for kind, _, _ in bars(svg)} == kinds
    (line,) = [attrs for _, attrs in Page(svg).tags if attrs.get("class") == "threshold"]
    assert float(line["x1"] or -1) == (0.0 if kinds == {"kept"} else 240.0)


def test_a_single_picture_among_a_million_has_a_bar_and_none_has_not() -> None:
    svg = drawn("sharpness", {**SHARPNESS, "counts": [1, 1_000_000, 0]})
    heights = [float(attrs["height"] or 0) for tag, attrs in Page(svg).tags if tag == "rect"]
    assert len(heights) == 2
    assert min(heights) >= 1


def test_the_headline_says_how_many_would_be_kept_and_set_aside() -> None:
    text = Page(page_of()).text
    assert "Of 1,625 pictures, 1,601 would be kept and 24 rejected." in text
    # 17 of 1625: duplicates are no fault of the set.
    assert "Without duplicates, 1.0% of the pictures are rejected, within" in text


def test_more_set_aside_than_the_limit_is_said_to_stop_the_job() -> None:
    text = Page(page_of(max_rejected=0.01)).text
    assert "The job would stop." in text
    assert "1.0% of the pictures are rejected, more than data.cleaning.max_rejected, 1%" in text


def test_exactly_the_limit_set_aside_does_not_stop_the_job() -> None:
    assert "would stop" not in Page(page_of(seen=170, max_rejected=0.1)).text


def test_every_reason_that_can_occur_has_a_sentence_on_the_page() -> None:
    text = Page(page_of(manifest={**MANIFEST, "rejected": dict.fromkeys(REASONS, 1)})).text
    for reason, sentence in REASONS.items():
        assert sentence.endswith(".")
        assert ": " in sentence, "meaning: remedy"
        assert f"{reason}: 0 of 1" in text
        assert text.count(sentence) == 2  # in the table and over the group


def test_every_reason_that_the_data_stage_gives_has_a_sentence() -> None:
    folder = Path(__file__).parents[2] / "ray_jobs" / "data"
    source = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    given = set(re.findall(r'Rejected\(\s*"(\w+)"', source)) | {measure.reason for measure in JUDGED.values()}
    assert len(given) > 10
    assert given <= set(REASONS)


def test_sentences_name_fields_that_exist() -> None:
    named = {field for sentence in REASONS.values() for field in re.findall(r"cleaning\.(\w+)", sentence)}
    assert len(named) > 5
    assert named <= set(CleaningConfig.model_fields)


def test_the_sheet_shows_each_example_with_its_words_and_how_many_there_are() -> None:
    page = Page(page_of(example(), example(name="haze.png", caption="haze", detail="")))
    for part in ("fog.png", "a harbour in fog", "sharpness 3.1 is below", "haze.png", "blurred: 2 of 12"):
        assert part in page.text
    assert [attrs["alt"] for tag, attrs in page.tags if tag == "img"] == ["fog.png", "haze.png"]


def test_a_duplicate_is_shown_beside_the_picture_that_is_kept() -> None:
    kept = Image.new("RGB", (64, 64), "red")
    twins = example(reason="near_duplicate", name="copy.jpg", twin=kept, twin_name="first.png")
    page = Page(page_of(twins))
    assert [attrs["alt"] for tag, attrs in page.tags if tag == "img"] == ["copy.jpg", "first.png"]
    assert "kept: first.png" in page.text
    assert "near_duplicate: 1 of the 7 duplicates" in page.text


def test_a_picture_that_cannot_be_read_has_an_empty_tile() -> None:
    page = Page(page_of(example(picture=None)))
    assert "no picture" in page.text
    assert not [tag for tag, _ in page.tags if tag == "img"]


def test_thumbnails_are_small_and_keep_their_shape() -> None:
    data = base64.b64decode(data_uri(Image.new("RGBA", (1000, 500)), THUMBNAIL).partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (128, 64)


def test_the_page_fetches_nothing() -> None:
    page = Page(
        page_of(example(), example(reason="near_duplicate", twin=Image.new("L", (9, 9)), twin_name="a"))
    )
    assert not [tag for tag, _ in page.tags if tag in {"script", "link", "iframe", "object"}]
    sources = [attrs["src"] or "" for _, attrs in page.tags if "src" in attrs]
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not [attrs for _, attrs in page.tags if {"href", "xlink:href"} & set(attrs)]
    assert "url(" not in page.text
    assert "@import" not in page.text


def test_names_captions_details_and_reasons_are_text_never_markup() -> None:
    evil = '<script>alert("x")</script> "&\' $headline'
    picture = Image.new("RGB", (8, 8))
    hostile = Example(evil, evil, evil, evil, picture, picture, evil)
    manifest = {
        **MANIFEST,
        "rejected": {evil: 1},
        "source": [{"name": evil, "rows": 1, "share": 0.5}] * 2,
        "buckets": {evil: {"rows": 1, "steps": 0, "rows_over": 1}, "64x64": MANIFEST["buckets"]["64x64"]},
        "measures": {"dark": {**DARK, "field": evil}},
    }
    page = Page(page_of(hostile, manifest=manifest, source=evil))
    assert "script" not in [tag for tag, _ in page.tags]
    # Twice each the source, the sources and the reason's group; the table, a bucket, a field; a tile's four.
    assert page.text.count(evil) == 13
    assert [attrs["alt"] for tag, attrs in page.tags if tag == "img"] == [evil, evil]


def test_groups_come_in_the_order_of_the_reasons() -> None:
    text = Page(page_of(example(reason="near_duplicate"))).text
    groups = ("blurred: 0 of 12", "too_dark: 0 of 5", "near_duplicate: 1 of")
    assert [text.index(group) for group in groups] == sorted(map(text.index, groups))


def test_the_same_data_set_gives_the_same_page() -> None:
    assert page_of(example()) == page_of(example())


SPREAD = {"edges": [0.0, 64.0, 192.0, 256.0], "counts": [0, 700, 901]}
COMPOSITION: dict[str, Any] = {
    "pictures": 1601,
    "words": {"cat": 900, "<b>dog</b>": 600},
    "repeated": {"a cat": 12},
    "num_repeated": 12,
    "enlarged": 160,
    "spreads": {"side": SPREAD, "brightness": SPREAD},
    "column": "breed",
    "num_classes": 3,
    "classes": {"tabby": {"pictures": 1400, "spreads": {"brightness": SPREAD}}, "": {"pictures": 190}},
    "scarce": {"siam": 11, "": 190},
    "num_scarce": 2,
}


def test_the_section_tells_words_repeated_captions_and_what_is_rare() -> None:
    text = section(composition=COMPOSITION)
    for part in (
        "cat (900), <b>dog</b> (600).",
        "12 pictures (1%) have a caption that others have too.",
        "a cat 12",
        "160 pictures (10%) have a shorter side below data.resolution, and are enlarged.",
        "Dark pictures are rare: 0 of 1,601 have a mean luma below 64.",
        "of an equal share of the pictures: siam (11), (empty) (190). Add pictures.",
        "tabby 1,400 87.4%",
        "1 more values are not shown.",
        "tabby: brightness",
    ):
        assert part in text, part
    assert "Bright pictures are rare" not in text
    assert section_html(composition=COMPOSITION).count("<svg") == 2 + 3


def test_a_dataset_of_an_earlier_release_and_one_without_classes_say_nothing_of_them() -> None:
    assert "Most frequent words" not in section()
    plain = COMPOSITION | {"column": "", "repeated": {}, "num_repeated": 0, "enlarged": 0}
    text = section(composition=plain)
    assert "No two pictures have the same caption." in text
    assert "breed" not in text and "enlarged" not in text
