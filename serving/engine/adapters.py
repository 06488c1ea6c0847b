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

# Imported here, because `adapter_scale` would: it takes seconds, during which running rows would stall.
import peft  # noqa: F401
import torch
from safetensors import SafetensorError
from torch import nn

from ray_jobs.weights.adapter_files import adapter_scale, layer_in_memory, read_adapter_file
from ray_jobs.weights.loading import LORA_WEIGHTS
from serving.engine.batched_lora import Adapter, LayerKey, Update

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
    updates = {
        place: _update(
            f"{file}: {'.'.join(place)}", _layer(parts, place, file), stored, settings, place, device, dtype
        )
        for place, stored in by_place.items()
    }
    return Adapter(name, updates)


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
) -> Update:
    """Make the update of one layer from its stored tensors."""
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
    gain = None
    if MAGNITUDE in stored:
        merged = weight.flatten(1).to(device, dtype) + up @ down.flatten(1)
        gain = stored[MAGNITUDE].flatten() / torch.linalg.norm(merged, dim=1)
        up = up * gain[:, None]
    return Update(down, up, gain)


class AdapterCache:
    """Least-recently-used cache of adapters in memory; a thread reads the missing ones.

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
        self._kept: OrderedDict[str, Adapter] = OrderedDict()
        self._loading: dict[str, Future[Adapter]] = {}
        self._thread = ThreadPoolExecutor(1, "adapters")
        self.hits = self.misses = 0

    @property
    def num_bytes(self) -> int:
        """Size of the cached adapters; may be read from any thread."""
        return sum(adapter.num_bytes for adapter in list(self._kept.values()))

    def get(self, name: str) -> Adapter | None:
        """Return the adapter, or None while it is being read; the first call starts reading. Never blocks.

        Raises:
            ValueError: the adapter is larger than `max_bytes`.
            Exception: any exception of `read`; the next call tries again.
        """
        if name in self._kept:
            self.hits += 1
            self._kept.move_to_end(name)
            return self._kept[name]
        if name not in self._loading:
            self.misses += 1
            self._loading[name] = self._thread.submit(self._read_checked, name)
            self._loading[name].add_done_callback(lambda _: self._on_loaded())
        self._keep_loaded(name)
        reading = self._loading.get(name)
        if reading and reading.done() and (error := reading.exception()):
            del self._loading[name]
            raise error
        return self._kept.get(name)

    def holds(self, name: str) -> bool:
        """Return True if the adapter is in memory."""
        return name in self._kept

    def _read_checked(self, name: str) -> Adapter:
        adapter = self._read(name)
        if adapter.num_bytes > self.max_bytes:
            raise ValueError(
                f"adapter: {name!r} takes {adapter.num_bytes:,} bytes, more than the {self.max_bytes:,} "
                "that all may take together"
            )
        return adapter

    def _keep_loaded(self, wanted: str) -> None:
        """Cache the adapters that have been read, even if their request is gone. Failures stay for the next
        `get`."""
        read = [name for name, each in self._loading.items() if each.done() and not each.exception()]
        for name in sorted(read, key=lambda name: name == wanted):  # the wanted one last, so that it stays
            self._kept[name] = self._loading.pop(name).result()
        while self.num_bytes > self.max_bytes:
            self._kept.popitem(last=False)

    def close(self) -> None:
        """Stop the thread, without waiting for the current read."""
        self._thread.shutdown(wait=False, cancel_futures=True)
