"""Whatever ranks (`search.rank_by`), candidates are chosen, compared and told of by that score."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from cluster.storage import Storage
from ray_jobs.config import ConfigError, load_config
from ray_jobs.evaluation.actor import FEATURES
from ray_jobs.evaluation.cross_validation import averaged, choose_over_folds
from ray_jobs.evaluation.pool import EvaluatorPool
from ray_jobs.evaluation.scores import Features, Real, Scores, difference_by, scores_of
from ray_jobs.metrics.corrected import Correction
from ray_jobs.metrics.resampling import PairedDifference
from ray_jobs.publish import _outcome
from ray_jobs.publishing.final_scores import JUDGED, _of_base
from ray_jobs.run.records import (
    CONTROL,
    EARLIER_VOTES,
    FID,
    KID,
    MEASURES,
    MIND,
    PREFERENCE,
    SUBJECT,
    TARGET,
    VOTES,
    RungRow,
)
from ray_jobs.run.split import VALIDATION, Split
from ray_jobs.tuning.results import choose, with_error
from ray_jobs.weights.feature_networks import Networks
from tests.unit.test_affects import configured, search
from tests.unit.test_measures import Colours
from tests.unit.test_model_card import WINNER as PUBLISHED
from tests.unit.test_model_card import card
from tests.unit.test_report import RESULTS, Page, report, won

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
WIDTH, COUNT, RESAMPLES = 16, 48, 20
NETWORKS = Networks(Colours("small", "0" * 64, torch.device("cpu"), WIDTH))  # only its name and width count
NETWORK = NETWORKS.first.identity
# Scores of sets of pictures of any kind; rewards are in test_preference.py, targets in test_edits.py, votes
# in test_votes.py.
RANKING = sorted(set(MEASURES) - {SUBJECT, PREFERENCE, TARGET, CONTROL, VOTES, EARLIER_VOTES})


def features(count: int, seed: int, shift: float = 0.0) -> Features:
    drawn = np.random.default_rng(seed).normal(size=(count, WIDTH)) + shift
    return {NETWORK: drawn.astype(np.float32)}


@pytest.fixture(scope="module")
def real() -> Real:
    pictures, others = features(64, 1), torch.from_numpy(features(2 * COUNT, 2)[NETWORK])
    correction = Correction.of(torch.from_numpy(pictures[NETWORK]), others, COUNT, NETWORK)
    assert correction is not None
    return Real.of(pictures, correction)


def scores(generated: Features, real: Real) -> Scores:
    return scores_of(generated, real, NETWORKS, RESAMPLES)


class Comparing:
    """Compares rungs by their saved features, as an evaluator does."""

    def __init__(self, real: Real, resamples: int = RESAMPLES) -> None:
        self.real, self.measures, self.resamples = real, set[str](), resamples

    def difference(self, one: Storage, other: Storage, split: Split, measure: str) -> PairedDifference:
        self.measures.add(measure)
        first, second = (torch.from_numpy(load(each.read_bytes(FEATURES))[NETWORK]) for each in (one, other))
        return difference_by(measure, first, second, self.real, NETWORK, resamples=self.resamples)


def rung(folder: Storage, measure: str, step: int, shift: float, real: Real) -> RungRow:
    generated = features(COUNT, 3, shift)  # the same noise for all
    place = folder.child(str(step))
    place.write_bytes(FEATURES, save(generated))
    found = scores(generated, real)
    given = {"trial_id": "a", "step": step, "checkpoint": place.uri, "ranked_by": measure}
    return RungRow.model_validate(given | found.row() | found.origin)


@pytest.mark.parametrize("measure", RANKING)
def test_a_difference_is_that_of_the_two_scores_with_an_error_that_common_noise_makes_small(
    real: Real, measure: str
) -> None:
    pair = [features(COUNT, 3, shift) for shift in (0.5, 0.4)]
    values = [scores(each, real).row() for each in pair]
    one, other = (torch.from_numpy(each[NETWORK]) for each in pair)
    found = difference_by(measure, one, other, real, NETWORK, resamples=RESAMPLES)
    first, second = (row[measure] or 0.0 for row in values)
    assert found.value == pytest.approx(first - second, rel=1e-6) and found.value > 0
    assert found.standard_error < (values[0][f"{measure}_error"] or 0.0) and found.variance_ratio > 2


@pytest.mark.parametrize("measure", RANKING)
def test_the_lowest_by_the_measure_wins_unless_fewer_steps_are_within_the_error(
    real: Real, measure: str, tmp_path: Path
) -> None:
    folder, pool = Storage.open(str(tmp_path)), Comparing(real)
    candidates: Any = pool
    far, near = (rung(folder, measure, step, shift, real) for step, shift in ((80, 0.8), (160, 0.2)))
    best, rows = choose([far, near], candidates)
    assert best.step == 160 and pool.measures == {measure}
    assert rows[0].behind and rows[0].behind_error and rows[0].behind > rows[0].behind_error
    assert rows[0].behind == pytest.approx(far.score - near.score, rel=1e-6)
    equal = [rung(folder, measure, step, 0.2, real) for step in (40, 320)]
    assert choose([near, *equal], candidates)[0].step == 40


def test_another_measure_may_choose_another_rung_of_a_trial_and_of_folds() -> None:
    rows = [
        RungRow(trial_id="a", step=step, fid=fid, kid=kid, mind=mind)
        for step, fid, kid, mind in ((80, 9.0, 0.02, 30.0), (160, 8.0, 0.03, 20.0), (320, 7.0, 0.04, 40.0))
    ]
    no_pool: Any = None  # without errors only equal scores tie
    for measure, step in ((FID, 320), (KID, 80), (MIND, 160)):
        ranked = [row | {"ranked_by": measure} for row in rows]
        assert choose(ranked, no_pool)[0].step == step
        folds = [row | {"fold": fold, "training": f"a_fold-{fold}"} for row in ranked for fold in (0, 1)]
        means = averaged(folds, 2)
        assert choose_over_folds(means).step == step
        assert [row.folds for row in means] == [[row.score] * 2 for row in ranked]
    with pytest.raises(ValueError, match="ranked_by: scores of fid and mind do not compare"):
        choose([rows[0] | {"ranked_by": FID}, rows[1] | {"ranked_by": MIND}], no_pool)


class Drifting(Comparing):
    """Compares rungs with what training began from, whose features it keeps."""

    def __init__(self, real: Real, storage: Path, resamples: int) -> None:
        super().__init__(real, resamples)
        self.config = configured().model_copy(update={"storage": str(storage)})

    def score(self, weights: None, split: Split, rung: Storage) -> Scores:
        generated = features(COUNT, 3, 0.3)
        rung.write_bytes(FEATURES, save(generated))
        return scores_of(generated, self.real, NETWORKS, self.resamples)

    def difference(self, one: Storage, other: Storage, split: Split, measure: str = FID) -> PairedDifference:
        return super().difference(one, other, split, measure)


@pytest.mark.parametrize("resamples", [RESAMPLES, 0])
def test_votes_choose_among_rungs_that_draw_no_worse_than_the_beginning(
    real: Real, tmp_path: Path, resamples: int
) -> None:
    pool: Any = Drifting(real, tmp_path / "runs", resamples)
    folder = Storage.open(str(tmp_path))

    def voted(step: int, shift: float, votes: float) -> RungRow:
        row = rung(folder, FID, step, shift, real)
        row |= {"ranked_by": VOTES, "votes": votes, "votes_error": 0.05}
        return row if resamples else row | {"fid_error": None}

    drifted, near = voted(160, 0.8, 0.2), voted(80, 0.2, 0.4)
    assert choose([drifted, near], pool)[0].step == 80
    assert choose([drifted], pool)[0].step == 160, "none is better"
    # A candidate at another guidance scale is judged by what it drew at that.
    at_scale = near | {"step": 40, "votes": 0.3, "features": drifted.checkpoint, "fid": drifted.fid}
    assert choose([at_scale, near], pool)[0].step == 80


def test_a_split_without_the_score_is_ranked_by_fid() -> None:
    pool = object.__new__(EvaluatorPool)
    pool.config = configured()
    pool.captions, pool.corrected = {VALIDATION: ["a"] * 3}, {VALIDATION: False}
    found = {}
    for pool.rank_by in RANKING:
        found[pool.rank_by] = pool.ranked_by(VALIDATION)
    assert found == {"corrected_fid": FID, FID: FID, KID: FID, MIND: MIND}
    pool.captions, pool.corrected = {VALIDATION: ["a"] * 4}, {VALIDATION: True}
    for pool.rank_by in RANKING:
        assert pool.ranked_by(VALIDATION) == pool.rank_by
    folds = [Split.of_fold(fold) for fold in (0, 1)]
    pool.rank_by, pool.captions = KID, {folds[0]: ["a"] * 4, folds[1]: ["a"] * 3}
    pool.corrected = dict.fromkeys(folds, True)
    assert {pool.ranked_by(fold) for fold in folds} == {FID}, "all folds are ranked by one score"


def test_a_subject_run_compares_pictures_of_an_earlier_run_by_fid() -> None:
    pool = object.__new__(EvaluatorPool)
    pool.rank_by, earlier = SUBJECT, Split("validation", run="earlier")
    assert [pool.ranked_by(split) for split in (VALIDATION, earlier)] == [SUBJECT, FID]


def test_few_pictures_have_no_kid_and_no_error_of_mind(real: Real) -> None:
    found = scores(features(3, 3), Real.of(real.features)).row()
    assert "kid" not in found and found["mind"] is not None and found["mind_error"] is None
    assert scores_of(features(COUNT, 3), real, NETWORKS, 0).mind.standard_error is None
    assert set(found) <= set(RungRow.model_fields)


def test_scores_are_told_with_the_digits_that_they_need(real: Real) -> None:
    row = RungRow(trial_id="a", step=80, fid=136.84, kid=0.01532, kid_error=0.0021, mind=310.16)
    assert with_error(row) == "FID 136.8"
    assert with_error(row | {"ranked_by": KID}) == "KID 0.0153 ± 0.0021 (FID 136.8)"
    assert with_error(row | {"ranked_by": MIND}) == "MIND 310.2 (FID 136.8)"
    both = row | {"ranked_by": CONTROL, "control": 0.6, "control_error": 0.02, "disagreement": 0.31}
    told = "control score 0.600 ± 0.020 (FID 136.8, corrected 17.5; disagreement 0.310)"
    assert with_error(both | {"corrected_fid": 17.46}) == told
    told = scores(features(COUNT, 3), real).described()
    assert [part.split(" ")[-4] for part in told.split(", ")] == ["FID", "FID", "KID", "MIND"]


def test_the_configuration_takes_each_of_them_and_another_one_starts_a_search_over() -> None:
    plain = configured()
    digests = set()
    for measure in RANKING:
        config = load_config(DEMO, [f"search.rank_by={measure}"])
        assert config.search.rank_by == measure
        digests.add(search(configured(rank_by=measure)))
    assert len(digests) == len(RANKING) and search(plain) == search(configured(rank_by="corrected_fid"))
    with pytest.raises(ConfigError, match="rank_by"):
        load_config(DEMO, ["search.rank_by=recall"])


RANKED: dict[str, Any] = {
    f"{whose}{key}": value
    for whose in ("validation_", "test_", "base_test_")
    for key, value in {"kid": 0.01234, "kid_error": 0.0021, "mind": 321.04, "mind_error": 12.34}.items()
} | {"base_validation_kid": 0.0456, "base_validation_mind": 456.0, "base_test_kid": 0.0345}


@pytest.mark.parametrize(
    ("measure", "name", "value", "tooltip"),
    [(KID, "KID", "0.0123 ± 0.0021", "0.0180"), (MIND, "MIND", "321.0 ± 12.3", "180.0")],
)
def test_the_report_and_the_card_tell_of_the_score_that_ranked(
    measure: str, name: str, value: str, tooltip: str
) -> None:
    scale = 1e-4 if measure == KID else 1.0
    results = [row | {"ranked_by": measure, measure: row.fid * scale} for row in RESULTS]
    results[1] |= {"behind": 3 * scale, "behind_error": 4 * scale}
    winner = won(**RANKED, ranked_by=measure, step=100)
    html = report(winner=winner, results=results)
    text = Page(html).text
    assert f"{name}, validation: winner" in text and value in text
    assert f"{name}, which ranks here" in text
    assert f"Validation {name} by learning rate and steps" in text
    assert f"0.0001, 100 steps: {tooltip}" in html[html.index('id="heat-map"') :]
    apart = "0.0003 ± 0.0004" if measure == KID else "3.0 ± 4.0"
    assert f"The lowest {name} is that of" in text and f"it is {apart} below the winner's" in text
    chart = html[html.index(f'id="{measure}"') :].partition("</figure>")[0]
    assert "base model" in chart
    published = card(winner=PUBLISHED | RANKED | {"ranked_by": measure})
    assert f"selected the model by its validation {name} ({value})" in published
    assert f"| {name} | {value} |" in published
    assert "validation FID, which" in card()


def test_publish_says_the_score_that_ranked_and_keeps_it_for_base_and_winner(real: Real) -> None:
    lines = {measure: _outcome(won(**RANKED, ranked_by=measure)) for measure in (FID, KID, MIND)}
    assert lines[KID] == [*lines[FID], "test KID, which ranked, 0.0345 (base) -> 0.0123"]
    assert lines[MIND] == [*lines[FID], "test MIND, which ranked, 321.0 (base) -> 321.0"]
    assert {"kid", "kid_error", "mind", "mind_error"} < set(JUDGED)
    judged = [scores(features(COUNT, seed), real) for seed in (3, 4)]
    found = _of_base(judged)
    assert found["base_validation_mind"] == pytest.approx(sum(each.mind.value for each in judged) / 2)
    few = scores(features(3, 3), Real.of(real.features))
    assert set(_of_base([*judged, few])) == {"base_validation_mind"}
