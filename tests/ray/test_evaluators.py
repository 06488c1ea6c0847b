"""The pool of evaluators on a few drawn pictures: what is shared, kept, chosen and published."""

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from safetensors.numpy import load, save

from cluster.local import LocalCluster
from cluster.storage import Storage
from ray_jobs.compare import Version, compare
from ray_jobs.config import Config, ConfigError
from ray_jobs.data.feeding.dataset import PARTS, Dataset
from ray_jobs.evaluation.actor import join
from ray_jobs.evaluation.pool import EvaluatorPool, evaluators, shape_of
from ray_jobs.evaluation.scores import Features
from ray_jobs.publish import publish
from ray_jobs.publishing.remembered import measure_remembered, require_remembered
from ray_jobs.publishing.subjects import measure_subjects
from ray_jobs.publishing.test_split_ledger import read_records
from ray_jobs.run.folder import SharedFolder
from ray_jobs.run.records import PREFERENCE, RungRow
from ray_jobs.run.samples import SAMPLES
from ray_jobs.run.split import TEST, VALIDATION, Split
from ray_jobs.training.checkpoint import folder_of, weights_of
from ray_jobs.tuning.guidance import MEASURED, choose_guidance
from ray_jobs.tuning.results import SearchResult, choose
from ray_jobs.weights.feature_networks import NetworkSet
from tests.conftest import captions, draw
from tests.ray.test_training import tiny_config
from tests.serving.conftest import save_adapters
from tests.small_set import PICTURES, small_set
from tests.unit.test_rank_by import RANKING

STEP = 2
SETTINGS = (
    "data.folds=2",
    "evaluate={num_samples: 11, inference_steps: 2, batch_size: 4, bootstrap: 3, num_actors: 2, "
    "feature_network: {kind: efficientnet-lite0}, second_network: null, memorisation_pictures: 8, "
    "subject_samples: 4, guidance_scale: 2.0}",
    "publish={sample_count: 2}",
)


@pytest.fixture(scope="module")
def config(
    tiny_model: Path, picture_folder: Path, clip_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Config]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        judged = f"evaluate.preference.model={clip_folder}"
        folder = tmp_path_factory.mktemp("evaluators")
        yield tiny_config(tiny_model, picture_folder, folder, *SETTINGS, judged)


@pytest.fixture(scope="module")
def dataset(config: Config) -> Dataset:
    return small_set(Storage.open(config.storage).child(config.name, "dataset"))


@pytest.fixture(scope="module")
def started(ray_cluster: LocalCluster, config: Config, dataset: Dataset) -> Iterator[EvaluatorPool]:
    with evaluators(config, dataset) as pool:
        yield pool


def fresh(started: EvaluatorPool, config: Config | None = None, num_actors: int = 2) -> EvaluatorPool:
    """A pool of the same actors that has loaded nothing."""
    pool = copy.copy(started)
    pool.config, pool.actors = config or started.config, started.actors[:num_actors]
    pool.captions, pool.shapes, pool.digests, pool._real, pool._training = {}, {}, {}, {}, {}
    pool.corrected, pool._restored_features, pool._known, pool._known_features = {}, {}, {}, {}
    return pool


@pytest.fixture(scope="module")
def rows(config: Config, started: EvaluatorPool, tiny_model: Path) -> list[RungRow]:
    """Two trials of one rung each, as a search has measured them."""
    pool, found = fresh(started), []
    pool.load(VALIDATION)
    for seed, trial in enumerate(("lr-0.001", "lr-0.0001")):
        folder = Storage.open(config.storage).child(config.name, "train", trial, folder_of(STEP))
        save_adapters(tiny_model, Path(folder.uri) / "weights", seed)
        folder.write_text("progress.json", json.dumps({"step": STEP, "why": "rung", "world_size": 1}))
        folder.write_text("complete-0000-of-0001", "{}")
        scores = pool.score(weights_of(folder.uri), VALIDATION, folder)
        row = {"trial_id": trial, "learning_rate": float(trial[3:]), "step": STEP, "checkpoint": folder.uri}
        row |= {"seconds": 1.0, "train_loss": 0.1, "images_per_second": 1.0, "settings": {}}
        row |= {"ranked_by": pool.ranked_by(VALIDATION)}
        found.append(RungRow.model_validate(row | scores.row() | scores.origin))
    assert all(row.score == row.corrected_fid != row.fid for row in found)
    return found


def test_a_score_does_not_depend_on_the_number_of_evaluators(started: EvaluatorPool) -> None:
    """Eleven pictures in batches of four."""
    scores = []
    for num_actors in (1, 2):
        pool = fresh(started, num_actors=num_actors)
        pool._measure_real = pool.features  # type: ignore[method-assign]  # not what the other has kept
        pool.load(VALIDATION)
        shares = [len(task.seeds) for task in pool._tasks(None, VALIDATION)]
        assert shares == [[11], [4, 7]][num_actors - 1]
        scores.append(pool.score(None, VALIDATION))
    assert scores[0] == scores[1]


def test_what_was_drawn_is_not_drawn_again_and_small_scores_do_not_all_wait_for_the_same_evaluator(
    started: EvaluatorPool, rows: list[RungRow]
) -> None:
    pool = fresh(started)
    pool.load(VALIDATION)
    weights = [None, *(weights_of(row.checkpoint) for row in rows)]
    small = [pool._tasks(each, VALIDATION, range(4)) for each in weights]
    assert [len(tasks) for tasks in small] == [1, 1, 1]  # a batch each
    many = [pool._tasks(f"trial-{number}", VALIDATION, range(4))[0].actor for number in range(8)]
    assert set(many) == set(pool.actors)
    by = [NetworkSet.ALL, NetworkSet.RANKING]  # the second is part of the first
    first, again = (
        pool._drawn(None, small[0], scale, each) for scale, each in zip((None, 2.0), by, strict=True)
    )
    assert first == again
    others = [pool._drawn(weights[1], small[1], scale, by[0]) for scale in (None, 3.0)]
    assert others[0] != others[1] and pool._drawn(weights[1], small[1], None, by[0]) == others[0]
    pool._drawn(weights[2], small[2], None, by[0])
    assert list(pool._known_features) == [None, weights[2]]
    assert pool._drawn(None, small[0], None, by[0]) == first
    whole = join(ray.get(first))
    pictures = pool.pictures(None, VALIDATION, range(4))
    png, actor = pool.features(pictures), pool.actors[0]
    png[ray.get(actor.preference_model.remote())] = ray.get(
        actor.rewards.remote(pictures, pool.captions[VALIDATION][:4])
    )
    assert whole.keys() == png.keys()
    for network, features in whole.items():
        np.testing.assert_array_equal(features, png[network])


def test_each_caption_is_drawn_in_the_shape_of_its_picture_however_many_evaluators_there_are(
    started: EvaluatorPool, tmp_path: Path
) -> None:
    shapes = [(64, 64), (48, 80), (80, 48)]
    scores, drawn, kept = [], [], []
    for num_actors in (1, 2):
        pool = fresh(started, num_actors=num_actors)
        pool.dataset = small_set(Storage.open(str(tmp_path / "set")), shapes=shapes)
        pool._measure_real = pool.features  # type: ignore[method-assign]  # not what the other has kept
        pool.load(VALIDATION)
        rung = Storage.open(str(tmp_path / str(num_actors)))
        scores.append((pool.score(None, VALIDATION, rung), pool.floor(VALIDATION)))
        drawn.append(pool.pictures(None, VALIDATION, 11))
        kept.append([rung.child(SAMPLES).read_bytes(name) for name in pool.sample_names(VALIDATION)])
    assert scores[0] == scores[1] and drawn[0] == drawn[1] and kept[0] == kept[1] == drawn[0][:2]
    real = [row["image"] for row in pool.dataset.pictures("validation", 11)]
    of_real = [shape_of(picture) for picture in real]
    assert [shape_of(picture) for picture in drawn[0]] == of_real and set(of_real) == set(shapes)
    asked = pool.prompted(None, "a circle", 4, shapes[1:])
    assert [shape_of(picture) for picture in asked] == [*shapes[1:], *shapes[1:]]


def test_features_of_real_pictures_are_measured_once_and_found_by_their_digest(
    config: Config, dataset: Dataset, started: EvaluatorPool
) -> None:
    folder = SharedFolder.of(config).real_features
    pictures = [row["image"] for row in dataset.pictures("train", 3)]
    before = set(folder.files())
    measured = started._measure_real(pictures)
    [file] = set(folder.files()) - before
    marked = {network: values + 1 for network, values in load(folder.read_bytes(file)).items()}
    folder.write_bytes(file, save(marked))
    again = fresh(started)._measure_real(pictures)  # of another start
    for network, values in again.items():
        np.testing.assert_array_equal(values, measured[network] + 1)
    other = fresh(started)._measure_real(pictures[::-1])
    assert len(set(folder.files()) - before) == 2
    np.testing.assert_allclose(other[network][::-1], measured[network], rtol=1e-3, atol=1e-4)


def test_with_folds_near_copies_are_told_by_the_fold_and_the_test_split_is_not_read(
    config: Config, started: EvaluatorPool
) -> None:
    search = config.search.model_copy(update={"folds": 2})
    pool = fresh(started, config.model_copy(update={"search": search}))
    pool.load(Split.of_fold(0))
    found = pool.measure(None, Split.of_fold(0))
    assert found.copies is not None
    facts = found.copies.facts
    whole_fold = pool.dataset.judged_by(Split.of_fold(0)).pictures("validation", 99)
    assert (facts.num_training, facts.num_held_out) == (8, len(whole_fold))
    assert found.recited is not None and len(found.recited.copies.nearest) == 8
    assert set(pool._real) == {Split.of_fold(0)} and set(pool._training) == set(pool._known) == {0}


def test_near_copies_at_every_rung_are_those_among_what_it_drew_for_its_score(
    started: EvaluatorPool, rows: list[RungRow], tmp_path: Path
) -> None:
    pool = fresh(started)
    pool.load(VALIDATION)
    rungs = [Storage.open(row.checkpoint) for row in rows]
    found = pool.copies_among(VALIDATION, [*rungs, Storage.open(str(tmp_path))])
    drawn = [pool.measure(weights_of(rung.uri), VALIDATION).copies for rung in rungs]
    assert found == [*(each and each.record() for each in drawn), None] and found[0]


def test_a_picture_that_several_folds_have_is_restored_once(
    started: EvaluatorPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, sent = fresh(started), list[int]()
    features = pool.features

    def counted(pictures: Sequence[bytes], through_autoencoder: int, by: NetworkSet) -> Features:
        sent.append(len(pictures))
        return features(pictures, through_autoencoder, by)

    monkeypatch.setattr(pool, "features", counted)
    training = pool.dataset.pictures("train", 6)
    some, more = pool._restored(training[:4]), pool._restored(training[2:])
    assert sent == [4, 2]
    for network, values in more.items():
        np.testing.assert_array_equal(values[:2], some[network][2:])
    assert pool._restored(training[:4], times=2)[network].shape == some[network].shape and sent[2:] == [4]


# This set has captions, but neither is it of a subject, nor has it references, control images or votes.
@pytest.mark.parametrize("measure", sorted([*RANKING, PREFERENCE]))
def test_two_rungs_are_compared_by_whatever_ranks(
    started: EvaluatorPool, rows: list[RungRow], measure: str
) -> None:
    pool = fresh(started)
    pool.rank_by = measure
    pool.load(VALIDATION)
    assert pool.ranked_by(VALIDATION) == measure
    one, other = (row | {"ranked_by": measure} for row in rows)
    first, second = (Storage.open(row.checkpoint) for row in (one, other))
    found = pool.difference(first, second, VALIDATION, measure=measure)
    assert found.value == pytest.approx(one.score - other.score, rel=1e-3) and found.standard_error > 0


def test_the_guidance_scale_that_suits_a_trial_wins_and_is_measured_once(
    config: Config, started: EvaluatorPool, rows: list[RungRow]
) -> None:
    scales = config.search.model_copy(update={"guidance_scales": [2.0, 1.0, 6.0]})
    config, pool = config.model_copy(update={"search": scales}), fresh(started)
    pool.load(VALIDATION)
    best, rows = choose(rows, pool)
    found = choose_guidance(config, rows, best, pool)
    storage = Storage.open(config.storage).child(config.name, "search")
    lines = storage.read_lines(MEASURED)
    measured = {(line["trial_id"], line["guidance_scale"]): line for line in lines}
    assert set(measured) == {(row.trial_id, scale) for row in rows for scale in (1.0, 6.0)}
    assert all(line["num_samples"] == 11 and "@sha256:" in line["feature_network"] for line in lines)
    scores_there = {key: line["corrected_fid"] for key, line in measured.items()}
    scores_there |= {(row.trial_id, 2.0): row.score for row in rows}
    assert (found.trial_id, found.guidance_scale) == min(scores_there, key=lambda key: scores_there[key])
    assert found.score == min(scores_there.values()) and len(set(scores_there.values())) == 6
    again = choose_guidance(config, rows, best, pool)
    assert again.score == found.score and storage.read_lines(MEASURED) == lines
    assert choose_guidance(started.config, rows, best, pool) is best, "nothing to choose from"


def test_a_subject_is_measured_by_its_photos_and_its_class_by_the_base_model(
    config: Config, dataset: Dataset, started: EvaluatorPool, rows: list[RungRow], tmp_path: Path
) -> None:
    instance, kind = captions()[0], "a circle"
    draw(instance, 0).save(tmp_path / "photo.png")
    source = {"path": str(tmp_path), "instance_prompt": instance, "class_prompt": kind}
    data = type(config.data).model_validate({"sources": [source], "resolution": 64, "folds": 2})
    config = config.model_copy(update={"data": data})
    weights = weights_of(rows[0].checkpoint)
    [found] = measure_subjects(config, dataset, started, weights)
    assert found.scores.num_photos == len(found.photos) == 1
    assert {place: len(pictures) for place, pictures in found.drawn.items()} == {
        (whose, prompt): 4 for whose in ("base", "winner") for prompt in (instance, kind)
    }
    [photo], [drawn] = (
        started.features(pictures).values() for pictures in (found.photos, found.drawn["winner", instance])
    )
    cosines = (drawn @ photo[0]) / np.linalg.norm(drawn, axis=1) / np.linalg.norm(photo[0])
    likeness = found.scores.winner_similarity
    assert likeness.value == pytest.approx(float(cosines.mean()), rel=1e-4)
    assert likeness.num_samples == 4 and likeness.feature_network in started.training_features(TEST, 1)
    assert found.scores.class_drift and found.scores.class_drift.value > 0.01
    base: Any = None
    [same] = measure_subjects(config, dataset, started, base)
    assert same.scores.class_drift
    assert same.scores.class_drift.value == pytest.approx(0, abs=1e-5)
    assert same.scores.winner_similarity == same.scores.base_similarity


def test_each_side_of_a_comparison_is_drawn_with_its_own_guidance_and_says_how_it_was_measured(
    config: Config, dataset: Dataset, started: EvaluatorPool, rows: list[RungRow]
) -> None:
    weights = weights_of(rows[0].checkpoint)
    one, other = Version("1", "version 1", weights, 1.0, "d"), Version("base", "base", None, 2.0)
    found = compare(config, dataset, fresh(started), one, other)
    folder = Storage.open(config.storage).child(config.name, "comparisons", "1-base")
    written = json.loads(folder.read_text("comparison.json"))
    for side, version in (("version 1", one), ("base", other)):
        assert written[side]["guidance_scale"] == version.guidance_scale
        assert written[side]["num_samples"] == 11 and "@sha256:" in written[side]["feature_network"]
    measure = written["difference"]["measure"]
    assert measure == "corrected_fid"
    scores = [written[side][measure] for side in ("version 1", "base")]
    assert scores[0] - scores[1] == pytest.approx(found.value, abs=1e-3)
    pool = fresh(started)
    pool.load(VALIDATION)
    drawn = pool.score(weights, VALIDATION, guidance_scale=1.0).fid.value
    assert written["version 1"]["fid"] == drawn != rows[0].fid


def test_what_is_forgotten_of_an_earlier_run_is_measured_on_its_pictures(
    config: Config, started: EvaluatorPool, rows: list[RungRow]
) -> None:
    evaluate = config.evaluate.model_copy(update={"remember": ["first"]})
    config, encoders = config.model_copy(update={"evaluate": evaluate}), "e" * 16
    with pytest.raises(ConfigError, match=r"^evaluate\.remember: first: no prepared run of this name in"):
        require_remembered(config)
    earlier = small_set(SharedFolder.of(config).encoded(encoders))
    folder = Storage.open(config.storage).child("first", "dataset")
    folder.write_text(PARTS, earlier.storage.read_text(PARTS))
    (earlier.manifest | {"encoders": encoders}).write(folder)
    require_remembered(config)
    pool, weights = fresh(started, config), weights_of(rows[0].checkpoint)
    [found] = measure_remembered(config, pool, weights, None)
    split = Split("validation", run="first")
    assert (found.run, found.measure, found.num_samples) == ("first", "corrected_fid", 11)
    before, after = (pool.score(each, split).row() for each in (None, weights))
    assert (found.before, found.after) == (before[found.measure], after[found.measure])
    assert found.change == pytest.approx(found.after - found.before, rel=1e-3) and found.change_error
    kept = Storage.open(config.storage).child(config.name, "remembered", "first")
    names = [kept.child(side, SAMPLES).files() for side in ("before", "after")]
    assert names[0] == names[1] and len(names[0]) == 2
    pool.load(VALIDATION)
    assert pool.score(weights, VALIDATION).fid.value == rows[0].fid, "the same pictures as of this run"
    assert found.after == pytest.approx(rows[0].score, rel=1e-3)
    same: Any = None
    [unchanged] = measure_remembered(config, pool, same, None)
    assert unchanged.change == 0 and unchanged.before == unchanged.after


def test_publish_reads_the_test_split_once_unless_forced_and_then_says_so(
    config: Config, dataset: Dataset, started: EvaluatorPool, rows: list[RungRow]
) -> None:
    run = Storage.open(config.storage).child(config.name)
    first, second = (SearchResult(row.trial_id, rows, rows, row, {}) for row in rows)
    winner = publish(config, dataset, fresh(started), first)
    assert winner.test_reads == 1
    reads = read_records(run)
    assert [each["event"] for each in reads] == ["read", "published"]
    assert publish(config, dataset, fresh(started), first) == winner
    pool = fresh(started)
    with pytest.raises(ConfigError, match=r"the test split of this run was read at .* --force"):
        publish(config, dataset, pool, second)
    assert not pool._real and read_records(run) == reads, "nothing was looked at"
    again = publish(config, dataset, pool, first, forced=True)
    assert again.test_reads == 2 and again.test_fid == winner.test_fid
    assert [each.get("forced") for each in read_records(run)] == [False, None, True, None]
    assert "used 2 times" in run.read_text("report.html")
    assert winner.test_preference == again.test_preference and winner.test_preference_error
    measures = winner.measures.winner if winner.measures else []
    rewards = [each for each in measures if each.metric == "mean reward"]
    assert [each.feature_network for each in rewards] == [winner.preference_model]
    kept = load(run.child("model").read_bytes("test.features"))[str(winner.preference_model)]
    assert kept.shape == (11, 1) and rewards[0].value == pytest.approx(float(kept.mean()))
    assert winner.num_samples == 11 and again.registry_version == winner.registry_version
    assert len(PICTURES["test"]) == 11
