"""What the stages of ZeRO cost and save on two workers, beside torch's DistributedDataParallel."""

import json
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch

from benchmarks.data.measuring import in_fresh_process
from benchmarks.train.limit import METHODS, bare_loop
from benchmarks.train.measuring import changed, first_inputs, prepared, run_on_workers, timed_turns
from ray_jobs.config import Config
from ray_jobs.training.engine import Engine
from ray_jobs.training.flat import Flat
from ray_jobs.training.phases import stages_of
from ray_jobs.training.setup import build_engine, build_model
from ray_jobs.training.zero import ZeRO

TURNS = {"small": 2, "full": 9}  # after one that warms up
STEPS = {"small": 1, "full": 3}  # of a turn
WORKERS = 2
RIVAL = "DistributedDataParallel"
KINDS = ("parameters", "gradients", "optimizer")


def run(size: str) -> dict[str, Any]:
    figures = in_fresh_process(measure, size)
    for method, rows in figures.items():
        print(f"{method}: MiB a rank (of {WORKERS})", flush=True)
        print(f"    {'':<24} s a step  {'  '.join(KINDS)}  all", flush=True)
        for name, row in rows.items():
            sizes = [row["bytes"][kind] / 2**20 for kind in KINDS]
            told = "  ".join(f"{size:>{len(kind)}.1f}" for kind, size in zip(KINDS, sizes, strict=True))
            print(f"    {name:<24} {row['seconds']:>8.3f}  {told}  {sum(sizes):.1f}", flush=True)
    ratios = {method: _ratios(rows) for method, rows in figures.items()}
    said = "; ".join(
        f"{method}: "
        + ", ".join(f"{name} {r['seconds']:.2f} and {r['bytes']:.2f}" for name, r in found.items())
        for method, found in ratios.items()
    )
    print(f"ratio: of {RIVAL}'s seconds a step and bytes a rank, {said}", flush=True)
    return {"workers": WORKERS, "figures": figures, "ratios": ratios}


def _ratios(rows: dict[str, Any]) -> dict[str, dict[str, float]]:
    rival = rows[RIVAL]
    return {
        name: {
            "seconds": row["seconds"] / rival["seconds"],
            "bytes": sum(row["bytes"].values()) / sum(rival["bytes"].values()),
        }
        for name, row in rows.items()
        if name != RIVAL
    }


def measure(size: str) -> dict[str, dict[str, Any]]:
    found = {}
    with prepared(size) as (config, dataset, folder):
        configs = {method: changed(config, method=method, num_workers=WORKERS) for method in METHODS}
        loop = {"configs": configs, "dataset": dataset, "folder": folder, "size": size}
        run_on_workers(train_all, loop, WORKERS, folder, "zero")
        for method in METHODS:
            found[method] = json.loads((folder / f"zero-{method}.json").read_text())
    return found


def train_all(loop: dict[str, Any]) -> None:
    """On each worker: the rival and all stages in turns, on the same rows; rank 0 writes what it measured."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    torch.set_num_threads(1)
    for method, config in loop["configs"].items():
        inputs = first_inputs(config, loop["dataset"], rank, WORKERS)
        trained: dict[str, Trained] = {RIVAL: Rival(config, inputs)}
        trained |= {f"flat, stage {stage}": Ours(config, "flat", stage, inputs) for stage in range(3)}
        trained |= {
            f"DeepSpeed, stage {stage}": Ours(config, "deepspeed", stage, inputs) for stage in range(4)
        }
        steps = {name: each.step for name, each in trained.items()}
        turns = timed_turns(steps, turns=TURNS[loop["size"]], steps=STEPS[loop["size"]])
        found = {
            name: {"seconds": median(turns[name]), "turns": turns[name], "bytes": each.bytes()}
            for name, each in trained.items()
        }
        if rank == 0:
            (loop["folder"] / f"zero-{method}.json").write_text(json.dumps(found))


class Trained:
    """Something that trains on one batch, and tells what it keeps."""

    def step(self) -> None:
        self.backward()
        self.update()

    def bytes(self) -> dict[str, int]:
        """Of this rank, between the backward pass and the update: then the gradients are there."""
        self.backward()
        found = self.state()
        self.update()
        return found

    backward: Callable[[], object]
    update: Callable[[], object]
    state: Callable[[], dict[str, int]]


class Rival(Trained):
    def __init__(self, config: Config, inputs: dict[str, Any]) -> None:
        loop = bare_loop(config, inputs)
        self.backward = lambda: loop.backward(loop.forward())
        self.update = loop.update
        self.state = lambda: by_kind(loop.unet.parameters(), _gradients(loop.trained), loop.optimizer)


class Ours(Trained):
    """One of our engines under a stage of ZeRO, without data, averages and meter."""

    def __init__(self, config: Config, name: str, stage: int, inputs: dict[str, Any]) -> None:
        _, model = build_model(config)
        engine = build_engine(model, changed(config, engine=name, zero_stage=stage).train, WORKERS)
        engine.set_hyperparameters(
            stages_of(config.train, config.search.ladder[-1])[0], config.train.warmup_steps
        )
        given = {name: inputs[name] for name in ("latents", "conditions", "draws")}
        rows = len(inputs["latents"])
        weights = torch.full((rows,), 1 / (rows * WORKERS))
        self.backward = lambda: engine.accumulate(given, weights, last=True)
        self.update = lambda: engine.update(torch.zeros(1))
        self.state = lambda: kept_bytes(engine)


def kept_bytes(engine: Engine) -> dict[str, int]:
    """Bytes that a rank keeps of parameters (frozen ones too), gradients, and the optimizer's states with
    fp32 weights; memory that several share counts once."""
    parameters = list(engine.module.parameters())
    if isinstance(engine, Flat):
        gradients = [chunk.kept for chunk in engine.chunks if chunk.kept is not None]
        gradients += [chunk.message[1] for chunk in engine.chunks if chunk.message is not None]
    else:
        assert isinstance(engine, ZeRO)
        gradients = _gradients(parameters)
        for partition in getattr(engine.engine.optimizer, "averaged_gradients", {}).values():
            gradients += [each for each in partition or [] if each is not None]
    kept = [getattr(parameter, "ds_tensor", parameter) for parameter in parameters]
    return by_kind(kept, gradients, engine.optimizer)


def _gradients(parameters: Iterable[Any]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def by_kind(
    parameters: Iterable[torch.Tensor], gradients: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, int]:
    """Bytes of the storages of tensors, each counted for the first kind that has it."""
    # What the optimizer steps is the parameters themselves, or ZeRO's copy of them.
    states = [value for state in optimizer.state.values() for value in state.values()]
    kept = [*optimizer.state, *(value for value in states if torch.is_tensor(value))]
    seen: set[int] = set()
    kinds = zip(KINDS, (parameters, gradients, kept), strict=True)
    return {kind: sum(_unseen(tensor, seen) for tensor in tensors) for kind, tensors in kinds}


def _unseen(tensor: torch.Tensor, seen: set[int]) -> int:
    """Bytes of a tensor's storage that was not counted before."""
    storage = tensor.untyped_storage()
    if storage.data_ptr() in seen:
        return 0
    seen.add(storage.data_ptr())
    return storage.nbytes()
