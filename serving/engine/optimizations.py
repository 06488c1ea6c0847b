"""Switches that make a model faster or smaller, applied before an engine is built on it. Pure PyTorch.

All but `offload`, `solver` and `fuse` change the denoiser only. The precision is chosen when the pipeline is
loaded. `Engine` has two more switches, `cache_features` and `attention`.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ray_jobs.config.serve import Attention, Offload, Solver
from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.families.control import CONTROLNET
from ray_jobs.diffusion.host_weights import HostWeights
from ray_jobs.diffusion.protocols import Pipeline
from ray_jobs.diffusion.quantization import QuantizedLinear, is_quantized, quantize
from ray_jobs.diffusion.solvers import scheduler_of
from ray_jobs.diffusion.switches import check_cache_features, check_channels_last
from serving.engine.batched_lora import Adapter

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def prepare(
    pipeline: Pipeline,
    device: str,
    *,
    channels_last: bool = False,
    compile: bool = False,
    int8_weights: bool = False,
    offload: Offload = "none",
    solver: Solver = "model",
    fuse: Adapter | None = None,
) -> None:
    """Optimize a pipeline in place, and move it to a device.

    Args:
        pipeline: a pipeline from `load_pipeline`, without peft adapters. Latents and the solver's steps are
            in float32 whatever its dtype.
        channels_last: use the channels-last memory format in the denoiser.
        compile: compile the denoiser with `torch.compile`, for any batch and image size; the first calls with
            one row and with several take minutes. Such an engine serves no adapters.
        int8_weights: store the denoiser's linear weights as int8 with one scale per output channel, and
            restore them in every call: a quarter of the memory, no speed-up.
        offload: components whose weights stay in host memory, see `keep_away`: the text encoders and the
            autoencoder, or the denoiser too, for models larger than the device.
        solver: replacement of the model's own scheduler, see `solvers.scheduler_of`.
        fuse: adapter to merge into the base's weights; the engine then serves this one and no others.

    Raises:
        ValueError: a switch, which is named, is incompatible with the model or with another switch.
    """
    family = family_of(pipeline)
    denoiser = getattr(pipeline, family.denoiser)
    if channels_last:
        check_channels_last(family, denoiser)
    if any(".lora_" in name for name, _ in denoiser.named_parameters()) and (int8_weights or compile or fuse):
        switch = "int8_weights" if int8_weights else "compile" if compile else "fuse"
        raise ValueError(
            f"{switch}: the denoiser contains a peft adapter; load the base alone and fuse the adapter"
        )
    if int8_weights and is_quantized(denoiser):
        raise ValueError("int8_weights: the denoiser is quantized already; turn it off")
    if compile and offload == "model":
        raise ValueError("offload: a compiled denoiser keeps its weights on the device; turn one off")
    pipeline.scheduler = scheduler_of(pipeline.scheduler, solver)
    if fuse is not None:
        merge(pipeline, fuse)
    if offload == "none":
        pipeline.to(device)
    for name in family.networks if int8_weights else ():
        quantize(getattr(pipeline, name), "int8")
    if channels_last:
        denoiser.to(memory_format=torch.channels_last)
    if compile:
        # The batch size changes with nearly every call, and the image size with every request.
        for part in family.model(pipeline).values():
            part.compile(dynamic=True)
    if offload != "none":
        keep_away(pipeline, device, offload)
    pipeline.switches = {"compile": compile, "fuse": fuse is not None, "offload": offload}


def check_switches(pipeline: Pipeline, *, with_adapters: bool, cache_features: bool) -> None:
    """Raise ValueError, naming the switch, if one of `prepare` is incompatible with one of the engine."""
    switches = getattr(pipeline, "switches", {})
    if with_adapters and switches.get("fuse"):
        raise ValueError(
            "fuse: a model with a fused adapter cannot serve others; create the engine without adapters"
        )
    if switches.get("compile") and (with_adapters or cache_features):
        other = "adapters" if with_adapters else "cache_features"
        raise ValueError(f"compile: incompatible with {other}, which changes what is called; turn one off")
    if cache_features:
        family = family_of(pipeline)
        if CONTROLNET in family.model(pipeline):
            raise ValueError("cache_features: a ControlNet changes the features of each step; turn it off")
        check_cache_features(family, getattr(pipeline, family.denoiser))


def offloaded(pipeline: Pipeline) -> bool:
    """Return True if `prepare` left parts of the pipeline in host memory."""
    return bool(getattr(pipeline, "switches", {}).get("offload", "none") != "none")


def compiled(pipeline: Pipeline) -> bool:
    """Return True if `prepare` compiled the pipeline's denoiser."""
    return bool(getattr(pipeline, "switches", {}).get("compile"))


def keep_away(pipeline: Pipeline, device: str, offload: Offload) -> None:
    """Leave the weights of the components that `offload` names in pinned host memory.

    A layer's are copied to the device while it runs, and meanwhile the next one's where there is room for
    both in the bytes of the largest layer. What is small is on the device: buffers, some of which FLUX.2's
    codec reads, and vectors, such as the biases that adapters of DoRA need.
    """
    denoisers = family_of(pipeline).model(pipeline)
    parts = {name: each for name, each in pipeline.components.items() if isinstance(each, nn.Module)}
    away = [part for name, part in parts.items() if offload == "model" or name not in denoisers]
    small = [weight for part in away for weight in part.parameters() if _is_vector(weight)]
    layers = [
        layer
        for part in away
        for layer in part.modules()
        if not all(map(_is_vector, layer.parameters(recurse=False)))
    ]
    kept = HostWeights(layers, layers=True)
    with kept.left_out(small):
        for part in parts.values():
            part.to(device)
    kept.hold(small, torch.device(device))


def _is_vector(weight: nn.Parameter) -> bool:
    """Return whether a weight is a bias or a norm's; a quantized layer's scales are integers."""
    return weight.ndim < 2 and weight.is_floating_point()


def attention_kernel(attention: Attention) -> AbstractContextManager[None]:
    """Return a context in which torch computes attention with this kernel only; `auto` lets torch choose.

    Raises:
        RuntimeError: raised by the first call that the kernel does not support on this device.
    """
    return nullcontext() if attention == "auto" else sdpa_kernel(KERNELS[attention])


@torch.no_grad()
def merge(pipeline: Pipeline, adapter: Adapter) -> None:
    """Merge an adapter into the weights of its base: W becomes gain * W + up down, summed in float32.

    Raises:
        ValueError: a layer is quantized, and rounds to more than an update.
    """
    for (part, name), update in adapter.updates.items():
        layer = getattr(pipeline, part).get_submodule(name)
        if isinstance(layer, QuantizedLinear):
            raise ValueError(
                f"fuse: {part}.{name} is stored as {layer.format_name}, which would round the update away; "
                "serve it as an adapter"
            )
        weight = layer.weight
        merged = weight.float()
        if update.gain is not None:
            merged = merged * update.gain.float().reshape(-1, *(1,) * (weight.ndim - 1))
        weight.copy_(merged + (update.up.float() @ update.down.flatten(1).float()).reshape(weight.shape))
