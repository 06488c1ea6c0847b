"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206)."""

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from ray_jobs.diffusion.families import tiny
from ray_jobs.diffusion.families.codec import Codec
from ray_jobs.diffusion.families.control import CONTROL, CONTROLNET, Control, added, of_controlled
from ray_jobs.diffusion.families.family import (
    CLIP_ATTENTION,
    MMDIT_ATTENTION,
    Components,
    Conditions,
    Family,
)
from ray_jobs.diffusion.families.noise_schedule import RectifiedFlow
from ray_jobs.diffusion.families.published import KohyaFiles, Published, renamed
from ray_jobs.diffusion.families.stable_diffusion import CLIP_TOKENS
from ray_jobs.diffusion.families.text import Captions, Encoders, Text
from ray_jobs.diffusion.protocols import Denoiser, Pipeline, Settings

T5_TOKENS = 256
PUBLISHED_LAYERS = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}


class StableDiffusion3Text(Text):
    """Two CLIP text encoders and T5, which a model may leave out (section 5.3.3)."""

    tokens = ("input_ids", "input_ids_2", "input_ids_3")
    embeds = ("prompt_embeds", "pooled_prompt_embeds")
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    max_tokens = {"input_ids_3": T5_TOKENS}

    def embed(self, encoders: Encoders, tokens: Captions) -> Captions:
        """Concatenate both CLIP encoders' penultimate layers, pad them to T5's width, and append T5's tokens.

        Without T5, return the CLIP embeddings unpadded: T5's width is in the denoiser's configuration, so
        `denoise` pads them.
        """
        clip = [
            encoders[part](tokens[name], output_hidden_states=True)
            for part, name in zip(self.encoders[:2], self.tokens[:2], strict=True)
        ]
        embeds = torch.cat([each.hidden_states[-2] for each in clip], dim=-1)
        if "text_encoder_3" in encoders:
            t5 = encoders["text_encoder_3"](tokens["input_ids_3"]).last_hidden_state
            embeds = torch.cat([pad(embeds, (0, t5.shape[-1] - embeds.shape[-1])), t5], dim=1)
        pooled = torch.cat([each.text_embeds for each in clip], dim=-1)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def shapes(self, denoiser: Settings) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        tokens = CLIP_TOKENS + T5_TOKENS
        return {
            "prompt_embeds": ((tokens, denoiser["joint_attention_dim"]), torch.float32),
            "pooled_prompt_embeds": ((denoiser["pooled_projection_dim"],), torch.float32),
        }


class StableDiffusion3Codec(Codec):
    """Latents in patches, with a learned table of positions."""

    def patch(self, denoiser: Settings) -> int:
        return int(denoiser.get("patch_size", 2))

    def max_side(self, config: Settings, denoiser: Settings) -> int | None:
        patches = int(denoiser.get("pos_embed_max_size", 96))  # diffusers' default
        return patches * self.size_multiple(config, denoiser)


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5: a multimodal diffusion transformer that predicts a rectified flow."""

    pipeline_class = "StableDiffusion3Pipeline"
    in_comfyui = True
    adapter_mark = "joint_blocks"
    kohya = KohyaFiles("networks.lora_sd3", "sd3", "stable-diffusion-3")
    trainable = {
        "transformer": MMDIT_ATTENTION,
        "text_encoder": CLIP_ATTENTION,
        "text_encoder_2": CLIP_ATTENTION,
    }
    text, codec, schedule = StableDiffusion3Text(), StableDiffusion3Codec(), RectifiedFlow(max_shift=1.16)
    variants = ("", "without-t5")
    control = Control(
        "StableDiffusion3ControlNetPipeline",
        "SD3ControlNetModel",
        "latents",
        # By default the pipeline leaves out the pooled captions and the shift of the latents.
        fixed={"extra_conditioning_channels": 0, "force_zeros_for_pooled_projection": False},
        num_layers={"num_layers": 12},
        num_spared=1,  # without a stream of texts behind it
    )

    def denoise(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        denoiser: Denoiser = model["transformer"]
        embeds = conditions["prompt_embeds"]
        missing = denoiser.config.joint_attention_dim - embeds.shape[-1]
        if missing:  # without T5, zeros take its place
            embeds = pad(embeds, (0, missing, 0, T5_TOKENS))
        inputs = {
            "encoder_hidden_states": embeds,
            "pooled_projections": conditions["pooled_prompt_embeds"],
            "timestep": timesteps,
        }
        control = None
        if CONTROL in conditions:
            [outputs] = model[CONTROLNET](
                of_controlled(conditions, latents),
                conditions[CONTROL],
                return_dict=False,
                **{name: of_controlled(conditions, each) for name, each in inputs.items()},
            )
            control = added(outputs, conditions, len(latents))
        return denoiser(latents, block_controlnet_hidden_states=control, return_dict=False, **inputs)[0]

    def published_layer(self, layer: str, denoiser: Settings) -> Published | None:
        return renamed(layer, PUBLISHED_LAYERS, {"transformer_blocks": "joint_blocks"})

    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        """Build a model with T5, or without it and with dynamic shifting."""
        from diffusers import (
            FlowMatchEulerDiscreteScheduler,
            SD3Transformer2DModel,
            StableDiffusion3Pipeline,
        )

        torch.manual_seed(0)
        tokenizer, t5 = tiny.clip_tokenizer(captions), variant != "without-t5"
        return StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                caption_projection_dim=16,
                joint_attention_dim=tiny.T5_WIDTH,
                pooled_projection_dim=tiny.POOLED + tiny.POOLED_2,
                pos_embed_max_size=8,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=not t5),
            vae=tiny.shifted_autoencoder(),
            text_encoder=tiny.clip(tokenizer, tiny.CLIP_WIDTH, tiny.POOLED),
            tokenizer=tokenizer,
            text_encoder_2=tiny.clip(tokenizer, tiny.CLIP_2_WIDTH, tiny.POOLED_2),
            tokenizer_2=tokenizer,
            text_encoder_3=tiny.t5_encoder(captions) if t5 else None,
            tokenizer_3=tiny.t5_tokenizer(captions) if t5 else None,
        )
