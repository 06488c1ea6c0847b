"""Facets of a family: what follows control images.

ControlNets (Zhang et al., arXiv 2302.05543) are networks that steer a frozen denoiser; or the denoiser itself
has further input channels for them, as FLUX.1's "control LoRA" and the models trained so.
"""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from ray_jobs.diffusion.objectives import per_row
from ray_jobs.diffusion.protocols import Component, Denoiser, Pipeline, Settings

CONTROLNET = "controlnet"
"""Name of the ControlNet among a pipeline's components."""
CONTROL = "control"
"""Control images, M x ..., as `Family.control_form` says: pixels of 0 to 1, M x 3 x height x width, or
latents, M x C x ..., as `Codec.normalised` returns them."""
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


class ControlChannels:
    """Input channels of a denoiser for the latents of a control image, after those of the picture.

    A base has none. An adapter that follows control images brings them: it changes the layer that takes
    latents, which is given them with weights of 0, and so begins as the base. diffusers' pipelines draw noise
    for the posterior of a control image, from the generator of the picture, before the picture's own noise.

    Args:
        pipeline_class: diffusers' pipeline of models with these channels.
        layer: the denoiser's layer that takes latents.
    """

    image_argument = "control_image"

    def __init__(self, pipeline_class: str, layer: str) -> None:
        self.pipeline_class, self.layer = pipeline_class, layer

    def are_in(self, denoiser: Denoiser) -> bool:
        """Return whether a denoiser has these channels."""
        return bool(self._input_layer(denoiser).in_features == 2 * denoiser.out_channels)

    def fit(self, denoiser: Denoiser, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Return whether an adapter needs these channels.

        Args:
            shapes: of its tensors, by name in the denoiser.
        """
        shape = shapes.get(f"{self.layer}.lora_A.weight")
        return shape is not None and shape[-1] == 2 * denoiser.out_channels

    @torch.no_grad()
    def add_to(self, denoiser: Denoiser) -> None:
        """Give a denoiser these channels, if it has none; until they are trained, they change nothing."""
        if self.are_in(denoiser):
            return
        weight = self._input_layer(denoiser).weight
        self._set(denoiser, torch.cat([weight, torch.zeros_like(weight)], dim=1))

    @torch.no_grad()
    def take_from(self, denoiser: Denoiser) -> None:
        """Leave a denoiser without these channels, as it was before `add_to`."""
        if self.are_in(denoiser):
            weight = self._input_layer(denoiser).weight
            self._set(denoiser, weight[:, : weight.shape[1] // 2].clone())

    def joined(self, latents: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return latents, N x 2C x ..., with those of the control images; 0 where there are none.

        Args:
            latents: N x C x ...
        """
        control, rows = conditions.get(CONTROL), conditions.get(CONTROL_ROWS)
        if control is None:
            control = torch.zeros_like(latents)
        elif rows is not None:
            control = torch.zeros_like(latents).index_copy(0, rows, control.to(latents.dtype))
        return torch.cat([latents, control.to(latents.dtype)], dim=1)

    def _input_layer(self, denoiser: Denoiser) -> nn.Linear:
        found: nn.Linear = getattr(denoiser, self.layer)
        return found

    def _set(self, denoiser: Denoiser, weight: torch.Tensor) -> None:
        """Replace the layer that takes latents, which may be quantized, by a plain one."""
        old = self._input_layer(denoiser)
        width = weight.shape[1]
        with torch.device("meta"):
            layer = nn.Linear(width, old.out_features, bias=old.bias is not None)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = old.bias
        setattr(denoiser, self.layer, layer.train(old.training))
        # By default a model predicts as many channels as it takes.
        denoiser.register_to_config(in_channels=width, out_channels=denoiser.out_channels)


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
