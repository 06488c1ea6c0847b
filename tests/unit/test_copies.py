"""Near copies: a perfect copier is found although the autoencoder moves pictures, an honest model is not."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ray_jobs.diffusion.sampling import reconstructed
from ray_jobs.metrics.copies import CopyDetector, fit_detector, lower_limit, relative
from ray_jobs.metrics.networks import NetworkSpec, load_network
from ray_jobs.weights.loading import load_pipeline

ROOT = Path(__file__).parents[2]


def normal(count: int, size: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, size)))


def points(*values: float) -> torch.Tensor:
    """Pictures with one feature."""
    return torch.tensor(values)[:, None]


def test_nearness_is_the_distance_in_units_of_the_next_ones() -> None:
    assert relative(torch.tensor([[1.0, 2.0, 6.0], [0.0, 3.0, 3.0]])).tolist() == [0.25, 0.0]
    nearness, indices = CopyDetector(points(0, 10, 20, 30, 40, 50, 1000), None).nearness(points(1, 10, 44))
    assert indices.tolist() == [0, 1, 4]
    assert nearness.tolist() == pytest.approx([1 / 29, 0, 4 / fsum_mean(6, 14, 24, 34, 44)])


def fsum_mean(*values: float) -> float:
    return math.fsum(values) / len(values)


def test_with_two_training_pictures_a_copy_is_at_0_and_with_one_the_distance_is_told() -> None:
    assert CopyDetector(points(0, 10), None).nearness(points(2, 10))[0].tolist() == [0.25, 0]
    assert CopyDetector(points(0), None).nearness(points(2))[0].tolist() == [2]
    same = CopyDetector(points(3, 3, 3), None).nearness(points(3))[0]
    assert same.tolist() == [0], "alike pictures divide nothing by 0"


def test_the_limit_is_that_of_so_many_pictures_as_one_more_falls_below_it_that_often() -> None:
    values = torch.arange(1, 300).double()
    assert lower_limit(values, 0.01) == 3  # 300 places, of which three are 1 %
    assert lower_limit(values[:99], 0.01) == 1
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(2000, 100, generator=generator).double()
    below = [float(row[99]) <= (lower_limit(row[:99], 0.01) or 0) for row in drawn]
    assert sum(below) / 2000 == pytest.approx(0.01, abs=0.006)


def test_from_few_pictures_the_limit_is_half_of_the_nearest() -> None:
    assert lower_limit(torch.tensor([0.2] + [1.0] * 40), 0.01) == pytest.approx(0.1)
    assert lower_limit(torch.arange(1, 99).double(), 0.01) == 0.5
    assert lower_limit(torch.ones(4), 0.01) is None


def test_held_out_pictures_set_the_limit_and_training_pictures_help_where_they_are_few() -> None:
    training, held_out = normal(100, 8, seed=1), normal(300, 8, seed=2)
    detector, facts = fit_detector(training, training, held_out, "n")
    assert (facts.num_held_out, facts.num_unseen, facts.extrapolated) == (300, 300, False)
    assert detector.threshold == facts.threshold == sorted(detector.nearness(held_out)[0].tolist())[2]
    _, some = fit_detector(training, training, held_out[:20], "n")
    assert (some.num_held_out, some.num_unseen, some.extrapolated) == (20, 120, False)
    _, few = fit_detector(training[:8], training[:8], None, "n")
    assert (few.num_held_out, few.num_unseen, few.extrapolated) == (0, 8, True)
    for each in (facts, some, few):
        assert each.sensitivity == 1 and each.expected_share == 0.01
    with pytest.raises(ValueError, match="share: above 0 and below 1"):
        fit_detector(training, training, None, "n", share=0)


def test_a_model_that_draws_new_pictures_has_the_expected_share_of_near_copies() -> None:
    training, held_out, drawn = normal(300, 8, 1), normal(999, 8, 2), normal(4000, 8, 3)
    detector, _ = fit_detector(training, training, held_out, "n", share=0.05)
    assert detector.share(detector.nearness(drawn)[0]) == pytest.approx(0.05, abs=0.02)


def test_known_copies_that_are_further_away_than_unseen_pictures_are_not_found() -> None:
    training, held_out = normal(100, 4, seed=1), normal(300, 4, seed=2)
    _, facts = fit_detector(training, training + 0.5, held_out, "n")
    assert facts.sensitivity is not None and facts.sensitivity < 0.1


def test_a_detector_is_the_same_after_it_was_written_and_read() -> None:
    detector, _ = fit_detector(normal(9, 4, 1).float(), normal(9, 4, 1).float(), None, "n")
    read = CopyDetector.read(detector.tensors())
    assert read and torch.equal(read.references, detector.references)
    assert read.threshold == pytest.approx(detector.threshold, rel=1e-6)
    unlimited = CopyDetector.read(CopyDetector(normal(4, 4, 1), None).tensors())
    assert unlimited and unlimited.threshold is None
    assert CopyDetector.read({}) is None


@pytest.mark.slow
def test_of_the_demos_pictures_copies_are_found_and_new_ones_are_not() -> None:
    """Through the demo's own autoencoder, which moves a picture further than look-alikes are away."""
    base = load_pipeline(str(ROOT / "models/emoji-base"))
    network = load_network(
        NetworkSpec("efficientnet-lite0", str(ROOT / ".cache/efficientnet-lite0.safetensors"))
    )

    def features(pictures: torch.Tensor) -> torch.Tensor:
        return torch.cat([network.features(part) for part in pictures.split(8)])

    real = emoji(160)
    restored = torch.cat([reconstructed(base, part) for part in real.split(16)])
    again = reconstructed(base, restored[:24])
    drawn, copies = features(restored), features(again)
    training, held_out, new = drawn[:100], drawn[100:130], drawn[130:]
    detector, facts = fit_detector(training, copies, held_out, network.identity)
    assert (facts.num_unseen, facts.extrapolated) == (130, False)
    assert facts.sensitivity is not None and facts.sensitivity >= 0.9
    copied, honest = (detector.share(detector.nearness(each)[0]) for each in (training, new))
    assert copied == 1 and honest is not None and honest <= 2 / 30


def emoji(count: int) -> torch.Tensor:
    """Real pictures of the demo on white: uint8, count x 3 x 64 x 64."""
    files = sorted((ROOT / "examples/fluent-emoji/images").glob("*.webp"))
    pictures = []
    for number in np.random.default_rng(0).permutation(len(files))[:count]:
        drawn = Image.open(files[number]).convert("RGBA")
        white = Image.new("RGBA", drawn.size, "white")
        white.alpha_composite(drawn)
        pictures.append(np.asarray(white.convert("RGB").resize((64, 64))))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
