"""A search whose trials are trained together: each ends as plain PyTorch trains it alone."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from ray.util.state import list_actors
from safetensors.torch import load_file

from cluster.local import LocalCluster
from ray_jobs.config import Config
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.evaluation.pool import evaluators
from ray_jobs.run.folder import RunFolder
from ray_jobs.run.split import VALIDATION
from ray_jobs.search import search
from ray_jobs.training.checkpoint import REPORTED
from ray_jobs.tuning.results import SearchResult
from tests.plain_training import PlainTraining
from tests.ray.test_training import tiny_config


def configured(model: Path, pictures: Path, folder: Path, *overrides: str) -> Config:
    return tiny_config(
        model,
        pictures,
        folder,
        "search.pack=auto",
        "train.warmup_steps=0",
        "evaluate.num_actors=1",
        "evaluate.num_samples=8",
        "evaluate.inference_steps=2",
        "evaluate.feature_network={kind: efficientnet-lite0}",
        "evaluate.second_network=null",
        *overrides,
    )


def found(config: Config, dataset: Dataset) -> SearchResult:
    with evaluators(config, dataset) as pool:
        pool.load(VALIDATION)
        return search(config, dataset, pool)


def workers(cluster: LocalCluster, *filters: tuple[str, str, str]) -> set[Any]:
    """All workers of trainings that were ever started, or those that pass the filters: (actor ID, pid)."""
    of_class = ("class_name", "=", "RayTrainWorker")
    actors = list_actors(address=cluster.address, filters=[of_class, *filters], limit=10000)
    return {(actor.actor_id, actor.pid) for actor in actors}


def published_name(name: str) -> str:
    """A trained parameter's name in the file."""
    name = name.replace("denoiser.", "unet.").replace(".default", "")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def kill_one(cluster: LocalCluster, before: set[Any], config: Config) -> None:
    """Once a rung is reported, kill a worker."""
    trainings = RunFolder.of(config).trainings
    while not any(
        trainings.child(name, step).exists(REPORTED)
        for name in trainings.folders()
        for step in trainings.child(name).folders()
    ):
        time.sleep(0.1)
    alive = workers(cluster, ("state", "=", "ALIVE"))
    os.kill(min(pid for _, pid in alive - before), signal.SIGKILL)


def test_trials_of_a_pack_end_as_alone_though_a_worker_is_killed(
    ray_cluster: LocalCluster,
    tiny_dataset: Dataset,
    tiny_model: Path,
    picture_folder: Path,
    tmp_path: Path,
) -> None:
    config = configured(
        tiny_model,
        picture_folder,
        tmp_path,
        "search.learning_rates=[1.0e-3,2.0e-3]",
        "search.space={train.lora.use_dora: [false, true]}",
        "search.ladder=[2,4,6]",
        "search.scheduler=halving",
        "train.epsilon=1.0e-3",  # with Adam's own, rounding moves what has hardly any gradient
    )
    before = workers(ray_cluster)
    killer = threading.Thread(target=kill_one, args=(ray_cluster, before, config), daemon=True)
    killer.start()
    result = found(config, tiny_dataset)
    killer.join()
    assert len(workers(ray_cluster) - before) == 2 * 2, "one group for all rungs, and its successor"
    steps = sorted(row.step for row in result.rows)
    assert steps == [2, 2, 2, 2, 4, 4, 6]
    for row in result.rows:
        settings = {"train.learning_rate": row.learning_rate, **row.settings}
        plain = PlainTraining(config.with_settings(settings), tiny_dataset)
        plain.run(row.step)
        expected = {published_name(name): value for name, value in plain.ema.averages.items()}
        got = load_file(Path(row.checkpoint, "weights", "pytorch_lora_weights.safetensors"))
        assert got.keys() == expected.keys()
        apart = max((got[name] - value).abs().max().item() for name, value in expected.items())
        assert apart < 1e-5, (row.training_name, row.step)
        assert (Path(row.checkpoint) / REPORTED).exists()


def test_trials_that_are_stopped_leave_the_pack(
    ray_cluster: LocalCluster,
    tiny_dataset: Dataset,
    tiny_model: Path,
    picture_folder: Path,
    tmp_path: Path,
) -> None:
    """Each would train for an hour, and is stopped at a rung that is no better than the one before. With two
    places for three trials, the third one trains when both are free."""
    config = configured(
        tiny_model,
        picture_folder,
        tmp_path,
        "search.pack=2",
        "search.learning_rates=[1.0e-9,2.0e-9,3.0e-9]",
        "search.ladder=[2,3,100000]",
        "search.scheduler=none",
        "search.patience=1",
        "train.num_workers=1",
    )
    before = workers(ray_cluster)
    rows = found(config, tiny_dataset).rows
    assert sorted((row.learning_rate, row.step) for row in rows) == [
        (rate, step) for rate in (1e-9, 2e-9, 3e-9) for step in (2, 3)
    ]
    assert len(workers(ray_cluster) - before) == 1
    [still_there] = [workers(ray_cluster, ("state", "=", "ALIVE")) - before]
    assert not still_there
