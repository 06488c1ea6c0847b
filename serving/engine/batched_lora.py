"""One forward pass for rows with different adapters: the base's layers plus one low-rank product per row.

The base stays unchanged. A hook on each layer that an adapter changes adds the output of each row's own
adapter (grouped products: Chen et al., arXiv 2310.18547; Sheng et al., arXiv 2311.03285).
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

LayerKey = tuple[str, str]  # names of a pipeline component and of a layer in it


class Update(NamedTuple):
    """An adapter's change to one layer: y becomes gain * (y - bias) + bias + up (down x)."""

    down: torch.Tensor  # rank x in; for a convolution rank x in x height x width
    up: torch.Tensor  # out x rank, with the adapter's scale and gain folded in
    gain: torch.Tensor | None  # out; None means 1, for all but DoRA (arXiv 2402.09353)

    def of(self, part: slice) -> "Update":
        """Return a slice of the rows of a stack."""
        if len(self.down) == 1:  # shared by all rows
            return self
        return Update(self.down[part], self.up[part], None if self.gain is None else self.gain[part])


@dataclass(frozen=True, eq=False)
class Adapter:
    """LoRA weights in memory, from `adapters.read_adapter`."""

    name: str
    updates: Mapping[LayerKey, Update]

    @cached_property
    def num_bytes(self) -> int:
        return sum(part.nbytes for update in self.updates.values() for part in update if part is not None)

    @cached_property
    def parts(self) -> frozenset[str]:
        """Names of the components that this adapter changes."""
        return frozenset(part for part, _ in self.updates)


Stacks = Mapping[LayerKey, Update]  # updates of N rows, each tensor N x ..., or 1 x ... if shared by all


class _Active(threading.local):
    """The stacks that apply to the current thread's pass."""

    stacks: Stacks = {}  # noqa: RUF012  # never written into


class BatchedLoRA:
    """Hooks in a model that apply adapters. Each thread runs one pass at a time.

    Args:
        parts: components that adapters may change, by their name in the pipeline.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self._parts = parts
        self._hooked: set[LayerKey] = set()
        self._active = _Active()

    def stack(self, rows: Sequence[Adapter | None], part: str) -> Stacks:
        """Stack the updates of N rows for a component, zero-padded to the largest rank. If all rows have the
        same adapter it is stored once."""
        unique = list(dict.fromkeys(rows))
        index = [unique.index(row) for row in rows]
        places = dict.fromkeys(place for adapter in unique if adapter for place in adapter.updates)
        stacks = {}
        for place in places:
            if place[0] != part:
                continue
            if place not in self._hooked:
                self._parts[part].get_submodule(place[1]).register_forward_hook(partial(self._add, place))
                self._hooked.add(place)
            updates = [adapter.updates.get(place) if adapter else None for adapter in unique]
            stacks[place] = _stacked(updates, index if len(unique) > 1 else [0])
        return stacks

    @contextmanager
    def applied(self, stacks: Stacks) -> Iterator[None]:
        """Apply the adapters of N rows to this thread's passes within the block."""
        self._active.stacks = stacks
        try:
            yield
        finally:
            self._active.stacks = {}

    def _add(self, place: LayerKey, layer: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> Any:
        update = self._active.stacks.get(place)
        if update is None:
            return None  # the layer's own output
        added = _convolved(layer, inputs[0], update) if output.ndim == 4 else _multiplied(inputs[0], update)
        if update.gain is not None:
            shape = (len(update.gain), *(1,) * (output.ndim - 2), -1)
            gain, bias = update.gain.reshape(shape), layer.bias
            if output.ndim == 4:
                gain = gain.permute(0, 3, 1, 2)
                bias = None if bias is None else bias.reshape(-1, 1, 1)
            output = output * gain if bias is None else (output - bias) * gain + bias
        return output + added


def _multiplied(inputs: torch.Tensor, update: Update) -> torch.Tensor:
    """Map N x ... x in to N x ... x out, each row by its own matrices, or all in one product if shared."""
    flat = inputs.reshape(len(update.down), -1, inputs.shape[-1])
    added = torch.bmm(torch.bmm(flat, update.down.mT), update.up.mT)
    return added.reshape(*inputs.shape[:-1], -1)


def _convolved(layer: nn.Conv2d, inputs: torch.Tensor, update: Update) -> torch.Tensor:
    """Map N x in x h x w to N x out x h' x w', each row by its own kernels or all by shared ones, as one
    grouped convolution with one group per kernel."""
    groups, rank = update.down.shape[:2]
    hidden = F.conv2d(
        inputs.reshape(len(inputs) // groups, -1, *inputs.shape[2:]),
        update.down.flatten(0, 1),
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=groups,
    )
    hidden = hidden.reshape(len(inputs), rank, *hidden.shape[2:])
    return torch.matmul(update.up, hidden.flatten(2)).unflatten(2, hidden.shape[2:])


def _stacked(updates: Sequence[Update | None], index: Sequence[int]) -> Update:
    """Stack the updates of one layer; row i takes `updates[index[i]]`."""
    present = [update for update in updates if update]
    if len(updates) == 1:
        (only,) = present
        return Update(only.down[None], only.up[None], None if only.gain is None else only.gain[None])
    rank = max(len(update.down) for update in present)
    down, up = present[0].down, present[0].up
    downs = down.new_zeros(len(updates), rank, *down.shape[1:])
    ups = up.new_zeros(len(updates), len(up), rank)
    gains = None
    if any(update.gain is not None for update in present):
        gains = up.new_ones(len(updates), len(up))
    for place, update in enumerate(updates):
        if update:
            downs[place, : len(update.down)] = update.down
            ups[place, :, : len(update.down)] = update.up
            if update.gain is not None:
                assert gains is not None
                gains[place] = update.gain
    rows = torch.tensor(index, device=down.device)
    return Update(downs[rows], ups[rows], None if gains is None else gains[rows])
