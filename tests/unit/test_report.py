"""The report: what it says, that it is self-contained, and that nothing a user wrote becomes markup."""

import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from statistics import fmean
from typing import Any

import pytest
from PIL import Image

from ray_jobs.report import (
    Memorisation,
    PictureRow,
    Spent,
    Strip,
    SubjectPictures,
    TrialCost,
    closed_share,
    grid_image,
    headline,
    write_report,
)
from ray_jobs.report.charts import rise_of
from ray_jobs.report.pictures import COLUMNS, SHEET_PICTURE
from ray_jobs.report.svg import ticks
from ray_jobs.report.verdict import front, notes
from ray_jobs.run.manifest import Manifest
from ray_jobs.run.records import OWN, RECITED, Measurement, RungRow, SubjectScores, Winner

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
    "left_out": {},
    "no_pictures": {},
    "source": [{"name": "pictures", "rows": 1601, "share": 1.0}],
    "measures": {},
    "duplicates": {"groups": 0, "pictures": 0, "mode": "drop"},
    "buckets": {},
    "folds": [],
    "held_out": True,
    "captions": {"different": 1601, "repaired": 0, "of_lines": 0},
    "digest": "9f" * 32,
}


def rung(trial: int, rate: float, step: int, fid: float) -> RungRow:
    values = {
        "trial_id": f"a_{trial:05d}",
        "learning_rate": rate,
        "step": step,
        "fid": fid,
        "train_loss": 0.125,
        "images_per_second": 31.5,
        "checkpoint": "checkpoints/x",
    }
    return RungRow.model_validate(values)


RESULTS = [
    rung(0, 1e-4, 100, 180.0),
    rung(1, 3e-4, 100, 150.0),
    rung(1, 3e-4, 400, 99.5),
    rung(2, 1e-2, 100, math.nan),
]


def won(**changes: Any) -> Winner:
    return Winner.model_validate(WINNER | changes)


def picture_row(caption: str = "a red apple") -> PictureRow:
    real, base, winner = (Image.new("RGB", (64, 64), color) for color in ("red", "green", "blue"))
    return PictureRow(caption, real, base, winner)


def report(**changes: Any) -> str:
    values: dict[str, Any] = {
        "winner": WINNER,
        "results": RESULTS,
        "manifest": MANIFEST,
        "config_yaml": "name: demo\nlearning_rates: [1.0e-4]\n",
        "rows": [picture_row()],
        "run_name": "demo",
        "enough_samples": 2049,
    }
    values |= changes
    values["winner"] = Winner.model_validate(values["winner"])
    values["manifest"] = Manifest.model_validate(values["manifest"])
    return write_report(**values)


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
    assert closed_share(won()) == pytest.approx(100 / 140)
    sentence = "A learning rate of 0.0003 for 400 steps closed 71% of the distance"
    assert headline(won()).startswith(sentence)
    assert sentence in Page(report()).text


CORRECTED_SCORES = {
    "ranked_by": "corrected_fid",
    "validation_corrected_fid": 12.0,
    "base_test_corrected_fid": 40.0,
    "test_corrected_fid": 10.0,
    "base_test_spread": 0.9,
    "test_spread": 0.7,
}


def test_the_share_closed_is_of_the_corrected_fid_where_there_is_one() -> None:
    winner = won(**CORRECTED_SCORES)
    assert closed_share(winner) == pytest.approx(30 / 40)
    text = Page(report(winner=winner)).text
    assert "by the corrected FID, of which real pictures have 0" in text
    assert "Corrected FID, test: base" in text and "Spread, test: winner" in text
    assert "The corrected FID, which ranks here, does not have this bias" in text


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({}, False),  # the corrected FID fell
        ({"test_corrected_fid": 41.0}, True),
        ({"test_corrected_fid": 41.0, "test_spread": 0.89}, False),
        ({"test_corrected_fid": 41.0, "base_test_kid": 0.02, "test_kid": 0.01}, False),
        ({"test_corrected_fid": 41.0, "test_fid": 250.0}, False),
    ],
)
def test_less_variety_without_a_gain_that_is_sure_is_an_alarm(changes: Any, warned: bool) -> None:
    found = Page(report(winner=won(**CORRECTED_SCORES | changes))).text
    assert ("variety was lost, and perhaps nothing gained" in found) is warned


def test_the_grid_says_whose_captions_it_shows() -> None:
    assert "Captions of the validation split" in Page(report()).text
    assert "Captions of the test split" in Page(report(split="test")).text


def test_a_worse_winner_is_called_worse() -> None:
    assert "further from real pictures" in headline(won(test_fid=250.0))


@pytest.mark.parametrize("base", [70.0, 60.0, math.nan, 73.0])
def test_without_a_distance_to_close_there_is_no_share(base: float) -> None:
    winner = won(base_test_fid=base, base_test_fid_error=4.0)
    assert closed_share(winner) is None
    assert "already as near to real pictures" in headline(winner)
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


def measured(**changes: Any) -> str:
    """A page with all that a search may measure."""
    results = [
        rung(trial, rate, step, fid)
        | {"fid_error": 2.0, "kid": fid / 2e4, "kid_error": 1e-4}
        | {"fid_2": other, "feature_network_2": "second@sha256:00", "validation_loss": loss}
        for trial, rate, step, fid, other, loss in (
            (0, 1e-4, 100, 180.0, 60.0, 0.20),
            (1, 3e-4, 100, 150.0, 55.0, 0.18),
            (1, 3e-4, 200, 101.5, 40.0, 0.15),
            (1, 3e-4, 400, 99.5, 45.0, 0.17),
        )
    ]
    return report(**{"results": results, **changes})


def test_the_guidance_scales_that_were_tried_are_a_table() -> None:
    assert "Guidance scales" not in report()
    winning = {"trial_id": WINNER["trial_id"], "step": WINNER["step"]}
    row = next(row for row in RESULTS if row | winning == row)
    tried = [
        row | {"guidance_scale": scale, "fid": fid, "fid_error": 1.5, "kid": 0.0123}
        for scale, fid in ((1.5, 77.7), (3.0, 88.8))
    ]
    page = report(guidance=tried, winner=WINNER | {"guidance_scale": 1.5})
    section = page[page.index("Guidance scales") :].partition("</table>")[0]
    assert "1.5 ★" in section and "3 ★" not in section
    assert "77.7 ± 1.5" in section and "88.8 ± 1.5" in section and "0.0123" in section


def test_points_have_their_error_and_the_last_of_a_stopped_trial_a_cross() -> None:
    html = measured()
    assert "0.0003, 400 steps: 99.5 ± 2.0" in html
    drawing = html[html.index('id="fid"') : html.index('id="heat-map"')]
    counts = {kind: drawing.count(f'class="{kind}"') for kind in ("curve", "error", "star", "stopped")}
    assert counts == {"curve": 2, "error": 4, "star": 1, "stopped": 1}


def test_the_map_has_a_cell_a_learning_rate_and_step_and_frames_the_winner() -> None:
    html = measured()
    drawing = html[html.index('id="heat-map"') : html.index('id="kid"')]
    counts = {kind: drawing.count(f'class="{kind}"') for kind in ("cell", "empty", "frame")}
    assert counts == {"cell": 4, "empty": 2, "frame": 1}
    opacity = {
        title: float(value)
        for value, title in re.findall(r'fill-opacity="([\d.]+)"[^>]*><title>([^<]+)', drawing)
    }
    assert min(opacity, key=lambda name: opacity[name]) == "0.0001, 100 steps: 180.0"
    assert max(opacity, key=lambda name: opacity[name]) == "0.0003, 400 steps: 99.5"


@pytest.mark.parametrize(
    ("losses", "step"),
    [([0.20, 0.15, 0.17], 200), ([0.20, 0.15, 0.10], None), ([0.1, 0.2, 0.3], 100), ([], None)],
)
def test_over_fitting_starts_at_the_lowest_validation_loss_that_higher_ones_follow(
    losses: list[float], step: int | None
) -> None:
    rungs = [
        rung(1, 3e-4, at, 100.0) | {"validation_loss": loss}
        for at, loss in zip((100, 200, 400), losses, strict=False)
    ]
    rise = rise_of(rungs)
    assert (rise.step if rise else None) == step
    assert rise is None or (rise.error is None and not rise.is_clear), "of means alone nothing is sure"


@pytest.mark.parametrize(
    ("last", "clear"),
    [([0.12, 0.23, 0.34], True), ([0.30, 0.10, 0.32], False)],
    ids=["each row a little higher", "one row much higher"],
)
def test_a_rise_is_clear_where_the_rows_agree(last: list[float], clear: bool) -> None:
    rungs = [
        rung(1, 3e-4, step, 100.0) | {"validation_loss": fmean(losses), "validation_losses": losses}
        for step, losses in ((100, [0.1, 0.2, 0.3]), (200, last))
    ]
    rise = rise_of(rungs)
    assert rise and rise.step == 100 and rise.is_clear is clear
    assert rise.by == pytest.approx(0.03 if clear else 0.04)
    # Of the differences 0.02, 0.03, 0.04, and 0.2, -0.1, 0.02: their deviation over the root of 3.
    assert rise.error == pytest.approx(0.01 / 3**0.5 if clear else 0.0871780)
    assert ("rises from there" in str(rise)) is clear


def test_the_start_of_over_fitting_is_marked_and_told() -> None:
    html = measured()
    assert html.count("lowest validation loss") == 1
    assert "Validation loss is lowest at 200 steps and higher at the last rung, possibly by chance" in html


def test_the_page_says_when_the_feature_networks_disagree_about_the_winner() -> None:
    assert (
        "The feature networks disagree about the winner: inception-2015-12-05 chooses 0.0003 at 400 steps,"
        " second chooses 0.0003 at 200 steps." in Page(measured()).text
    )
    agreeing = [
        row | {"fid_2": other, "feature_network_2": "second@sha256:00"}
        for row, other in ((rung(0, 1e-4, 100, 180.0), 60.0), (rung(1, 3e-4, 400, 99.5), 40.0))
    ]
    assert "inception-2015-12-05 and second, choose the same winner" in Page(report(results=agreeing)).text


def test_second_scores_of_different_networks_are_never_compared() -> None:
    mixed = [rung(0, 1e-4, 100, 180.0) | {"fid_2": 1.0, "feature_network_2": name} for name in ("a", "b")]
    with pytest.raises(ValueError, match="feature_network_2: a, b: .* cannot be compared"):
        report(results=mixed)


def test_few_samples_are_called_out_and_enough_are_not() -> None:
    assert "96 pictures per score is fewer than 2,049" in Page(report()).text
    assert "may be noise" not in Page(report(enough_samples=96)).text


def test_a_winner_of_fewer_steps_than_the_lowest_score_is_explained() -> None:
    tied = rung(1, 3e-4, 400, 99.5) | {"behind": 0.61, "behind_error": 0.9}
    text = Page(report(results=[*RESULTS[:2], tied, rung(1, 3e-4, 800, 98.9)])).text
    assert "The lowest FID is that of 0.0003 at 800 steps. On the same noise it is 0.6 ± 0.9 below" in text
    assert "ranked by: within the error of the lowest of all rungs, with fewer steps" in text
    assert "On the same noise it is" not in Page(report()).text
    assert "ranked by: the lowest of all rungs" in Page(report()).text


def test_a_test_split_that_was_read_twice_is_told() -> None:
    again = Page(report(winner={**WINNER, "test_reads": 2})).text
    assert "was used 2 times" in again and "measured once" not in again
    assert "measured once" in Page(report(winner={**WINNER, "test_reads": 1})).text


REMEMBERED = {
    "run": "first",
    "measure": "fid",
    "before": 12.0,
    "before_error": 1.0,
    "after": 15.0,
    "after_error": 1.5,
    "change": 3.0,
    "change_error": 0.5,
    "num_samples": 90,
    "feature_network": "inception@sha256:ab",
}


def test_what_training_began_from_is_told() -> None:
    begun = Page(report(winner=WINNER | {"begins_from": {"base": "emoji@2", "adapter": "first@1"}})).text
    assert "The base model is emoji@2 of the registry. Training went on from the adapter first@1" in begun
    assert "Training went on" not in Page(report()).text


@pytest.mark.parametrize(
    ("changes", "told", "alarms"),
    [
        ({}, "In pairs of pictures it is 3.0 ± 0.5 worse: something was forgotten.", True),
        ({"change": -3.0}, "In pairs of pictures it is 3.0 ± 0.5 better: nothing was forgotten.", False),
        ({"change_error": 4.0}, "In pairs of pictures they differ by 3.0 ± 4.0, within the error.", False),
        ({"change": None, "change_error": None}, "without errors, nothing says whether they differ.", False),
    ],
)
def test_what_was_forgotten_is_told_where_it_is_more_than_its_error(
    changes: dict[str, Any], told: str, alarms: bool
) -> None:
    winner = won(remembered=[REMEMBERED | changes])
    [note] = [note for note in notes(winner, RESULTS, 10) if "pictures of first" in note.text]
    assert note.text.startswith(
        "The pictures of first: FID 12.0 ± 1.0 before, 15.0 ± 1.5 after this training"
    )
    assert note.text.endswith(told) and note.alert == alarms
    assert note.text in Page(report(winner=winner.fields())).text


def test_what_is_left_of_an_adapter_is_told_beside_the_base_that_never_had_it() -> None:
    winner = won(remembered=[REMEMBERED | {"base": 30.0, "base_error": 2.0}])
    told = [note.text for note in notes(winner, RESULTS, 10) if "pictures of first" in note.text]
    assert "15.0 ± 1.5 after this training; 30.0 ± 2.0 for the base without either. In" in told[0]


def test_the_scores_have_their_errors_and_kid_beside_fid() -> None:
    winner = {**WINNER, "test_fid_error": 1.4, "test_kid": 0.0061, "test_kid_error": 0.0004}
    text = Page(report(winner=winner)).text
    assert "110.0 ± 1.4" in text and "0.0061 ± 0.0004" in text


def test_costs_add_up_and_tell_what_each_stopped_trial_saved() -> None:
    trials = [TrialCost("a", 100, 80, 60.0, 0.5, saved_steps=300), TrialCost("b", 400, 400, 3700.0, 2.0)]
    html = report(spent=Spent(trials, price=2.0, other_steps=7))
    assert "500 steps computed, 480 up to the last scored rungs" in html
    assert "7 more steps computed by trainings without a scored rung" in html
    assert "Stopping trials early saved 300, which is 38%" in html
    section = html[html.index("<h2>Costs</h2>") : html.index("<h2>Data</h2>")]
    cells = re.findall("<td>([^<]*)</td>", section)
    assert [cells[start : start + 8] for start in (0, 8, 16)] == [
        ["a", "100", "80", "0:01:00", "0.50", "1.00", "300", "1.50"],  # 300 steps at half an hour a hundred
        ["b", "400", "400", "1:01:40", "2.00", "4.00", "0", "0.00"],
        ["all", "500", "480", "1:02:40", "2.50", "5.00", "300", "1.50"],
    ]
    assert "saved" not in Page(report()).text


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(file, format="PNG")
    return file.getvalue()


def memorisation(**changes: Any) -> Memorisation:
    pairs = [(png("red"), png("blue"), 0.7), (png("red"), png("red"), 0.01), (png("red"), png("pink"), 0.4)]
    values: dict[str, Any] = {
        "pairs": pairs,
        "num_samples": 96,
        "share": 1 / 96,
        "of_training": 1420,
        "recited": {},
        "recited_by_base": {},
        "threshold": 0.3,
        "expected_share": 0.01,
        "extrapolated": False,
        "sensitivity": 0.97,
        "num_training": 1000,
        "num_held_out": 120,
        "num_unseen": 120,
        "feature_network": WINNER["feature_network"],
    }
    return Memorisation(**{**values, **changes})


def recited(copies: float, own: float | None) -> dict[str, Measurement]:
    """Of 32 pictures for captions of training pictures."""
    shared = {"num_samples": 32, "feature_network": NETWORK, "num_training": 1000}
    found = [{"metric": RECITED, "value": copies, "standard_error": 0.04, "expected_share": 0.01}]
    if own is not None:
        found.append({"metric": OWN, "value": own, "standard_error": 0.08, "expected_share": 0.001})
    return {str(each["metric"]): Measurement.model_validate(each | shared) for each in found}


def memorisation_of(html: str) -> str:
    return html[html.index("<h2>Memorisation") :]


def test_samples_stand_beside_their_nearest_training_pictures_the_nearest_first() -> None:
    page = Page(report(memorisation=memorisation()))
    shown = [attrs["alt"] for tag, attrs in page.tags if tag == "img" and "sample," in (attrs["alt"] or "")]
    assert shown == ["sample, nearness 0.01, a near copy", "sample, nearness 0.4", "sample, nearness 0.7"]


def test_the_share_of_near_copies_comes_with_how_near_is_chosen_and_what_was_looked_at() -> None:
    text = Page(report(memorisation=memorisation())).text
    assert "1 of 96 pictures of the winner (1.0%) are near copies" in text
    assert "than 99% of pictures that it never saw (up to 0.3)" in text
    assert "The limit comes from 120 held-out pictures. It finds 97% of" in text
    assert "go unseen" not in text and "too few" not in text
    assert "Compared: 1,000 of 1,420 training pictures" in text and WINNER["feature_network"] in text


def test_a_limit_from_few_pictures_says_what_it_assumes() -> None:
    few = memorisation(num_held_out=0, num_unseen=8, extrapolated=True, num_training=8)
    text = Page(report(memorisation=few)).text
    assert "The limit comes from 8 training pictures, each compared with the others." in text
    assert "too few to count 1% of them, so it is half of the nearness of the nearest." in text
    both = memorisation(num_held_out=50, num_unseen=400)
    assert "50 held-out pictures and 350 training pictures, each" in Page(report(memorisation=both)).text


def test_a_detector_that_misses_known_copies_says_so() -> None:
    text = Page(report(memorisation=memorisation(sensitivity=0.6))).text
    assert "It finds 60% of" in text and "Copies can therefore go unseen" in text


@pytest.mark.parametrize(("share", "alarms"), [(1 / 96, False), (2 / 96, False), (3 / 96, True)])
def test_more_near_copies_than_chance_makes_are_an_alarm(share: float, alarms: bool) -> None:
    # Of 96 pictures 0.96 are expected, give or take 0.97.
    section = memorisation_of(report(memorisation=memorisation(share=share)))
    assert section.startswith('<h2>Memorisation</h2><p class="note alert">') is alarms


@pytest.mark.parametrize(("copies", "alarms"), [(1 / 32, False), (2 / 32, True)])
def test_near_copies_for_captions_of_training_pictures_are_an_alarm_of_their_own(
    copies: float, alarms: bool
) -> None:
    found = memorisation(recited=recited(copies, 0.5), recited_by_base=recited(0.0, 0.125))
    html = report(memorisation=found)
    assert memorisation_of(html).count('<p class="note alert">') == alarms
    text = Page(html).text
    assert f"Of 32 more pictures, drawn for captions of training pictures, {32 * copies:.0f} are near" in text
    assert (
        "For 16 of them the nearest training picture is the caption's own: 50%, of the base model's 12%"
        in (text)
    )
    assert "by chance 0.1%" in text


def test_where_captions_do_not_differ_no_own_picture_is_told() -> None:
    found = memorisation(recited=recited(0.0, None), recited_by_base=recited(0.0, None))
    text = Page(report(memorisation=found)).text
    assert "Of 32 more pictures" in text and "own:" not in text


def test_without_a_limit_there_is_no_share_of_near_copies() -> None:
    unknown = memorisation(share=None, threshold=None, sensitivity=None, num_held_out=0, num_unseen=4)
    text = Page(report(memorisation=unknown)).text
    assert "4 pictures are too few to say what a near copy is" in text
    assert "are near copies" not in text and ", a near copy" not in text


NETWORK = "inception-2015-12-05@sha256:7ff4a85c3a63"


def record(metric: str, value: float, error: float | None = None, **more: Any) -> dict[str, Any]:
    shared = {"num_samples": 96, "feature_network": NETWORK}
    return {"metric": metric, "value": value, "standard_error": error, **shared, **more}


def with_measures() -> dict[str, Any]:
    base = [
        record("precision", 0.25, num_real=90),
        record("IS", 2.5, 0.25),
        record("near copies", 0.0, 0.012),
    ]
    tuned = [
        record("precision", 0.75, num_real=90),
        record("IS", 3.5, 0.5),
        record("near copies", 1 / 96, 0.017),
        record(OWN, 0.5, 0.08, expected_share=0.001),
    ]
    measures = {"base": base, "winner": tuned, "left_out": ["No CLIP scores: why."]}
    return {**WINNER, "measures": measures | {"floor": [record("precision", 0.625, num_real=90)]}}


def test_further_measures_stand_beside_the_bases_with_error_count_and_network() -> None:
    html = report(winner=with_measures())
    cells = re.findall("<td>([^<]*)</td>", html[html.index('<table class="pairs">') :])
    assert [cells[start : start + 4] for start in (0, 5, 10, 15)] == [
        ["Precision", "0.250", "0.750", "0.625"],
        ["Inception Score", "2.50 ± 0.25", "3.50 ± 0.50", "–"],
        ["Near copies", "0.0% ± 1.2%", "1.0% ± 1.7%", "–"],
        ["Own picture nearest", "–", "50.0% ± 8.0%", "–"],
    ]
    assert cells[4].endswith(f"96 pictures and 90 real, {NETWORK}")
    assert "No CLIP scores: why." in html


def subject(toward: float = 0.01) -> SubjectPictures:
    numbers = {
        "instance_prompt": "a photo of sks dog",
        "class_prompt": "a photo of a dog",
        "num_photos": 4,
        "base_similarity": record("image similarity", 0.5, 0.01),
        "winner_similarity": record("image similarity", 0.875, 0.01),
        "class_drift": record("class drift", 0.125, 0.02),
        "toward_subject": record("drift toward subject", toward, 0.02),
    }
    return SubjectPictures(
        SubjectScores.model_validate(numbers), {"photo": [png("red")] * 4, "class, base": [png("blue")] * 4}
    )


def test_a_subject_is_shown_with_its_likeness_and_the_drift_of_its_class() -> None:
    page = Page(report(subjects=[subject()]))
    for part in ("a photo of sks dog / a photo of a dog", "0.500 ± 0.010", "0.875 ± 0.010", "0.125 ± 0.020"):
        assert part in page.text
    assert [attrs["alt"] for tag, attrs in page.tags if tag == "img"][3:] == ["photo"] * 4 + [
        "class, base"
    ] * 4


def test_a_class_that_begins_to_look_like_the_subject_is_an_alarm() -> None:
    assert "is beginning to look like the subject" not in report(subjects=[subject(0.01)])
    assert "“a photo of a dog” is beginning to look like the subject: 0.030 ± 0.020." in report(
        subjects=[subject(0.03)]
    )


@pytest.mark.parametrize(
    ("shares", "from_step"),
    [([0.0, 0.01], None), ([0.0, 0.2], "400"), ([0.3, 0.2], "100")],
)
def test_learning_by_heart_is_shown_from_the_rung_where_it_exceeds_chance(
    shares: list[float], from_step: str | None
) -> None:
    climbed = [
        rung(1, 3e-4, step, 100.0)
        | {"near_copies": share, "near_copies_error": 0.04, "copies_by_chance": 0.01, "spread": 0.9}
        for step, share in zip((100, 400), shares, strict=True)
    ]
    text = Page(report(results=[*climbed, RESULTS[0]])).text
    assert "Near copies and variety at a learning rate of 0.0003" in text
    assert (f"From {from_step} steps on" in text) == (from_step is not None)
    assert ("No rung draws more near copies than chance would." in text) == (from_step is None)
    assert f"{shares[1]:.2f} ± 0.04" in text, "in the table of all rungs"


def test_rungs_that_are_better_in_one_score_each_are_named_together() -> None:
    gaps = [(180.0, 0.5), (150.0, 1.5), (99.5, 1.0), (math.nan, 0.1)]
    rows = [row | {"fid": fid, "preference": gap} for row, (fid, gap) in zip(RESULTS, gaps, strict=True)]
    assert front(rows, ("fid", "preference")) == [rows[0], rows[2]]
    assert front(rows[1:3], ("fid", "preference")) == [rows[2]]
    text = Page(report(results=rows)).text
    told = "0.0003 at 400 steps (99.5, 1.00); 0.0001 at 100 steps (180.0, 0.50)."
    assert f"By FID and preference gap together no rung is better than one of these: {told}" in text
    assert "What the reward model prefers, over training steps" in text
    assert "together no rung" not in Page(report(results=rows[1:3])).text


def test_a_part_without_data_is_left_out() -> None:
    text = Page(report()).text
    for part in (
        "KID",
        "Over-fitting",
        "Memorisation",
        "Costs",
        "Subjects",
        "Precision",
        "The same pictures",
        "validation loss",
    ):
        assert part not in text


def test_every_drawing_has_a_title_and_a_description() -> None:
    page = Page(measured())
    drawings = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    names = {attrs["id"] for tag, attrs in page.tags if tag in ("title", "desc") and "id" in attrs}
    labels = [(attrs["aria-labelledby"] or "").split() for attrs in drawings]
    assert len(labels) == 5 and all(len(pair) == 2 and names.issuperset(pair) for pair in labels)
    identifiers = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(identifiers)) == len(identifiers)


@pytest.mark.parametrize(("low", "high"), [(99.5, 214.6), (0.006, 0.0113), (-3.0, 4.0), (1e5, 9e5)])
def test_ticks_are_few_round_numbers_around_the_values(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low and high <= found[-1] and 4 <= len(found) <= 8
    apart = {f"{later - earlier:.0e}" for earlier, later in zip(found, found[1:], strict=False)}
    assert len(apart) == 1 and apart.pop()[0] in "125"


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


def test_the_strip_of_edits_begins_with_what_is_edited() -> None:
    before = Image.new("RGB", (64, 64), (0, 0, 255))
    rungs = replace(strip("80", winner="80"), references=[[before], [before]])
    page = Page(report(strip=rungs))
    alternatives = [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
    assert [each for each in alternatives if (each or "").startswith("a pear: ")][-3:] == [
        "a pear: before",
        "a pear: base",
        "a pear: ★ 80",
    ]


def test_without_samples_of_the_rungs_there_is_no_strip() -> None:
    assert "How it learned" in report(strip=strip("80", winner="80"))
    assert "How it learned" not in report()


def test_own_prompts_are_shown_over_the_steps_too() -> None:
    page = Page(report(prompts=strip("80", winner="80", captions=("it on a beach", "another class"))))
    shown = [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
    assert {"it on a beach: base", "it on a beach: ★ 80", "another class: base", "another class: ★ 80"} <= {
        *shown
    }
    assert "Your prompts" in page.text and "Your prompts" not in report()


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


def test_a_report_of_control_shows_the_control_image_and_both_parts_of_the_score() -> None:
    measured = {"control": 0.6, "control_error": 0.04, "disagreement": 0.3, "disagreement_error": 0.02}
    results = [row | measured if row.step == 400 else row for row in RESULTS]
    found = {
        "ranked_by": "control",
        "validation_control": 0.6,
        "base_validation_control": 0.9,
        "base_validation_disagreement": 0.8,
        "test_control": 0.62,
        "test_disagreement": 0.31,
        "test_disagreement_error": 0.02,
        "base_test_disagreement": 0.81,
    }
    rows = [replace(picture_row(), control=Image.new("RGB", (64, 64), "white"))]
    assert rows[0].columns == ("control image", "base", "fine-tuned", "real")
    assert [each.getpixel((0, 0)) for each in rows[0].pictures] == [
        (255, 255, 255),
        (0, 128, 0),
        (0, 0, 255),
        (255, 0, 0),
    ]
    picture = Image.new("RGB", (64, 64), "white")
    strip = Strip(["a"], [("base", [picture])], "400", controls=[picture])
    assert [name for name, _ in strip.all_columns] == ["control image", "base"]
    page = Page(report(winner=WINNER | found, results=results, rows=rows, strip=strip)).text
    assert "its disagreement with control images of the test split is 0.310 ± 0.020" in page
    assert "that of the base model 0.810" in page and "its FID is " in page
    for shown in ("control score", "disagreement", "0.300 ± 0.020", "Control score over training steps"):
        assert shown in page, shown
