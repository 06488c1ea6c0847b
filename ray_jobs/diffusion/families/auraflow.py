"""AuraFlow of fal (https://huggingface.co/fal/AuraFlow)."""

from collections.abc import Sequence
from math import isqrt

import torch

from ray_jobs.diffusion.families import tiny
from ray_jobs.diffusion.families.codec import Codec
from ray_jobs.diffusion.families.family import MMDIT_ATTENTION, Components, Conditions, Family
from ray_jobs.diffusion.families.noise_schedule import RectifiedFlow
from ray_jobs.diffusion.families.text import Captions, Encoders, Text, zero_padding
from ray_jobs.diffusion.protocols import Pipeline, Settings

MAX_TOKENS = 256


class AuraFlowText(Text):
    """UMT5 (Pile-T5), with zeros at padding, to which the transformer attends."""

    tokens = ("input_ids", "attention_mask")
    embeds = ("prompt_embeds",)
    encoders = ("text_encoder",)
    max_tokens = {"input_ids": MAX_TOKENS}

    def tokenize(self, pipeline: Pipeline, captions: list[str]) -> Captions:
        return self.masked_tokens_of(pipeline.tokenizer, captions)

    def embed(self, encoders: Encoders, tokens: Captions) -> Captions:
        mask = tokens["attention_mask"]
        states = encoders["text_encoder"](tokens["input_ids"], attention_mask=mask.int()).last_hidden_state
        return {"prompt_embeds": zero_padding(states, mask)}

    def shapes(self, denoiser: Settings) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"prompt_embeds": ((MAX_TOKENS, denoiser["joint_attention_dim"]), torch.float32)}


class AuraFlowCodec(Codec):
    """Latents in patches, with a learned table of positions, of which images take the middle."""

    def patch(self, denoiser: Settings) -> int:
        return int(denoiser["patch_size"])

    def max_side(self, config: Settings, denoiser: Settings) -> int | None:
        return isqrt(denoiser["pos_embed_max_size"]) * self.size_multiple(config, denoiser)


class AuraFlow(Family):
    """AuraFlow: a multimodal diffusion transformer that predicts a rectified flow."""

    pipeline_class = "AuraFlowPipeline"
    in_comfyui = True
    trainable = {"transformer": MMDIT_ATTENTION}
    text, codec, schedule = AuraFlowText(), AuraFlowCodec(), RectifiedFlow(max_shift=1.15)

    def denoise(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        return model["transformer"](
            latents,
            encoder_hidden_states=conditions["prompt_embeds"],
            timestep=(timesteps / 1000).to(latents.dtype),  # in this order, as its pipeline rounds it
            return_dict=False,
        )[0]

    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        from diffusers import (
            AuraFlowPipeline,
            AuraFlowTransformer2DModel,
            FlowMatchEulerDiscreteScheduler,
        )

        torch.manual_seed(0)
        tokenizer = tiny.llama_tokenizer(captions)
        transformer = AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=tiny.UMT5_WIDTH,
            caption_projection_dim=32,
            pos_embed_max_size=64,
        )
        # As drawn, it hardly opens the gates through which attention reaches the prediction.
        torch.nn.init.normal_(transformer.time_step_proj.linear_2.weight, std=1.5)
        return AuraFlowPipeline(
            tokenizer=tokenizer,
            text_encoder=tiny.umt5_encoder(tokenizer),
            vae=tiny.shifted_autoencoder(scale=0.13025, shift=None),
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        )
