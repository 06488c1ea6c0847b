"""Stable Diffusion 1.x and 2.x (Rombach et al., arXiv 2112.10752)."""

from collections.abc import Sequence

import torch

from ray_jobs.diffusion.families import architecture
from ray_jobs.diffusion.families.checkpoints import Tensors, clip_checkpoint
from ray_jobs.diffusion.families.control import Control
from ray_jobs.diffusion.families.family import CLIP_ATTENTION, UNET_ATTENTION
from ray_jobs.diffusion.families.published import KohyaFiles
from ray_jobs.diffusion.families.text import Captions, Encoders, Text
from ray_jobs.diffusion.families.unet import UNetFamily
from ray_jobs.diffusion.protocols import Pipeline, Settings

CLIP_TOKENS = 77


class StableDiffusionText(Text):
    """One CLIP text encoder."""

    tokens = ("input_ids",)
    embeds = ("prompt_embeds",)
    encoders = ("text_encoder",)

    def embed(self, encoders: Encoders, tokens: Captions) -> Captions:
        return {"prompt_embeds": encoders["text_encoder"](tokens["input_ids"]).last_hidden_state}

    def shapes(self, denoiser: Settings) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"prompt_embeds": ((CLIP_TOKENS, denoiser["cross_attention_dim"]), torch.float32)}


class StableDiffusion(UNetFamily):
    """Stable Diffusion 1.x and 2.x.

    The scheduler's configuration says whether the UNet predicts the noise (1.x) or the velocity (2.x).
    """

    pipeline_class = "StableDiffusionPipeline"
    trainable = {"unet": UNET_ATTENTION, "text_encoder": CLIP_ATTENTION}
    text = StableDiffusionText()
    control = Control("StableDiffusionControlNetPipeline", "ControlNetModel", "pixels")
    variants = ("", "consistency")
    text_widths = (768, 1024)
    in_checkpoint = ("unet", "vae", "text_encoder")
    kohya = KohyaFiles("networks.lora", "sd_v1", "stable-diffusion-v1")

    def kohya_encoder(self, component: str) -> str:
        return "lora_te"

    def encoder_checkpoint(
        self, component: str, tensors: Tensors, settings: Settings
    ) -> dict[str, torch.Tensor]:
        if settings.get("hidden_act", "quick_gelu") != "quick_gelu":  # OpenCLIP's, without its last layer
            raise ValueError("single files of Stable Diffusion 2 are not written; take --format merged")
        return clip_checkpoint(tensors, "cond_stage_model.transformer.")

    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        """Build a model of velocities, or one whose UNet takes guidance and whose images are not square."""
        torch.manual_seed(0)
        pipeline = architecture.build_pipeline(
            architecture.build_autoencoder([8, 16, 16, 16], latent_channels=4, resolution=64),
            architecture.build_tokenizer(captions, vocabulary=600, max_tokens=16),
            text_width=32,
            text_layers=2,
            heads=2,
            denoiser_channels=[32, 64],
            denoiser_layers=1,
            latent_size=8,
        )
        if variant == "consistency":
            config = dict(pipeline.unet.config) | {"time_cond_proj_dim": 16, "sample_size": [8, 6]}
            config.pop("_use_default_values", None)  # which lists the first option as left out
            pipeline.unet = type(pipeline.unet).from_config(config)
            torch.nn.init.normal_(pipeline.unet.time_embedding.cond_proj.weight, std=0.5)
        return pipeline
