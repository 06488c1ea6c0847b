"""Edits are judged by how far each is from the picture that it should be."""

import numpy as np
import pytest
import torch

from ray_jobs.evaluation.pool import EvaluatorPool
from ray_jobs.evaluation.scores import Real, difference_by, scores_of
from ray_jobs.metrics.edits import (
    METRIC,
    OUTSIDE,
    outside_change,
    outside_score,
    over_unedited,
    target_difference,
    target_distance,
)
from ray_jobs.run.records import FID, TARGET
from ray_jobs.run.split import VALIDATION
from tests.unit.test_affects import configured
from tests.unit.test_rank_by import COUNT, NETWORK, NETWORKS, features

WIDTH = 8


def pictures(seed: int, count: int = 12) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_a_picture_that_is_its_target_has_no_distance_whatever_the_size_of_its_features() -> None:
    targets = pictures(0)
    assert target_distance(3 * targets, targets, "net").value == pytest.approx(0, abs=1e-7)
    assert target_distance(-targets, targets, "net").value == pytest.approx(2)
    turned = target_distance(targets.flip(0), targets, "net")
    assert turned.value > 0.5 and turned.metric == METRIC and turned.num_samples == 12


def test_two_pictures_of_one_reference_have_the_same_target() -> None:
    targets = pictures(0)
    found = target_distance(torch.cat([targets, targets]), targets, "net")
    assert found.value == pytest.approx(0, abs=1e-7) and found.num_samples == 24


def test_the_error_is_that_of_the_mean_over_pictures() -> None:
    drawn, targets = torch.eye(4), torch.ones(4, 4)
    drawn[0, 1:] = 1.0  # its own target; the others are at 1/2
    found = target_distance(drawn, targets, "net")
    distances = torch.tensor([0.0, 0.5, 0.5, 0.5])
    assert found.value == pytest.approx(float(distances.mean()))
    assert found.standard_error == pytest.approx(float(distances.std()) / 2)


def test_common_references_and_noise_make_the_error_of_a_difference_small() -> None:
    targets, noise = pictures(0, 64), pictures(1, 64)
    near, far = targets + 0.5 * noise, targets + 0.6 * noise
    found = target_difference(far, near, targets, "net")
    values = [target_distance(each, targets, "net") for each in (far, near)]
    assert found.value == pytest.approx(values[0].value - values[1].value) and found.value > 0
    assert found.standard_error < (values[0].standard_error or 0.0) and found.variance_ratio > 2


def test_edits_are_compared_in_pairs_with_the_pictures_as_they_were() -> None:
    targets, noise = pictures(0, 32), pictures(1, 32)
    before, drawn = targets + 0.6 * noise, targets + 0.5 * noise
    twice = torch.cat([drawn, drawn])  # two edits of each
    found = over_unedited(twice, before, targets, "net")
    values = [target_distance(each, targets, "net") for each in (drawn, before)]
    assert found.value == pytest.approx(values[0].value - values[1].value) and found.value < 0
    assert found.standard_error < (values[1].standard_error or 0.0)
    assert over_unedited(before, before, targets, "net").value == 0


def test_only_edits_have_targets_and_rungs_are_compared_by_them() -> None:
    real, drawn = features(COUNT, 1), features(COUNT, 2)
    plain = scores_of(drawn, Real.of(real), NETWORKS, 2)
    targets = Real.of(real, are_targets=True)
    edits = scores_of(drawn, targets, NETWORKS, 2)
    assert plain.target is None and TARGET not in plain.row()
    assert edits.target and edits.row("test_")["test_target"] == edits.target.value
    assert "distance to the target" in edits.described()
    other = torch.from_numpy(real[NETWORK])
    found = difference_by(TARGET, torch.from_numpy(drawn[NETWORK]), other, targets, NETWORK, resamples=2)
    assert found.value == pytest.approx(edits.target.value, abs=1e-6)
    assert np.isfinite(found.standard_error)


def test_a_split_without_references_is_ranked_by_fid() -> None:
    pool = object.__new__(EvaluatorPool)
    pool.config, pool.rank_by = configured(), TARGET
    pool.captions, pool.corrected, pool.unedited = {VALIDATION: ["a"] * 4}, {VALIDATION: True}, {}
    assert pool.ranked_by(VALIDATION) == FID
    pool.unedited = {VALIDATION: 0.2}
    assert pool.ranked_by(VALIDATION) == TARGET


def test_what_an_edit_changes_where_the_picture_was_to_stay_is_told_in_levels() -> None:
    before = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    target, drawn = before.clone(), before.clone()
    target[:, :4] = 200  # the upper half is to be edited
    assert outside_change(target, before, target) == 0
    assert outside_change(before, before, target) == 0  # that nothing was edited is told by the distance
    drawn[:, 4:] = 130
    assert outside_change(drawn, before, target) == pytest.approx(30)
    nearly = before + 8
    assert outside_change(nearly, nearly, before) == pytest.approx(8)
    everything = torch.full_like(before, 200)
    assert np.isnan(outside_change(drawn, before, everything)) and np.isnan(
        outside_change(drawn, before[:, :4], target)
    )


def test_pictures_without_such_pixels_are_left_out_of_the_mean() -> None:
    nothing = float("nan")
    found = outside_score(torch.tensor([10.0, nothing, 30.0]), 3)
    assert found and found.value == 20 and found.num_samples == 3 and found.standard_error
    assert outside_score(torch.tensor([nothing]), 1) is None
    drawn = features(COUNT, 2) | {OUTSIDE: np.full((COUNT, 1), 5.0, np.float32)}
    scores = scores_of(drawn, Real.of(features(COUNT, 1), are_targets=True), NETWORKS, 2)
    assert scores.row("test_")["test_outside"] == 5
