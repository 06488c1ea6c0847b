"""Facet of a family: ControlNets (Zhang et al., arXiv 2302.05543), networks that steer a frozen denoiser."""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, Literal, TypeVar

import torch

from ray_jobs.diffusion.objectives import per_row
from ray_jobs.diffusion.protocols import Component, Denoiser, Pipeline, Settings

CONTROLNET = "controlnet"
"""Name of the ControlNet among a pipeline's components."""
CONTROL = "control"
"""Condition that a ControlNet looks at, M x ..., as `Control.form` says: pixels of 0 to 1, M x 3 x height x
width, or latents, M x C x ..., as `Codec.normalised` returns them."""
CONTROL_ROWS = "control_rows"
"""Condition that names the rows of `CONTROL` among all N: int64, M; where it is missing, they are all."""
CONTROL_SCALE = "control_scale"
"""Condition that tells how much a ControlNet's output counts: float32, M; where it is missing, 1."""
UNUSED = ("attn.add_q_proj", "attn.to_add_out", "ff_context")
"""Layers of a transformer's last block that only make the stream of captions, which ends there."""


class Control:
    """ControlNets of one class of diffusers: how one begins, and what it looks at.

    Args:
        pipeline_class: diffusers' pipeline of the family with a ControlNet.
        network_class: the ControlNet's class.
        form: what it looks at: the control image's `pixels`, in [0, 1], or its `latents`.
        fixed: options of its configuration that are not the denoiser's.
        num_layers: names of its options that count blocks, with the usual number of each; empty: it has all
            blocks of the first half of a UNet.
        num_spared: number of the denoiser's last blocks, which have another form and are not copied.
        draws_first: whether diffusers' pipeline draws noise for the control image's posterior, from the
            generator of the picture, before the picture's own noise.
    """

    def __init__(
        self,
        pipeline_class: str,
        network_class: str,
        form: Literal["pixels", "latents"],
        *,
        fixed: Settings | None = None,
        num_layers: dict[str, int] | None = None,
        num_spared: int = 0,
        draws_first: bool = False,
    ) -> None:
        self.pipeline_class, self.network_class, self.form = pipeline_class, network_class, form
        self.fixed, self.num_layers = fixed or {}, num_layers or {}
        self.num_spared, self.draws_first = num_spared, draws_first

    def network(self, denoiser: Denoiser, num_layers: int | None = None) -> Component:
        """Return a ControlNet that begins as a copy of a denoiser's first blocks and changes nothing yet.

        What is new in it is drawn from the global generator, or 0 where it is added to the denoiser.

        Args:
            denoiser: plain, not quantised.
            num_layers: number of blocks of each kind, of those that `num_layers` names; None: the usual one.

        Raises:
            ValueError: it has no number of blocks, or the denoiser has fewer.
        """
        kind = self._class
        settings = {**denoiser.config, **self.fixed}
        if num_layers and not self.num_layers:
            raise ValueError(f"{num_layers}; a {self.network_class} has all blocks of a UNet's first half")
        for name, usual in self.num_layers.items():
            most = int(settings[name]) - self.num_spared
            if num_layers and num_layers > most:
                raise ValueError(f"{num_layers}; this model has {most} blocks that can be copied ({name})")
            settings[name] = min(num_layers or usual, most)
        options = signature(kind.__init__).parameters
        network: Component = kind.from_config({k: v for k, v in settings.items() if k in options})
        own = network.state_dict()
        shared = {name: each for name, each in denoiser.state_dict().items() if name in own}
        network.load_state_dict(shared, strict=False)
        return network

    def check(self, network: Component) -> None:
        """Raise ValueError if a ControlNet has a switch that is not supported."""
        if type(network).__name__ != self.network_class:
            raise ValueError(f"a {type(network).__name__}, where {self.network_class} is needed")
        supported = {
            "global_pool_conditions": False,
            "controlnet_conditioning_channel_order": "rgb",
            "conditioning_channels": 3,
            "num_mode": None,
            "conditioning_embedding_channels": None,
            **self.fixed,
        }
        for name, value in supported.items():
            if name in network.config and network.config[name] != value:
                raise ValueError(f"its {name} is {network.config[name]}; only {value} is supported")

    def unused_layers(self, network: Component) -> tuple[str, ...]:
        """Return the names of a ControlNet's layers that do not reach the prediction."""
        blocks = getattr(network, "transformer_blocks", ())
        if not len(blocks) or len(getattr(network, "single_transformer_blocks", ())):
            return ()
        last = f"transformer_blocks.{len(blocks) - 1}"
        names = {name for name, _ in network.named_modules()}
        return tuple(name for layer in UNUSED if (name := f"{last}.{layer}") in names)

    def pipeline(self, pipeline: Pipeline, network: Component) -> Pipeline:
        """Return diffusers' pipeline of a base and a ControlNet; it has the base's own components."""
        import diffusers

        kind: Any = getattr(diffusers, self.pipeline_class)
        options = signature(kind.__init__).parameters
        parts = {name: each for name, each in pipeline.components.items() if name in options}
        settings = {name: each for name, each in pipeline.config.items() if name in options.keys() - parts}
        found = kind(**parts, **settings | {CONTROLNET: network})
        found.set_progress_bar_config(disable=True)
        return found

    @property
    def image_argument(self) -> str:
        """Name of the control image among the arguments of diffusers' pipeline."""
        return "image" if self.form == "pixels" else "control_image"

    @property
    def _class(self) -> Any:
        import diffusers

        return getattr(diffusers, self.network_class)


T = TypeVar("T", torch.Tensor, torch.Tensor | None)


def of_controlled(conditions: Mapping[str, torch.Tensor], tensor: T) -> T:
    """Return the rows, of N x ..., that a ControlNet steers: M x ..., or None of None."""
    rows = conditions.get(CONTROL_ROWS)
    return tensor if rows is None or tensor is None else tensor[rows]


def added(
    outputs: Sequence[torch.Tensor], conditions: Mapping[str, torch.Tensor], count: int
) -> list[torch.Tensor]:
    """Return what a ControlNet adds to a denoiser in each of `count` rows, 0 where it does not steer them.

    Args:
        outputs: of the ControlNet, each M x ...
    """
    rows, scale = conditions.get(CONTROL_ROWS), conditions.get(CONTROL_SCALE)
    found = []
    for output in outputs:
        scaled = output if scale is None else (output * per_row(scale, output)).to(output.dtype)
        if rows is not None:
            scaled = scaled.new_zeros(count, *scaled.shape[1:]).index_copy(0, rows, scaled)
        found.append(scaled)
    return found
