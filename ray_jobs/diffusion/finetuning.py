"""What is trained of a text-to-image model: LoRA adapters or everything, and how it is saved."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ray_jobs.diffusion.loading import LORA_WEIGHTS
from ray_jobs.diffusion.objectives import alphas_cumprod, denoising_loss


class FineTuning(nn.Module):
    """A denoiser with what it needs for a loss. The engine wraps this module.

    Args:
        pipeline: from `load_pipeline`.
        text_encoder_trained: train the text encoder too; the captions then come as tokens.
    """

    schedule: torch.Tensor  # alpha-bar, one a training timestep

    def __init__(
        self,
        pipeline: Any,
        *,
        text_encoder_trained: bool = False,
        min_snr_gamma: float | None = None,
    ) -> None:
        super().__init__()
        self.unet = pipeline.unet
        self.text_encoder = pipeline.text_encoder if text_encoder_trained else None
        self.prediction_type = pipeline.scheduler.config.prediction_type
        self.min_snr_gamma = min_snr_gamma
        schedule = alphas_cumprod(pipeline.scheduler.config)
        self.register_buffer("schedule", schedule, persistent=False)

    def forward(
        self,
        latents: torch.Tensor,
        captions: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """The loss of a batch.

        Args:
            latents, noise: float, N x C x H x W.
            captions: prompt embeddings (float, N x tokens x width), or tokens (int, N x tokens) where
                the text encoder is trained.
            timesteps: int64, N.
        """
        if self.text_encoder is not None:
            captions = self.text_encoder(captions, return_dict=False)[0]

        def denoise(noisy: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            return self.unet(noisy, at, encoder_hidden_states=captions, return_dict=False)[0]

        return denoising_loss(
            denoise,
            latents,
            noise,
            timesteps,
            self.schedule,
            prediction_type=self.prediction_type,
            min_snr_gamma=self.min_snr_gamma,
        )

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that training changes, by name."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)


def add_lora(denoiser: Any, *, rank: int, alpha: int, dropout: float, target_modules: list[str]) -> None:
    """Freeze `denoiser` and add adapters (Hu et al., arXiv 2106.09685) to the named layers.

    The down projections are drawn from the global generator; the up projections start at 0, so the
    model starts as the base.

    Raises:
        ValueError: no layer has such a name.
    """
    from peft import LoraConfig

    denoiser.requires_grad_(False)
    denoiser.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            init_lora_weights="gaussian",
            target_modules=target_modules,
        )
    )


def save_weights(pipeline: Any, method: str, folder: Path) -> None:
    """Write what was trained in diffusers' format, as safetensors.

    LoRA: `pytorch_lora_weights.safetensors`, which `load_lora_weights` takes. Full: the pipeline.
    """
    if method == "full":
        pipeline.save_pretrained(folder, safe_serialization=True)
        return
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    # In peft's names. diffusers' own converter renames attention layers only, and its loader then drops
    # those of a file with both kinds of names, with a warning.
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
        safe_serialization=True,
    )
    assert (folder / LORA_WEIGHTS).exists()
