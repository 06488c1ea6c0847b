"""Memory of what draws, encodes and measures pictures: encoders, evaluators, replicas.

As in `footprint.py`, the modules are built without memory, and run on tensors without data.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cluster.fetched import local_path
from ray_jobs.config import Config
from ray_jobs.data.encoding.shapes import shown_tokens, square_latents
from ray_jobs.diffusion.families import Captions, Family, family_of
from ray_jobs.diffusion.families.control import CONTROLNET
from ray_jobs.diffusion.precision import PRECISIONS, cast, to_precision
from ray_jobs.diffusion.quantization import quantize
from ray_jobs.planning.footprint import blank_conditions
from ray_jobs.training.setup import add_channels, begun_controlnet
from ray_jobs.weights.conditioner import conditioner_bytes
from ray_jobs.weights.feature_networks import load_networks
from ray_jobs.weights.loading import dtypes_of, empty_model, load_text, read_index
from ray_jobs.weights.model_files import model_folder

EMBEDDING = "embedding"
MANY_WORDS = 4096  # more than the tokens of which any text encoder takes


@dataclass(frozen=True)
class Need:
    """Bytes of an actor that draws or encodes.

    Attributes:
        weights: on the device while the actor draws or encodes.
        host: weights that are in host memory meanwhile.
        captions: weights on the device while captions are embedded, if others than `weights` are.
        networks: weights of feature networks and of models of `data.control`, which are on the device all the
            time.
        engines: models that a replica holds at once; the other fields are those of all.
        picture: activations of a picture by what is done with it: `drawing`, `decoding`, `encoding`,
            `embedding` its caption, `measuring` its features.
    """

    weights: int
    picture: Mapping[str, int]
    host: int = 0
    captions: int = 0
    networks: int = 0
    engines: int = 1

    @property
    def least(self) -> int:
        """Bytes with one picture at a time."""
        return max(self._held(doing) + size for doing, size in self.picture.items())

    def at_once(self, room: int) -> dict[str, int]:
        """Return how many pictures fit at once into `room` bytes, by what is done with them."""
        return {doing: max(0, room - self._held(doing)) // size for doing, size in self.picture.items()}

    def _held(self, doing: str) -> int:
        """Return the bytes of the weights on the device meanwhile."""
        return self.networks + (self.captions if doing == EMBEDDING and self.captions else self.weights)


def needs(config: Config) -> tuple[Need, Need, Need]:
    """Return what an encoder, an evaluator and a replica take, with pictures of the run's size.

    Raises:
        ValueError: the base belongs to no known family, or a feature network is missing.
    """
    data, evaluate, serve, model = config.data, config.evaluate, config.serve, config.model
    kinds = (
        (data.encode_precision, model.quantize),
        (evaluate.precision, model.quantize),
        (serve.precision, model.quantize or ("int8" if serve.int8_weights else None)),
    )
    tokens = _longest_caption(config)
    parts = {kind: _Parts(config, tokens, *kind) for kind in set(kinds)}
    encoding, drawing, serving = (parts[kind] for kind in kinds)
    away = {"none": [], "encoders": serving.not_denoising, "model": serving.names}[serve.offload]
    here = [name for name in serving.names if name not in away]
    engines = engines_of(config)
    return (
        Need(
            encoding.bytes_of(encoding.not_denoising),
            encoding.of_encoding,
            networks=conditioner_bytes(data.control) if data.computes_control_by_model else 0,
        ),
        _evaluator(drawing, config),
        Need(
            engines * (serving.bytes_of(here) + serving.largest_layer(away)),
            serving.of_drawing,
            engines * serving.bytes_of(away),
            engines=engines,
        ),
    )


def engines_of(config: Config) -> int:
    """Return how many models a replica holds while a new champion is loaded beside the one that answers.

    LoRA versions are adapters of one model, unless fused. A candidate's pictures are drawn by a third one.
    """
    serve = config.serve
    if config.train.makes_adapter and not serve.fuse_champion:
        return 1
    return 3 if serve.candidate_share or serve.shadow_share else 2


def _longest_caption(config: Config) -> Captions:
    """Return the tokens of a caption that fills all of its places; none if the model has no text encoders.

    Tokens of pictures take as much as those of words; what their own layers compute before is less.
    """
    text, tokenizers = load_text(local_path(config.model.base), revision=config.model.revision)
    if not vars(tokenizers):
        return {}
    tokens, shown = text.tokenize(tokenizers, [text.as_prompt("a " * MANY_WORDS)]), shown_tokens(config, text)
    return {name: torch.cat([each, each[:, :1].expand(-1, shown)], dim=1) for name, each in tokens.items()}


def _measuring(config: Config) -> tuple[int, int]:
    """Return the bytes of the feature networks' weights, and of a picture's activations in one of them.

    On the meta device attention is not fused, so that of a ViT is counted rather too large. What a chat model
    computes of a picture and its question is not counted, nor what models of `data.control` compute, whose
    weights are.
    """

    def bytes_of(modules: list[torch.nn.Module]) -> int:
        return sum(each.nbytes for part in modules for each in part.state_dict().values())

    side, weights, most = config.data.resolution, 0, 0
    loaded = load_networks(config.evaluate, "meta")
    judge = loaded.preference
    for network in [*loaded.all, *([judge.network] if judge and judge.network else [])]:
        weights += bytes_of(network.modules)
        with LiveBytes(network.modules) as live:
            network.on_device(torch.empty(1, 3, side, side, dtype=torch.uint8, device="meta"))
        most = max(most, live.most)
    if judge and not judge.network:
        weights += bytes_of(judge.modules)
    return weights + conditioner_bytes(config.data.control), most


def _evaluator(parts: "_Parts", config: Config) -> Need:
    """Return what an evaluator takes; on a GPU, denoiser and text encoders take turns."""
    networks, measuring = _measuring(config)
    picture = parts.of_drawing | {"measuring": measuring}
    if not config.evaluate.use_gpu:
        return Need(parts.bytes_of(parts.names), picture, networks=networks)
    autoencoder = parts.bytes["vae"]
    encoders = parts.bytes_of(parts.not_denoising) - autoencoder
    denoisers = parts.bytes_of(parts.names) - parts.bytes_of(parts.not_denoising)
    return Need(
        denoisers + autoencoder,
        picture,
        host=max(denoisers, encoders),
        captions=encoders + autoencoder,
        networks=networks,
    )


class _Parts:
    """A model's parts without data, in a precision, its denoiser quantized if `stored` names a format.

    So are the text encoders if the configuration says so.

    Args:
        tokens: from `_longest_caption`.
    """

    def __init__(self, config: Config, tokens: Captions, precision: str, stored: str | None) -> None:
        self.config, self.tokens = config, tokens
        base, revision = local_path(config.model.base), config.model.revision
        index = read_index(base, revision)
        self.family: Family = family_of(index["_class_name"])
        wanted = (*self.family.networks, "vae", *self.family.text.encoders)
        self.dtypes = dtypes_of(model_folder(base, revision=revision), index, PRECISIONS[precision])
        self.pipeline: Any = empty_model(base, wanted, revision=revision)
        self.names = [name for name in wanted if getattr(self.pipeline, name) is not None]
        if config.train.method == "controlnet":
            with init_empty_weights():
                self.pipeline.controlnet = begun_controlnet(config, self.pipeline, self.family)
            self.names.append(CONTROLNET)
            self.dtypes[CONTROLNET] = self.dtype(self.family.denoiser)
        if stored:
            for name in self.family.networks:
                quantize(getattr(self.pipeline, name), stored)
        with init_empty_weights():
            add_channels(config, self.pipeline, self.family)
        if config.model.quantize_text:
            for encoder in self.family.text.present(self.pipeline).values():
                quantize(encoder, config.model.quantize_text)
        self.not_denoising = [name for name in self.names if name not in self.family.model(self.pipeline)]
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
    def of_encoding(self) -> dict[str, int]:
        """Bytes that a picture with a caption takes while it is encoded."""
        return {"encoding": self.peak(self.encode)} | self._of_caption

    @cached_property
    def of_drawing(self) -> dict[str, int]:
        """Bytes that a picture takes: both rows of guidance, unless the denoiser takes it as an input."""
        rows = 1 if self.family.guidance_embedded(getattr(self.pipeline, self.family.denoiser)) else 2
        found = {"drawing": rows * self.peak(self.denoise), "decoding": self.peak(self.decode)}
        return found | self._of_caption

    @cached_property
    def _of_caption(self) -> dict[str, int]:
        return {EMBEDDING: self.peak(self.embed)} if self.tokens else {}

    def peak(self, work: Callable[[], None]) -> int:
        """Return the greatest number of bytes that live at once while `work` is done, without the weights."""
        with torch.no_grad(), self.without_data, LiveBytes(self.modules) as live:
            work()
        return live.most

    def embed(self) -> None:
        """Embed the longest caption. It takes a mask of all pairs of tokens, as one with padding does."""
        tokens: Captions = {name: self.without_data.from_tensor(each) for name, each in self.tokens.items()}
        self.family.text.embed(self.family.text.present(self.pipeline), tokens)

    def encode(self) -> None:
        side = self.config.data.resolution
        self.family.codec.posterior(self.pipeline.vae, torch.empty(1, 3, side, side))

    def denoise(self) -> None:
        """Predict for one row."""
        model = self.family.model(self.pipeline)
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
