"""How many trials train together is decided by the memory of the smallest GPU, for a plan as for a run."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.nodes import Node
from cluster.preflight import GPU, Equipment
from cluster.shape import Machine, machines_of
from ray_jobs.config import Config, ConfigError
from ray_jobs.console import GIB
from ray_jobs.planning import checks
from ray_jobs.planning.memory import HEADROOM, Model
from ray_jobs.planning.packs import checked_pack, largest_trial, with_pack
from ray_jobs.planning.plan import plan

BASE = Path(__file__).resolve().parents[2] / "models" / "emoji-base"
RATES = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3]
TRAIN = {"use_gpu": True, "batch_size": 8, "num_workers": 1, "lora": {"rank": 8, "alpha": 8}}


def a_config(pack: object = "auto", space: dict[str, Any] | None = None, **train: Any) -> Config:
    return Config.model_validate(
        {
            "name": "packed",
            "data": {"source": "pictures"},
            "model": {"base": str(BASE)},
            "train": TRAIN | train,
            "search": {"learning_rates": RATES, "ladder": [50], "pack": pack, "space": space or {}},
        }
    )


@pytest.fixture(scope="module")
def model() -> Model:
    """The module is measured once for all tests."""
    return Model(a_config())


def gpus(*room: float) -> list[Machine]:
    """A machine for each GPU, by the bytes that a rank may use of it."""
    return [Machine(f"node {number}", 32, 1, each / HEADROOM / GIB) for number, each in enumerate(room)]


def needed(model: Model, config: Config, trials: int) -> int:
    return model.memory(config.train, trials).device.whole


@pytest.mark.parametrize("fitting", [2, 3, 4])
def test_as_many_trials_as_the_smallest_gpu_holds_are_trained_together(model: Model, fitting: int) -> None:
    config = a_config()
    small = (needed(model, config, fitting) + needed(model, config, fitting + 1)) / 2
    decided, line = with_pack(config, model, gpus(10 * small, small))
    assert decided.search.pack == decided.trials_together == fitting
    assert line.startswith(f"search.pack: {fitting} of 5 trials together: {fitting + 1} need ")


def test_all_trials_are_trained_together_where_they_fit(model: Model) -> None:
    config = a_config()
    decided, line = with_pack(config, model, gpus(needed(model, config, 5) + 1000))
    assert (decided.trials_together, line) == (5, "")
    share = a_config(gpu_share=0.6)
    decided, _ = with_pack(share, model, gpus(needed(model, config, 5) + 1000))
    assert 1 < decided.trials_together < 5


def test_where_not_even_two_fit_each_has_its_own_workers_and_a_line_says_so(model: Model) -> None:
    config = a_config()
    for room in (needed(model, config, 2) - 1000, needed(model, config, 1) / 2):
        decided, line = with_pack(config, model, gpus(room))
        assert decided.search.pack == "off" and decided.trials_together == 1
        assert line.startswith("search.pack: each trial has its own workers: together 2 need ")


def test_fewer_trials_are_preferred_to_smaller_pieces(model: Model) -> None:
    """All rows of a trial stay in one piece; smaller ones, if they are asked for, leave room for others."""
    config = a_config()
    room = gpus(needed(model, config, 2) + 1000)
    assert with_pack(config, model, room)[0].trials_together == 2
    assert with_pack(a_config(micro_batch_size=2), model, room)[0].trials_together == 5


def test_every_trial_counts_as_the_largest(model: Model) -> None:
    ranks = a_config(space={"train.lora.rank": [64, 4], "train.lora.use_dora": [False, True]})
    largest = largest_trial(ranks, model).train.lora
    assert (largest.rank, largest.use_dora) == (64, True)
    layers = a_config(space={"train.lora.target_modules": [["to_q"], ["to_q", "to_k", "to_v"], ["to_k"]]})
    assert largest_trial(layers, model).train.lora.target_modules == ["to_q", "to_k", "to_v"]
    room = gpus(needed(model, a_config(), 5) + 1000)
    small, large = (
        with_pack(a_config(space={"train.lora.rank": [2, rank]}), model, room)[0] for rank in (4, 32)
    )
    assert 1 < large.trials_together < small.trials_together


def test_a_number_beyond_memory_is_refused_with_changes_that_help(model: Model) -> None:
    config = a_config(4)
    machines = gpus(needed(model, config, 3) + 1000)
    with pytest.raises(ConfigError, match=r"^search\.pack: 4: a rank needs .* and has .*: one of") as error:
        checked_pack(config, machines)
    changes = [yaml.safe_load(each) for each in str(error.value).split("one of")[1].split(",")]
    assert changes[0] == {"search.pack": 3} and {"train.gradient_checkpointing": True} in changes[1:]
    for change in changes:
        tree = config.model_dump(mode="json")
        for name, value in change.items():
            section, field = name.split(".")
            tree[section][field] = value
        checked_pack(Config.model_validate(tree), machines)


def test_a_number_that_fits_is_taken(model: Model) -> None:
    config = a_config(3)
    assert checked_pack(config, gpus(needed(model, config, 3) + 1000)) == (config, "")
    alone = gpus(needed(model, config, 1) + 1000)
    with pytest.raises(ConfigError, match=r"^search\.pack: 3: .*: one of search\.pack: off, "):
        checked_pack(config, alone)


@pytest.mark.parametrize("pack", ["auto", 3])
def test_without_knowing_the_memory_trials_train_together_and_a_line_says_so(
    pack: object, model: Model
) -> None:
    config = a_config(pack)
    for machines in ([], [Machine("node", 32, 8)]):
        decided, line = checked_pack(config, machines)
        assert decided == config and line.startswith(
            f"search.pack: {config.trials_together} trials together,"
        )
        assert "not known here; train.on_oom decides" in line


def test_what_trains_on_cpus_or_alone_is_left_as_it_is(model: Model) -> None:
    for config in (a_config(use_gpu=False), a_config("off"), a_config(method="full")):
        assert with_pack(config, model, gpus(1)) == (config, "")


def test_the_plan_shows_how_many_and_their_memory_and_what_makes_a_number_fit(model: Model) -> None:
    config = a_config()
    small = needed(model, config, 3) + 1000
    page, fits = plan(config, gpus(small), None)
    assert (
        "1 worker, 3 trials together (act" in page and "\nsearch.pack: 3 of 5 trials together: 4 need" in page
    )
    assert f"in all         {needed(model, config, 3) / 2**20:>10,.1f} MiB" in page
    page, fits = plan(a_config(5), gpus(small), None)
    assert not fits and "does not fit: a rank needs" in page and ": one of search.pack: 3, " in page


NODES = [Node(name, name, {"CPU": 8, "GPU": 2}) for name in "abc"]


def of_gpus(*gib: float) -> Equipment:
    found = [GPU("one", (9, 0), int(each * GIB), int(each * GIB)) for each in gib]
    return Equipment("2.13.0", "13.0", "2.29.7", gpus=tuple(found))


def test_a_run_decides_by_the_gpus_that_its_cluster_has(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = a_config()
    gib = (needed(model, config, 3) + 1000) / HEADROOM / GIB
    monkeypatch.setattr(checks, "living_nodes", lambda: NODES)
    monkeypatch.setattr(checks, "equipment", lambda nodes: {node.name: of_gpus(80, gib) for node in nodes})
    decided, lines = checks._checked(config, "search")
    assert decided.search.pack == 3 and lines[-1].startswith("search.pack: 3 of 5 trials together: ")
    assert checks._checked(config, "train") == (config, [])


def test_the_memory_of_a_nodes_smallest_gpu_is_known_once_it_was_looked_at() -> None:
    found = machines_of(NODES, {"a": of_gpus(80, 24), "b": of_gpus()})
    assert [machine.gpu_gib for machine in found] == [24, None, None]
    assert [machine.gpu_gib for machine in machines_of(NODES)] == [None] * 3
