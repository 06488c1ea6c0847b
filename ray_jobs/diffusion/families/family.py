"""Interface of a text-to-image model family: all that differs between families, each in one small file."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ray_jobs.diffusion.objectives import Diffusion, FlowMatching, Objective

Captions = dict[str, torch.Tensor]  # tokens or embeddings of N captions, by name, each N x ...
Encoders = Mapping[str, nn.Module] | nn.ModuleDict  # text encoders by their name in the pipeline

UNET_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MMDIT_ATTENTION = (*UNET_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
PATCH = 2  # side of a transformer's patch, in latents; the same in Stable Diffusion 3 and FLUX


class Family(ABC):
    """A family of models in diffusers' format; stateless."""

    pipeline_class: str  # as in model_index.json
    denoiser: str  # the pipeline's denoising component: "unet" or "transformer"
    tokens: tuple[str, ...]  # names of the text encoders' inputs
    embeds: tuple[str, ...]  # names of the denoiser's caption inputs
    text_encoders: tuple[str, ...]  # components that turn tokens into embeds, in the order of `tokens`
    trainable_text_encoders: tuple[str, ...]  # text encoders that fine-tuning may train: CLIP, not T5
    lora_targets: tuple[str, ...]  # default layers for LoRA, by the end of their name: attention layers
    sizes: bool = False  # whether the denoiser takes original size, crop offset and target size as input
    max_tokens: Mapping[str, int] = {}  # lengths where diffusers does not use the tokenizer's own

    def encoders(self, pipeline: Any) -> dict[str, nn.Module]:
        """Return the text encoders that a pipeline has, by name; some models leave one out."""
        parts = {name: getattr(pipeline, name) for name in self.text_encoders}
        return {name: part for name, part in parts.items() if part is not None}

    def adaptable(self, pipeline: Any) -> dict[str, nn.Module]:
        """Return the components that adapters may change, by name: the denoiser and the text encoders."""
        return {self.denoiser: getattr(pipeline, self.denoiser), **self.encoders(pipeline)}

    def tokenize(self, pipeline: Any, captions: list[str]) -> Captions:
        """Tokenize captions, truncated or padded to each tokenizer's length: int32, N x tokens each.

        Tokenizers that the pipeline does not have are skipped.
        """
        found = {}
        for name in self.tokens:
            tokenizer = getattr(pipeline, name.replace("input_ids", "tokenizer"))
            if tokenizer is None:
                continue
            length = self.max_tokens.get(name, tokenizer.model_max_length)
            encoded = tokenizer(
                captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            found[name] = encoded.input_ids.int()
        return found

    @abstractmethod
    def embed(self, parts: Encoders, tokens: Captions) -> Captions:
        """Return the denoiser's caption inputs; gradients reach the encoders.

        Args:
            parts: those of `text_encoders` that the model has.
            tokens: tokens from `tokenize`, on the encoders' device.

        Returns:
            Float, in the encoders' dtype: `prompt_embeds`, N x tokens x width, and, if the family has it,
            `pooled_prompt_embeds`, N x width.
        """

    def unconditional(self, settings: Mapping[str, Any], empty: Captions) -> Captions:
        """Return the denoiser's inputs for no caption: N x ..., in the form that `embed` returns.

        An empty caption that is given explicitly is different: it is always encoded.

        Args:
            settings: the pipeline's own configuration, as in `model_index.json`.
            empty: embeddings of N empty captions, from `embed`.
        """
        return empty

    @abstractmethod
    def objective(self, scheduler_config: Any, *, zero_terminal_snr: bool = False) -> Objective:
        """Return the denoiser's training objective.

        Raises:
            ValueError: the scheduler is of another family, or the family does not support the options.
        """

    @abstractmethod
    def denoise(
        self,
        denoiser: Any,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        captions: Captions,
        sizes: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the denoiser's prediction, of the latents' shape.

        Args:
            latents: float, N x C x h x w, noisy.
            timesteps: N, as the objective or the scheduler returns them.
            captions: embeddings from `embed`; other names are ignored.
            sizes: int, N x 6, pixels: original height and width, top and left of the crop, target height and
                width (arXiv 2307.01952, section 2.2). Only for families with `sizes`, which require it.
            guidance: float32, N. Only for denoisers with `distilled_guidance`; 1 if left out.
        """

    def patch(self, denoiser: Mapping[str, Any]) -> int:
        """Return the side of a denoiser's patches, in latents, from the denoiser's configuration."""
        return 1

    def size_multiple(self, autoencoder: Mapping[str, Any], denoiser: Mapping[str, Any]) -> int:
        """Return the pixel count that image sides must be multiples of, by the components' configurations."""
        return self.latent_pixels(autoencoder) * self.patch(denoiser)

    def latent_pixels(self, autoencoder: Mapping[str, Any]) -> int:
        """Return the side of a latent in pixels, from the autoencoder's configuration."""
        return int(2 ** (len(autoencoder["block_out_channels"]) - 1))

    def max_side(self, autoencoder: Mapping[str, Any], denoiser: Mapping[str, Any]) -> int | None:
        """Return the longest side, in pixels, that the denoiser has positions for; None for no limit."""
        return None

    def distilled_guidance(self, denoiser: Any) -> bool:
        """Return whether the denoiser takes guidance as input (Meng et al., arXiv 2210.03142).

        It then needs one pass per step instead of two.
        """
        return False

    def set_timesteps(
        self, scheduler: Any, num_steps: int, latent_shape: Sequence[int], device: str | torch.device
    ) -> None:
        """Prepare a scheduler for sampling, as the family's pipeline does.

        Args:
            latent_shape: (..., h, w).
        """
        scheduler.set_timesteps(num_steps, device=device)
        _drop_negative_timestep(scheduler)

    @abstractmethod
    def first_step(self, num_steps: int, strength: float) -> int:
        """Return the number of steps that image-to-image skips, as in the family's own pipeline for it.

        Args:
            strength: in (0, 1], the share of the steps that are run.
        """

    def sample_size(self, pipeline: Any) -> tuple[int, int]:
        """Return height and width of the model's native latents."""
        size = getattr(pipeline, self.denoiser).config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height, width


class DiffusionFamily(Family):
    """A UNet over a variance-preserving noise schedule."""

    denoiser = "unet"
    lora_targets = UNET_ATTENTION

    def objective(self, scheduler_config: Any, *, zero_terminal_snr: bool = False) -> Objective:
        return Diffusion.from_scheduler(scheduler_config, zero_terminal_snr=zero_terminal_snr)

    def first_step(self, num_steps: int, strength: float) -> int:
        return num_steps - int(num_steps * strength)

    def distilled_guidance(self, denoiser: Any) -> bool:
        return denoiser.config.get("time_cond_proj_dim") is not None

    def guidance_embedding(
        self, denoiser: Any, latents: torch.Tensor, guidance: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return the sinusoidal embedding of N guidance scales: N x `time_cond_proj_dim`.

        It embeds the scale minus 1, for a UNet that was distilled with guidance, as latent consistency models
        are (arXiv 2310.04378); None for other UNets.
        """
        if not self.distilled_guidance(denoiser):
            assert guidance is None
            return None
        from diffusers.models.embeddings import get_timestep_embedding

        told = latents.new_ones(len(latents)) if guidance is None else guidance
        size = denoiser.config.time_cond_proj_dim
        # As in time embeddings with sines first and 1 / 10,000 as the last frequency.
        embedding = get_timestep_embedding(1000 * (told.float() - 1), size, downscale_freq_shift=1)
        return embedding.to(latents.dtype)


class FlowMatchingFamily(Family):
    """A multimodal diffusion transformer that predicts a rectified flow (Esser et al., arXiv 2403.03206)."""

    denoiser = "transformer"
    lora_targets = MMDIT_ATTENTION
    max_shift: float  # default if the scheduler's configuration names none

    def patch(self, denoiser: Mapping[str, Any]) -> int:
        return PATCH

    def objective(self, scheduler_config: Any, *, zero_terminal_snr: bool = False) -> Objective:
        if zero_terminal_snr:
            raise ValueError(
                f"train.loss.zero_terminal_snr: the schedule of {self.pipeline_class} ends in pure noise by "
                "itself; turn it off"
            )
        return FlowMatching.from_scheduler(scheduler_config)

    def dynamic_shift(self, config: Mapping[str, Any], latent_shape: Sequence[int]) -> dict[str, float]:
        """Return `mu`, which gives larger images more of the noisy timesteps.

        It is linear in the number of patches, through two known points. Empty if the scheduler does not use
        dynamic shifting.
        """
        if not config.get("use_dynamic_shifting"):
            return {}
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        least, most = config.get("base_shift", 0.5), config.get("max_shift", self.max_shift)
        patches = (latent_shape[-2] // PATCH) * (latent_shape[-1] // PATCH)
        return {"mu": least + (most - least) * (patches - few) / (many - few)}

    def set_timesteps(
        self, scheduler: Any, num_steps: int, latent_shape: Sequence[int], device: str | torch.device
    ) -> None:
        shift = self.dynamic_shift(scheduler.config, latent_shape)
        scheduler.set_timesteps(num_steps, device=device, **shift)

    def first_step(self, num_steps: int, strength: float) -> int:
        return int(num_steps - num_steps * strength)


def _drop_negative_timestep(scheduler: Any) -> None:
    """Remove the timestep -1 with which trailing spacing ends for some step counts, for example 61.

    In diffusers 0.42 the last value of `arange(1000, 0, -1000 / 61)` is 0 up to rounding. A step from there
    would multiply DDIM's latents by 14.65.
    """
    kept = int((scheduler.timesteps >= 0).sum())
    if kept == len(scheduler.timesteps):
        return
    scheduler.timesteps = scheduler.timesteps[:kept]
    if len(getattr(scheduler, "sigmas", ())) > kept + 1:
        scheduler.sigmas = torch.cat([scheduler.sigmas[:kept], scheduler.sigmas[-1:]])
