"""FLUX.2 klein of Black Forest Labs (https://github.com/black-forest-labs/flux2).

The distilled checkpoints sample in 4 steps without guidance; train the base ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ray_jobs.diffusion.families import tiny
from ray_jobs.diffusion.families.codec import Codec
from ray_jobs.diffusion.families.family import MMDIT_ATTENTION, Components, Conditions, Family, references_of
from ray_jobs.diffusion.families.flux import PUBLISHED_BLOCKS
from ray_jobs.diffusion.families.noise_schedule import RectifiedFlow
from ray_jobs.diffusion.families.published import KohyaFiles, Published, renamed
from ray_jobs.diffusion.families.text import Captions, Encoders, Text, chat_prompts
from ray_jobs.diffusion.protocols import Autoencoder, Denoiser, Pipeline, Settings, Tokenizer

REFERENCE_STEP = 10  # between the positions of reference pictures, on the axis of images
PATCH = 2  # side of a latent of the denoiser, in latents of the autoencoder
MAX_TOKENS = 512
SINGLE_BLOCKS = 48  # the most that a published model has


PUBLISHED_LAYERS = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
    "linear1": ("attn.to_qkv_mlp_proj",),
    "linear2": ("attn.to_out",),
}


class Flux2Text(Text):
    """Three layers of a language model on a caption in its chat template.

    The transformer attends to the padding too.
    """

    layers: tuple[int, ...]
    tokens = ("input_ids", "attention_mask")
    embeds = ("prompt_embeds",)
    encoders = ("text_encoder",)
    max_tokens = {"input_ids": MAX_TOKENS}

    def tokenize(self, pipeline: Pipeline, captions: list[str]) -> Captions:
        return self.masked_tokens_of(pipeline.tokenizer, captions)

    def embed(self, encoders: Encoders, tokens: Captions) -> Captions:
        found = encoders["text_encoder"](
            tokens["input_ids"],
            attention_mask=tokens["attention_mask"].long(),
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,  # none are needed
        )
        return {"prompt_embeds": torch.cat([found.hidden_states[layer] for layer in self.layers], dim=-1)}

    def shapes(self, denoiser: Settings) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"prompt_embeds": ((MAX_TOKENS, denoiser["joint_attention_dim"]), torch.float32)}


class Flux2KleinText(Flux2Text):
    """Three layers of Qwen3."""

    layers = (9, 18, 27)

    def written(self, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
        return chat_prompts(tokenizer, texts, enable_thinking=False)


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


class Flux2Family(Family):
    """FLUX.2: a transformer that receives an image's patches, those of references, and a padded caption."""

    max_references = 10

    # The single blocks' output layer is named in full: the double blocks have a list of that name.
    trainable = {
        "transformer": (
            *MMDIT_ATTENTION,
            "to_qkv_mlp_proj",
            *(f"single_transformer_blocks.{block}.attn.to_out" for block in range(SINGLE_BLOCKS)),
        )
    }
    codec = Flux2Codec()
    adapter_mark = "to_qkv_mlp_proj|double_blocks|single_blocks"
    schedule = Flux2Schedule(max_shift=1.15, even_sigmas=True)

    def published_layer(self, layer: str, denoiser: Settings) -> Published | None:
        return renamed(layer, PUBLISHED_LAYERS, PUBLISHED_BLOCKS)

    def denoise(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        embeds, grid = conditions["prompt_embeds"], latents.shape[-2:]
        pictures = [latents, *references_of(conditions)]
        places = [
            positions(0, *each.shape[-2:], 0, device=latents.device, image=REFERENCE_STEP * number)
            for number, each in enumerate(pictures)
        ]
        guidance = None
        if self.guidance_embedded(model["transformer"]):
            guidance = conditions.get("guidance", latents.new_ones(len(latents)))
        predicted = model["transformer"](
            torch.cat([each.flatten(2).transpose(1, 2) for each in pictures], dim=1),
            encoder_hidden_states=embeds,
            timestep=timesteps.to(latents.dtype) / 1000,  # the transformer multiplies it by 1000 again
            img_ids=torch.cat(places),
            txt_ids=positions(0, 0, 0, embeds.shape[1], device=latents.device),
            guidance=guidance,
            return_dict=False,
        )[0]
        return predicted[:, : grid.numel()].transpose(1, 2).unflatten(2, grid)

    def guidance_embedded(self, denoiser: Denoiser) -> bool:
        return bool(denoiser.config.guidance_embeds)

    def tiny_parts(self, **options: Any) -> dict[str, Any]:
        """Return the parts of a small pipeline without text: transformer, scheduler and autoencoder.

        Args:
            options: further options of the transformer.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

        autoencoder = tiny_autoencoder()
        transformer = Flux2Transformer2DModel(
            in_channels=4 * PATCH**2,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * tiny.QWEN_WIDTH,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            **options,
        )
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        return {"transformer": transformer, "scheduler": scheduler, "vae": autoencoder}


class Flux2Klein(Flux2Family):
    """FLUX.2 klein, 4B and 9B."""

    pipeline_class = "Flux2KleinPipeline"
    in_comfyui = True
    kohya = KohyaFiles("networks.lora_flux_2", "flux_2_klein", "Flux.2-klein")
    text = Flux2KleinText()

    def has_guidance(self, settings: Settings) -> bool:
        return not settings.get("is_distilled")  # then the pipeline ignores the scale

    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        from diffusers import Flux2KleinPipeline
        from transformers import Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(0)
        tokenizer = tiny.qwen_tokenizer(captions)
        text_encoder = Qwen3Config(**tiny.qwen3_options(tokenizer, layers=self.text.layers[-1] + 1))
        parts = self.tiny_parts(guidance_embeds=False)
        return Flux2KleinPipeline(text_encoder=Qwen3ForCausalLM(text_encoder), tokenizer=tokenizer, **parts)


def tiny_autoencoder() -> Autoencoder:
    """Return a small autoencoder with 4 channels and statistics of its own."""
    from diffusers import AutoencoderKLFlux2

    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4
    )
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.2, 3.2)
    return autoencoder


def positions(*sizes: int, device: torch.device, image: int = 0) -> torch.Tensor:
    """Return the positions of tokens on four axes (image, row, column, word): int64, tokens x 4.

    Args:
        sizes: number of positions on each axis; 0 for the one position 0.
        image: the position on the first axis that is added to all.
    """
    places = torch.cartesian_prod(*(torch.arange(max(size, 1), device=device) for size in sizes))
    places[:, 0] += image
    return places
