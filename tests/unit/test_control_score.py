"""Pictures are judged by how they follow their control images, and by FID together with that."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_jobs.config import Config, ConfigError, ControlConfig
from ray_jobs.data.control import check_control, suited_to_control
from ray_jobs.diffusion.families import FAMILIES
from ray_jobs.diffusion.sampling import sample_pictures
from ray_jobs.evaluation.actor import Evaluator, References, Shown
from ray_jobs.evaluation.pool import EvaluatorPool
from ray_jobs.evaluation.scores import Features, Real, control_difference_by, scores_of
from ray_jobs.metrics.control import (
    DISAGREEMENT,
    METRIC,
    Controlled,
    Scale,
    control_difference,
    control_score,
    disagreement_difference,
    disagreement_score,
    unlike_depth,
    unlike_edges,
    unlike_points,
    unmatched,
)
from ray_jobs.metrics.corrected import Correction, corrected_distance
from ray_jobs.metrics.frechet import Moments, frechet_distance
from ray_jobs.run.records import CONTROL, FID
from ray_jobs.run.split import VALIDATION
from ray_jobs.weights.conditioner import load_conditioner
from tests.tiny_conditioners import depth_model, pose_model
from tests.unit.test_affects import configured
from tests.unit.test_control import changing, small_base
from tests.unit.test_rank_by import COUNT, NETWORK, NETWORKS, features

SIDE = 64


def line(column: int, side: int = SIDE) -> torch.Tensor:
    """A vertical line: bool, 1 x 1 x side x side."""
    marked = torch.zeros(1, 1, side, side, dtype=torch.bool)
    marked[..., column] = True
    return marked


def test_edges_agree_within_the_tolerance_and_not_beyond() -> None:
    # 0.008 of the diagonal of 64 x 64 is 0.7, so 1 pixel; of 512 x 512 it is 5.8, so 6.
    assert unlike_edges(line(20), line(20)).tolist() == [0]
    assert unlike_edges(line(21), line(20)).tolist() == [0]
    assert unlike_edges(line(22), line(20)).tolist() == [1]
    assert unlike_edges(line(26, 512), line(20, 512)).tolist() == [0]
    assert unlike_edges(line(27, 512), line(20, 512)).tolist() == [1]
    turned = unlike_edges(line(21).transpose(2, 3), line(20).transpose(2, 3))
    assert turned.tolist() == [0] and turned.dtype == torch.float64


def test_disagreement_is_one_minus_the_harmonic_mean_of_precision_and_recall() -> None:
    both = line(10) | line(40)
    # All that is drawn was given, and half of what was given is drawn: F1 is 2 / 3.
    assert unlike_edges(line(10), both).item() == pytest.approx(1 / 3)
    assert unlike_edges(both, line(10)).item() == pytest.approx(1 / 3)
    nothing = torch.zeros_like(both)
    assert [
        unlike_edges(*pair).item() for pair in ((nothing, nothing), (nothing, both), (both, nothing))
    ] == [
        0,
        1,
        1,
    ]
    stacked = unmatched(torch.cat([both, nothing]), torch.cat([both, both]), 0)
    assert stacked.tolist() == [0, 1]


def test_key_points_match_their_own_kind_only() -> None:
    found = torch.zeros(1, 2, 100, 100, dtype=torch.bool)
    given = found.clone()
    found[0, 0, 50, 50] = given[0, 0, 55, 45] = True  # 5 % of the side away
    assert unlike_points(found, given).item() == 0
    given[0, 1, 50, 50] = True  # the other one lacks its own
    assert unlike_points(found, given).item() == pytest.approx(1 / 3)
    assert unlike_points(found.flip(1), given[:, :1].expand(-1, 2, -1, -1) & ~found).item() > 0


def test_depth_differs_by_its_root_mean_square() -> None:
    near = torch.zeros(2, 4, 4)
    other = near.clone()
    other[1], other[0, :2] = 1, 0.5
    assert unlike_depth(other, near).tolist() == pytest.approx([0.5 * 0.5**0.5, 1])


def pictures(count: int, side: int = SIDE) -> torch.Tensor:
    """Bright rectangles in other places: uint8, N x 3 x side x side."""
    found = torch.full((count, 3, side, side), 40, dtype=torch.uint8)
    for number in range(count):
        found[number, :, 8 + 3 * number : 40, 10 : 50 - 4 * number] = 210
    return found


@pytest.mark.parametrize("kind", ["edges", "depth", "pose"])
def test_a_picture_agrees_with_its_own_control_image_and_less_with_that_of_another(
    kind: str, tmp_path: Path
) -> None:
    given = {"kind": kind}
    if kind != "edges":
        given["model"] = str((depth_model if kind == "depth" else pose_model)(tmp_path))
    conditioner = load_conditioner(ControlConfig.model_validate(given))
    own = conditioner(pictures(3))
    assert conditioner.disagreement(pictures(3), own).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    if kind == "pose":  # a small model finds the same pose everywhere
        own = torch.zeros_like(own)
    apart = conditioner.disagreement(pictures(3), own.roll(1, dims=0))
    assert apart.shape == (3,) and (apart > 0.02).all() and (apart <= 1).all()


def test_the_mean_disagreement_and_its_paired_difference_have_errors() -> None:
    noise = torch.rand(50, generator=torch.Generator().manual_seed(0))
    one, other = 0.3 + 0.4 * noise, 0.25 + 0.4 * noise
    found = disagreement_score(one)
    assert (found.metric, found.num_samples) == (DISAGREEMENT, 50)
    assert found.value == pytest.approx(float(one.double().mean()))
    assert found.standard_error == pytest.approx(float(one.std()) / 50**0.5, rel=1e-5)
    apart = disagreement_difference(one, other)
    assert apart.value == pytest.approx(0.05, abs=1e-6)
    assert apart.standard_error < 1e-6 and apart.variance_ratio > 100


def drawn(count: int, seed: int, shift: float = 0.3, apart: float = 0.4) -> Controlled:
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(count, 8, generator=generator) + shift
    return Controlled(own, apart + 0.2 * (torch.rand(count, generator=generator) - 0.5))


def corrected(real: torch.Tensor, count: int) -> Correction:
    others = torch.randn(2 * count, 8, generator=torch.Generator().manual_seed(9))
    found = Correction.of(real, others, count, NETWORK)
    assert found
    return found


@pytest.mark.parametrize("is_corrected", [True, False])
def test_the_control_score_is_the_mean_of_both_shares_with_the_error_of_their_spread(
    is_corrected: bool,
) -> None:
    count, scale = 64, Scale(4.0, 0.8)
    pictures = torch.randn(128, 8, generator=torch.Generator().manual_seed(1))
    real = Moments.of(pictures, NETWORK)
    correction = corrected(pictures, count) if is_corrected else None

    def scored(own: Controlled) -> Any:
        return control_score(own, real, correction, scale, num_resamples=60)

    own = drawn(count, 100)
    if correction:
        distance = corrected_distance(own.features, real, correction)
    else:
        distance = frechet_distance(Moments.of(own.features, NETWORK), real)
    expected = (distance / 4.0 + float(own.apart.double().mean()) / 0.8) / 2
    found = scored(own)
    assert found.value == pytest.approx(expected) and found.metric == METRIC
    plain = control_score(own, real, correction, scale, num_resamples=0)
    assert plain.value == found.value and plain.standard_error is None
    # The error is that of other captions and noise, up to a factor that `corrected_score` states.
    fresh = [scored(drawn(count, seed)) for seed in range(24)]
    spread = float(np.std([each.value for each in fresh], ddof=1))
    mean_error = float(np.mean([each.standard_error for each in fresh]))
    assert 0.6 * spread < mean_error < 2.2 * spread


@pytest.mark.parametrize("is_corrected", [True, False])
def test_common_control_images_and_noise_make_the_error_of_a_difference_small(is_corrected: bool) -> None:
    count, scale = 64, Scale(4.0, 0.8)
    pictures = torch.randn(128, 8, generator=torch.Generator().manual_seed(1))
    real, correction = Moments.of(pictures, NETWORK), corrected(pictures, count) if is_corrected else None
    pair = drawn(count, 3, 0.5, 0.5), drawn(count, 3, 0.4, 0.4)
    values = [control_score(each, real, correction, scale, num_resamples=60) for each in pair]
    found = control_difference(*pair, real, correction, scale, num_resamples=60)
    assert found.value == pytest.approx(values[0].value - values[1].value) and found.value > 0
    assert found.standard_error < (values[0].standard_error or 0) / 2 and found.variance_ratio > 4


def controlled_features(seed: int, apart: float) -> Features:
    return features(COUNT, seed) | {DISAGREEMENT: np.full((COUNT, 1), apart, np.float32)}


def test_scores_of_a_rung_have_both_parts_and_are_compared_by_their_features() -> None:
    plain = Real.of(features(64, 1))
    base = scores_of(controlled_features(2, 0.8), plain, NETWORKS, 4)
    assert base.disagreement and base.disagreement.value == pytest.approx(0.8) and base.control is None
    assert base.row()["disagreement"] == base.disagreement.value and CONTROL not in base.row()
    scale = Scale(base.fid.value, base.disagreement.value)
    real = Real(plain.features, plain.moments, scale=scale)
    again = scores_of(controlled_features(2, 0.8), real, NETWORKS, 4)
    assert again.control and again.control.value == pytest.approx(1)  # without a correction: the base itself
    better = scores_of(controlled_features(2, 0.4), real, NETWORKS, 4)
    assert better.control and better.control.value == pytest.approx(0.75)
    assert "control score 0.75" in better.described() and DISAGREEMENT in better.described()
    one, other = controlled_features(2, 0.8), controlled_features(2, 0.4)
    found = control_difference_by(one, other, real, NETWORK, resamples=4)
    assert found.value == pytest.approx(0.25) and np.isfinite(found.standard_error)
    without = scores_of(features(COUNT, 2), real, NETWORKS, 4)
    assert without.disagreement is None and without.control is None


def test_a_split_without_control_images_is_ranked_by_fid() -> None:
    pool = object.__new__(EvaluatorPool)
    pool.config, pool.rank_by = configured(), CONTROL
    pool.captions, pool.corrected, pool.controlled = {VALIDATION: ["a"] * 4}, {VALIDATION: True}, set()
    assert pool.ranked_by(VALIDATION) == FID
    pool.controlled = {VALIDATION}
    assert pool.ranked_by(VALIDATION) == CONTROL


def controls(control: dict[str, Any], **search: Any) -> Config:
    return Config.model_validate(
        {
            "name": "x",
            "data": {"source": "x", "control": control, "resolution": SIDE},
            "model": {"base": "x"},
            "train": {"method": "controlnet"} if control else {},
            "search": {"learning_rates": [1e-4], "ladder": [1], **search},
        }
    )


def test_control_ranks_where_scores_can_tell_it_unless_another_score_is_given() -> None:
    assert suited_to_control(controls({"kind": "edges"})).search.rank_by == CONTROL
    assert suited_to_control(controls({"kind": "edges"}, rank_by="fid")).search.rank_by == FID
    assert suited_to_control(controls({})).search.rank_by == "corrected_fid"
    for check in (suited_to_control, check_control):
        with pytest.raises(ConfigError, match="search.rank_by: control compares .* data.control.kind"):
            check(controls({}, rank_by="control"))


def png(picture: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("is_controlled", [True, False])
def test_only_a_model_with_a_controlnet_sees_control_images_and_both_are_judged_by_them(
    is_controlled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES["StableDiffusionPipeline"]
    pipeline = small_base(family)
    assert family.control
    if is_controlled:
        pipeline = family.control.pipeline(pipeline, changing(family.control.network(pipeline.unet)))
    config = controls({"kind": "edges"})
    evaluate = config.evaluate.model_copy(update={"inference_steps": 2, "batch_size": 2, "guidance_scale": 1})
    evaluator = Evaluator(config.model_copy(update={"evaluate": evaluate}), None, 1)  # type: ignore[arg-type]
    evaluator.prompts = None  # type: ignore[assignment]
    monkeypatch.setattr(evaluator, "_use", lambda weights: pipeline)
    assert evaluator.conditioner
    given = evaluator.conditioner(pictures(3))
    rows: References = [
        Shown([], png(each), png(edge)) for each, edge in zip(pictures(3), given, strict=True)
    ]
    captions, places = ["a red apple"] * 4, [2, 0, 1, 2]
    arguments: dict[str, Any] = {
        "num_steps": 2,
        "guidance_scale": 1.0,
        "batch_size": 2,
        "shapes": [(SIDE, SIDE)] * 4,
    }
    looked_at = (lambda number: [given[places[number]]]) if is_controlled else None
    expected = torch.cat(
        list(sample_pictures(pipeline, captions, list(range(4)), references=looked_at, **arguments))
    )
    seen: list[torch.Tensor] = []

    def measured(batches: Any, *others: Any) -> Features:
        seen.extend(batches)
        return {NETWORK: np.zeros((4, 1), np.float32)}

    monkeypatch.setattr(evaluator, "_features", measured)
    found = evaluator.sample_features(None, captions, list(range(4)), references=rows, places=places)
    assert torch.equal(torch.cat(seen), expected)
    apart = evaluator.conditioner.disagreement(expected, given[places])
    assert found[DISAGREEMENT][:, 0] == pytest.approx(apart.numpy()) and set(found) == {NETWORK, DISAGREEMENT}
    assert (apart > 0).any()
