"""The metrics: the feature network's input, and the Fréchet distance against its definition and a rival."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance

from ray_jobs.config import EvaluateConfig
from ray_jobs.metrics.frechet import Moments, frechet_distance
from ray_jobs.metrics.inception import (
    INPUT_SIZE,
    Inception,
    interpolation_matrix,
    load_inception,
    resize,
)
from ray_jobs.metrics.score import Score

ROOT = Path(__file__).parents[2]


class GivenFeatures(torch.nn.Module):
    """A feature network for torchmetrics that returns what it is given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


def random_features(count: int, width: int, seed: int) -> torch.Tensor:
    """Correlated, off-centre, non-negative like those of Inception: float32, count x width."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    offset = torch.randn(width, generator=generator)
    return (torch.randn(count, width, generator=generator) @ mixing + offset).relu()


def torchmetrics_fid(real: torch.Tensor, fake: torch.Tensor) -> float:
    metric = FrechetInceptionDistance(feature=GivenFeatures(real.shape[1]), normalize=True)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return float(metric.compute())


@pytest.mark.parametrize("count", [30, 96, 129, 700], ids="{} pictures of 128 features".format)
def test_fid_equals_torchmetrics_on_the_same_features(count: int) -> None:
    real, fake = random_features(count, 128, seed=1), random_features(count + 7, 128, seed=2)
    ours = frechet_distance(Moments.of(real), Moments.of(fake))
    assert ours == pytest.approx(torchmetrics_fid(real, fake), rel=1e-4)


@pytest.mark.parametrize("count", [10, 500], ids=["fewer than features", "more than features"])
def test_fid_of_a_set_with_itself_is_zero(count: int) -> None:
    moments = Moments.of(random_features(count, 64, seed=3))
    assert frechet_distance(moments, moments) < 1e-10


def test_fid_of_one_feature_equals_the_formula_by_hand() -> None:
    # Means 2 and 5, variances 4 and 16: (5 - 2)^2 + (sqrt 16 - sqrt 4)^2 = 13.
    a = Moments.of(torch.tensor([[0.0], [2.0], [4.0]]))
    b = Moments.of(torch.tensor([[1.0], [5.0], [9.0]]))
    assert frechet_distance(a, b) == pytest.approx(13, rel=1e-12)


def test_moments_do_not_depend_on_how_the_features_were_shared_out() -> None:
    features, other = random_features(700, 48, seed=4), Moments.of(random_features(90, 48, seed=5))
    whole = Moments.of(features)
    parts = [Moments.of(part) for part in features.split([3, 250, 1, 96, 350])]
    first, second, third, fourth, fifth = parts
    forward = first + second + third + fourth + fifth
    backward = fifth + ((fourth + third) + (second + first))
    for merged in (forward, backward):
        assert merged.count == 700
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-9, atol=1e-12)
        assert frechet_distance(merged, other) == pytest.approx(frechet_distance(whole, other), rel=1e-9)
    torch.testing.assert_close(whole.covariance, features.double().T.cov(), rtol=1e-9, atol=1e-12)


def test_moments_stay_small_however_many_pictures_there_are() -> None:
    moments = Moments.of(random_features(50, 16, seed=0))
    for seed in range(1, 20):
        moments += Moments.of(random_features(50, 16, seed=seed))
    assert moments.count == 1000
    assert len(moments.factor) <= 2 * 16


def test_moments_of_different_networks_do_not_meet() -> None:
    a, b = (Moments.of(torch.rand(4, 8), network) for network in ("one", "other"))
    with pytest.raises(ValueError, match="feature_network: one and other"):
        frechet_distance(a, b)
    with pytest.raises(ValueError, match="feature_network: one and other"):
        a + b


def test_scores_of_different_networks_or_sample_counts_do_not_compare() -> None:
    real, generated = (Moments.of(random_features(20, 8, seed), "network") for seed in (1, 2))
    score = Score.of(generated, real)
    assert score == Score(frechet_distance(generated, real), 20, "network")
    assert min(score, Score(1e9, 20, "network")) == score
    with pytest.raises(ValueError, match="feature_network"):
        min(score, Score(1.0, 20, "another"))
    with pytest.raises(ValueError, match="num_samples"):
        min(score, Score(1.0, 30, "network"))


def test_one_picture_or_broken_features_have_no_fid() -> None:
    one, two = Moments.of(torch.rand(1, 8)), Moments.of(torch.rand(2, 8))
    with pytest.raises(ValueError, match=r"evaluate\.num_samples"):
        frechet_distance(one, two)
    with pytest.raises(ValueError, match="not finite"):
        Moments.of(torch.tensor([[1.0, float("nan")]]))


def test_interpolation_reads_without_half_pixel_offset() -> None:
    # 2 -> 4 reads at 0, 0.5, 1, 1.5; the last position lies past the last pixel, which repeats.
    assert interpolation_matrix(2, 4).tolist() == [[1, 0], [0.5, 0.5], [0, 1], [0, 1]]
    # 4 -> 2 reads at 0 and 2: no averaging.
    assert interpolation_matrix(4, 2).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    assert torch.equal(interpolation_matrix(7, 7), torch.eye(7))


def test_resizing_a_picture_equals_the_values_worked_out_by_hand() -> None:
    picture = torch.tensor([[[[0, 100], [40, 200]]]], dtype=torch.uint8)
    top, between, bottom = [0, 50, 100, 100], [20, 85, 150, 150], [40, 120, 200, 200]
    assert resize(picture, 4, 4).tolist() == [[[top, between, bottom, bottom]]]
    assert resize(picture, 1, 2).tolist() == [[[[0, 100]]]]


def test_a_missing_network_names_the_field_and_the_fix(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"evaluate\.feature_network: .*absent\.pt: no such file; `make setup`"
    ):
        load_inception(tmp_path / "absent.pt")


def test_an_unknown_network_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    # A real TorchScript file, so that only the digest can be what stops it.
    path = tmp_path / "other.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(ValueError, match=r"evaluate\.feature_network: .*not a known.*`make setup`"):
        load_inception(path)


@pytest.fixture(scope="module")
def network() -> Inception:
    return load_inception(ROOT / str(EvaluateConfig().feature_network))


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Four real pictures: uint8, 4 x 3 x 64 x 64."""
    paths = sorted((ROOT / "examples/fluent-emoji/images").iterdir())[:4]
    rows = []
    for path in paths:
        with Image.open(path) as picture:
            pixels = picture.convert("RGB").resize((64, 64)).tobytes()
        rows.append(torch.frombuffer(bytearray(pixels), dtype=torch.uint8).reshape(64, 64, 3))
    return torch.stack(rows).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def features(network: Inception, pictures: torch.Tensor) -> torch.Tensor:
    return network.features(pictures)


def test_features_are_those_of_the_network_on_the_standard_input(
    network: Inception, pictures: torch.Tensor, features: torch.Tensor
) -> None:
    assert features.shape == (4, network.num_features) == (4, 2048)
    assert features.dtype == torch.float32
    assert network.identity == "inception-2015-12-05@sha256:7ff4a85c3a63"
    standard = (resize(pictures, INPUT_SIZE, INPUT_SIZE).contiguous() - 128) / 128
    with torch.inference_mode():
        expected = network.module(standard)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_features_of_a_picture_do_not_depend_on_its_batch(
    network: Inception, pictures: torch.Tensor, features: torch.Tensor
) -> None:
    torch.testing.assert_close(network.features(pictures[1:2]), features[1:2], rtol=1e-4, atol=1e-4)


def test_a_slightly_noisy_picture_is_nearest_to_itself(
    network: Inception, pictures: torch.Tensor, features: torch.Tensor
) -> None:
    noise = torch.randint(-8, 9, pictures.shape, generator=torch.Generator().manual_seed(0))
    noisy = (pictures.int() + noise).clamp(0, 255).to(torch.uint8)
    assert torch.cdist(network.features(noisy), features).argmin(dim=1).tolist() == [0, 1, 2, 3]


def test_pictures_of_the_wrong_type_are_refused(network: Inception) -> None:
    with pytest.raises(ValueError, match="uint8"):
        network.features(torch.rand(1, 3, 64, 64))
