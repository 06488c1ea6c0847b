"""One forward pass for rows with different adapters: the base's layers plus one low-rank product per row.

The base stays unchanged. A hook on each layer that an adapter changes adds the output of each row's own
adapter (grouped products: Chen et al., arXiv 2310.18547; Sheng et al., arXiv 2311.03285).
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

LayerKey = tuple[str, str]  # names of a pipeline component and of a layer in it
ALIGNED = 16  # elements: each update begins at a multiple, as tensor cores want it


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

    def then(self, other: "Update") -> "Update":
        """Return the update that does what this one and then another one do, with the sum of their ranks."""
        up, gain = self.up, other.gain
        if gain is not None:
            up = up * gain[:, None]
            gain = gain if self.gain is None else gain * self.gain
        else:
            gain = self.gain
        return Update(torch.cat([self.down, other.down]), torch.cat([up, other.up], dim=1), gain)


@dataclass(frozen=True)
class Slot:
    """Where the update of a layer lies in a packed row: down, up and gain, one after the other.

    Attributes:
        begin: its first element.
        down, up: shapes; `gain` tells whether there is one.
    """

    dtype: torch.dtype
    begin: int
    down: tuple[int, ...]
    up: tuple[int, ...]
    gain: bool

    @property
    def end(self) -> int:
        return self.begin + prod(self.down) + prod(self.up) + self.gain * self.up[0]

    def of(self, rows: torch.Tensor) -> Update:
        """Return views of the update in N packed rows of its dtype."""
        up = self.begin + prod(self.down)
        gain = up + prod(self.up)
        return Update(
            _view(rows, self.begin, self.down),
            _view(rows, up, self.up),
            _view(rows, gain, self.up[:1]) if self.gain else None,
        )


Layout = dict[LayerKey, Slot]
"""How updates of a component are packed into rows, one per dtype."""
Packed = dict[torch.dtype, torch.Tensor]
"""Rows by dtype, each N x elements."""


def _view(rows: torch.Tensor, begin: int, shape: tuple[int, ...]) -> torch.Tensor:
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return rows.as_strided((len(rows), *shape), (rows.stride(0), *strides), rows.storage_offset() + begin)


@dataclass(frozen=True, eq=False)
class Adapter:
    """LoRA weights in memory, from `adapters.read_adapter`.

    A batch with several adapters takes each one's updates as one packed row, so that a change of the batch
    costs few kernels.

    Attributes:
        squares: float32, 3 x out, of each DoRA layer: for each output the square of the base's weights, their
            product with the adapter's change, and the square of that, which tell the norm at any scale.
    """

    name: str
    updates: Mapping[LayerKey, Update]
    squares: Mapping[LayerKey, torch.Tensor] = field(default_factory=dict)
    _packed: dict[str, tuple[Layout, Packed]] = field(default_factory=dict)  # by component, the last one

    def __post_init__(self) -> None:
        """Pack the updates, and keep views of the rows instead of them."""
        views: dict[LayerKey, Update] = {}
        for part in self.parts:
            layout = _layout([self], part)
            packed = self.packed(part, layout)
            for place, slot in layout.items():
                down, up, gain = slot.of(packed[slot.dtype])
                views[place] = Update(down[0], up[0], None if gain is None else gain[0])
        object.__setattr__(self, "updates", views)

    def packed(self, part: str, layout: Layout) -> Packed:
        """Return the updates of a component in a layout, one row per dtype, zero-padded to its ranks."""
        if part not in self._packed or self._packed[part][0] != layout:
            self._packed[part] = layout, _pack(self.updates, layout)
        return self._packed[part][1]

    def scaled(self, place: LayerKey, scale: float) -> Update:
        """Return the update of a layer at another scale than 1, as peft computes it.

        DoRA divides by the norm of the base's weights with the scaled change (arXiv 2402.09353, eq. 5).
        """
        down, up, gain = self.updates[place]
        if gain is None:
            return Update(down, up * scale, None)
        base, product, change = self.squares[place]
        ratio = ((base + 2 * product + change) / (base + 2 * scale * product + scale**2 * change)).sqrt()
        ratio = ratio.to(up.dtype)
        return Update(down, up * (scale * ratio)[:, None], gain * ratio)

    @cached_property
    def num_bytes(self) -> int:
        return sum(part.nbytes for update in self.updates.values() for part in update if part is not None)

    @cached_property
    def parts(self) -> frozenset[str]:
        """Names of the components that this adapter changes."""
        return frozenset(part for part, _ in self.updates)


def _layout(adapters: Sequence[Adapter], part: str) -> Layout:
    """Return a layout that holds any of the adapters' updates of a component."""
    layout: Layout = {}
    ends: dict[torch.dtype, int] = {}
    for place in sorted({place for adapter in adapters for place in adapter.updates if place[0] == part}):
        updates = [adapter.updates[place] for adapter in adapters if place in adapter.updates]
        down, up = updates[0].down, updates[0].up
        rank = max(len(update.down) for update in updates)
        gain = any(update.gain is not None for update in updates)
        slot = Slot(down.dtype, ends.get(down.dtype, 0), (rank, *down.shape[1:]), (len(up), rank), gain)
        layout[place], ends[down.dtype] = slot, -(-slot.end // ALIGNED) * ALIGNED
    return layout


def _pack(updates: Mapping[LayerKey, Update], layout: Layout, device: torch.device | None = None) -> Packed:
    """Return updates in a layout; layers without one get an update that changes nothing.

    Args:
        device: needed if there are no updates.
    """
    device = device or next(iter(updates.values())).down.device
    ends: dict[torch.dtype, int] = {}
    for slot in layout.values():
        ends[slot.dtype] = max(slot.end, ends.get(slot.dtype, 0))
    rows = {dtype: torch.zeros((1, end), dtype=dtype, device=device) for dtype, end in ends.items()}
    for place, slot in layout.items():
        down, up, gain = slot.of(rows[slot.dtype])
        update = updates.get(place)
        if update is not None:
            down[0, : len(update.down)] = update.down
            up[0, :, : len(update.down)] = update.up
        if gain is not None:
            gain[0] = 1.0 if update is None or update.gain is None else update.gain
    return rows


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
        self._nothing: dict[str, tuple[Layout, Packed]] = {}  # by component, the last layout

    def stack(self, rows: Sequence[Adapter | None], part: str) -> Stacks:
        """Stack the updates of N rows for a component, zero-padded to the largest rank. If all rows have the
        same adapter it is stored once."""
        unique = list(dict.fromkeys(rows))
        present = [adapter for adapter in unique if adapter]
        layout = _layout(present, part)
        for place in layout:
            if place not in self._hooked:
                self._parts[part].get_submodule(place[1]).register_forward_hook(partial(self._add, place))
                self._hooked.add(place)
        if not layout:
            return {}
        packed = [
            each.packed(part, layout) if each else self._none(part, layout, present[0]) for each in unique
        ]
        stacked = packed[0]
        if len(unique) > 1:
            device = next(iter(stacked.values())).device
            index = torch.tensor([unique.index(row) for row in rows], device=device)
            stacked = {dtype: torch.cat([row[dtype] for row in packed])[index] for dtype in stacked}
        found = {place: slot.of(stacked[slot.dtype]) for place, slot in layout.items()}
        # Convolutions take all rows' kernels as one tensor.
        return {
            place: update._replace(down=update.down.contiguous()) if update.down.ndim > 3 else update
            for place, update in found.items()
        }

    def _none(self, part: str, layout: Layout, like: Adapter) -> Packed:
        """Return the packed row of no adapter, on the device of another one."""
        if part not in self._nothing or self._nothing[part][0] != layout:
            device = next(iter(like.updates.values())).down.device
            self._nothing[part] = layout, _pack({}, layout, device)
        return self._nothing[part][1]

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
        added = (
            _convolved(layer, inputs[0], update)
            if isinstance(layer, nn.Conv2d)
            else _multiplied(inputs[0], update)
        )
        if update.gain is not None:
            output = _scaled(layer, output, update.gain)
        return output + added


def _scaled(layer: Any, output: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Scale a layer's output, without its bias, by gains: N x out, or 1 x out if shared by all rows."""
    bias = layer.bias
    if isinstance(layer, nn.Conv2d):
        gain, bias = gain[..., None, None], None if bias is None else bias[:, None, None]
        return output * gain if bias is None else (output - bias) * gain + bias
    # The first axis holds more than the rows where a model folds others into it, such as Krea 2's texts.
    flat, gain = output.reshape(len(gain), -1, output.shape[-1]), gain[:, None]
    scaled = flat * gain if bias is None else (flat - bias) * gain + bias
    return scaled.reshape(output.shape)


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
