"""All measures of a set of pictures: each with its network and count, and a sentence for what is left out."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.storage import Storage
from ray_jobs.config import Config, EvaluateConfig
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.diffusion.sampling import batches_of
from ray_jobs.evaluation.actor import Evaluator, SampleFiles, join
from ray_jobs.evaluation.dealing import dealt, in_order
from ray_jobs.evaluation.pool import shape_of
from ray_jobs.evaluation.scores import Features, Real, more_scores, near_copies, recited, scores_of
from ray_jobs.metrics import inception
from ray_jobs.metrics.copies import CopyDetector, DetectorFacts, fit_detector
from ray_jobs.metrics.feature_network import FeatureNetwork
from ray_jobs.metrics.frechet import Moments
from ray_jobs.metrics.resampling import frechet_score
from ray_jobs.metrics.vision_model import load_clip
from ray_jobs.pictures.reading import encode_png
from ray_jobs.run.manifest import Manifest
from ray_jobs.run.records import COPIES, OWN, RECITED
from ray_jobs.weights import loading
from ray_jobs.weights.feature_networks import Networks, NetworkSet, load_networks
from tests.serving.conftest import save_adapters
from tests.unit.test_metrics_networks import noise

COLOURS = "colours@sha256:000000000000"
NETWORK = "inception-2015-12-05@sha256:7ff4a85c3a63"
CAPTIONS = ["a big red circle", "a small green square", "a big blue cross"]


class Colours(FeatureNetwork):
    """The mean of each channel."""

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


@pytest.fixture(scope="module")
def networks(clip_folder: Path) -> Networks:
    return load_networks(EvaluateConfig(clip=str(clip_folder)), "cpu")


def features(networks: Networks, count: int, seed: int, shift: float = 0.0) -> Features:
    """Random ones of the widths that the networks have."""
    generator = np.random.default_rng(seed)
    return {
        network.identity: (generator.normal(size=(count, network.num_features)) + shift).astype(np.float32)
        for network in networks.all
    }


def test_scores_are_the_same_from_moments_that_were_made_before(networks: Networks) -> None:
    generated, real = features(networks, 12, seed=1, shift=0.2), features(networks, 10, seed=2)
    found = scores_of(generated, Real.of(real), networks, resamples=5)
    pictures, references = torch.from_numpy(generated[NETWORK]), torch.from_numpy(real[NETWORK])
    expected = frechet_score(pictures, Moments.of(references, NETWORK), num_resamples=5)
    assert found.fid == expected and expected.standard_error is not None
    assert found.second is not None and found.second.feature_network.startswith("efficientnet-lite0@")


def test_every_measure_carries_its_network_and_its_count(networks: Networks) -> None:
    generated, real = features(networks, 24, seed=1), Real.of(features(networks, 3 * 4, seed=2))
    found, _ = more_scores(generated, real, networks, CAPTIONS * 4)
    assert networks.second and networks.clip
    of_network = {record.metric: record.feature_network for record in found}
    assert of_network == {
        "precision": NETWORK,
        "recall": NETWORK,
        "IS": networks.second.identity,
        "CLIP score": networks.clip.identity,
        "CLIP image similarity": networks.clip.identity,
    }
    assert {record.num_samples for record in found} == {24}
    errors = {record.metric for record in found if record.standard_error}
    assert errors == set(of_network)


def test_the_inception_score_is_that_of_the_literature_where_its_classes_are_at_hand(
    networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has the published one's layer, with other numbers: those are not in a package registry."""
    layer = {"fc.weight": torch.randn(1008, 2048) / 20, "fc.bias": torch.randn(1008)}
    torch.save(layer, tmp_path / "inception.pth")
    digest = hashlib.sha256((tmp_path / "inception.pth").read_bytes()).hexdigest()
    monkeypatch.setitem(inception.KNOWN_CLASSIFIERS, digest, "classes")
    classes = inception.load_classes(tmp_path / "inception.pth")
    generated, real = features(networks, 40, seed=1), Real.of(features(networks, 40, seed=2))
    found, _ = more_scores(generated, real, replace(networks, classes=classes), CAPTIONS * 14)
    [record] = [record for record in found if record.metric == "IS"]
    assert record.feature_network == f"classes@sha256:{digest[:12]}"
    logits = generated[NETWORK].astype(np.float64) @ layer["fc.weight"].double().numpy().T  # without the bias
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    parts = [shares[start::10] for start in range(10)]
    of_parts = [
        np.exp((part * (np.log(part) - np.log(part.mean(axis=0)))).sum(axis=1).mean()) for part in parts
    ]
    assert record.value == pytest.approx(np.mean(of_parts), rel=1e-4)
    stand_in, _ = more_scores(generated, real, networks, CAPTIONS * 14)
    assert [each.feature_network.split("@")[0] for each in stand_in if each.metric == "IS"] == [
        "efficientnet-lite0"
    ]


def test_what_is_not_measured_is_said_with_the_reason(networks: Networks) -> None:
    generated, real = features(networks, 3, seed=1), Real.of(features(networks, 3, seed=2))
    found, left_out = more_scores(generated, real, Networks(networks.first, networks.second), CAPTIONS)
    assert found == []
    assert [sentence.split(":")[0] for sentence in left_out] == [
        "Precision and recall need more than 3 pictures.",
        "FID is not extrapolated to infinitely many pictures",
        "No Inception Score",
        "No CLIP scores",
    ]
    assert "from 2,049 on it does" in left_out[1]
    _, left_out = more_scores(generated, real, Networks(networks.first), CAPTIONS)
    assert left_out[2] == (
        "No Inception Score: it needs evaluate.inception_classes, or evaluate.second_network of kind "
        "efficientnet-lite0."
    )


def test_fid_is_extrapolated_from_more_pictures_than_features_on(networks: Networks) -> None:
    few = Networks(replace(networks.first, num_features=20))
    generated, real = features(few, 21, seed=1), Real.of(features(few, 21, seed=2))
    found, _ = more_scores(generated, real, few, CAPTIONS * 7)
    [record] = [record for record in found if record.metric == "fid_infinity"]
    assert record.standard_error and record.standard_error > 0 and record.num_samples == 21
    found, _ = more_scores(features(few, 20, seed=1), real, few, CAPTIONS * 7)
    assert "fid_infinity" not in [record.metric for record in found]


def test_a_picture_is_held_against_the_caption_and_the_real_picture_that_it_was_drawn_for(
    networks: Networks,
) -> None:
    assert networks.clip
    clip, texts = networks.clip.identity, networks.clip.text_features(CAPTIONS).numpy()
    real = features(networks, 3, seed=2) | {clip: texts}
    generated = features(networks, 6, seed=1)
    values = {}
    for name, order in (("own", [0, 1, 2, 0, 1, 2]), ("others", [1, 2, 0, 1, 2, 0])):
        found, _ = more_scores(generated | {clip: texts[order]}, Real.of(real), networks, CAPTIONS)
        values[name] = {record.metric: record.value for record in found}
    assert values["own"]["CLIP score"] == pytest.approx(2.5)
    assert values["own"]["CLIP image similarity"] == pytest.approx(1)
    assert values["others"]["CLIP score"] < 2.49


def test_a_copied_training_picture_is_found_and_counted() -> None:
    generator = np.random.default_rng(0)
    training, held_out, drawn = (generator.normal(size=(n, 5)).astype(np.float32) for n in (40, 200, 20))
    drawn[7] = training[31] + 1e-4
    detector, facts = fitted(training, held_out)
    found = near_copies(drawn, detector, facts)
    number, nearness = found.nearest[7]
    assert number == 31 and nearness < 1e-3
    record = found.record()
    assert record and record.threshold and record.standard_error
    assert record.value == pytest.approx(sum(each <= record.threshold for _, each in found.nearest) / 20)
    assert record.value >= 1 / 20 and record.standard_error > 0
    assert (record.num_samples, record.num_training, record.num_held_out) == (20, 40, 200)
    assert (record.expected_share, record.feature_network) == (0.01, "n")


def test_from_too_few_pictures_the_nearest_are_told_and_no_share() -> None:
    training = np.eye(4, dtype=np.float32)
    detector, facts = fitted(training, None)
    found = near_copies(training[[2, 0]], detector, facts)
    assert found.nearest == [(2, 0), (0, 0)]
    assert (found.share, found.record(), facts.threshold, facts.num_unseen) == (None, None, None, 4)


def test_a_captions_own_picture_is_counted_against_chance() -> None:
    training, captions = np.eye(8, dtype=np.float32), ["a", "b", "c", "d", "e", "e", "f", "f"]
    found = recited(training[[0, 1, 3, 3, 5]] * 0.9, captions, *fitted(training, None))
    assert (found.own, found.chance) == (4 / 5, pytest.approx((4 * 1 / 8 + 2 / 8) / 5))
    [copies, own] = found.records()
    assert (copies.metric, copies.value, copies.num_samples) == (RECITED, 1, 5)
    assert (own.metric, own.value, own.expected_share) == (OWN, found.own, found.chance)


def test_where_all_captions_are_the_same_none_has_a_picture_of_its_own() -> None:
    training = np.eye(8, dtype=np.float32)
    found = recited(training[:2], ["a photo of sks dog"] * 8, *fitted(training, None))
    assert [record.metric for record in found.records()] == [RECITED]


def fitted(training: np.ndarray, held_out: np.ndarray | None) -> tuple[CopyDetector, DetectorFacts]:
    others = None if held_out is None else torch.from_numpy(held_out)
    return fit_detector(torch.from_numpy(training), torch.from_numpy(training), others, "n")


@pytest.fixture(scope="module")
def evaluator(tiny_model: Path, clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluator:
    """One whose deciding network gives a picture's colours, in a moment."""
    storage = Storage.open(str(tmp_path_factory.mktemp("evaluator")))
    config = Config.model_validate(
        {
            "name": "run",
            "storage": storage.uri,
            "data": {"source": "pictures"},
            "model": {"base": str(tiny_model)},
            "search": {"learning_rates": [1e-3], "ladder": [4]},
            "evaluate": {"inference_steps": 2, "batch_size": 4, "bootstrap": 3, "second_network": None},
        }
    )
    evaluator = Evaluator(config, Dataset(storage, storage, Manifest()), num_threads=1)
    clip = load_clip(str(clip_folder))
    evaluator.networks = Networks(Colours("colours", "0" * 64, torch.device("cpu"), 3), None, clip)
    return evaluator


def test_scores_are_computed_on_the_cpu_where_the_devices_memory_is_too_small(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "device", "cuda")
    asked = []

    def work(device: str) -> int:
        asked.append(device)
        if device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return 7

    assert evaluator._computed(work) == 7 and asked == ["cuda", "cpu"]


def test_a_rung_pays_for_the_networks_that_rank_only(evaluator: Evaluator) -> None:
    ranking = evaluator.sample_features(None, CAPTIONS, [0, 1, 2])
    assert list(ranking) == [COLOURS]
    whole = evaluator.sample_features(None, CAPTIONS, [0, 1, 2], by=NetworkSet.ALL)
    assert list(whole) == evaluator.identities() and len(whole) == 2
    np.testing.assert_array_equal(whole[COLOURS], ranking[COLOURS])


def test_one_sampling_gives_all_measures_and_the_same_scores_as_before(evaluator: Evaluator) -> None:
    pictures = [encode_png(np.asarray(picture.permute(1, 2, 0))) for picture in noise(6, 64, 64)]
    real = Real.of(evaluator.picture_features(pictures))
    halves = [
        evaluator.sample_features(None, CAPTIONS, seeds, by=NetworkSet.ALL)
        for seeds in ([0, 1, 2], [3, 4, 5])
    ]
    detector = fitted(real.features[COLOURS], real.features[COLOURS])
    found = evaluator.measure(real, CAPTIONS * 2, detector, None, None, *halves)
    assert found.scores == evaluator.score(real, None, None, *halves)
    assert {record.metric for record in found.records()} >= {"precision", "CLIP score", COPIES}
    assert found.copies is not None and len(found.copies.nearest) == 6


def test_pictures_that_are_not_numbers_are_counted_as_black(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Real.of(
        evaluator.picture_features([encode_png(np.full((64, 64, 3), n, np.uint8)) for n in (9, 99)])
    )
    drawn = evaluator.sample_features(None, CAPTIONS, [0, 1, 2])
    assert evaluator.score(real, None, None, drawn).black == 0
    bias = evaluator.base.vae.decoder.conv_out.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, torch.nan))  # as an overflow leaves them
    black = evaluator.sample_features(None, CAPTIONS[:2], [0, 1])
    assert evaluator.score(real, None, None, drawn, black).black == 2
    assert evaluator.score(real, None, None, black).black == 2


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("num_actors", [1, 2, 3, 5])
def test_actors_are_dealt_whole_batches_that_are_the_same_however_many_they_are(
    count: int, num_actors: int
) -> None:
    items = range(4 * count - 3)
    shares = dealt([(64, 64)] * len(items), num_actors, batch_size=4)
    assert len(shares) == min(num_actors, count) and all(shares)
    batches = [list(share[i : i + 4]) for share in shares for i in range(0, len(share), 4)]
    assert batches == [list(items[i : i + 4]) for i in range(0, len(items), 4)]
    assert dealt([], num_actors, batch_size=4) == []


@pytest.mark.parametrize("num_actors", [1, 2, 3, 5, 20])
def test_a_batch_has_one_shape_and_is_the_same_however_many_actors_there_are(num_actors: int) -> None:
    shapes = [[(64, 64), (48, 80), (80, 48)][number * number % 7 % 3] for number in range(31)]
    shares = dealt(shapes, num_actors, batch_size=4)
    batches = []
    for share in shares:
        of_share = [shapes[number] for number in share]
        batches += [share[batch] for batch in batches_of(of_share, 4)]
    assert len(shares) == min(num_actors, len(batches))
    assert all(len({shapes[number] for number in batch}) == 1 for batch in batches)
    alone = dealt(shapes, 1, batch_size=4)[0]
    assert batches == [alone[batch] for batch in batches_of([shapes[n] for n in alone], 4)]
    assert sorted(sum(batches, [])) == list(range(31))
    assert in_order(shares, shares) == list(range(31))


@pytest.mark.parametrize("shapes", [[(64, 64)], [(64, 64), (48, 80), (80, 48)]])
def test_scores_do_not_depend_on_the_number_of_actors(
    evaluator: Evaluator, shapes: list[tuple[int, int]]
) -> None:
    """Thirteen pictures, which three actors do not share evenly: the very same features and scores."""
    size, found = evaluator.config.evaluate.batch_size, []
    of_each = [shapes[number % len(shapes)] for number in range(13)]
    pictures = [
        encode_png(np.asarray(noise(number + 1, *shape)[number].permute(1, 2, 0)))
        for number, shape in enumerate(of_each)
    ]
    for num_actors in (1, 3):
        shares = dealt(of_each, num_actors, size)
        assert len(shares) == num_actors and sum(map(len, shares)) == 13
        parts = [
            evaluator.sample_features(
                None, [CAPTIONS[i % 3] for i in share], share, shapes=[of_each[i] for i in share]
            )
            for share in shares
        ]
        real = join([evaluator.picture_features([pictures[i] for i in share]) for share in shares], shares)
        scores = evaluator.score(Real.of(real), None, shares, *parts)
        found.append((join(parts, shares)[COLOURS], real[COLOURS], scores))
    for one, three in zip(found[0][:2], found[1][:2], strict=True):
        np.testing.assert_array_equal(one, three)
    assert found[0][2] == found[1][2]
    for number in (0, 1, 12):  # in the order of the pictures, and each in its shape
        [alone] = evaluator.sample_features(None, [CAPTIONS[number % 3]], [number], shapes=[of_each[number]])[
            COLOURS
        ]
        np.testing.assert_allclose(found[0][0][number], alone, rtol=1e-3)
        [[png]] = [evaluator.sample_pictures(None, [CAPTIONS[0]], [number], shapes=[of_each[number]])]
        assert shape_of(png) == of_each[number]


def test_guidance_of_a_call_takes_the_place_of_the_configured_one(evaluator: Evaluator) -> None:
    plain, same, other = (
        evaluator.sample_pictures(None, CAPTIONS, [0, 1, 2], scale) for scale in (None, 3.0, 1.0)
    )
    assert evaluator.config.evaluate.guidance_scale == 3.0
    assert plain == same and plain != other
    given = evaluator.sample_features(None, CAPTIONS, [0, 1, 2], guidance_scale=1.0)
    configured = evaluator.sample_features(None, CAPTIONS, [0, 1, 2])
    assert not np.array_equal(given[COLOURS], configured[COLOURS])


def test_the_base_is_loaded_once_for_many_checkpoints(
    evaluator: Evaluator, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = [str(save_adapters(tiny_model, tmp_path / str(seed), seed)) for seed in (0, 1)]
    loads, real = [], loading.load_pipeline

    def counted(*arguments: Any, **options: Any) -> Any:
        loads.append(arguments)
        return real(*arguments, **options)

    def frozen() -> dict[str, int]:
        parts = {
            name: part for name, part in evaluator.base.components.items() if hasattr(part, "parameters")
        }
        return {
            f"{name}.{key.replace('.base_layer', '')}": value.data_ptr()
            for name, part in parts.items()
            for key, value in part.named_parameters()
            if ".lora_" not in key
        }

    def same() -> bool:
        """Whether the weights are in the same memory, but for those that an adapter is merged into."""
        after = frozen()
        moved = {name for name in before if before[name] != after[name]}
        kept = evaluator.merged._kept if evaluator.merged else []
        back = {weights.data_ptr() for _, weights in kept}
        return (
            after.keys() == before.keys()
            and len(moved) == len(back)
            and all(before[n] in back for n in moved)
        )

    evaluator._use(None)
    monkeypatch.setattr(loading, "load_pipeline", counted)
    before, pipeline = frozen(), evaluator.pipeline
    assert len(before) > 50
    drawn = []
    for weights in (None, checkpoints[0], checkpoints[1], checkpoints[0], None):
        drawn.append(evaluator.sample_pictures(weights, CAPTIONS, [0, 1, 2]))
        assert evaluator.pipeline is pipeline and same(), "its weights are the same memory"
    assert not loads
    assert drawn[0] == drawn[4] and drawn[1] == drawn[3]
    assert len({tuple(pictures) for pictures in drawn}) == 3


def test_kept_pictures_and_features_lie_beside_the_checkpoint(evaluator: Evaluator, tmp_path: Path) -> None:
    folder = Storage.open(str(tmp_path))
    kept = SampleFiles(folder.child("samples"), ["0-a.png", None, "1-b.png"])
    drawn = evaluator.sample_features(None, [*CAPTIONS, CAPTIONS[0]], [0, 1, 2, 3], kept)
    evaluator.score(Real.of(drawn), folder, None, drawn)
    assert folder.child("samples").files() == ["0-a.png", "1-b.png"]
    assert evaluator.difference(Real.of(drawn), folder, folder).value == 0
