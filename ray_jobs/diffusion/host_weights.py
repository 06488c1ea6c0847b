"""Frozen weights of blocks or layers in host memory, on a device only while one of these runs.

diffusers' group offload (0.42.1) is made for drawing. It moves all of a block, also what is trained. It sets
`parameter.data`, which changes what autograd has saved. `torch.utils.checkpoint` leaves a recomputed block
by an exception as soon as it can: diffusers then leaves the block's weights on the device. And in the
backward pass it fetches the block that was there before, not the one that comes.

Here a block gets parameters of its own while it runs, and its own ones back after, also after an exception.
What autograd keeps for the backward pass therefore stays as it was, and goes as the backward pass does.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

ALIGNED = 256  # bytes: where CUDA's allocator lets tensors begin
ARENA = 1 << 30  # bytes pinned at once: torch rounds up to powers of two, for single blocks often far


@dataclass
class Weight:
    """A frozen weight of a block.

    Attributes:
        host: the parameter, which stays in host memory.
        places: the modules' tables of parameters that have it, and its name in each.
        segment, offset: where its bytes are in the block's segments.
    """

    host: nn.Parameter
    places: list[tuple[dict[str, nn.Parameter | None], str]]
    segment: int = 0
    offset: int = 0

    def put(self, parameter: nn.Parameter | None) -> None:
        for table, name in self.places:
            table[name] = parameter

    def view(self, segments: list[torch.Tensor]) -> torch.Tensor:
        """Return the weight in segments like those that have its bytes."""
        size, stride, num_bytes = self.host.shape, self.host.stride(), self.host.nbytes
        raw = segments[self.segment][self.offset : self.offset + num_bytes]
        return raw.view(self.host.dtype).as_strided(size, stride)


@dataclass
class Block:
    """The frozen weights of a block, and the bytes of all of them in host memory: uint8 vectors."""

    weights: list[Weight]
    segments: list[torch.Tensor] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(len(segment) for segment in self.segments)


@dataclass
class Fetched:
    """A block's segments on the device, complete when `done` is."""

    segments: list[torch.Tensor]
    done: Any

    def wait(self) -> list[torch.Tensor]:
        """Let the current stream wait; the segments may be used, or freed, from then on."""
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)
        return self.segments


def frozen_weights(module: nn.Module, resident: Iterable[nn.Parameter], *, own: bool = False) -> list[Weight]:
    """Return the weights of a module that are not among the resident ones, which move with the model.

    Args:
        own: without those of the modules in it.
    """
    kept, found = {id(parameter) for parameter in resident}, dict[int, Weight]()
    for part in [module] if own else module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) not in kept:
                weight = found.setdefault(id(parameter), Weight(parameter, []))
                weight.places.append((part._parameters, name))
    return list(found.values())


class HostWeights:
    """Keeps the frozen weights of blocks in host memory, and runs each block with copies on a device.

    While a block runs, the one that followed in the same place last time is copied on a second stream. For
    autograd not to keep all copies until the backward pass, blocks must be recomputed in it.

    Args:
        blocks: they run one after the other, none within another. Until `hold` is called they run as they
            are. Whatever recomputes their `forward` must be set after this.
        layers: the blocks are single layers, which may be within another: each with its own weights only. A
            layer is then copied ahead only where both have room in the bytes of the largest one.
    """

    def __init__(self, blocks: Iterable[nn.Module], *, layers: bool = False) -> None:
        self.modules, self.layers = list(blocks), layers
        self.room: int | None = None
        self.blocks: dict[nn.Module, Block] = {}
        self.device: torch.device | None = None
        self._ahead: dict[nn.Module, Fetched] = {}  # at most one
        self._last: tuple[nn.Module | None, nn.Module | None] = None, None
        self._next: dict[tuple[nn.Module | None, nn.Module | None], nn.Module] = {}  # after the last two
        for module in self.modules:
            module.forward = partial(self._run, module, module.forward)

    @contextmanager
    def left_out(self, resident: Iterable[nn.Parameter]) -> Iterator[None]:
        """Take the frozen weights out of the blocks, so that a move of the model leaves them in place."""
        resident = list(resident)
        weights = [
            weight for module in self.modules for weight in frozen_weights(module, resident, own=self.layers)
        ]
        for weight in weights:
            weight.put(None)
        try:
            yield
        finally:
            for weight in weights:
                weight.put(weight.host)

    @torch.no_grad()
    def hold(self, resident: Iterable[nn.Parameter], device: torch.device) -> None:
        """Move the frozen weights together in host memory, pinned for a GPU, and fetch them from there."""
        resident = list(resident)
        shared: dict[tuple[int, ...], Block] = {}
        for module in self.modules:
            weights = frozen_weights(module, resident, own=self.layers)
            key = tuple(id(weight.host) for weight in weights)
            if key in shared:  # tied layers
                for here, there in zip(shared[key].weights, weights, strict=True):
                    here.places += there.places
            self.blocks[module] = shared.setdefault(key, Block(weights))
        everything = [weight for block in shared.values() for weight in block.weights]
        left = sum(_padded(weight.host.nbytes) for weight in everything)
        arena, used = torch.empty(0, dtype=torch.uint8), 0
        for block in shared.values():
            start = used
            for weight in block.weights:
                size = _padded(weight.host.nbytes)
                if used + size > len(arena):
                    if used > start:
                        block.segments.append(arena[start:used])
                    arena = torch.empty(
                        max(size, min(ARENA, left)), dtype=torch.uint8, pin_memory=device.type == "cuda"
                    )
                    start = used = 0
                weight.segment, weight.offset = len(block.segments), used - start
                left, used = left - size, used + size
                if not _is_dense(weight.host):
                    weight.host.data = weight.host.contiguous()
                view = weight.view([*block.segments, arena[start:used]])
                weight.host.data = view.copy_(weight.host)
            if used > start:
                block.segments.append(arena[start:used])
        if self.layers:
            self.room = max((block.num_bytes for block in shared.values()), default=0)
        self.device = device
        # Of a pretended GPU in tests, all streams are one.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _run(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Run a block's `forward` with its weights on the device."""
        if self.device is None:
            return forward(*args, **named)
        block = self.blocks[module]
        fetched = self._ahead.pop(module, None)
        while self._ahead:  # another block was expected
            self._ahead.popitem()[1].wait()
        fetched = fetched or self._fetch(block)
        segments = fetched.wait()
        self._next[self._last], self._last = module, (self._last[1], module)
        following = self._next.get(self._last)
        if following is module:  # its recomputation, after the last block
            self._ahead[module] = fetched
        elif following is not None:
            both = block.num_bytes + self.blocks[following].num_bytes
            if self.room is None or both <= self.room:
                self._ahead[following] = self._fetch(self.blocks[following])
        for weight in block.weights:
            weight.put(nn.Parameter(weight.view(segments), requires_grad=False))
        try:
            return forward(*args, **named)
        finally:
            for weight in block.weights:
                weight.put(weight.host)

    @torch.no_grad()
    def _fetch(self, block: Block) -> Fetched:
        """Begin to copy a block's weights to the device."""
        assert self.device is not None
        if self._stream is None:
            return Fetched([segment.to(self.device, copy=True) for segment in block.segments], None)
        # Memory of the current stream: the copy waits for what used it before, and whoever frees it has
        # waited for the copy.
        segments = [torch.empty_like(segment, device=self.device) for segment in block.segments]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for here, there in zip(segments, block.segments, strict=True):
                here.copy_(there, non_blocking=True)
        return Fetched(segments, self._stream.record_event())


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNED) * ALIGNED


def _is_dense(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's elements fill its bytes, in any order."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))
