"""Memory of what draws and encodes pictures: encoders, evaluators, replicas.

As in `footprint.py`, the modules are built without memory, and run on tensors without data.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cluster.fetched import local_path
from ray_jobs.config import Config
from ray_jobs.data.encoding.shapes import square_latents
from ray_jobs.diffusion.families import Family, family_of
from ray_jobs.diffusion.precision import PRECISIONS, cast, to_precision
from ray_jobs.diffusion.quantization import quantize
from ray_jobs.planning.footprint import blank_conditions
from ray_jobs.weights.loading import dtypes_of, empty_model, read_index
from ray_jobs.weights.model_files import model_folder


@dataclass(frozen=True)
class Need:
    """Bytes of an actor that draws or encodes.

    Attributes:
        weights: on the device while the actor draws or encodes.
        host: weights that are in host memory meanwhile.
        captions: weights on the device while captions are encoded, if others than `weights` are.
        picture: activations of a picture by what is done with it: `drawing`, `decoding`, `encoding`.
    """

    weights: int
    picture: Mapping[str, int]
    host: int = 0
    captions: int = 0

    @property
    def least(self) -> int:
        """Bytes with one picture at a time."""
        return max(self.captions, self.weights + max(self.picture.values()))

    def at_once(self, room: int) -> dict[str, int]:
        """Return how many pictures fit at once into `room` bytes, by what is done with them."""
        left = room - self.weights if room >= self.captions else 0
        return {name: max(0, left) // size for name, size in self.picture.items()}


def needs(config: Config) -> tuple[Need, Need, Need]:
    """Return what an encoder, an evaluator and a replica take, with pictures of the run's size.

    Raises:
        ValueError: the base belongs to no known family.
    """
    data, evaluate, serve, model = config.data, config.evaluate, config.serve, config.model
    kinds = (
        (data.encode_precision, model.quantize),
        (evaluate.precision, model.quantize),
        (serve.precision, model.quantize or ("int8" if serve.int8_weights else None)),
    )
    parts = {kind: _Parts(config, *kind) for kind in set(kinds)}
    encoding, drawing, serving = (parts[kind] for kind in kinds)
    away = {"none": [], "encoders": serving.not_denoising, "model": serving.names}[serve.offload]
    here = [name for name in serving.names if name not in away]
    return (
        Need(encoding.bytes_of(encoding.not_denoising), {"encoding": encoding.peak(encoding.encode)}),
        _evaluator(drawing, evaluate.use_gpu),
        Need(
            serving.bytes_of(here) + serving.largest_layer(away),
            serving.of_a_picture,
            serving.bytes_of(away),
        ),
    )


def _evaluator(parts: "_Parts", use_gpu: bool) -> Need:
    """Return what an evaluator takes; on a GPU, denoiser and text encoders take turns."""
    if not use_gpu:
        return Need(parts.bytes_of(parts.names), parts.of_a_picture)
    autoencoder = parts.bytes["vae"]
    encoders = parts.bytes_of(parts.not_denoising) - autoencoder
    denoisers = parts.bytes_of(parts.names) - parts.bytes_of(parts.not_denoising)
    return Need(
        denoisers + autoencoder,
        parts.of_a_picture,
        host=max(denoisers, encoders),
        captions=encoders + autoencoder,
    )


class _Parts:
    """A model's parts without data, in a precision, its denoiser quantized if `stored` names a format.

    So are the text encoders if the configuration says so.
    """

    def __init__(self, config: Config, precision: str, stored: str | None) -> None:
        self.config = config
        base, revision = local_path(config.model.base), config.model.revision
        index = read_index(base, revision)
        self.family: Family = family_of(index["_class_name"])
        wanted = (*self.family.denoisers, "vae", *self.family.text.encoders)
        self.dtypes = dtypes_of(model_folder(base, revision=revision), index, PRECISIONS[precision])
        self.pipeline: SimpleNamespace = empty_model(base, wanted, revision=revision)
        self.names = [name for name in wanted if getattr(self.pipeline, name) is not None]
        if stored:
            for name in self.family.denoisers:
                quantize(getattr(self.pipeline, name), stored)
        if config.model.quantize_text:
            for encoder in self.family.text.present(self.pipeline).values():
                quantize(encoder, config.model.quantize_text)
        self.not_denoising = [name for name in self.names if name not in self.family.denoisers]
        self.modules = [getattr(self.pipeline, name) for name in self.names]
        self.without_data = FakeTensorMode(allow_non_fake_inputs=True)
        # Shared parameters are shared no longer once a module without memory is cast.
        self.bytes = {
            name: sum(
                each.numel() * (self.dtype(name) if each.is_floating_point() else each.dtype).itemsize
                for each in module.parameters()
            )
            for name, module in zip(self.names, self.modules, strict=True)
        }
        for name, module in zip(self.names, self.modules, strict=True):
            to_precision(module, self.dtype(name))
        with self.without_data:
            for module in self.modules:
                module.to_empty(device="cpu")
        self.latents = square_latents(config)

    def dtype(self, name: str) -> torch.dtype:
        return self.dtypes.get(name, self.dtypes["default"])

    def bytes_of(self, names: Sequence[str]) -> int:
        """Return the bytes of parts' weights."""
        return sum(self.bytes[name] for name in names)

    def largest_layer(self, names: Sequence[str]) -> int:
        """Return the bytes of the weights of the largest layer of parts, 0 without parts."""
        layers = (layer for name in names for layer in getattr(self.pipeline, name).modules())
        return max(
            (sum(each.nbytes for each in layer.parameters(recurse=False)) for layer in layers), default=0
        )

    @cached_property
    def of_a_picture(self) -> dict[str, int]:
        """Bytes that a picture takes: both rows of guidance, unless the denoiser takes it as an input."""
        rows = 1 if self.family.guidance_embedded(getattr(self.pipeline, self.family.denoiser)) else 2
        return {"drawing": rows * self.peak(self.denoise), "decoding": self.peak(self.decode)}

    def peak(self, work: Callable[[], None]) -> int:
        """Return the greatest number of bytes that live at once while `work` is done, without the weights."""
        with torch.no_grad(), self.without_data, LiveBytes(self.modules) as live:
            work()
        return live.most

    def encode(self) -> None:
        """Encode a picture; its caption takes less."""
        side = self.config.data.resolution
        self.family.codec.posterior(self.pipeline.vae, torch.empty(1, 3, side, side))

    def denoise(self) -> None:
        """Predict for one row."""
        model = {name: getattr(self.pipeline, name) for name in self.family.denoisers}
        conditions = blank_conditions(self.config, self.family, model[self.family.denoiser])
        dtype = self.dtype(self.family.denoiser)
        conditions = {name: cast(each, dtype) for name, each in conditions.items()}
        latents = torch.empty((1, *self.latents), dtype=dtype)
        self.family.denoise(model, latents, torch.full((1,), 500.0), conditions)

    def decode(self) -> None:
        self.family.codec.pixels(self.pipeline.vae, torch.empty((1, *self.latents)))


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that live at a time, each storage once.

    Attributes:
        most: the greatest number so far.
    """

    def __init__(self, modules: Iterable[torch.nn.Module] = ()) -> None:
        """Count all but the weights of `modules`."""
        super().__init__()
        self.now = self.most = 0
        self._weights = {each.untyped_storage()._cdata for part in modules for each in part.parameters()}
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        outputs = function(*arguments, **(named or {}))
        for each in tree_leaves(outputs):
            if isinstance(each, torch.Tensor):
                self._hold(each)
        self.most = max(self.most, self.now)
        return outputs

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._weights:
            return
        if not self._holders.get(key):
            self._holders[key] = 0
            self.now += size
        self._holders[key] += 1
        weakref.finalize(tensor, self._release, key, size).atexit = False

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            self.now -= size
