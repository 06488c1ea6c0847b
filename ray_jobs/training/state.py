"""Access to a rank's training state by parameter and position, under any ZeRO stage.

An engine keeps the fp32 weights and the optimizer's moments in flat tensors of its own, split differently
for each stage and number of workers. This module presents them as fragments: elements `start` to `start + n`
of a named parameter. A checkpoint stores fragments, so any number of workers can load it under any other
stage, and it needs no pickle.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ray_jobs.training.engine import Engine
from ray_jobs.training.fragments import Fragment

WEIGHTS, AVERAGES = "weights", "ema"
STEPS = "steps"
REDUCED_AT_ONCE = 1 << 24  # elements

Counts = dict[str, dict[str, float]]
"""Steps of the optimizer, and other scalars that it keeps, by parameter."""


def snapshot(engine: Engine, averages: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Counts]:
    """Copy the state that this rank owns to host memory.

    Args:
        averages: EMA vectors, named as in `engine.averaged`; empty without averaging.

    Returns:
        fp32 vectors by `<kind>/<start>/<name>`, and `STEPS` and other scalars of the optimizer.
    """
    tensors: dict[str, torch.Tensor] = {}
    counts: Counts = {name: {} for name in (STEPS, *engine.scalars)}
    counted: dict[int, dict[str, float]] = {}  # by owner: each look at a device waits for it
    for piece in engine.owned:
        state = engine.state_of(piece.owner)
        if id(piece.owner) not in counted:
            scalars = {name: state[name].item() for name in engine.scalars}
            counted[id(piece.owner)] = {STEPS: int(state["step"])} | scalars
        for name, value in counted[id(piece.owner)].items():
            counts[name][piece.name] = value
        kinds = {WEIGHTS: piece.weights}
        for kind, shape in engine.moments_of(piece.owner).items():
            if shape == piece.owner.shape:
                kinds[kind] = piece.of(state[kind])
            elif not piece.start:  # kept for the parameter, and not for its elements
                kinds[kind] = state[kind].view(-1)
        if averages:
            kinds[AVERAGES] = engine.average(averages, piece)
        tensors |= {f"{kind}/{piece.key}": _on_host(value) for kind, value in kinds.items()}
    return tensors, counts


def _on_host(value: torch.Tensor) -> torch.Tensor:
    return value.detach().clone() if value.device.type == "cpu" else value.detach().cpu()


def write_shard(
    folder: Path, rank: int, world_size: int, tensors: dict[str, torch.Tensor], counts: Counts
) -> None:
    """Write the result of `snapshot` to this rank's file."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    metadata = {name: json.dumps(each) for name, each in counts.items()}
    save_file(tensors, folder / shard_name(rank, world_size), metadata)


def shard_name(rank: int, world_size: int) -> str:
    """Return the name of a rank's file; it depends on the number of workers."""
    return f"{rank:04d}-of-{world_size:04d}.safetensors"


class Shards:
    """State files of all ranks that wrote a checkpoint, readable by parameter and position.

    Raises:
        ValueError: a rank's file is missing.
    """

    def __init__(self, folder: Path, world_size: int) -> None:
        from safetensors import safe_open

        files = [folder / shard_name(rank, world_size) for rank in range(world_size)]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise ValueError(f"{folder}: the training state is incomplete: {', '.join(missing)} is missing")
        self.files = [safe_open(path, "pt") for path in files]
        self.counts: Counts = {}
        self.pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for file in self.files:
            for name, found in file.metadata().items():
                self.counts.setdefault(name, {}).update(json.loads(found))
            for key in file.keys():  # noqa: SIM118  not a dict
                kind, start, name = key.split("/", 2)
                length = file.get_slice(key).get_shape()[0]
                piece = (int(start), int(start) + length, file, key)
                self.pieces.setdefault((kind, name), []).append(piece)

    @property
    def names(self) -> set[str]:
        """Names of the stored parameters."""
        return {name for _, name in self.pieces}

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Return elements `start` to `start + numel` of a flattened parameter's values, fp32.

        Args:
            kind: `weights`, `ema`, or a moment of the optimizer.

        Raises:
            ValueError: some of the elements are not stored.
        """
        values, filled = torch.empty(numel), 0
        for begin, end, file, key in self.pieces.get((kind, name), []):
            low, high = max(begin, start), min(end, start + numel)
            if low < high:
                values[low - start : high - start] = file.get_slice(key)[low - begin : high - begin]
                filled += high - low
        if filled != numel:
            raise ValueError(f"{kind} of {name}: {filled} of {numel} elements are stored")
        return values


@torch.no_grad()
def load_weights(shards: Shards, trained: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load stored weights into whole parameters; call it before the engine is built.

    Raises:
        ValueError: the checkpoint stores a different set of parameters.
    """
    parameters = dict(trained)
    if parameters.keys() != shards.names:
        different = sorted(parameters.keys() ^ shards.names)
        raise ValueError(
            f"the checkpoint was made with other trained layers: {different[0]} and {len(different) - 1} "
            "more are in only one of them; give the run another name"
        )
    for name, parameter in parameters.items():
        parameter.copy_(shards.read(WEIGHTS, name, 0, parameter.numel()).view_as(parameter))


@torch.no_grad()
def load_state(shards: Shards, engine: Engine) -> None:
    """Restore the weights that the optimizer updates, and its state.

    The weights need it because an engine derives its fp32 weights from the model's after rounding those to
    bf16 or fp16.
    """
    counted: dict[int, float] = {}  # steps by owner; without ZeRO, unused parameters count none
    for piece in engine.held:
        state = engine.state_of(piece.owner)
        piece.weights.copy_(shards.read(WEIGHTS, piece.name, piece.start, piece.numel))
        for kind, shape in engine.moments_of(piece.owner).items():
            if shape == piece.owner.shape:
                piece.of(state[kind]).copy_(shards.read(kind, piece.name, piece.start, piece.numel))
            else:
                state[kind].view(-1).copy_(shards.read(kind, piece.name, 0, shape.numel()))
        steps = shards.counts[STEPS][piece.name]
        if steps >= counted.get(id(piece.owner), 0):
            counted[id(piece.owner)] = steps
            state["step"].fill_(steps)
            for name in engine.scalars:
                state[name].fill_(shards.counts[name][piece.name])


def whole(engine: Engine, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gather every parameter's values from all ranks' fragments into rank 0's host memory.

    All ranks must call this; ranks other than 0 get an empty dict.

    Args:
        values: the values that this rank owns, named as in `engine.averaged`.
    """
    found: dict[str, torch.Tensor] = {}
    mine: dict[str, list[Fragment]] = {}
    for piece in engine.owned:
        mine.setdefault(piece.name, []).append(piece)
    for bucket in _buckets(engine.module.all_trained):
        sizes = {name: _numel(parameter) for name, parameter in bucket}
        flat = torch.zeros(sum(sizes.values()), device=engine.device)
        begin = 0
        for name, numel in sizes.items():
            for piece in mine.get(name, []):
                at = begin + piece.start
                flat[at : at + piece.numel] = engine.average(values, piece)
            begin += numel
        if engine.world_size > 1:
            # Each element has one owner; the other ranks add 0 to it.
            torch.distributed.reduce(flat, dst=0)
        if engine.rank == 0:
            pieces = flat.cpu().split(list(sizes.values()))
            for (name, parameter), values_of_it in zip(bucket, pieces, strict=True):
                found[name] = values_of_it.view(_shape(parameter)).clone()
    return found


def _buckets(trained: Iterable[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    bucket: list[tuple[str, Any]] = []
    size = 0
    for name, parameter in trained:
        bucket.append((name, parameter))
        size += _numel(parameter)
        if size >= REDUCED_AT_ONCE:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def _shape(parameter: Any) -> torch.Size:
    """Return the shape of the whole parameter, even where ZeRO stage 3 has removed its data."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _numel(parameter: Any) -> int:
    return _shape(parameter).numel()
