"""Shares of GPUs and places for workers: what is refused, what fits, and how much memory is left."""

from typing import Any

import pytest

from cluster.capacity import check_resources
from cluster.gpus import OUTSIDE_BYTES, memory_fraction
from cluster.reservation import beside_training
from cluster.shape import Machine, check_places
from cluster.submit import stage_in
from ray_jobs.config import Config, ConfigError
from ray_jobs.training.trainer import placement

GIB = 2**30
ONE_GPU = {"CPU": 16.0, "GPU": 1.0, "node:10.0.0.1": 1.0}


def a_config(*, train: float = 1.0, evaluate: float = 1.0, workers: Any = 1, actors: int = 1) -> Config:
    return Config.model_validate(
        {
            "name": "shared",
            "data": {"source": "pictures"},
            "model": {"base": "model"},
            "train": {"use_gpu": True, "gpu_share": train, "num_workers": workers},
            "evaluate": {"use_gpu": True, "gpu_share": evaluate, "num_actors": actors},
            "serve": {"use_gpu": True},
            "search": {"learning_rates": [1e-3], "ladder": [2]},
        }
    )


def test_one_gpu_runs_the_whole_pipeline_in_shares() -> None:
    shared = a_config(train=0.7, evaluate=0.3)
    for stage in ("prepare", "search", "pipeline", "publish"):
        check_resources(shared, ONE_GPU, stage)
        check_places(shared, [Machine("one", 16, 1)], stage)


def test_whole_gpus_are_refused_where_there_is_one_and_the_shares_are_named() -> None:
    advice = r"needs 2 logical GPUs, but .* has 1; .* \(train.gpu_share: 0.7, evaluate.gpu_share: 0.3\)"
    with pytest.raises(ConfigError, match=advice):
        check_resources(a_config(), ONE_GPU)


@pytest.mark.parametrize("stage", ["prepare", "train", "pretrain", "evaluate", "compare", "publish", "serve"])
def test_only_what_a_stage_starts_must_fit(stage: str) -> None:
    check_resources(a_config(), ONE_GPU, stage)


@pytest.mark.parametrize(
    ("stage", "field"),
    [("train", "train"), ("prepare", "train"), ("evaluate", "evaluate"), ("serve", "serve")],
)
def test_a_stage_that_needs_a_gpu_names_its_own_setting_where_there_is_none(stage: str, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}.use_gpu: the run needs 1 GPUs"):
        check_resources(a_config(), {"CPU": 16.0}, stage)


@pytest.mark.parametrize(
    ("command", "stage"),
    [
        ("python -m ray_jobs.train --config configs/demo.yaml", "train"),
        ("python -m serving.command --ask 4", "serve"),
        ("true", ""),
    ],
)
def test_a_submitted_command_is_checked_for_its_stage(command: str, stage: str) -> None:
    assert stage_in(command.split()) == stage


def test_a_share_is_taken_from_one_gpu() -> None:
    """Two evaluators of 0.3 are put on one GPU, whose rest is too little for a worker of 0.7."""
    two = [Machine("two", 64, 2)]
    check_places(a_config(train=0.7, evaluate=0.3, workers=2), two)
    check_places(a_config(train=0.7, evaluate=0.15, workers=2, actors=2), two)
    crowded = a_config(train=0.7, evaluate=0.3, workers=2, actors=2)
    check_resources(crowded, {"CPU": 64.0, "GPU": 2.0})
    with pytest.raises(
        ConfigError, match=r"^train.gpu_share: 2 training workers of 0.7, 2 evaluators of 0.3"
    ):
        check_places(crowded, two)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"train": 0.5, "workers": 2}, "gpu_share: 0.5 would put two workers .* NCCL refuses"),
        ({"train": 0.7, "workers": [1, 2]}, "gpu_share: below 1, num_workers must be one number"),
        ({"train": 0.0}, "gpu_share"),
        ({"evaluate": 1.5}, "gpu_share"),
    ],
)
def test_a_share_that_cannot_work_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){told}"):
        a_config(**settings)


@pytest.mark.parametrize("section", ["train", "evaluate"])
def test_a_share_without_a_gpu_is_refused(section: str) -> None:
    tree = a_config(train=0.7, evaluate=0.3).model_dump(mode="json")
    tree[section]["use_gpu"] = False
    with pytest.raises(ValueError, match="gpu_share needs use_gpu"):
        Config.model_validate(tree)


def test_the_memory_of_shares_leaves_room_for_what_pytorch_does_not_count() -> None:
    total = 80 * GIB
    fractions = [memory_fraction(share, total) for share in (0.7, 0.3)]
    assert sum(fractions) * total + 2 * OUTSIDE_BYTES == pytest.approx(total)
    with pytest.raises(ValueError, match="gpu_share: 0.02 of a GPU of 24 GiB is less than the 0.7 GiB"):
        memory_fraction(0.02, 24 * GIB)


NODE = {"CPU": 96.0, "GPU": 8.0}
WITH_EVALUATORS = {"CPU": 94.0, "GPU": 6.0}


@pytest.mark.parametrize(
    ("workers", "trials", "free", "strategy"),
    [
        (8, 1, [WITH_EVALUATORS, NODE], "STRICT_PACK"),
        (8, 1, [WITH_EVALUATORS, WITH_EVALUATORS], "PACK"),
        (8, 2, [WITH_EVALUATORS, NODE], "PACK"),
        (4, 2, [NODE], "STRICT_PACK"),
        (8, 1, [{"CPU": 4.0, "GPU": 8.0}], "PACK"),
        (1, 1, [NODE], "PACK"),
        ([4, 8], 1, [NODE], "PACK"),
    ],
    ids=["one node", "no node", "for one of two", "both on one", "too few CPUs", "one worker", "elastic"],
)
def test_workers_are_kept_on_one_node_where_there_is_a_place_for_every_trial(
    workers: Any, trials: int, free: list[dict[str, float]], strategy: str
) -> None:
    assert placement(a_config(workers=workers).train, trials, free) == strategy


def test_an_elastic_training_leaves_room_for_all_that_runs_beside_it() -> None:
    beside = beside_training(a_config(workers=[1, 8], actors=2), "search")
    kinds = {each.kind: each.count for each in beside}
    assert kinds == {"trial driver": 1, "evaluator": 2, "driver and Ray Data task": 2}
    streamed = a_config(workers=[1, 8]).model_dump(mode="json") | {
        "data": {"source": "pictures", "encode": "stream", "encode_workers": 3}
    }
    gpus = {each.kind: each.count * each.gpus for each in beside_training(Config(**streamed), "train")}
    assert gpus["encoder"] == 3 and "evaluator" not in gpus
    assert beside_training(a_config(workers=2), "search") == []
    assert beside_training(a_config(workers=[1, 8]), "evaluate") == []
