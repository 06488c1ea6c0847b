"""Z-Image of Alibaba's Tongyi lab (https://github.com/Tongyi-MAI/Z-Image), Base and Turbo.

Turbo is distilled for 8 steps without guidance. Plain training undoes that; train Base.
"""

from collections.abc import Sequence

import torch

from ray_jobs.diffusion.families import tiny
from ray_jobs.diffusion.families.family import UNET_ATTENTION, Components, Conditions, Family
from ray_jobs.diffusion.families.flux import PATCH, FluxCodec
from ray_jobs.diffusion.families.noise_schedule import RectifiedFlow
from ray_jobs.diffusion.families.published import KohyaFiles
from ray_jobs.diffusion.families.text import (
    MASK,
    Captions,
    Encoders,
    MaskedText,
    chat_prompts,
    real_tokens,
    zero_padding,
)
from ray_jobs.diffusion.protocols import Pipeline, Settings, Tokenizer

MAX_TOKENS = 512
TURBO_SHIFT = 3.0  # of its scheduler; Base has 6


class ZImageText(MaskedText):
    """Qwen3's penultimate layer on a caption in its chat template."""

    caption_tokens, width = MAX_TOKENS, "cap_feat_dim"
    max_tokens = {"input_ids": MAX_TOKENS}

    def written(self, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
        return chat_prompts(tokenizer, texts, enable_thinking=True)

    def embed(self, encoders: Encoders, tokens: Captions) -> Captions:
        mask = tokens["attention_mask"]
        found = encoders["text_encoder"](tokens["input_ids"], attention_mask=mask, output_hidden_states=True)
        return {"prompt_embeds": zero_padding(found.hidden_states[-2], mask), MASK: mask}


class ZImageCodec(FluxCodec):
    """Latents in patches, with tables of positions for each side."""

    def max_side(self, config: Settings, denoiser: Settings) -> int | None:
        return int(min(denoiser["axes_lens"][1:])) * self.size_multiple(config, denoiser)


class ZImage(Family):
    """Z-Image: one stream of caption and image tokens, which predicts the opposite of a rectified flow."""

    pipeline_class = "ZImagePipeline"
    in_comfyui = True
    adapter_mark = r"layers[._]\d+[._]attention[._](to_q|qkv)"
    kohya = KohyaFiles("networks.lora_zimage", "z_image", "Z-Image")
    adds_guidance = True
    trainable = {"transformer": UNET_ATTENTION}
    text = ZImageText()
    codec = ZImageCodec()
    schedule = RectifiedFlow(max_shift=1.15, patch=PATCH, even_sigmas=True)
    native = (1024, 1024)

    def denoise(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        # The transformer pads captions itself, with tokens that it attends to: padding of ours would count.
        counts = real_tokens(conditions)
        captions = [row[:count] for row, count in zip(conditions["prompt_embeds"], counts, strict=True)]
        predicted = model["transformer"](
            list(latents.unsqueeze(2).unbind()),  # each with an axis of frames
            (1000 - timesteps) / 1000,  # it counts time from noise to image
            captions,
            return_dict=False,
        )[0]
        return -torch.stack(predicted).squeeze(2)  # it predicts the image minus the noise

    def is_distilled(self, pipeline: Pipeline) -> bool:
        return bool(pipeline.scheduler.config.get("shift") == TURBO_SHIFT)

    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
        from transformers import Qwen3Config, Qwen3Model

        torch.manual_seed(0)
        tokenizer = tiny.qwen_tokenizer(captions)
        transformer = ZImageTransformer2DModel(
            all_patch_size=(PATCH,),
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=tiny.QWEN_WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[1536, 64, 64],
        )
        for token in (transformer.x_pad_token, transformer.cap_pad_token):  # diffusers leaves them empty
            torch.nn.init.normal_(token)
        return ZImagePipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny.shifted_autoencoder(),
            text_encoder=Qwen3Model(Qwen3Config(**tiny.qwen3_options(tokenizer, layers=3))),
            tokenizer=tokenizer,
        )
