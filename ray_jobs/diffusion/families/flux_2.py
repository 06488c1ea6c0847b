"""FLUX.2 klein of Black Forest Labs (https://github.com/black-forest-labs/flux2).

The distilled checkpoints sample in 4 steps without guidance; train the base ones.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ray_jobs.diffusion.families import tiny
from ray_jobs.diffusion.families.codec import Codec
from ray_jobs.diffusion.families.family import MMDIT_ATTENTION, Components, Conditions, Family
from ray_jobs.diffusion.families.noise_schedule import RectifiedFlow
from ray_jobs.diffusion.families.text import Captions, Encoders, Text, chat_prompts
from ray_jobs.diffusion.protocols import Autoencoder, Pipeline, Settings

PATCH = 2  # side of a latent of the denoiser, in latents of the autoencoder
MAX_TOKENS = 512
LAYERS = (9, 18, 27)  # of the text encoder
SINGLE_BLOCKS = 48  # the most that a published model has


class Flux2KleinText(Text):
    """Three layers of Qwen3 on a caption in its chat template. The transformer attends to the padding too."""

    tokens = ("input_ids", "attention_mask")
    embeds = ("prompt_embeds",)
    encoders = ("text_encoder",)
    max_tokens = {"input_ids": MAX_TOKENS}

    def tokenize(self, pipeline: Pipeline, captions: list[str]) -> Captions:
        texts = chat_prompts(pipeline.tokenizer, captions, enable_thinking=False)
        return self.masked_tokens_of(pipeline.tokenizer, texts)

    def embed(self, encoders: Encoders, tokens: Captions) -> Captions:
        found = encoders["text_encoder"](
            tokens["input_ids"],
            attention_mask=tokens["attention_mask"].long(),
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,  # none are needed
        )
        return {"prompt_embeds": torch.cat([found.hidden_states[layer] for layer in LAYERS], dim=-1)}

    def shapes(self, denoiser: Settings) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"prompt_embeds": ((MAX_TOKENS, denoiser["joint_attention_dim"]), torch.float32)}


class Flux2Codec(Codec):
    """Latents in patches of 2 x 2, each channel with mean 0 and variance 1."""

    def patch(self, denoiser: Settings) -> int:
        return PATCH

    def shape(self, config: Settings, height: int, width: int) -> tuple[int, ...]:
        return self.packed_shape(super().shape(config, height, width))

    def scale(self, autoencoder: Autoencoder) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the statistics of the autoencoder's batch norm, which are weights, not configuration."""
        norm = autoencoder.bn
        variance = norm.running_var.float().cpu() + autoencoder.config.batch_norm_eps
        return norm.running_mean.float().cpu(), 1 / variance.sqrt()

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        return pixel_unshuffle(latents, PATCH)

    def unpack(self, latents: torch.Tensor) -> torch.Tensor:
        return pixel_shuffle(latents, PATCH)


class Flux2Schedule(RectifiedFlow):
    """A rectified flow whose timesteps shift by the number of tokens and of steps."""

    def dynamic_shift(
        self, config: Settings, latent_shape: Sequence[int], num_steps: int
    ) -> dict[str, float]:
        """Return `mu` by the lines that were fitted for FLUX.2 at 10 and at 200 steps.

        Between and beyond them it is linear in the number of steps; above 4,300 tokens it is that of 200.
        """
        tokens = latent_shape[-2] * latent_shape[-1]
        at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
        if tokens > 4300:
            return {"mu": at_200}
        slope = (at_200 - at_10) / 190
        return {"mu": slope * num_steps + at_200 - 200 * slope}


class Flux2Klein(Family):
    """FLUX.2 klein, 4B and 9B: a transformer that receives an image's patches and a padded caption."""

    pipeline_class = "Flux2KleinPipeline"
    # The single blocks' output layer is named in full: the double blocks have a list of that name.
    trainable = {
        "transformer": (
            *MMDIT_ATTENTION,
            "to_qkv_mlp_proj",
            *(f"single_transformer_blocks.{block}.attn.to_out" for block in range(SINGLE_BLOCKS)),
        )
    }
    text = Flux2KleinText()
    codec = Flux2Codec()
    schedule = Flux2Schedule(max_shift=1.15, even_sigmas=True)

    def denoise(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        embeds, grid = conditions["prompt_embeds"], latents.shape[-2:]
        predicted = model["transformer"](
            latents.flatten(2).transpose(1, 2),
            encoder_hidden_states=embeds,
            timestep=timesteps.to(latents.dtype) / 1000,  # the transformer multiplies it by 1000 again
            img_ids=positions(0, *grid, 0, device=latents.device),
            txt_ids=positions(0, 0, 0, embeds.shape[1], device=latents.device),
            guidance=None,
            return_dict=False,
        )[0]
        return predicted.transpose(1, 2).unflatten(2, grid)

    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        from diffusers import (
            AutoencoderKLFlux2,
            FlowMatchEulerDiscreteScheduler,
            Flux2KleinPipeline,
            Flux2Transformer2DModel,
        )
        from transformers import Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(0)
        tokenizer = tiny.qwen_tokenizer(captions)
        text_encoder = Qwen3Config(**tiny.qwen3_options(tokenizer, layers=LAYERS[-1] + 1))
        autoencoder = AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4
        )
        autoencoder.bn.running_mean.normal_()
        autoencoder.bn.running_var.uniform_(0.2, 3.2)
        return Flux2KleinPipeline(
            transformer=Flux2Transformer2DModel(
                in_channels=4 * PATCH**2,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=len(LAYERS) * tiny.QWEN_WIDTH,
                timestep_guidance_channels=32,
                axes_dims_rope=(4, 4, 4, 4),
                guidance_embeds=False,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=autoencoder,
            text_encoder=Qwen3ForCausalLM(text_encoder),
            tokenizer=tokenizer,
        )


def positions(*sizes: int, device: torch.device) -> torch.Tensor:
    """Return the positions of tokens on four axes (image, row, column, word): int64, tokens x 4.

    Args:
        sizes: number of positions on each axis; 0 for the one position 0.
    """
    return torch.cartesian_prod(*(torch.arange(max(size, 1), device=device) for size in sizes))
