"""A model family: everything in which families differ, as facets. Each family is one file in this folder."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ray_jobs.diffusion.families.codec import Codec
from ray_jobs.diffusion.families.control import CONTROLNET, Control, ControlChannels
from ray_jobs.diffusion.families.noise_schedule import NoiseSchedule
from ray_jobs.diffusion.families.published import KohyaFiles, Published
from ray_jobs.diffusion.families.text import Text
from ray_jobs.diffusion.protocols import Component, Denoiser, Pipeline, Settings
from ray_jobs.diffusion.recomputation import Recompute, recomputed, stacked_blocks

Conditions = dict[str, torch.Tensor]
"""The denoiser's inputs besides latents and timesteps, by name, each N x ...

These are the columns of `Text.embeds`, the family's `picture_conditions`, and `guidance` (float32, N) for
denoisers that take the guidance scale as an input. Reference pictures are `reference_0`, `reference_1`, ...:
their latents, N x C x ..., clean, as `Codec.normalised` returns them; see `references_of`. Of families that
paint masks there are `MASKED` and `MASK_PIXELS`, and for flow maps `NEXT_TIMESTEP` while they sample. Control
images have those of `control`.
"""
NEXT_TIMESTEP = "next_timestep"
"""The timesteps at which each row's step ends: float32, N, 0 for the last step."""
MASKED = "masked"
"""Latents of the pictures without what is to be painted, N x C x ..., as from `Codec.sample`."""
MASK_PIXELS = "mask_pixels"
"""What is to be painted: bool, N x 1 x height x width."""
Components = Mapping[str, Component]  # modules of a pipeline, by their names there

UNET_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MMDIT_ATTENTION = (*UNET_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def reference(number: int) -> str:
    """Return the condition that holds the latents of a reference picture, counted from 0."""
    return f"reference_{number}"


def references_of(conditions: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the latents of the reference pictures, in their order, each N x C x ..."""
    found: list[torch.Tensor] = []
    while (name := reference(len(found))) in conditions:
        found.append(conditions[name])
    return found


class Family(ABC):
    """A family of models in diffusers' format; stateless."""

    pipeline_class: str
    """The pipeline's class, as in the model's index."""
    trainable: Mapping[str, tuple[str, ...]]
    """Components that fine-tuning may train, with their default LoRA layers by the end of the layers' names.

    First the denoiser, then any further denoising components, then text encoders.
    """
    helpers: tuple[str, ...] = ()
    """Further networks with which the pipeline samples, and that are never trained: one that predicts without
    a caption, in place of the denoiser."""
    text: Text
    codec: Codec
    schedule: NoiseSchedule
    picture_conditions: tuple[str, ...] = ()
    """Conditions that belong to the picture. `sizes`: int, N x 6, pixels: original height and width, top and
    left of the crop, target height and width (arXiv 2307.01952, section 2.2)."""
    max_references: int = 0
    """The most pictures that the denoiser looks at beside the one it draws; 0: it takes none."""
    needs_references: bool = False
    """Whether diffusers' pipeline draws from reference pictures only."""
    control: Control | None = None
    """The family's ControlNets; None: there are none that are supported."""
    control_channels: ControlChannels | None = None
    """Input channels for control images, which adapters bring; None: none do."""
    paints_masks: bool = False
    """Whether the denoiser paints into a mask, and so takes `MASKED` and `MASK_PIXELS`."""
    is_unet: bool = False
    """Whether the denoiser is a convolutional UNet in diffusers' form."""
    has_lora_loader: bool = True
    """Whether diffusers' pipeline reads and writes LoRA files, and its denoiser takes adapters."""
    adds_guidance: bool = False
    """Whether diffusers' pipeline adds guidance to the conditional prediction: its scale is less by 1."""
    usual_guidance: float | None = None
    """Guidance scale of diffusers' pipeline, of families that paint masks; None: the configuration's."""
    own_area: bool = False
    """Whether diffusers' pipeline scales every size to the area of its native one, `default_sample_size`."""
    native: tuple[int, int] | None = None
    """Height and width of native images in pixels, where no configuration of a model has them."""
    in_comfyui: bool = False
    """Whether ComfyUI reads LoRA files with diffusers' names of the layers."""
    adapter_mark: str = ""
    """Regular expression for a part of layers' names by which an adapter is taken for the family's."""
    in_checkpoint: tuple[str, ...] = ()
    """Components that a single-file checkpoint has; empty: `checkpoint` cannot write one."""
    kohya: KohyaFiles | None = None
    """Metadata of kohya's LoRA files; None: its programs are not known to train the family."""
    routed_layers: str = ""
    """Part of the names of layers that see only the tokens that a gate gives them; empty: there are none."""
    has_dropout: bool = True
    """Whether the denoiser has dropout layers, and its forward pass uses them."""
    variants: tuple[str, ...] = ("",)
    """Names of the small models that `tiny` can build: one for each way in which models differ."""

    def unused_layers(self, denoiser: Denoiser, num_references: int = 0) -> tuple[str, ...]:
        """Return the names of layers that do not reach the prediction, and which are therefore never trained.

        They get no gradient or a zero one: weight decay would move them, and ZeRO 3 would apply stale ones.

        Args:
            num_references: number of each row's reference pictures.
        """
        return ()

    def comfyui_layer(self, component: str, layer: str) -> tuple[str, int, int] | None:
        """Return where ComfyUI's LoRA files have a layer: a name, and which part of how many it is there.

        None: ComfyUI is not known to read LoRA of the model.

        Args:
            component: a denoiser or text encoder, by name.
            layer: the layer's name in it, in files (`adapter_files.file_name`).
        """
        return (f"{component}.{layer}", 0, 1) if self.in_comfyui else None

    def kohya_layer(self, component: str, layer: str, denoiser: Settings) -> Published | None:
        """Return where kohya's LoRA files have a layer; None if they have no place for it.

        Args:
            component, layer: as for `comfyui_layer`.
            denoiser: the denoiser's configuration.
        """
        encoders = self.trainable_encoders
        if component in encoders:
            return f"{self.kohya_encoder(component)}_{layer.replace('.', '_')}", (layer,)
        found = self.published_layer(layer, denoiser)
        return found and (f"lora_unet_{found[0].replace('.', '_')}", found[1])

    def kohya_encoder(self, component: str) -> str:
        """Return how the names of a text encoder's layers begin in kohya's files."""
        return f"lora_te{self.trainable_encoders.index(component) + 1}"

    def published_layer(self, layer: str, denoiser: Settings) -> Published | None:
        """Return the name of a denoiser's layer in the first publication; None if it has no counterpart.

        Args:
            layer: diffusers' name.
            denoiser: the denoiser's configuration.
        """
        return layer, (layer,)

    def resembles(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Return whether an adapter, by any program's names, may be the family's; for errors alone.

        Args:
            shapes: of its tensors, by name.
        """
        return bool(self.adapter_mark) and any(re.search(self.adapter_mark, name) for name in shapes)

    def checkpoint(
        self, component: str, tensors: Mapping[str, torch.Tensor], settings: Settings
    ) -> dict[str, torch.Tensor]:
        """Return a component's tensors as single-file checkpoints have them, of `in_checkpoint` alone.

        Args:
            tensors: by diffusers' names.
            settings: the component's configuration.

        Raises:
            ValueError: a tensor has no name there, or the model is one that checkpoints hold otherwise.
        """
        raise NotImplementedError

    @property
    def denoisers(self) -> tuple[str, ...]:
        """Names of the denoising components; most families have one."""
        return tuple(name for name in self.trainable if name not in self.text.encoders)

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the components that sampling calls in each step: denoisers and `helpers`."""
        return (*self.denoisers, *self.helpers)

    @property
    def denoiser(self) -> str:
        """Name of the denoising component, or of the first if there are several."""
        return self.denoisers[0]

    @property
    def trainable_encoders(self) -> tuple[str, ...]:
        """Names of the text encoders that fine-tuning may train: CLIP, not T5."""
        return tuple(name for name in self.trainable if name in self.text.encoders)

    def loaded(self, pipeline: Pipeline) -> None:
        """Adapt a pipeline that was just read, or its configuration, scheduler and parts (`empty_model`).

        Raises:
            ValueError: a setting of the pipeline is not supported.
        """
        return

    def model(self, pipeline: Pipeline) -> dict[str, Component]:
        """Return a pipeline's denoising components, by name; last the ControlNet, if it has one.

        Training does without the `helpers`.
        """
        found = {name: getattr(pipeline, name) for name in self.denoisers}
        helpers = {name: getattr(pipeline, name, None) for name in self.helpers}
        found |= {name: each for name, each in helpers.items() if each is not None}
        network = getattr(pipeline, CONTROLNET, None) if self.control else None
        return found if network is None else {**found, CONTROLNET: network}

    def is_controlled(self, model: Components) -> bool:
        """Return whether denoising components follow a control image."""
        channels = self.control_channels
        return CONTROLNET in model or (channels is not None and channels.are_in(model[self.denoiser]))

    @property
    def control_form(self) -> Literal["pixels", "latents"] | None:
        """What is looked at of a control image; None: no models of the family follow one."""
        if self.control:
            return self.control.form
        return "latents" if self.control_channels else None

    @property
    def draws_control_first(self) -> bool:
        """Whether diffusers' pipelines draw noise for a control image before the picture's own."""
        return self.control.draws_first if self.control else self.control_channels is not None

    def adaptable(self, pipeline: Pipeline) -> dict[str, Component]:
        """Return the components that adapters may change, by name: denoisers and text encoders."""
        denoisers = {name: getattr(pipeline, name) for name in self.denoisers}
        return {**denoisers, **self.text.present(pipeline)}

    @abstractmethod
    def denoise(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Return the denoiser's prediction, of the latents' shape.

        Args:
            model: the denoising components.
            latents: float, N x C x ..., noisy.
            timesteps: N, as the objective or the scheduler returns them.
            conditions: as described at `Conditions`; other names are ignored. Where a denoiser takes
                `guidance` and it is missing, 1 is used.
        """

    def guidance_embedded(self, denoiser: Denoiser) -> bool:
        """Return whether the denoiser takes guidance as an input (Meng et al., arXiv 2210.03142).

        It then needs one pass per step instead of two.
        """
        return False

    def takes_next_timestep(self, denoiser: Denoiser) -> bool:
        """Return whether the denoiser is a flow map, which takes `NEXT_TIMESTEP` as an input.

        Flow maps predict the mean velocity from one timestep to another (Boffi et al., arXiv 2406.07507).
        """
        return False

    def has_guidance(self, settings: Settings) -> bool:
        """Return whether guidance scales above 1 have a meaning for a model.

        Args:
            settings: the pipeline's own configuration, as in `model_index.json`.
        """
        return True

    def is_distilled(self, pipeline: Pipeline) -> bool:
        """Return whether a model was distilled for a few steps, as far as its configurations tell.

        Args:
            pipeline: a pipeline, or its configuration, scheduler and denoiser (`empty_model`).
        """
        return bool(pipeline.config.get("is_distilled"))

    def guide(
        self, unconditional: torch.Tensor, conditional: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """Apply classifier-free guidance (Ho & Salimans, arXiv 2207.12598, eq. 6); at scale 1 it is off.

        Args:
            unconditional, conditional: the denoiser's predictions, N x C x ...
            scale: float, N x 1 x ...
        """
        return unconditional + scale * (conditional - unconditional)

    def guidance_arguments(self, denoiser: Settings, scale: float) -> dict[str, Any]:
        """Return the arguments with which diffusers' pipeline draws at a guidance scale of ours.

        Args:
            denoiser: the denoiser's configuration.
        """
        return {"guidance_scale": scale - 1 if self.adds_guidance else scale}

    def size_arguments(self, height: int, width: int) -> dict[str, Any]:
        """Return the further arguments with which diffusers' pipeline draws images of a size, in pixels."""
        return {}

    def before_drawing(self, reference: tuple[int, int]) -> tuple[str, ...]:
        """Return lines of Python without which diffusers' `pipeline` edits otherwise than this family.

        Args:
            reference: height and width of the reference pictures in pixels.
        """
        return ()

    def native_size(self, pipeline: Pipeline) -> tuple[int, int]:
        """Return height and width of the model's native images, in pixels."""
        if self.native is not None:
            return self.native
        # In latents; some denoisers' configurations have no size.
        size = getattr(pipeline, self.denoiser).config.get("sample_size") or pipeline.default_sample_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = self.codec.latent_pixels(pipeline.vae.config)
        return height * pixels, width * pixels

    def enable_gradient_checkpointing(self, denoiser: Denoiser, recompute: Recompute = recomputed) -> None:
        """Recompute the activations of blocks in the backward pass."""
        denoiser.enable_gradient_checkpointing(recompute)

    def recomputed_blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """Return the blocks that `enable_gradient_checkpointing` recomputes."""
        return stacked_blocks(denoiser)

    @abstractmethod
    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        """Return a pipeline of the family's own classes with small random weights, for 64 x 64 pixels.

        Every test of every room that runs over families runs on these.

        Args:
            captions: captions from which the tokenizers learn their vocabulary.
            variant: one of `variants`.
        """
