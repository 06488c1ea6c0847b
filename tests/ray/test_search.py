"""The search under Ray Tune, on landscapes whose best point is known: what Tune runs is a formula here, and
all that draws, stops, records and resumes is the real one. The pipeline's test trains.
"""

import json
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image
from ray.train import TrainingFailedError, UserCallback
from ray.util.state import list_actors

from cluster.local import LocalCluster
from cluster.promise import Promise
from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.data.preparation import prepare
from ray_jobs.evaluation.pool import evaluators
from ray_jobs.publish import publish
from ray_jobs.registry.aliases import promote
from ray_jobs.registry.models import TEST_FEATURES, registered
from ray_jobs.run.split import TEST, VALIDATION
from ray_jobs.search import search
from ray_jobs.training.checkpoint import REPORTED, SERIES, steps_of
from ray_jobs.training.tracking import Mirror
from ray_jobs.training.trainer import build_trainer
from ray_jobs.tuning.driver import Trials
from ray_jobs.tuning.scheduling import run_trials
from ray_jobs.tuning.trial import SearchContext
from tests.landscape import climb, out_of_room
from tests.ray.test_prepare import noisy
from tests.ray.test_training import tiny_config
from tests.record import record_fault

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
DECAY = "train.weight_decay"


def configured(folder: Path, *overrides: str) -> Config:
    search = [f"search.{override}" for override in ("pack=off", "scheduler=asha", *overrides)]
    return load_config(DEMO, [f"storage={folder}", *search])


def searched(config: Config, objective: Any = climb) -> Trials:
    """The trials of a search after it has run, or gone on."""
    storage = Storage.open(config.storage).child(config.name, "search")
    dataset = none = cast(Any, None)
    around = SearchContext(config, dataset, Promise(none, Future()), none)
    done = Trials(around, storage, Mirror(config, {}, "digest", list), objective)
    run_trials(config, done)
    assert not done.errors
    return done


def test_optuna_draws_from_ranges_and_goes_on_with_what_it_began(
    ray_cluster: LocalCluster, tmp_path: Path
) -> None:
    settings = ["learning_rates={low: 1.0e-6, high: 1.0e-1}", "algorithm=optuna", "max_concurrent_trials=3"]
    first = searched(configured(tmp_path, *settings, "num_trials=2"))
    assert len(first.settings) == 2
    went_on = searched(configured(tmp_path, *settings, "num_trials=4"))
    assert list(went_on.settings)[:2] == list(first.settings) and len(went_on.settings) == 4
    assert went_on.rows[: len(first.rows)] == first.rows


def test_trials_worse_than_the_median_of_the_others_stop(ray_cluster: LocalCluster, tmp_path: Path) -> None:
    rates = "learning_rates=[3.0e-4,2.9e-4,3.1e-4,1.0e-1]"
    rows = searched(configured(tmp_path, rates, "scheduler=median")).rows
    steps = {rate: max(row.step for row in rows if row.learning_rate == rate) for rate in (3e-4, 0.1)}
    assert steps == {3e-4: 320, 0.1: 80}


@pytest.mark.parametrize("scheduler", ["asha", "halving"])
def test_folds_train_what_is_left_of_the_fold_before(
    ray_cluster: LocalCluster, tmp_path: Path, scheduler: str
) -> None:
    config = load_config(
        DEMO,
        [
            f"storage={tmp_path}",
            f"search.scheduler={scheduler}",
            "search.pack=off",
            "data.folds=2",
            "search.folds=2",
            "search.learning_rates=[3.0e-4,1.0e-1]",
        ],
    )
    rows = searched(config).rows
    reached = {
        fold: {
            row.trial_id: max(r.step for r in rows if (r.trial_id, r.fold) == (row.trial_id, fold))
            for row in rows
            if row.fold == fold
        }
        for fold in (0, 1)
    }
    assert reached[0]["lr-0.0003"] == 320 and reached[0]["lr-0.1"] == 80
    assert all(reached[1][name] <= reached[0][name] for name in reached[1])
    assert {row.training for row in rows if row.fold == 1} <= {f"{n}_fold-1" for n in reached[0]}


def test_a_population_improves_on_what_it_began_with(ray_cluster: LocalCluster, tmp_path: Path) -> None:
    config = configured(
        tmp_path,
        "scheduler=population",
        "learning_rates=[1.0e-1,1.0e-3,3.0e-4]",
        "ladder=[80,160]",
        "max_concurrent_trials=3",
    )
    found = searched(config)
    members = {row.trial_id for row in found.rows}
    assert members == {f"member-{n}" for n in range(3)}
    for name in members:
        assert [row.step for row in found.rows if row.trial_id == name] == [80, 160]
    worst = [row for row in found.rows if row.trial_id == "member-0"]
    assert worst[1].parent == "member-2/80" and worst[1].begins_at == 80
    assert worst[1].fid < worst[0].fid / 2


def test_a_full_disk_ends_the_search_and_is_no_trial_that_is_left_out(
    ray_cluster: LocalCluster, tmp_path: Path
) -> None:
    config = configured(tmp_path, "learning_rates=[1.0e-4,1.0e-3,1.0e-2]", "max_concurrent_trials=2")
    begun = time.monotonic()
    with pytest.raises(ConfigError, match="^storage: .*Disk quota exceeded: free some space"):
        searched(config, out_of_room)
    assert time.monotonic() - begun < 300


def test_ctrl_c_ends_the_search_and_not_only_its_trials(ray_cluster: LocalCluster, tmp_path: Path) -> None:
    """Tune of Ray 2.60.0 would return the trials so far, of which a winner would be chosen."""
    config = configured(tmp_path, "learning_rates=[1.0e-5,1.0e-4,1.0e-3,1.0e-2]", "scheduler=none")
    results = tmp_path / config.name / "search" / "results.jsonl"

    def interrupt() -> None:
        while not results.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    with ThreadPoolExecutor(1) as beside, pytest.raises(KeyboardInterrupt):
        beside.submit(interrupt)
        searched(config)
    signal.signal(signal.SIGINT, former)


def test_the_budget_ends_the_search_at_a_rung(ray_cluster: LocalCluster, tmp_path: Path) -> None:
    config = configured(tmp_path, "space={train.weight_decay: [0.0,0.1]}", "scheduler=none", "max_steps=480")
    rows = searched(config).rows
    assert {(row.learning_rate, row.settings[DECAY]) for row in rows} == {(1e-3, 0.0), (1e-3, 0.1)}
    steps = {row.trial_id: row.step for row in rows}
    assert 480 <= sum(steps.values()) < 480 + 320, "four trials of 320 steps"


def test_a_stopped_trial_frees_its_workers_at_once_and_the_evaluators_outlive_it(
    ray_cluster: LocalCluster,
    tiny_dataset: Dataset,
    tiny_model: Path,
    picture_folder: Path,
    tmp_path: Path,
) -> None:
    """Each trial would train for an hour, and its driver and its worker take five of at most nine free CPUs:
    the second one can begin only if the first is stopped, at a rung that is no better than the one before
    (ray-project/ray#54305). No step is begun before the rung below it is measured."""
    config = tiny_config(
        tiny_model,
        picture_folder,
        tmp_path,
        "train.num_workers=1",
        "train.cpus_per_worker=4",
        "search.learning_rates=[1.0e-9,2.0e-9]",
        "search.ladder=[2,3,100000]",
        "search.pack=off",
        "search.scheduler=none",
        "search.patience=1",
        "search.wait_for_scores=true",
        "evaluate.num_actors=1",
        "evaluate.inference_steps=2",
        "evaluate.feature_network={kind: efficientnet-lite0}",
        "evaluate.second_network=null",
    )
    before = [actor.actor_id for actor in alive(ray_cluster)]  # of other tests
    with evaluators(config, tiny_dataset) as pool:
        pool.load(VALIDATION)
        [evaluator] = alive(ray_cluster, "Evaluator")
        base = pool.score(None, VALIDATION)
        found = search(config, tiny_dataset, pool)
        assert [(row.learning_rate, row.step) for row in found.rows] == [
            (1e-9, 2),
            (1e-9, 3),
            (2e-9, 2),
            (2e-9, 3),
        ]
        for first, second in (found.rows[:2], found.rows[2:]):
            [step] = json.loads((Path(second.checkpoint) / SERIES).read_text())
            assert step["time"] > (Path(first.checkpoint) / REPORTED).stat().st_mtime
        assert found.computed.keys() == {"lr-1e-09", "lr-2e-09"} and min(found.computed.values()) >= 3
        wait_until_gone(ray_cluster, before, "ImplicitFunc", "RayTrainWorker", "TrainController")
        assert [actor.pid for actor in alive(ray_cluster, "Evaluator")] == [evaluator.pid], (
            "its models were loaded again"
        )
        os.kill(evaluator.pid, signal.SIGKILL)
        killed = time.monotonic()
        assert pool.score(None, VALIDATION).fid == base.fid, "it starts again and repeats"
        took = time.monotonic() - killed
        record_fault("kill -9 of an evaluator", recovery_s=took, lost="one score, measured again")
    wait_until_gone(ray_cluster, before, "Evaluator")


def test_a_training_that_waits_for_a_score_ends_where_the_measuring_fails(
    tiny_dataset: Dataset, tiny_model: Path, picture_folder: Path, tmp_path: Path
) -> None:
    class Unmeasurable(UserCallback):
        def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
            raise RuntimeError("no evaluator is left")

    config = tiny_config(tiny_model, picture_folder, tmp_path, "train.num_workers=1", "search.ladder=[2,4]")
    trainer = build_trainer(
        config, tiny_dataset, name="waits", callbacks=[Unmeasurable()], wait_for_scores=True
    )
    with pytest.raises(TrainingFailedError, match="no evaluator is left"):
        trainer.fit()
    trainings = Storage.open(config.storage).child(config.name, "train", "waits")
    assert steps_of(trainings) == [2], "it went on without the score"


def alive(cluster: LocalCluster, *names: str) -> list[Any]:
    """Actors of these classes; without names all."""
    actors = list_actors(address=cluster.address, filters=[("state", "=", "ALIVE")], limit=1000)
    return [actor for actor in actors if not names or actor.class_name in names]


def wait_until_gone(cluster: LocalCluster, before: list[str], *names: str, timeout_s: float = 30) -> None:
    """Wait until all that is alive of these classes was there before."""
    deadline = time.monotonic() + timeout_s
    while new := [actor for actor in alive(cluster, *names) if actor.actor_id not in before]:
        assert time.monotonic() < deadline, new
        time.sleep(0.2)


def test_pictures_of_several_shapes_are_searched_on_and_two_versions_are_compared_in_pairs(
    ray_cluster: LocalCluster, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With buckets every score, kept picture and page is of pictures in the shapes of the real ones. And a
    version of the same test split is held against the champion by the error of their difference. By MIND. And
    what a trial trained is published: a whole model, which its own method makes."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder, rows = tmp_path / "pictures", []
    folder.mkdir()
    for number in range(36):
        size = [(128, 64), (80, 80), (60, 120)][number % 3]
        noisy(number, size).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"picture {number}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = "num_samples: 12, inference_steps: 1, batch_size: 4, bootstrap: 3, num_actors: 1"
    prompts = ["it on a beach", "another thing"]
    config = tiny_config(
        tiny_model,
        folder,
        tmp_path,
        "data.buckets=true",
        "search.ladder=[1,2]",
        "search.rank_by=mind",
        "search.space={train.method: [full]}",
        f"evaluate={{{evaluation}, second_network: null, memorisation_pictures: 4, prompts: {prompts}}}",
    )
    dataset = prepare(config)
    with evaluators(config, dataset) as pool:
        found = search(config, dataset, pool)
        winner = publish(config, dataset, pool, found)
        promote(config, 1)  # also where it does not beat its base
        [other] = [row for row in found.rows if row.step != winner.step]
        again = config.model_copy(update={"name": "again"})
        second = publish(again, dataset, pool, replace(found, winner=other))
        new, held = (Storage.open(config.storage).child(name, "model") for name in ("again", "tiny"))
        paired = pool.difference(new, held, TEST, TEST_FEATURES, winner.ranked_by)
        shapes = pool.shapes[TEST]
    assert winner.ranked_by == "mind" and winner.base_validation_mind and winner.base_test_mind
    assert all(row.score == row.mind and row.score_error == row.mind_error for row in found.rows)
    lowest = min(row.score for row in found.rows)
    assert winner.validation_mind == found.winner.mind
    assert found.winner.score - lowest == pytest.approx(found.winner.behind or 0.0, abs=1e-9)
    assert [registered(config, version).method for version in ("1", "2")] == ["full"] * 2
    # Both drew the same captions: far less than either's own error may part them.
    assert second.test_mind_error and second.registry_decision
    assert paired.standard_error < second.test_mind_error / 4
    if paired.value < -paired.standard_error:
        assert second.registry_decision.startswith("champion: ")
    else:
        error = f"by more than the error {paired.standard_error:.2f} of the difference in pairs"
        assert error in second.registry_decision
    assert all(row.fid > 0 and (row.validation_loss or 0) > 0 for row in found.rows)
    assert set(pool.shapes[VALIDATION]) | set(shapes) == {(48, 88), (64, 64), (88, 48)}
    run = tmp_path / "tiny"
    for number, (height, width) in enumerate(pool.shapes[VALIDATION][:8]):
        for kind in ("real", "base", "winner"):
            [file] = (run / "samples").glob(f"{number}-*-{kind}.png")
            assert Image.open(file).size == (width, height)
    assert sum(winner.test_shapes.values()) == winner.num_samples == 2 * len(shapes)
    assert set(winner.test_shapes) == {f"{width}x{height}" for height, width in shapes}
    page = (run / "report.html").read_text()
    for row in found.rows:  # from the same noise, by other weights
        kept = {path.name[:4]: path for path in (Path(row.checkpoint) / "prompts").iterdir()}
        assert [*sorted(kept)] == ["0-it", "1-an"]
        assert {Image.open(path).size for path in kept.values()} == {(64, 64)}
    assert page.count('alt="it on a beach: ') == page.count('alt="another thing: ') == 1 + len(found.rows)
    assert "Each caption is drawn in the shape of its real picture: " in page
    assert "for inception-2015-12-05 resized whole to 299 x 299 pixels, whatever its proportions" in page


def test_a_search_ends_at_once_where_nothing_can_measure_its_rungs(
    ray_cluster: LocalCluster, tiny_model: Path, picture_folder: Path, tiny_dataset: Dataset, tmp_path: Path
) -> None:
    config = tiny_config(
        tiny_model,
        picture_folder,
        tmp_path,
        "train.num_workers=1",
        "search.ladder=[100000]",
        "search.pack=off",
        "evaluate.num_actors=1",
        f"evaluate.feature_network={tmp_path}/absent.pt",
        "evaluate.second_network=null",
    )
    with evaluators(config, tiny_dataset) as pool, pytest.raises(ValueError, match="absent.pt"):
        search(config, tiny_dataset, pool)
    assert not steps_of(Storage.open(f"{tmp_path}/tiny/trainings/lr-0.001"))
