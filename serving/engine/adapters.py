"""LoRA adapters of one base: read from safetensors outside the step loop, kept in an LRU cache.

The format is that of `publish`: `pytorch_lora_weights.safetensors` with peft's names, the scale in the file's
metadata. It covers LoRA, rsLoRA and DoRA on linear layers and convolutions of the denoiser and the text
encoders. A file with anything else is refused.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

# Imported here, because `adapter_scale` would: it takes seconds, during which running rows would stall.
import peft  # noqa: F401
import torch
from safetensors import SafetensorError
from torch import nn

from ray_jobs.weights.adapter_files import adapter_scale, layer_in_memory, read_adapter_file
from ray_jobs.weights.loading import LORA_WEIGHTS
from serving.engine.batched_lora import Adapter, LayerKey, Update
from serving.request import Mixture, alone

DOWN, UP, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


def read_adapter(
    name: str,
    folder: Path,
    parts: Mapping[str, nn.Module],
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Read an adapter from its folder.

    Args:
        name: name of the adapter; its weights never change while the process lives.
        parts: the components of the pipeline that adapters may change, by name.
        device: device that computes; the layers are on it, unless they are offloaded.
        dtype: dtype of the adapter; None for that of the layers that it changes.

    Raises:
        ValueError: the file has unsupported content, or belongs to another base.
        OSError: there is no such file.
    """
    file = folder / LORA_WEIGHTS
    try:
        tensors, settings = read_adapter_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file: {error}") from error
    by_place: dict[LayerKey, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind = next((kind for kind in (DOWN, UP, MAGNITUDE) if key.endswith(kind)), None)
        part, _, layer = key.partition(".")
        if kind is None or part not in parts:
            raise ValueError(
                f"{file}: {key} is not read here, only {DOWN[1:]}, {UP[1:]} and {MAGNITUDE[1:]} of layers of "
                f"{', '.join(parts)}; load it with diffusers and save it again in peft's names"
            )
        layer = layer_in_memory(parts[part], layer.removesuffix(kind))
        by_place.setdefault((part, layer), {})[kind] = tensor
    updates: dict[LayerKey, Update] = {}
    squares: dict[LayerKey, torch.Tensor] = {}
    for place, stored in by_place.items():
        where, changed = f"{file}: {'.'.join(place)}", _layer(parts, place, file)
        updates[place], of_dora = _update(where, changed, stored, settings, place, device, dtype)
        if of_dora is not None:
            squares[place] = of_dora
    return Adapter(name, updates, squares)


def mixed(mixture: Mixture, adapters: Mapping[str, Adapter]) -> Adapter:
    """Return one adapter that does what those of a mixture do one after the other, in its order.

    Each changes the output of the previous one, as in peft; a DoRA thereby also scales the changes of those
    before it, so that the order matters with DoRA.

    Args:
        adapters: the adapters by name, from `read_adapter`.
    """
    updates: dict[LayerKey, Update] = {}
    for name, scale in mixture:
        for place in adapters[name].updates:
            update = adapters[name].scaled(place, scale)
            updates[place] = updates[place].then(update) if place in updates else update
    return Adapter(" + ".join(f"{name} x {scale!r}" for name, scale in mixture), updates)


def _layer(parts: Mapping[str, nn.Module], place: LayerKey, file: Path) -> nn.Linear | nn.Conv2d:
    """Return the layer that an update applies to."""
    part, name = place
    try:
        layer = parts[part].get_submodule(name)
    except AttributeError:
        raise ValueError(f"{file}: {part} has no layer {name}; it was trained on another base") from None
    if isinstance(layer, nn.Linear) or (
        isinstance(layer, nn.Conv2d)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    ):
        return layer
    kind = type(layer).__name__
    raise ValueError(f"{file}: {part}.{name} is a {kind}, and only linear layers and convolutions are read")


def _update(
    where: str,
    layer: nn.Linear | nn.Conv2d,
    tensors: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    place: LayerKey,
    device: str,
    dtype: torch.dtype | None,
) -> tuple[Update, torch.Tensor | None]:
    """Make the update of one layer from its stored tensors, and for DoRA the `Adapter.squares` of it."""
    weight = layer.weight
    if DOWN not in tensors or UP not in tensors:
        raise ValueError(f"{where}: {DOWN[1:]} and {UP[1:]} belong together, and one is missing")
    # Copies, because safetensors returns views of the file.
    dtype = dtype or weight.dtype
    stored = {kind: tensor.to(device, dtype, copy=True) for kind, tensor in tensors.items()}
    down, up = stored[DOWN], stored[UP].flatten(1)
    expected = (len(down), *weight.shape[1:])
    if down.shape != expected or up.shape != (len(weight), len(down)) or stored[UP].ndim != weight.ndim:
        raise ValueError(f"{where}: its shape does not fit the base's layer; it was trained on another base")
    up = up * adapter_scale(where, settings, place, rank=len(down))
    if MAGNITUDE not in stored:
        return Update(down, up, None), None
    base, change = weight.flatten(1).to(device, dtype), up @ down.flatten(1)
    gain = stored[MAGNITUDE].flatten() / torch.linalg.norm(base + change, dim=1)
    base, change = base.float(), change.float()
    squares = torch.stack([(base * base).sum(1), (base * change).sum(1), (change * change).sum(1)])
    return Update(down, up * gain[:, None], gain), squares


class AdapterCache:
    """Least-recently-used cache of adapters and mixtures in memory; a thread reads the missing ones.

    A mixture is kept beside the adapters that it was made of, which other mixtures and scales need too.
    An adapter that is evicted while rows use it stays in memory until they are done.

    Args:
        read: function from a name to its adapter; runs on the cache's thread, and may fetch and check files.
        max_bytes: maximum size of the cached adapters.
        on_loaded: callback from that thread after each read.
    """

    def __init__(
        self, read: Callable[[str], Adapter], *, max_bytes: int, on_loaded: Callable[[], object]
    ) -> None:
        self._read, self._on_loaded, self.max_bytes = read, on_loaded, max_bytes
        self._kept: OrderedDict[Mixture, Adapter] = OrderedDict()
        self._loading: dict[Mixture, Future[dict[Mixture, Adapter]]] = {}
        # Single ones that are kept, in use, or have just been read; only the thread looks.
        self._in_memory: WeakValueDictionary[str, Adapter] = WeakValueDictionary()
        self._thread = ThreadPoolExecutor(1, "adapters")
        self.hits = self.misses = 0

    @property
    def num_bytes(self) -> int:
        """Size of the cached adapters; may be read from any thread."""
        return sum(adapter.num_bytes for adapter in list(self._kept.values()))

    def get(self, mixture: Mixture) -> Adapter | None:
        """Return the adapter, or None while it is being read; the first call starts reading. Never blocks.

        Args:
            mixture: `alone(name)` for a single one.

        Raises:
            ValueError: the adapter is larger than `max_bytes`.
            Exception: any exception of `read`; the next call tries again.
        """
        if mixture in self._kept:
            self.hits += 1
            self._kept.move_to_end(mixture)
            return self._kept[mixture]
        if mixture not in self._loading:
            self.misses += 1
            self._loading[mixture] = self._thread.submit(self._read_checked, mixture)
            self._loading[mixture].add_done_callback(lambda _: self._on_loaded())
        self._keep_loaded(mixture)
        reading = self._loading.get(mixture)
        if reading and reading.done() and (error := reading.exception()):
            del self._loading[mixture]
            raise error
        return self._kept.get(mixture)

    def holds(self, mixture: Mixture) -> bool:
        """Return True if the adapter is in memory."""
        return mixture in self._kept

    def _read_checked(self, mixture: Mixture) -> dict[Mixture, Adapter]:
        """Return the adapters of a mixture, read from their files unless in memory, and the mixture."""
        adapters: dict[str, Adapter] = {}
        for name, _ in mixture:
            adapters[name] = self._in_memory.get(name) or self._read(name)
            self._in_memory[name] = adapters[name]
        read = {alone(name): adapter for name, adapter in adapters.items()}
        if mixture not in read:
            read[mixture] = mixed(mixture, adapters)
        if (wanted := read[mixture]).num_bytes > self.max_bytes:
            raise ValueError(
                f"adapter: {wanted.name!r} takes {wanted.num_bytes:,} bytes, more than the "
                f"{self.max_bytes:,} that all may take together"
            )
        return read

    def _keep_loaded(self, wanted: Mixture) -> None:
        """Cache the adapters that have been read, even if their request is gone. Failures stay for the next
        `get`."""
        read = [key for key, each in self._loading.items() if each.done() and not each.exception()]
        for key in sorted(read, key=lambda key: key == wanted):  # the wanted one last, so that it stays
            for each, adapter in self._loading.pop(key).result().items():
                self._kept[each] = adapter
                self._kept.move_to_end(each)
        while self.num_bytes > self.max_bytes:
            self._kept.popitem(last=False)

    def close(self) -> None:
        """Stop the thread, without waiting for the current read."""
        self._thread.shutdown(wait=False, cancel_futures=True)
