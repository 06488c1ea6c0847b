"""Sana of NVIDIA (Xie et al., arXiv 2410.10629)."""

from collections.abc import Sequence
from typing import Any

import torch

from ray_jobs.diffusion.families import tiny
from ray_jobs.diffusion.families.codec import Codec
from ray_jobs.diffusion.families.family import UNET_ATTENTION, Components, Conditions, Family
from ray_jobs.diffusion.families.noise_schedule import RectifiedFlow
from ray_jobs.diffusion.families.text import MASK, Captions, Encoders, MaskedText, zero_padding
from ray_jobs.diffusion.protocols import Autoencoder, Denoiser, Pipeline, Settings, Tokenizer

MAX_TOKENS = 300
# The pipeline's `complex_human_instruction` (section 2.3 of the paper), which stands before each prompt.
INSTRUCTION = """\
Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for \
image generation. Evaluate the level of detail in the user prompt:
- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial \
relationships to create vivid and concrete scenes.
- If the prompt is already detailed, refine and enhance the existing details slightly without \
overcomplicating.
Here are examples of how to transform or refine prompts:
- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping \
peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.
- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing \
street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering \
glass skyscrapers.
Please generate only the enhanced description for the prompt below and avoid including any additional \
commentary or evaluations:
User Prompt: """


class SanaText(MaskedText):
    """Gemma 2's last layer on an instruction and the caption, of which the caption's tokens are kept.

    Captions that guidance leads away from have no instruction.
    """

    tokens = ("input_ids", "attention_mask", "kept")
    caption_tokens, width = MAX_TOKENS, "caption_channels"

    def as_prompt(self, caption: str) -> str:
        return INSTRUCTION + self.as_negative(caption)

    def as_negative(self, caption: str) -> str:
        return caption.lower().strip()

    def longest(self, tokenizer: Tokenizer, name: str) -> int:
        return MAX_TOKENS + len(tokenizer.encode(INSTRUCTION)) - 2

    def tokenize(self, pipeline: Pipeline, captions: list[str]) -> Captions:
        """Tokenize texts, and find the tokens of each that the denoiser gets: int32, N x `MAX_TOKENS`.

        These are the first one, which starts the text, and the caption's, padded on the right.
        """
        tokenizer = pipeline.tokenizer
        longest = self.longest(tokenizer, "input_ids")
        lengths = [longest if text.startswith(INSTRUCTION) else MAX_TOKENS for text in captions]
        found = [
            tokenizer(text, padding="max_length", max_length=length, truncation=True, padding_side="right")
            for text, length in zip(captions, lengths, strict=True)
        ]
        padded = tokenizer.pad(found, padding_side="right", return_tensors="pt")
        kept = [[0, *range(length - MAX_TOKENS + 1, length)] for length in lengths]
        return {
            "input_ids": padded.input_ids.int(),
            "attention_mask": padded.attention_mask.bool(),
            "kept": torch.tensor(kept, dtype=torch.int32),
        }

    def embed(self, encoders: Encoders, tokens: Captions) -> Captions:
        mask, kept = tokens["attention_mask"], tokens["kept"].long()
        states = encoders["text_encoder"](tokens["input_ids"], attention_mask=mask.int()).last_hidden_state
        found, mask = states.gather(1, kept[..., None].expand(-1, -1, states.shape[-1])), mask.gather(1, kept)
        return {"prompt_embeds": zero_padding(found, mask), MASK: mask}


class SanaCodec(Codec):
    """diffusers' AutoencoderDC, which has no posterior: an image has one latent."""

    def latent_pixels(self, config: Settings) -> int:
        return int(2 ** (len(config["encoder_block_out_channels"]) - 1))

    def posterior(self, autoencoder: Autoencoder, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = autoencoder.encode(pixels.to(autoencoder.dtype)).latent.float()
        return latents, torch.full_like(latents, -torch.inf)  # a Gaussian of no width


class Sana(Family):
    """Sana: a linear diffusion transformer that predicts a rectified flow."""

    pipeline_class = "SanaPipeline"
    trainable = {"transformer": UNET_ATTENTION}
    text, codec = SanaText(), SanaCodec()
    schedule = RectifiedFlow(max_shift=1.15, patch=1)

    def denoise(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        denoiser: Denoiser = model["transformer"]
        return denoiser(
            latents,
            encoder_hidden_states=conditions["prompt_embeds"],
            encoder_attention_mask=conditions[MASK],
            timestep=timesteps * denoiser.config.timestep_scale,
            return_dict=False,
        )[0]

    def guidance_arguments(self, denoiser: Settings, scale: float) -> dict[str, Any]:
        # Else the pipeline draws at a size of its own list, and scales and crops the image.
        return {"guidance_scale": scale, "use_resolution_binning": False}

    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        from diffusers import (
            AutoencoderDC,
            DPMSolverMultistepScheduler,
            SanaPipeline,
            SanaTransformer2DModel,
        )

        torch.manual_seed(0)
        tokenizer = tiny.gemma_tokenizer([*captions, INSTRUCTION])
        channels, kinds = (8, 8, 8, 16, 16, 16), ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2
        return SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=tiny.gemma_encoder(tokenizer),
            vae=AutoencoderDC(
                latent_channels=8,
                attention_head_dim=8,
                encoder_block_types=kinds,
                decoder_block_types=kinds,
                encoder_block_out_channels=channels,
                decoder_block_out_channels=channels,
                encoder_layers_per_block=(1,) * 6,
                decoder_layers_per_block=(1,) * 6,
                encoder_qkv_multiscales=((),) * 4 + ((5,),) * 2,
                decoder_qkv_multiscales=((),) * 4 + ((5,),) * 2,
                upsample_block_type="interpolate",
                downsample_block_type="Conv",
                scaling_factor=0.41407,
            ),
            transformer=SanaTransformer2DModel(
                in_channels=8,
                out_channels=8,
                sample_size=2,
                num_layers=2,
                num_attention_heads=2,
                attention_head_dim=16,
                num_cross_attention_heads=2,
                cross_attention_head_dim=16,
                cross_attention_dim=32,
                caption_channels=tiny.GEMMA_WIDTH,
            ),
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        )
