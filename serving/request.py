"""The request that travels from the ingress to the engine. No PyTorch, which the ingress does not import."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class RequestError(ValueError):
    """A field of a request that the model does not support."""

    # Positional arguments, so that it can be pickled.
    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field, self.reason = field, reason

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"


ALL_STEPS = (0.0, 1.0)
"""The guidance interval of a request that has guidance in every step."""


class ScaledAdapter(NamedTuple):
    """An adapter of a request, and the factor of its change."""

    name: str
    scale: float = 1.0


Mixture = tuple[ScaledAdapter, ...]
"""Adapters that are applied one after the other, as diffusers' `set_adapters` does in the order given."""


def alone(adapter: str) -> Mixture:
    """Return the mixture of a single adapter, unscaled."""
    return (ScaledAdapter(adapter),)


@dataclass(frozen=True, eq=False)
class Request:
    """One image to generate: from text alone, from another image, into a mask, or with reference pictures."""

    prompt: str
    seed: int
    steps: int
    guidance_scale: float  # 1: off; guidance-distilled denoisers take it as an input
    negative_prompt: str | None = None  # None: as diffusers without one
    height: int | None = None  # pixels; None: the model's own
    width: int | None = None
    adapter: str | None = None  # None: the bare base, or `adapters`
    previews: int = 0  # number of intermediate images, evenly spaced over the steps
    image: "torch.Tensor | None" = None  # initial image: uint8, height x width x 3
    strength: float = 1.0  # with an image, in (0, 1]: fraction of the steps that is run, the last ones
    # To paint into: uint8, height x width x 4, transparent where it is to be painted; None: all is painted
    # by models that paint into masks.
    masked: "torch.Tensor | None" = None
    control: "torch.Tensor | None" = None  # image that a ControlNet follows: uint8, height x width x 3
    control_scale: float = 1.0  # how much it counts
    # Classifier-free guidance from this share of the steps to that one, as diffusers' guiders have it.
    guidance_interval: tuple[float, float] = ALL_STEPS
    references: "tuple[torch.Tensor, ...]" = ()  # to look at: uint8, height x width x 3, of any sizes
    adapters: Mixture = ()  # several ones, or a scaled one, instead of `adapter`
    zero_terminal_snr: bool = False  # the adapter was trained with zero terminal SNR

    @cached_property
    def mixture(self) -> Mixture:
        """The adapters to apply, without those of scale 0, which are off."""
        adapters = self.adapters or (alone(self.adapter) if self.adapter is not None else ())
        return tuple(each for each in adapters if each.scale)
