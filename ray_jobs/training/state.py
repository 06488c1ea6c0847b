"""Access to a rank's training state by parameter and position, under any ZeRO stage.

DeepSpeed keeps the fp32 weights and Adam's moments in flat tensors of its own, split differently for each
stage and number of workers. This module presents them as fragments: elements `start` to `start + n` of a
named parameter. A checkpoint stores fragments, so any number of workers can load it under any other stage,
and it needs no pickle.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHTS, AVERAGES = "weights", "ema"
REDUCED_AT_ONCE = 1 << 24  # elements


@dataclass(frozen=True)
class Fragment:
    """The part of a trained parameter whose state this rank keeps.

    Attributes:
        name: name of the parameter.
        start: index of the fragment's first element in the flattened parameter.
        owner: fp32 tensor that the optimizer updates; the fragment is its elements `offset` to
            `offset + numel`.
    """

    name: str
    start: int
    owner: torch.Tensor
    offset: int
    numel: int

    @property
    def key(self) -> str:
        return f"{self.start}/{self.name}"

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a 1-D view of the fragment's elements in a tensor with the owner's layout."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)

    @property
    def weights(self) -> torch.Tensor:
        return self.of(self.owner)


def held_fragments(engine: Any) -> list[Fragment]:
    """Return all that this rank's optimizer updates: whole parameters under stage 0, else its own parts."""
    pieces = (_fragment(engine, name, parameter) for name, parameter in engine.module.all_trained)
    return [piece for piece in pieces if piece is not None]


def owned_fragments(engine: Any) -> list[Fragment]:
    """Return the fragments that this rank saves and averages; each element is owned by exactly one rank."""
    held = held_fragments(engine)
    if engine.zero_optimization_stage() > 0:
        return held
    rank, world_size = engine.global_rank, engine.world_size
    cuts = [
        (piece, piece.numel * rank // world_size, piece.numel * (rank + 1) // world_size) for piece in held
    ]
    return [
        Fragment(piece.name, begin, piece.owner, begin, end - begin)
        for piece, begin, end in cuts
        if end > begin
    ]


def _fragment(engine: Any, name: str, parameter: Any) -> Fragment | None:
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return Fragment(name, 0, parameter, 0, parameter.numel())
    if stage == 3:
        group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = engine.global_rank * parameter.partition_numel()
        numel = min(length, parameter.ds_numel - start)  # the last rank's part is padded
        owner = optimizer.fp32_partitioned_groups_flat[group]
        return Fragment(name, start, owner, offset, numel) if numel > 0 else None
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    [owner] = optimizer.param_groups[mapping.param_group_index]["params"]
    address = mapping.get_hp_fragment_address()
    return Fragment(name, mapping.lp_fragment_address.start, owner, address.start, address.numel)


def adam_state(engine: Any, owner: torch.Tensor) -> dict[str, Any]:
    """Return Adam's state for a tensor that the optimizer updates; zeros before the first step."""
    state: dict[str, Any] = engine.basic_optimizer.state[owner]
    if not state:
        state["step"] = torch.tensor(0.0)
        state.update({name: torch.zeros_like(owner) for name in MOMENTS})
    return state


def restart_adam(engine: Any, names: Iterable[str]) -> None:
    """Set the moments and the step count of the named parameters to 0, as before Adam's first step.

    While parameters are frozen, ZeRO lets their moments decay and counts steps; without ZeRO neither changes.

    Args:
        names: parameter names. Of the parameters that the optimizer updates as one tensor, name all or none.
    """
    wanted = set(names)
    for piece in held_fragments(engine):
        if piece.name in wanted:
            state = adam_state(engine, piece.owner)
            state["step"].zero_()
            for kind in MOMENTS:
                piece.of(state[kind]).zero_()


def snapshot(
    engine: Any, averages: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Copy the state that this rank owns to host memory.

    Args:
        averages: EMA vectors by fragment key; empty without averaging.

    Returns:
        fp32 vectors by `<kind>/<start>/<name>`, and the number of Adam steps by parameter.
    """
    tensors: dict[str, torch.Tensor] = {}
    steps: dict[str, int] = {}
    for piece in owned_fragments(engine):
        state = adam_state(engine, piece.owner)
        steps[piece.name] = int(state["step"])
        kinds = {WEIGHTS: piece.weights} | {kind: piece.of(state[kind]) for kind in MOMENTS}
        if averages:
            kinds[AVERAGES] = averages[piece.key]
        tensors |= {f"{kind}/{piece.key}": _on_host(value) for kind, value in kinds.items()}
    return tensors, steps


def _on_host(value: torch.Tensor) -> torch.Tensor:
    return value.detach().clone() if value.device.type == "cpu" else value.detach().cpu()


def write_shard(
    folder: Path, rank: int, world_size: int, tensors: dict[str, torch.Tensor], steps: dict[str, int]
) -> None:
    """Write the result of `snapshot` to this rank's file."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / shard_name(rank, world_size), {"steps": json.dumps(steps)})


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
        self.steps: dict[str, int] = {}
        self.pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for file in self.files:
            self.steps |= json.loads(file.metadata()["steps"])
            for key in file.keys():  # noqa: SIM118  not a dict
                kind, start, name = key.split("/", 2)
                length = file.get_slice(key).get_shape()[0]
                found = (int(start), int(start) + length, file, key)
                self.pieces.setdefault((kind, name), []).append(found)

    @property
    def names(self) -> set[str]:
        """Names of the stored parameters."""
        return {name for _, name in self.pieces}

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Return elements `start` to `start + numel` of a flattened parameter's values, fp32.

        Args:
            kind: `weights`, `ema`, or one of MOMENTS.

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
def load_state(shards: Shards, engine: Any) -> None:
    """Restore the weights that the optimizer updates, and Adam's state.

    The weights need it because an engine derives its fp32 weights from the model's after rounding those to
    bf16 or fp16.
    """
    counted: dict[int, int] = {}  # steps by owner; without ZeRO, unused parameters count none
    for piece in held_fragments(engine):
        state = adam_state(engine, piece.owner)
        piece.weights.copy_(shards.read(WEIGHTS, piece.name, piece.start, piece.numel))
        for kind in MOMENTS:
            piece.of(state[kind]).copy_(shards.read(kind, piece.name, piece.start, piece.numel))
        stored = max(shards.steps[piece.name], counted.get(id(piece.owner), 0))
        counted[id(piece.owner)] = stored
        state["step"].fill_(stored)


def whole(engine: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gather every parameter's values from all ranks' fragments into rank 0's host memory.

    All ranks must call this; ranks other than 0 get an empty dict.

    Args:
        values: the values that this rank owns, by fragment key.
    """
    found: dict[str, torch.Tensor] = {}
    mine: dict[str, list[Fragment]] = {}
    for piece in owned_fragments(engine):
        mine.setdefault(piece.name, []).append(piece)
    for bucket in _buckets(engine.module.all_trained):
        sizes = {name: _numel(parameter) for name, parameter in bucket}
        flat = torch.zeros(sum(sizes.values()), device=engine.device)
        begin = 0
        for name, numel in sizes.items():
            for piece in mine.get(name, []):
                flat[begin + piece.start : begin + piece.start + piece.numel] = values[piece.key]
            begin += numel
        if engine.world_size > 1:
            # Each element has one owner; the other ranks add 0 to it.
            torch.distributed.reduce(flat, dst=0)
        if engine.global_rank == 0:
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
