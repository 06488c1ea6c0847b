"""Stable Diffusion XL (Podell et al., arXiv 2307.01952)."""

from collections.abc import Sequence

import torch

from ray_jobs.diffusion.families import architecture, tiny
from ray_jobs.diffusion.families.checkpoints import Tensors, clip_checkpoint, open_clip_checkpoint
from ray_jobs.diffusion.families.control import Control
from ray_jobs.diffusion.families.family import CLIP_ATTENTION, UNET_ATTENTION, Conditions
from ray_jobs.diffusion.families.published import KohyaFiles, Published, published_unet_layer
from ray_jobs.diffusion.families.stable_diffusion import CLIP_TOKENS
from ray_jobs.diffusion.families.text import Captions, Encoders, Text
from ray_jobs.diffusion.families.unet import UNetFamily
from ray_jobs.diffusion.protocols import Pipeline, Settings

TURBO_SCHEDULER = "EulerAncestralDiscreteScheduler"  # with trailing timesteps; the base has neither


class StableDiffusionXLText(Text):
    """Two CLIP text encoders, the second also pooled."""

    tokens = ("input_ids", "input_ids_2")
    embeds = ("prompt_embeds", "pooled_prompt_embeds")
    encoders = ("text_encoder", "text_encoder_2")

    def embed(self, encoders: Encoders, tokens: Captions) -> Captions:
        """Return both encoders' penultimate layers, concatenated, and the second one's projection."""
        first = encoders["text_encoder"](tokens["input_ids"], output_hidden_states=True)
        second = encoders["text_encoder_2"](tokens["input_ids_2"], output_hidden_states=True)
        return {
            "prompt_embeds": torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1),
            "pooled_prompt_embeds": second.text_embeds,
        }

    def unconditional(self, settings: Settings, empty: Captions) -> Captions:
        """Return zeros if the model's configuration asks for them, which is diffusers' default."""
        if not settings.get("force_zeros_for_empty_prompt", True):
            return empty
        return {name: torch.zeros_like(tensor) for name, tensor in empty.items()}

    def shapes(self, denoiser: Settings) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        pooled = denoiser["projection_class_embeddings_input_dim"] - 6 * denoiser["addition_time_embed_dim"]
        return {
            "prompt_embeds": ((CLIP_TOKENS, denoiser["cross_attention_dim"]), torch.float32),
            "pooled_prompt_embeds": ((pooled,), torch.float32),
        }


class StableDiffusionXL(UNetFamily):
    """Stable Diffusion XL: the UNet also receives the sizes (sections 2.1 and 2.2 of the paper)."""

    pipeline_class = "StableDiffusionXLPipeline"
    trainable = {"unet": UNET_ATTENTION, "text_encoder": CLIP_ATTENTION, "text_encoder_2": CLIP_ATTENTION}
    text = StableDiffusionXLText()
    control = Control("StableDiffusionXLControlNetPipeline", "ControlNetModel", "pixels")
    picture_conditions = ("sizes",)
    text_widths = (2048,)
    in_checkpoint = ("unet", "vae", "text_encoder", "text_encoder_2")
    kohya = KohyaFiles("networks.lora", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base")

    def published_layer(self, layer: str, denoiser: Settings) -> Published:
        return published_unet_layer(layer, denoiser), (layer,)

    def encoder_checkpoint(
        self, component: str, tensors: Tensors, settings: Settings
    ) -> dict[str, torch.Tensor]:
        if component == "text_encoder":
            return clip_checkpoint(tensors, "conditioner.embedders.0.transformer.")
        return open_clip_checkpoint(tensors, "conditioner.embedders.1.model.")

    def added_conditions(self, conditions: Conditions) -> dict[str, torch.Tensor]:
        return {"text_embeds": conditions["pooled_prompt_embeds"], "time_ids": conditions["sizes"]}

    def is_distilled(self, pipeline: Pipeline) -> bool:
        scheduler = pipeline.scheduler
        turbo = type(scheduler).__name__ == TURBO_SCHEDULER
        turbo = turbo and scheduler.config.timestep_spacing == "trailing"
        return turbo or super().is_distilled(pipeline)

    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

        torch.manual_seed(0)
        tokenizer = tiny.clip_tokenizer(captions)
        return StableDiffusionXLPipeline(
            vae=architecture.build_autoencoder([8, 16, 16, 16], latent_channels=4, resolution=64),
            text_encoder=tiny.clip(tokenizer, tiny.CLIP_WIDTH),
            text_encoder_2=tiny.clip(tokenizer, tiny.CLIP_2_WIDTH, tiny.POOLED_2),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(8, 16),
                norm_num_groups=4,
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=tiny.CLIP_WIDTH + tiny.CLIP_2_WIDTH,
                attention_head_dim=4,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + tiny.POOLED_2,
            ),
            # As Stable Diffusion XL's own is configured.
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
            ),
        )
