"""Frozen linear layers whose weights are stored in 4 or 8 bits, to train adapters on a base that is large.

A layer restores its weight for each product, in the forward and again in the backward pass, so that autograd
keeps only what is stored. It computes exactly what a plain layer with the restored weight does.

An update merged into such a weight would be rounded away: adapters stay beside it.

The libraries' own ways fail where no GPU is, or are less exact (on a CPU: diffusers 0.42.1, peft 0.21.2,
torch 2.13): diffusers' `BitsAndBytesConfig` refuses without a GPU. bitsandbytes' `Linear8bitLt` rounds the
inputs too: 0.23 % off the same weights restored. diffusers' layerwise casting to float8 has no scales: 3.3
% error at a standard deviation of 0.02, 28 % at 0.002. With adapters, either its backward pass raises for
their dtypes, or they become float8 as well.

T5's `wo`, which transformers keeps in float32 for fp16, is stored as other layers are: for T5-XXL 0.57 GB
in nf4, not 2.0 GB in bf16. A feed-forward of that size, 128 tokens in bf16 on one core, takes 5.0 s of CPU
time.
"""

import ctypes
from abc import ABC, abstractmethod
from collections import Counter
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

BLOCK = 64  # weights that share a scale in nf4
CHUNK = 1 << 16  # weights that are rounded to nf4 at a time: they fit a core's cache
GIVEN_BACK = 1 << 24  # weights after whose rounding what it took is given back to the system
# Quantiles of the normal distribution, scaled to [-1, 1] (Dettmers et al., arXiv 2305.14314, appendix E).
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
EPSILON = 1e-12  # least scale of a row, for rows of zeros


class Format(ABC):
    """How a matrix is stored: as small integers, and float32 scales.

    What else it takes to restore one follows the scales, so that nothing is copied to a device later.
    """

    @abstractmethod
    def store(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Round a weight, out x in; return its integers and its scales."""

    @abstractmethod
    def restore(
        self, stored: torch.Tensor, scales: torch.Tensor, shape: torch.Size, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the rounded weight of this shape."""


class NF4(Format):
    """Four bits per weight, and a scale for each block of 64; the bytes are those of bitsandbytes."""

    def store(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = weight.float().flatten()
        blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(dim=1)
        limits = [(low + high) / 2 for low, high in zip(LEVELS, LEVELS[1:], strict=False)]
        levels = torch.empty(blocks.shape, dtype=torch.uint8, device=weight.device)
        # Without memory there is no cache to fit, and a large model would have a million pieces.
        size = len(blocks) if weight.is_meta else CHUNK // BLOCK
        pieces = (each.split(size) for each in (blocks, scales[:, None], levels))
        for values, scale, level in zip(*pieces, strict=True):
            level.zero_()
            values = values / scale
            for limit in limits:
                level += values > limit
        # The values of the two weights in each possible byte.
        table = torch.tensor(LEVELS, device=weight.device)
        pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)
        return (levels[:, 0::2] << 4) | levels[:, 1::2], torch.cat([scales, pairs.flatten()])

    def restore(
        self, stored: torch.Tensor, scales: torch.Tensor, shape: torch.Size, dtype: torch.dtype
    ) -> torch.Tensor:
        scales, pairs = scales[: len(stored)], scales[len(stored) :].view(-1, 2)
        if kernel := _kernel():
            whole = kernel(stored, scales, BLOCK, "nf4", [len(stored) * BLOCK], dtype)
        else:
            whole = _scaled(F.embedding(stored.int(), pairs).flatten(1), scales[:, None], dtype)
        return whole.flatten()[: shape.numel()].view(shape)


class Int8(Format):
    """Eight bits per weight, and a scale per output channel: a channel's largest magnitude becomes 127."""

    def store(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(EPSILON) / 127
        return (weight / scales).round().to(torch.int8), scales

    def restore(
        self, stored: torch.Tensor, scales: torch.Tensor, shape: torch.Size, dtype: torch.dtype
    ) -> torch.Tensor:
        return _scaled(stored, scales, dtype)


class FP8(Format):
    """Floats of eight bits, three of them mantissa, and a scale per output channel, whose largest is 448."""

    def store(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        largest = torch.finfo(torch.float8_e4m3fn).max
        scales = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(EPSILON) / largest
        return (weight / scales).to(torch.float8_e4m3fn).view(torch.uint8), scales

    def restore(
        self, stored: torch.Tensor, scales: torch.Tensor, shape: torch.Size, dtype: torch.dtype
    ) -> torch.Tensor:
        return _scaled(stored.view(torch.float8_e4m3fn).to(dtype), scales, dtype)


FORMATS: dict[str, Format] = {"nf4": NF4(), "int8": Int8(), "fp8": FP8()}


def _scaled(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Multiply in float32 and round once, in one kernel on a GPU."""
    return torch.mul(values, scales, out=torch.empty(values.shape, dtype=dtype, device=values.device))


@cache
def _kernel() -> Any:
    """Return bitsandbytes' operator that restores nf4, equally but faster; None if it is not installed."""
    if find_spec("bitsandbytes") is None:
        return None
    import_module("bitsandbytes")  # registers its operators
    return torch.ops.bitsandbytes.dequantize_4bit.default


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with a weight in one of `FORMATS`.

    What is stored are integers, scales too by their bits: casts of a module leave them alone, and diffusers
    takes a component's dtype from its first float parameter.

    Args:
        layer: the layer to replace; the bias stays.
        device: device that rounds; what is stored goes back to the layer's.
        asked: the module around it asks for the weight's dtype in each call, see `_Unrestored`.
    """

    like: torch.Tensor  # empty; follows casts of the module, as a weight would

    def __init__(
        self, layer: nn.Linear, format_name: str, device: str | None = None, *, asked: bool = False
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.format_name, self.bias, self.asked = format_name, layer.bias, asked
        weight = layer.weight.detach()
        stored, scales = (each.to(weight.device) for each in FORMATS[format_name].store(weight.to(device)))
        self.stored = nn.Parameter(stored, requires_grad=False)
        self.scales = nn.Parameter(scales.view(torch.int32), requires_grad=False)
        self.register_buffer("like", layer.weight.detach().new_empty(0), persistent=False)
        self.train(layer.training)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The restored weight, made at each access; changes of it are lost."""
        return _Unrestored(self) if self.asked else self.restored()

    def restored(self) -> torch.Tensor:
        return _restored(self.stored, self.scales, self.format_name, self._shape, self.like.dtype)

    @property
    def _shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        restoring = self.format_name, self._shape, self.like.dtype
        product: torch.Tensor = _Product.apply(inputs, self.stored, self.scales, self.bias, *restoring)
        return product

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.format_name}"


class _Unrestored(torch.Tensor):
    """A quantized layer's weight, which is restored by whatever computes with it.

    T5 asks for the weight of its layer `wo` three times in each call, and only for its dtype.
    """

    layer: QuantizedLinear
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, layer: QuantizedLinear) -> Any:
        made = torch.Tensor._make_wrapper_subclass(
            cls, layer._shape, dtype=layer.like.dtype, device=layer.stored.device
        )
        made.layer = layer
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, lambda weight: weight.layer.restored(), (args, kwargs or {}))
        return func(*args, **kwargs)


class _Product(torch.autograd.Function):
    """A linear layer's product, which keeps the stored weight for the backward pass, not the restored one."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        stored: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        *restoring: Any,
    ) -> torch.Tensor:
        ctx.save_for_backward(stored, scales)
        ctx.restoring = restoring
        return F.linear(inputs, _restored(stored, scales, *restoring), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        stored, scales = ctx.saved_tensors
        weight = _restored(stored, scales, *ctx.restoring)
        # As autograd does for a plain layer, so that both round alike.
        of_inputs = gradient.reshape(-1, len(weight)).mm(weight).view(*gradient.shape[:-1], -1)
        return (of_inputs, *[None] * 6)


def _restored(
    stored: torch.Tensor, scales: torch.Tensor, format_name: str, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    return FORMATS[format_name].restore(stored, scales.view(torch.float32), shape, dtype)


def _layers(part: nn.Module) -> list[str]:
    """Return the names of a component's linear layers, but of those that share an embedding's weight."""
    owners = Counter(id(each) for module in part.modules() for each in module.parameters(recurse=False))
    return [
        name
        for name, layer in part.named_modules()
        if isinstance(layer, nn.Linear) and owners[id(layer.weight)] == 1
    ]


def copy_unrounded(part: nn.Module) -> None:
    """Copy what `quantize` leaves as it is, for a component whose tensors are views of mapped files.

    Each file is then unmapped as soon as its last layer is rounded, so that memory never holds them all.
    """
    rounded = {id(part.get_submodule(name).weight) for name in _layers(part)}
    for tensor in (*part.parameters(), *part.buffers()):
        if id(tensor) not in rounded:
            tensor.data = tensor.data.clone()


@torch.no_grad()
def quantize(part: nn.Module, format_name: str) -> None:
    """Replace the linear layers of a frozen component by quantized ones, one after the other.

    Raises:
        ValueError: it has none.
    """
    names = _layers(part)
    if not names:
        raise ValueError(f"model.quantize: {type(part).__name__} has no linear layers; leave it out")
    # A thread rounds some 30 million weights a second to nf4: minutes for a large model.
    device = "cuda" if torch.cuda.is_available() else None
    asked = getattr(part, "_keep_in_fp32_modules", None) or ()
    rounded = 0
    for name in names:  # not the layers, each of which goes when it is replaced
        owner, _, own = name.rpartition(".")
        layer = part.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(
            part.get_submodule(owner), own, QuantizedLinear(layer, format_name, device, asked=own in asked)
        )
        rounded += layer.in_features * layer.out_features
        if rounded >= GIVEN_BACK:
            _give_back()
            rounded = 0
    _give_back()


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps the holes that rounding leaves."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def cast_weights(part: nn.Module, dtype: torch.dtype) -> None:
    """Cast what a component's files hold, and what its quantized layers restore.

    Other buffers stay: transformers computes rotary frequencies in float32 whatever the precision.
    """
    for module in part.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            stays = name in module._non_persistent_buffers_set and not isinstance(module, QuantizedLinear)
            if buffer.is_floating_point() and not stays:
                setattr(module, name, buffer.to(dtype))


def is_quantized(part: nn.Module) -> bool:
    """Return whether a component has quantized layers."""
    return any(isinstance(layer, QuantizedLinear) for layer in part.modules())
