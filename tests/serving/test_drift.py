"""Drift is seen: other pictures than were published raise the FID; drawn training pictures are found."""

import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from cluster.storage import Storage
from ray_jobs.config import ConfigError
from ray_jobs.metrics.copies import fit_detector
from ray_jobs.metrics.feature_network import FeatureNetwork
from ray_jobs.metrics.frechet import Moments, frechet_distance
from ray_jobs.metrics.networks import NetworkSpec, load_network
from ray_jobs.metrics.similarity import clip_score
from ray_jobs.metrics.vision_model import Clip, load_clip
from ray_jobs.registry.models import REFERENCE
from serving.load import DriftScores
from serving.replica.drift import DriftMonitor, Reference

ROOT = Path(__file__).parents[2]
WINDOW = 8


def emoji(numbers: Sequence[int], side: int = 64) -> list[np.ndarray]:
    """Real pictures: uint8, side x side x 3."""
    files = sorted((ROOT / "examples/fluent-emoji/images").glob("*.webp"))
    pictures = [Image.open(files[number]).convert("RGB").resize((side, side)) for number in numbers]
    return [np.asarray(picture) for picture in pictures]


def recompressed(picture: np.ndarray) -> np.ndarray:
    """Hardly another one to the eye."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="JPEG", quality=98, subsampling=0)
    return np.asarray(Image.open(file))


def noisy(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """As a solver that stops early would leave them."""
    generator = np.random.default_rng(0)
    noise = [generator.normal(0, 50, picture.shape) for picture in pictures]
    return [np.clip(p + n, 0, 255).astype(np.uint8) for p, n in zip(pictures, noise, strict=True)]


TRAINING, VALIDATION, DRAWN = range(0, 480, 24), range(3, 480, 6), range(8, 440, 54)


def features(network: FeatureNetwork, pictures: Sequence[np.ndarray]) -> torch.Tensor:
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return torch.cat([network.features(part) for part in batch.split(4)])


def reference_of(network: FeatureNetwork) -> Reference:
    validation, training, drawn = (
        features(network, emoji(numbers)) for numbers in (VALIDATION, TRAINING, DRAWN)
    )
    detector, _ = fit_detector(training, training, validation, network.identity)
    return Reference(validation, detector, drawn, network.identity)


@pytest.fixture(scope="module")
def quick() -> FeatureNetwork:
    """A real network that takes a tenth of Inception's time."""
    return load_network(
        NetworkSpec("efficientnet-lite0", str(ROOT / ".cache/efficientnet-lite0.safetensors"))
    )


@pytest.fixture(scope="module")
def reference(quick: FeatureNetwork) -> Reference:
    return reference_of(quick)


@pytest.fixture()
def monitor(quick: FeatureNetwork, reference: Reference) -> Iterator[DriftMonitor]:
    monitor = DriftMonitor(quick, reference, WINDOW)
    yield monitor
    monitor.stop()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300  # others of a busy machine come first
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def scored(monitor: DriftMonitor, pictures: Sequence[np.ndarray]) -> DriftScores:
    """The scores once so many more pictures were measured."""
    before = monitor.num_measured
    for picture in pictures:
        monitor.add(picture, "an emoji")
    wait_for(lambda: monitor.num_measured == before + len(pictures) and monitor.latest is not None)
    assert monitor.latest
    return monitor.latest


def test_drift_rises_when_the_pictures_change_and_near_copies_are_found(monitor: DriftMonitor) -> None:
    as_published = scored(monitor, emoji(DRAWN))
    assert as_published.num_pictures == WINDOW
    assert as_published.expected_fid == pytest.approx(as_published.fid, rel=1e-3)
    assert as_published.near_copies is not None and as_published.near_copies < 0.5
    others = scored(monitor, noisy(emoji(DRAWN)))
    assert others.fid > 1.2 * as_published.fid
    copies = scored(monitor, [recompressed(picture) for picture in emoji(TRAINING[:WINDOW])])
    assert copies.near_copies == 1 and copies.expected_near_copies == 0.01


def test_nothing_is_told_before_the_window_is_full(monitor: DriftMonitor) -> None:
    for picture in emoji(DRAWN)[: WINDOW - 1]:
        monitor.add(picture, "an emoji")
    wait_for(lambda: monitor.num_measured == WINDOW - 1)
    assert monitor.latest is None


def test_a_window_is_scored_as_an_evaluation_is(quick: FeatureNetwork, monitor: DriftMonitor) -> None:
    found = scored(monitor, emoji(DRAWN))
    drawn = Moments.of(features(quick, emoji(DRAWN)), quick.identity)
    real = Moments.of(features(quick, emoji(VALIDATION)), quick.identity)
    assert found.fid == pytest.approx(frechet_distance(drawn, real), rel=1e-4)
    assert found.feature_network == quick.identity and found.clip_score is None


def test_captions_are_scored_where_there_is_a_clip(
    quick: FeatureNetwork,
    reference: Reference,
    clip_folder: Path,  # noqa: F811
) -> None:
    clip: Clip = load_clip(str(clip_folder))
    monitor = DriftMonitor(quick, reference, 2, clip)
    found = scored(monitor, emoji(DRAWN[:2]))
    monitor.stop()
    captions = clip.text_features(["an emoji"] * 2)
    expected = clip_score(features(clip, emoji(DRAWN[:2])), captions, clip.identity).value
    assert found.clip_score == pytest.approx(expected, rel=1e-4)


def test_adding_never_waits_and_what_is_passed_over_is_counted(monitor: DriftMonitor) -> None:
    [picture] = emoji([8])
    began = time.monotonic()
    for _ in range(500):
        monitor.add(picture, "an emoji")
    assert time.monotonic() - began < 1  # measuring them would take several
    assert monitor.num_skipped + monitor.num_measured > 300


def test_a_picture_that_cannot_be_measured_is_counted_and_the_next_ones_are_scored(
    monitor: DriftMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    monitor.add(np.zeros((8, 8, 3), dtype=np.float32), "not uint8")
    assert scored(monitor, emoji(DRAWN)).num_pictures == WINDOW
    assert monitor.num_failed == 1 and "drift: a picture was not measured" in caplog.text


def test_it_runs_at_the_lowest_priority_and_leaves_the_servers_alone(monitor: DriftMonitor) -> None:
    [thread] = [each for each in threading.enumerate() if each is monitor._thread]
    wait_for(lambda: os.getpriority(os.PRIO_PROCESS, thread.native_id or 0) == 19)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < 19


def test_a_reference_is_read_from_beside_the_weights(tmp_path: Path, reference: Reference) -> None:
    network = reference.feature_network
    folder = Storage.open(str(tmp_path))
    folder.write_bytes(REFERENCE, save({f"{network}/validation": reference.validation}))
    found = Reference.read(folder, network)
    assert torch.equal(found.validation, reference.validation)
    assert found.detector is None and found.published is None
    assert reference.detector
    tensors = {"validation": reference.validation, **reference.detector.tensors()}
    folder.write_bytes(REFERENCE, save({f"{network}/{name}": each for name, each in tensors.items()}))
    read, near = Reference.read(folder, network).detector, reference.detector
    assert read and torch.equal(read.references, near.references)
    assert read.threshold == pytest.approx(near.threshold, rel=1e-6)


def test_a_reference_of_an_earlier_release_is_read_and_its_lack_of_a_detector_told(
    tmp_path: Path, reference: Reference, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = {kind: reference.validation for kind in ("validation", "training", "published")}
    network, folder = reference.feature_network, Storage.open(str(tmp_path))
    folder.write_bytes(REFERENCE, save({f"{network}/{kind}": each.clone() for kind, each in kinds.items()}))
    found = Reference.read(folder, network)
    assert found.detector is None and found.published is not None
    assert "near copies are not measured until the model is published again" in caplog.text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "is missing; publish the model again"),
        (b"broken", "is damaged"),
        (save({"dino@sha256:1/validation": torch.zeros(2, 2)}), "has no validation features by inception"),
    ],
)
def test_a_missing_reference_names_the_field_and_the_fix(
    tmp_path: Path, content: bytes | None, expected: str
) -> None:
    folder = Storage.open(str(tmp_path))
    if content:
        folder.write_bytes(REFERENCE, content)
    with pytest.raises(ConfigError, match=rf"serve\.drift_pictures: .*{expected}"):
        Reference.read(folder, "inception-2015-12-05@sha256:7ff4a85c3a63")


def test_a_window_of_one_is_refused(quick: FeatureNetwork, reference: Reference) -> None:
    with pytest.raises(ValueError, match=r"serve\.drift_pictures: 1"):
        DriftMonitor(quick, reference, 1)
