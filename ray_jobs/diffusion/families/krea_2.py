"""Krea 2 (https://huggingface.co/krea): Raw, which is to be trained, and Turbo, distilled from it."""

from collections.abc import Sequence
from typing import Any

import torch

from ray_jobs.diffusion.families import tiny
from ray_jobs.diffusion.families.family import UNET_ATTENTION, Components, Conditions, Family
from ray_jobs.diffusion.families.flux import PATCH, from_tokens, positions, to_tokens
from ray_jobs.diffusion.families.noise_schedule import RectifiedFlow
from ray_jobs.diffusion.families.qwen_image import PREFIX, PREFIX_TOKENS, SUFFIX, QwenImageCodec
from ray_jobs.diffusion.families.text import (
    MASK,
    Captions,
    Encoders,
    MaskedText,
    without_padding,
    zero_padding,
)
from ray_jobs.diffusion.precision import kept_in_float32
from ray_jobs.diffusion.protocols import Pipeline, Settings, Tokenizer

MAX_TOKENS = 512
SUFFIX_TOKENS = 5
LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)  # of the text encoder
TURBO_SHIFT = 1.15  # `mu` of the distilled model, at every size


class Krea2Text(MaskedText):
    """Twelve layers of Qwen3-VL on a caption in Qwen-Image's template.

    The pipeline pads between the caption and the template's end, and numbers the real tokens only. Here the
    padding comes last, which gives the same states. The transformer does not number captions' tokens.
    """

    caption_tokens, width = MAX_TOKENS, "text_hidden_dim"
    ragged = ("prompt_embeds",)  # 61 KB a token in bf16, 31 MB for all places
    max_tokens = {"input_ids": PREFIX_TOKENS + MAX_TOKENS - SUFFIX_TOKENS}  # the end is never cut

    def written(self, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
        return [PREFIX + text for text in texts]

    def num_tokens(self, name: str, encoder: Any) -> int:
        return PREFIX_TOKENS + MAX_TOKENS

    def tokenize(self, pipeline: Pipeline, captions: list[str]) -> Captions:
        tokenizer = pipeline.tokenizer
        begun = tokenizer(
            self.written(tokenizer, captions),
            truncation=True,
            max_length=self.longest(tokenizer, "input_ids"),
        ).input_ids
        end = tokenizer([SUFFIX]).input_ids[0]
        padded = tokenizer.pad(
            {"input_ids": [row + end for row in begun]},
            padding="max_length",
            max_length=PREFIX_TOKENS + MAX_TOKENS,
            padding_side="right",
            return_tensors="pt",
        )
        return {"input_ids": padded.input_ids.int(), "attention_mask": padded.attention_mask.bool()}

    def embed(self, encoders: Encoders, tokens: Captions) -> Captions:
        mask = tokens["attention_mask"]
        places = torch.arange(mask.shape[1], device=mask.device).expand(3, *mask.shape)  # equal on three axes
        found = encoders["text_encoder"](
            input_ids=tokens["input_ids"],
            attention_mask=mask.long(),
            position_ids=places,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        states = torch.stack([found[layer][:, PREFIX_TOKENS:] for layer in LAYERS], dim=2)
        mask = mask[:, PREFIX_TOKENS:]
        return {"prompt_embeds": zero_padding(states, mask), MASK: mask}

    def shapes(self, denoiser: Settings) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        layers, width = denoiser["num_text_layers"], denoiser[self.width]
        return {
            "prompt_embeds": ((MAX_TOKENS, layers, width), torch.float32),
            MASK: ((MAX_TOKENS,), torch.bool),
        }


class Krea2(Family):
    """Krea 2: one stream of caption and image tokens that predicts a rectified flow."""

    pipeline_class = "Krea2Pipeline"
    in_comfyui = True
    has_dropout = False  # it has the layers, but its attention does not call them (diffusers 0.42.1)
    adds_guidance = True
    trainable = {"transformer": (*UNET_ATTENTION, "to_gate")}
    text = Krea2Text()
    codec = QwenImageCodec()
    schedule = RectifiedFlow(max_shift=1.15, patch=PATCH, even_sigmas=True)
    native = (1024, 1024)
    variants = ("", "turbo")

    def loaded(self, pipeline: Pipeline) -> None:
        """Shift a distilled model's timesteps as its pipeline does."""
        layers = pipeline.config.get("text_encoder_select_layers")
        if layers is not None and tuple(layers) != LAYERS:
            raise ValueError(f"model.base: text_encoder_select_layers {layers}; only {LAYERS} are supported")
        if pipeline.scheduler is not None and pipeline.config.get("is_distilled"):
            pipeline.scheduler.register_to_config(base_shift=TURBO_SHIFT, max_shift=TURBO_SHIFT)

    def denoise(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        tokens, grid = to_tokens(latents)
        embeds, mask = without_padding(conditions)
        places = positions(*grid, device=tokens.device)
        predicted = model["transformer"](
            tokens.contiguous(),  # else half precision rounds in another order than the pipeline's
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
            timestep=(timesteps / 1000).to(latents.dtype),  # in this order, as its pipeline rounds it
            position_ids=torch.cat([places.new_zeros(embeds.shape[1], 3), places]),
            return_dict=False,
        )[0]
        return from_tokens(predicted, grid)

    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
        from transformers import Qwen3VLModel

        torch.manual_seed(0)
        tokenizer = tiny.qwen_tokenizer(captions, [PREFIX])
        config = tiny.qwen3_vl_config(tokenizer, LAYERS[-1] + 1)
        transformer = Krea2Transformer2DModel(
            in_channels=4 * PATCH**2,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=48,
            timestep_embed_dim=32,
            text_hidden_dim=tiny.QWEN_WIDTH,
            num_text_layers=len(LAYERS),
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=32,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        )
        for parameter in kept_in_float32(transformer.requires_grad_(False)):
            torch.nn.init.normal_(parameter, std=0.2)  # diffusers begins with zeros, which bf16 could keep
        return Krea2Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=1.15,
                base_image_seq_len=256,
                max_image_seq_len=6400,
            ),
            vae=tiny.qwen_autoencoder(),
            text_encoder=Qwen3VLModel(config),
            tokenizer=tokenizer,
            is_distilled=variant == "turbo",
        )
