"""Chroma (https://huggingface.co/lodestones/Chroma): FLUX.1-schnell without CLIP and with masked captions."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ray_jobs.diffusion.families import tiny
from ray_jobs.diffusion.families.family import MMDIT_ATTENTION, Components, Conditions
from ray_jobs.diffusion.families.flux import T5_TOKENS, FluxFamily, to_tokens
from ray_jobs.diffusion.families.published import KohyaFiles
from ray_jobs.diffusion.families.text import MASK, Captions, Encoders, MaskedText
from ray_jobs.diffusion.protocols import Denoiser, Pipeline
from ray_jobs.diffusion.recomputation import Recompute, recomputed


class ChromaText(MaskedText):
    """T5 with its attention mask, and a mask for the transformer: a caption's tokens and one of padding."""

    caption_tokens, width = T5_TOKENS, "joint_attention_dim"
    max_tokens = {"input_ids": T5_TOKENS}

    def embed(self, encoders: Encoders, tokens: Captions) -> Captions:
        mask = tokens["attention_mask"]
        embeds = encoders["text_encoder"](tokens["input_ids"], attention_mask=mask.int()).last_hidden_state
        places = torch.arange(mask.shape[1], device=mask.device)
        return {"prompt_embeds": embeds, MASK: places <= mask.sum(dim=1, keepdim=True)}


class Chroma(FluxFamily):
    """Chroma: a transformer with FLUX.1's tokens, whose modulation a small network computes."""

    pipeline_class = "ChromaPipeline"
    in_comfyui = True
    kohya = KohyaFiles("networks.lora_flux", "chroma", "chroma")
    trainable = {"transformer": MMDIT_ATTENTION}
    text = ChromaText()

    def denoise(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        tokens, grid = to_tokens(latents)
        # A float mask, as in diffusers' pipeline: diffusers 0.42.1 adds its ones to the attention scores,
        # where a bool mask would exclude the padding. Training and sampling follow the pipeline.
        mask = torch.cat([conditions[MASK].to(tokens), tokens.new_ones(tokens.shape[:2])], dim=1)
        embeds = conditions["prompt_embeds"]
        return self.denoise_tokens(model, tokens, grid, timesteps, embeds, conditions, attention_mask=mask)

    def enable_gradient_checkpointing(self, denoiser: Denoiser, recompute: Recompute = recomputed) -> None:
        """Wrap the blocks: diffusers 0.42.1 recomputes the single blocks without their attention mask."""
        for block in (*denoiser.transformer_blocks, *denoiser.single_transformer_blocks):
            block.forward = partial(_in_training, block.forward, recompute)

    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

        torch.manual_seed(0)
        return ChromaPipeline(
            transformer=ChromaTransformer2DModel(
                in_channels=4 * 4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=tiny.T5_WIDTH,
                axes_dims_rope=(4, 6, 6),
                approximator_num_channels=16,
                approximator_hidden_dim=32,
                approximator_layers=2,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=tiny.shifted_autoencoder(),
            text_encoder=tiny.t5_encoder(captions),
            tokenizer=tiny.t5_tokenizer(captions),
        )


def _in_training(forward: Callable[..., Any], recompute: Recompute, *args: Any, **named: Any) -> Any:
    return recompute(forward, *args, **named) if torch.is_grad_enabled() else forward(*args, **named)
