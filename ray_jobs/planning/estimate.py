"""Memory estimate of a training per rank, from the model's file headers and the configuration alone.

Memory held between the backward pass and the step follows the ZeRO paper (Rajbhandari et al., arXiv
1910.02054, section 5), as `ray_jobs/training/memory.py` measures it. Activations are estimated
(`ray_jobs/planning/activations.py`).
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ray_jobs.config import OTHER_LAYERS, ConfigError, TrainConfig
from ray_jobs.weights.weight_files import plain_name, variant_of

Shapes = dict[str, tuple[int, ...]]
"""Shapes of a component's parameters, by name."""

# Default layers with an adapter, in diffusers' names, for denoisers and for CLIP.
DENOISER_ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)
CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")

ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2}
REDUCED_AT_ONCE = 500_000_000  # maximum elements of ZeRO's gradient bucket
LIVE_AT_ONCE = (
    1_000_000_000  # elements that ZeRO-3 may keep gathered (DeepSpeed's stage3_max_live_parameters)
)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by kind.

    Attributes:
        parameters: model parameters, trained and frozen, without encoders and autoencoder.
        gradients: gradients between backward and step.
        master_weights: fp32 weights that the optimizer updates; 0 if it updates the parameters themselves.
        moments: Adam's two moments.
        averages: exponential moving average, fp32.
        buckets: ZeRO's gradient buckets, and at stage 3 the parameters gathered at once.
        activations: estimated activations of one micro batch.
    """

    parameters: int
    gradients: int
    master_weights: int
    moments: int
    averages: int
    buckets: int
    activations: int

    @property
    def kept(self) -> int:
        """Bytes counted by `benchmarks/train/zero.py`: parameters, gradients and optimizer states."""
        return self.parameters + self.gradients + self.master_weights + self.moments

    @property
    def whole(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Placement:
    """Memory of a rank by location: on its device, or offloaded to host memory."""

    device: Memory
    offloaded: Memory


def header(file: Path) -> dict[str, Any]:
    """Read the tensor entries of a safetensors header, by name; values are not read.

    Raises:
        ConfigError: the file is not a safetensors file.
    """
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            found: dict[str, Any] = json.loads(opened.read(min(length, 100_000_000)))
    except (struct.error, ValueError) as error:
        raise ConfigError(f"model.base: {file}: not a safetensors file ({error})") from None
    found.pop("__metadata__", None)
    return found


def parameter_shapes(folder: Path) -> Shapes:
    """Parameter shapes of a component in diffusers or transformers format; empty without weights files.

    Integers (CLIP's position IDs) and Stable Diffusion 3's sinusoidal table are not parameters.
    """
    every = sorted(folder.glob("*.safetensors"))
    variant = variant_of(file.name for file in every)
    files = [file for file in every if plain_name(file.name, variant)]
    return {
        name: tuple(tensor["shape"])
        for file in files
        for name, tensor in header(file).items()
        if tensor["dtype"] in ("F64", "F32", "F16", "BF16") and name != "pos_embed.pos_embed"
    }


def numel(shape: Iterable[int]) -> int:
    return math.prod(shape)


def adapted(shapes: Shapes, targets: Iterable[str]) -> Iterator[str]:
    """Yield the layers whose names end in one of `targets`, without `.weight`."""
    ends = tuple(targets)
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if layer != name and len(shape) > 1 and any(layer == e or layer.endswith(f".{e}") for e in ends):
            yield layer


def adapters(shapes: Shapes, targets: Iterable[str], rank: int, *, use_dora: bool = False) -> Shapes:
    """LoRA parameters (arXiv 2106.09685) of the layers whose names end in one of `targets`."""
    found = Shapes()
    for layer in adapted(shapes, targets):
        shape = shapes[f"{layer}.weight"]
        found[f"{layer}.lora_A.default.weight"] = (rank, *shape[1:])
        found[f"{layer}.lora_B.default.weight"] = (shape[0], rank, *(1 for _ in shape[2:]))
        if use_dora:
            found[f"{layer}.lora_magnitude_vector.default.weight"] = (shape[0],)
    return found


def trained_shapes(train: TrainConfig, denoiser: Shapes, text_encoders: Mapping[str, Shapes]) -> Shapes:
    """Shapes of the parameters that the optimizer updates, by name in the training's module.

    Args:
        text_encoders: shapes of the text encoders that are trained too.

    Raises:
        ConfigError: no layer matches the LoRA target modules.
    """
    parts = {"denoiser": denoiser} | {f"text_encoders.{name}": part for name, part in text_encoders.items()}
    found = Shapes()
    for prefix, part in parts.items():
        if train.method == "lora":
            usual = DENOISER_ATTENTION if prefix == "denoiser" else CLIP_ATTENTION
            chosen = train.lora.target_modules if prefix == "denoiser" else None
            part = adapters(part, chosen or usual, train.lora.rank, use_dora=train.lora.use_dora)
            if not part:
                raise ConfigError(f"train.lora.target_modules: {chosen or usual} match no layer of {prefix}")
        found |= {f"{prefix}.{name}": shape for name, shape in part.items()}
    chosen_groups = _ever_trained(train)
    return {
        name: shape
        for name, shape in found.items()
        if chosen_groups is None or _group(name, train.groups) in chosen_groups
    }


def _ever_trained(train: TrainConfig) -> set[str] | None:
    """Groups of layers that any stage of the run trains; None means all."""
    named = [stage.trainable or train.trainable for stage in train.stages] or [train.trainable]
    return None if any(each is None for each in named) else {group for each in named for group in each or ()}


def _group(name: str, groups: Mapping[str, list[str]]) -> str:
    matching = (group for group, patterns in groups.items() if any(fnmatchcase(name, p) for p in patterns))
    return next(matching, OTHER_LAYERS)


def effective_stage(train: TrainConfig, workers: int) -> int:
    """ZeRO stage that the engine uses: a single worker in plain full fp32 training uses stage 0."""
    offloads = train.offload_optimizer or train.offload_parameters
    needed = train.method != "full" or train.precision != "fp32" or offloads or train.deepspeed
    return train.zero_stage if workers > 1 or needed else 0


def rows_a_worker(train: TrainConfig, workers: int) -> int:
    """Maximum number of rows per rank and step."""
    return -(-train.batch_size // workers)


def pieces_a_step(train: TrainConfig, workers: int) -> int:
    """Number of micro batches per rank and step, for gradient accumulation."""
    most = rows_a_worker(train, workers)
    return -(-most // (train.micro_batch_size or most))


def rank_memory(
    train: TrainConfig, *, whole: int, trained: int, workers: int, activations: int = 0
) -> Placement:
    """Estimate the memory of one rank.

    Args:
        whole: number of parameters of the model that the engine wraps, including adapters.
        trained: number of trained parameters.
        activations: bytes of activations of a micro batch.
    """
    stage, element = effective_stage(train, workers), ELEMENT[train.precision]
    zero = train.deepspeed.get("zero_optimization", {})
    share = -(-trained // workers)  # of a sharded state
    # Stage 1 shards gradients after the backward pass, but accumulates several micro batches unsharded.
    sharded_gradients = stage >= 2 or (stage == 1 and pieces_a_step(train, workers) == 1)
    parameters = element * (whole if stage < 3 else -(-whole // workers))
    # Gradients of several micro batches are accumulated in fp32.
    of_gradient = element if pieces_a_step(train, workers) == 1 else 4
    gradients = of_gradient * (share if sharded_gradients else trained)
    masters = 4 * share if stage else 0
    moments = 8 * (share if stage else trained)
    buckets = element * min(int(zero.get("reduce_bucket_size", REDUCED_AT_ONCE)), trained) if stage else 0
    if stage == 3:
        buckets += element * min(int(zero.get("stage3_max_live_parameters", LIVE_AT_ONCE)), whole)
    state = {"parameters": parameters, "gradients": gradients, "master_weights": masters}
    state |= {"moments": moments, "averages": 4 * share if train.ema_decay else 0}
    away = {"parameters"} if train.offload_parameters else set()
    if train.offload_optimizer:
        away |= {"gradients", "master_weights", "moments", "averages"}
    none = dict.fromkeys(state, 0) | {"buckets": 0, "activations": 0}
    here = {name: size for name, size in state.items() if name not in away}
    there = {name: size for name, size in state.items() if name in away}
    return Placement(
        Memory(**none | here | {"buckets": buckets, "activations": activations}), Memory(**none | there)
    )
