"""Switches that make a model draw faster, or smaller, before an engine is made of it. Pure PyTorch.

All but `offload` and `solver` change the denoiser only: text encoders and autoencoder stay in float32,
because they run once a picture, and half precision overflows in some autoencoders.
`Engine(cache_features=True)` is one more switch, and its `attention`.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from ray_jobs.config.serve import Attention, Offload, Solver
from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.solvers import scheduler_of
from ray_jobs.diffusion.switches import check_cache_features, check_channels_last
from serving.engine.batched_lora import Adapter

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def prepare(
    pipeline: Any,
    device: str,
    *,
    precision: str = "fp32",
    channels_last: bool = False,
    compile: bool = False,
    int8_weights: bool = False,
    offload: Offload = "none",
    solver: Solver = "model",
    fuse: Adapter | None = None,
) -> None:
    """Change a pipeline, in place, into a faster one, and move it to a device.

    Args:
        pipeline: as `load_pipeline` gives it, in float32 and without adapters of peft.
        precision: of the denoiser's weights and arithmetic, one of `PRECISIONS`. Latents, prompts' embeddings
            and the solver's steps stay in float32 outside of it.
        channels_last: the denoiser's convolutions take channels as the last dimension in memory.
        compile: by `torch.compile`, for any batch and picture size; the first calls of one row and of several
            take minutes. Rows of such an engine have no adapters.
        int8_weights: of the denoiser's linear layers, a scale an output channel, restored in every call: a
            quarter of their memory, not more speed.
        offload: what stays in the host's memory, and is on the device a layer at a time while it runs: the
            text encoders and the autoencoder, or the denoiser too, for models larger than the device.
        solver: takes the place of the model's own scheduler, `solvers.scheduler_of`.
        fuse: is merged into the base's weights; the engine then serves this one, and no others.

    Raises:
        ValueError: naming the switch that does not fit the model or another one.
    """
    family = family_of(pipeline)
    denoiser = getattr(pipeline, family.denoiser)
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r} is none of {', '.join(PRECISIONS)}")
    if channels_last:
        check_channels_last(family, denoiser)
    if any(".lora_" in name for name, _ in denoiser.named_parameters()) and (int8_weights or compile or fuse):
        switch = "int8_weights" if int8_weights else "compile" if compile else "fuse"
        raise ValueError(
            f"{switch}: the denoiser has an adapter of peft in it; load the base alone, and fuse the adapter"
        )
    if compile and offload == "model":
        raise ValueError("offload: a compiled denoiser has its weights on the device; turn one off")
    pipeline.scheduler = scheduler_of(pipeline.scheduler, solver)
    if fuse is not None:
        merge(pipeline, fuse)
    denoiser.to(PRECISIONS[precision])
    if offload == "none":
        pipeline.to(device)
    if int8_weights:
        quantise(denoiser)
    if channels_last:
        denoiser.to(memory_format=torch.channels_last)
    if compile:
        # The batch changes with nearly every call, and there is a size for every request.
        denoiser.compile(dynamic=True)
    if offload != "none":
        keep_away(pipeline, device, offload)
    pipeline.switches = {"compile": compile, "fuse": fuse is not None, "offload": offload}


def check_switches(pipeline: Any, *, with_adapters: bool, cache_features: bool) -> None:
    """Raise ValueError, naming the switch, where one that `prepare` was given does not fit an engine's."""
    switches = getattr(pipeline, "switches", {})
    if with_adapters and switches.get("fuse"):
        raise ValueError("fuse: a model with a fused adapter serves no others; make the engine without them")
    if switches.get("compile") and (with_adapters or cache_features):
        other = "adapters" if with_adapters else "cache_features"
        raise ValueError(f"compile: it does not go with {other}, which change what is called; turn one off")
    if cache_features:
        family = family_of(pipeline)
        check_cache_features(family, getattr(pipeline, family.denoiser))


def offloaded(pipeline: Any) -> bool:
    """Whether `prepare` left parts of a pipeline in the host's memory."""
    return bool(getattr(pipeline, "switches", {}).get("offload", "none") != "none")


def compiled(pipeline: Any) -> bool:
    """Whether `prepare` compiled a pipeline's denoiser."""
    return bool(getattr(pipeline, "switches", {}).get("compile"))


def keep_away(pipeline: Any, device: str, offload: Offload) -> None:
    """Leave the weights of what `offload` names in the host's memory; a layer's are copied to the device for
    as long as it runs, by accelerate, and have no storage in between."""
    from accelerate import cpu_offload

    own = family_of(pipeline).denoiser
    for name, part in pipeline.components.items():
        if not isinstance(part, nn.Module):
            continue
        if offload == "model" or name != own:
            cpu_offload(part, execution_device=torch.device(device), offload_buffers=True)
        else:
            part.to(device)


def attention_kernel(attention: Attention) -> AbstractContextManager[None]:
    """Within it, torch computes attention by this kernel and no other; auto leaves it the choice.

    Raises:
        RuntimeError: in the first call that the kernel does not cover on this device.
    """
    return nullcontext() if attention == "auto" else sdpa_kernel(KERNELS[attention])


@torch.no_grad()
def merge(pipeline: Any, adapter: Adapter) -> None:
    """Add an adapter to the weights of the base that it changes: W becomes gain * W + up down."""
    for (part, name), update in adapter.updates.items():
        weight = getattr(pipeline, part).get_submodule(name).weight
        if update.gain is not None:
            weight *= update.gain.reshape(-1, *(1,) * (weight.ndim - 1))
        weight += (update.up @ update.down.flatten(1)).reshape(weight.shape)


class Int8(nn.Module):
    """Weights as int8 and a scale an output channel: symmetric, the largest weight of a channel is 127."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, rounded: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (rounded * scale).to(self.dtype)

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int8, out x in, and float32, out x 1."""
        scale = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
        return (weight / scale).round().to(torch.int8), scale


def quantise(module: nn.Module) -> None:
    """Keep the weights of all linear layers as int8. They are read as before, in their dtype."""
    for layer in [each for each in module.modules() if isinstance(each, nn.Linear)]:
        parametrize.register_parametrization(layer, "weight", Int8(layer.weight.dtype))
