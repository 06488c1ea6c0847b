"""Qwen-Image 2.1 (https://huggingface.co/Qwen), also its Turbo release, distilled from it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ray_jobs.diffusion.families import tiny
from ray_jobs.diffusion.families.family import UNET_ATTENTION, Components, Conditions, Family
from ray_jobs.diffusion.families.flux import PATCH
from ray_jobs.diffusion.families.noise_schedule import RectifiedFlow
from ray_jobs.diffusion.families.qwen_image import SUFFIX, QwenImageCodec
from ray_jobs.diffusion.families.text import (
    MASK,
    Captions,
    Encoders,
    MaskedText,
    without_padding,
    zero_padding,
)
from ray_jobs.diffusion.families.text_processor import text_processor
from ray_jobs.diffusion.protocols import Autoencoder, Denoiser, Pipeline, Scheduler, Settings, Tokenizer

SYSTEM_MESSAGE = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
MAX_TOKENS = 1024  # the pipeline never cuts a caption; columns of captions need a limit
SIGMAS = "sample_sigmas"  # setting of a distilled model: the noise levels of its steps
ROPE_BASE = 10000.0


class QwenImage21Text(MaskedText):
    """The last layer of Qwen3-VL before its norm, on a system message and the caption.

    The transformer does not receive the system message's tokens. The pipeline pads on the left; here the
    padding comes last, which gives the same states.
    """

    caption_tokens, width = MAX_TOKENS, "context_in_dim"
    ragged = ("prompt_embeds",)

    def tokenizer_of(self, pipeline: Any, name: str) -> Tokenizer:
        found: Tokenizer = pipeline.processor.tokenizer
        return found

    def as_prompt(self, caption: str) -> str:
        return caption or " "

    def written(self, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
        return [f"{SYSTEM_MESSAGE}<|im_start|>user\n{text}{SUFFIX}" for text in texts]

    def longest(self, tokenizer: Tokenizer, name: str) -> int:
        return len(tokenizer.encode(SYSTEM_MESSAGE)) + MAX_TOKENS

    def embed(self, encoders: Encoders, tokens: Captions) -> Captions:
        encoder, states = encoders["text_encoder"], list[torch.Tensor]()
        norm = encoder.model.language_model.norm  # transformers 5 returns the last layer's states normed only
        hook = norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        try:
            encoder(
                tokens["input_ids"],
                attention_mask=tokens["attention_mask"].long(),
                use_cache=False,
                logits_to_keep=1,  # none are needed
            )
        finally:
            hook.remove()
        embeds, mask = (each[:, -MAX_TOKENS:] for each in (states[0], tokens["attention_mask"]))
        return {"prompt_embeds": zero_padding(embeds, mask), MASK: mask}


class QwenImage21Codec(QwenImageCodec):
    """Latents of 16 x 16 pixels with an alpha channel; the pipeline's images have an even number of them."""

    def latent_pixels(self, config: Settings) -> int:
        return int(config["scale_factor_spatial"])

    def posterior(self, autoencoder: Autoencoder, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        opaque = torch.ones_like(pixels[:, :1])
        return super().posterior(autoencoder, torch.cat([pixels, opaque], dim=1))

    def decode(self, autoencoder: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
        return on_white(super().decode(autoencoder, latents))


class QwenImage21Schedule(RectifiedFlow):
    """A rectified flow; a distilled model has noise levels of its own, before they are shifted."""

    def set_timesteps(
        self, scheduler: Scheduler, num_steps: int, latent_shape: Sequence[int], device: str | torch.device
    ) -> None:
        sigmas = scheduler.config.get(SIGMAS)
        if sigmas is None:
            super().set_timesteps(scheduler, num_steps, latent_shape, device)
            return
        if num_steps != len(sigmas):
            raise ValueError(f"{num_steps} steps; this model is distilled for {len(sigmas)} steps")
        shift = self.dynamic_shift(scheduler.config, latent_shape, num_steps)
        scheduler.set_timesteps(sigmas=list(sigmas), device=device, **shift)


class QwenImage21(Family):
    """Qwen-Image 2.1: one stream of caption and image tokens, in which a caption attends to itself only."""

    pipeline_class = "QwenImage21Pipeline"
    trainable = {"transformer": UNET_ATTENTION}
    text = QwenImage21Text()
    codec = QwenImage21Codec()
    schedule = QwenImage21Schedule(max_shift=1.15, patch=1, even_sigmas=True)
    native = (1024, 1024)
    in_comfyui = True

    def loaded(self, pipeline: Pipeline) -> None:
        """Let captions of several lengths share a call, and tell the scheduler a distilled model's steps."""
        if sigmas := pipeline.config.get(SIGMAS):
            pipeline.scheduler.register_to_config(**{SIGMAS: list(sigmas)})
        if pipeline.transformer is None:
            return
        pipeline.transformer.forward = partial(_forward, pipeline.transformer)
        for block in pipeline.transformer.transformer_blocks:
            block.attn.set_processor(RaggedAttention())

    def is_distilled(self, pipeline: Pipeline) -> bool:
        return bool(pipeline.config.get(SIGMAS))

    def denoise(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        grid, tokens = latents.shape[-2:], latents.flatten(2).transpose(1, 2).contiguous()
        embeds, mask = without_padding(conditions)
        words = embeds.shape[1]
        # Of the encoder's places for images, each stands for 2 x 2 latents; `_forward` does not need them.
        places = torch.arange(words + tokens.shape[1] // PATCH**2, device=tokens.device) >= words
        predicted = model["transformer"](
            tokens,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            timestep=timesteps.to(latents.dtype) / 1000,
            img_shapes=[[(1, *grid)]] * len(tokens),
            img_mask=places.expand(len(tokens), -1),
            return_dict=False,
        )[0]
        return predicted[:, -tokens.shape[1] :].transpose(1, 2).unflatten(2, grid)

    def guidance_arguments(self, denoiser: Settings, scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": scale, "negative_prompt": ""}  # the pipeline's guidance needs both

    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        from diffusers import (
            AutoencoderKLQwenImage21,
            QwenImage21Pipeline,
            QwenImage21Transformer2DModel,
        )
        from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

        torch.manual_seed(0)
        tokenizer = tiny.qwen_tokenizer(captions, [SYSTEM_MESSAGE])
        pipeline = QwenImage21Pipeline(
            transformer=QwenImage21Transformer2DModel(
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                context_in_dim=tiny.QWEN_WIDTH,
                axes_dims_rope=(4, 6, 6),
            ),
            scheduler=tiny.qwen_scheduler(),
            vae=AutoencoderKLQwenImage21(
                base_dim=4,
                decoder_base_dim=4,
                z_dim=4,
                num_res_blocks=1,
                latents_mean=[0.1, -0.2, 0.3, 0.0],
                latents_std=[1.5, 0.8, 1.1, 2.0],
            ),
            text_encoder=Qwen3VLForConditionalGeneration(tiny.qwen3_vl_config(tokenizer, 2)),
            processor=text_processor(Qwen3VLProcessor, tokenizer),
        )
        pipeline.register_to_config(processor=("transformers", "Qwen3VLProcessor"))  # as it is published
        return pipeline


def on_white(pixels: torch.Tensor) -> torch.Tensor:
    """Return images in [-1, 1] on a white background, as the model's text encoder sees transparent ones.

    Args:
        pixels: N x 4 x height x width; the last channel is the opacity.
    """
    colours, alpha = pixels.clamp(-1, 1).split([3, 1], dim=1)
    opacity = alpha / 2 + 0.5
    return opacity * colours + 1 - opacity


class RaggedAttention:
    """Attention of captions of several lengths, padded on the right, and of an image after each.

    Captions attend to their own tokens so far, images to their caption and themselves.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        rotary_emb: torch.Tensor,
        segments: list[tuple[int, int, bool]],
        key_valid: torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """Return the attention's output, N x tokens x width.

        Args:
            attn: diffusers' layer.
            hidden_states: N x tokens x width.
            rotary_emb: see `rotated`.
            segments: diffusers' parts of the tokens before the image: here the caption alone.
            key_valid: bool, N x tokens, False at padding; None if there is none.
        """
        [(_, words, _)] = segments
        query, key, value = (
            layer(hidden_states).unflatten(-1, (-1, attn.inner_dim // attn.heads))
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (
            rotated(norm(each).to(value.dtype), rotary_emb).transpose(1, 2)
            for norm, each in ((attn.norm_q, query), (attn.norm_k, key))
        )
        value = value.transpose(1, 2)
        # A caption's padding comes after its tokens, so that causal attention never reaches it.
        caption = scaled_dot_product_attention(
            query[:, :, :words], key[:, :, :words], value[:, :, :words], is_causal=True
        )
        mask = None if key_valid is None else key_valid[:, None, None]
        image = scaled_dot_product_attention(query[:, :, words:], key, value, attn_mask=mask)
        joined = torch.cat([caption, image], dim=2).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](joined))


def rotated(states: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of channels (Su et al., arXiv 2104.09864, eq. 34).

    Args:
        states: N x tokens x heads x width.
        turns: cosines and sines of the angles, float32, 2 x N x tokens x 1 x width / 2.
    """
    first, second = states.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns.unbind()
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.flatten(3).type_as(states)


def positions(lengths: torch.Tensor, words: int, height: int, width: int) -> torch.Tensor:
    """Return the positions of tokens on three axes: int64, N x tokens x 3.

    A caption's words advance on all axes. Its image stands after its last word on the first axis, and has the
    middle of its grid at 0 on the others.

    Args:
        lengths: N, the words of each caption.
        words: the most words that a caption has room for.
    """
    device = lengths.device
    text = torch.arange(words, device=device).reshape(1, -1, 1).expand(len(lengths), -1, 3)
    rows, columns = (torch.arange(side, device=device) - (side - side // 2) for side in (height, width))
    grid = torch.cartesian_prod(rows, columns).expand(len(lengths), -1, -1)
    after = lengths.reshape(-1, 1, 1).expand(-1, height * width, 1)
    return torch.cat([text, torch.cat([after, grid], dim=2)], dim=1)


def _forward(
    transformer: Denoiser,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    img_shapes: list[list[tuple[int, int, int]]],
    encoder_hidden_states_mask: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor]:
    """Predict as `QwenImage21Transformer2DModel` does for images without references, each row as if alone.

    diffusers 0.42.1 places every image after the longest caption of its batch, by which a shorter caption's
    image changes, and waits for the device several times.
    """
    embeds, mask = encoder_hidden_states, encoder_hidden_states_mask
    (rows, words), image_tokens = embeds.shape[:2], hidden_states.shape[1]
    joint = torch.cat([transformer.txt_in(embeds), transformer.img_in(hidden_states)], dim=1)
    # The words' modulation is that of the timestep 0, the last row.
    told = torch.cat([timestep, timestep.new_zeros(1)]).to(joint.dtype)
    if not transformer.config.causal_condition:
        told = told[:-1]
    embedded = transformer.time_text_embed(told, joint)
    modulation = transformer.modulation(embedded)
    lengths = torch.full((rows,), words, device=joint.device) if mask is None else mask.sum(dim=1)
    axes = transformer.config.axes_dims_rope
    places = positions(lengths, words, *img_shapes[0][-1][1:]).float()
    angles = torch.cat(
        [
            place * ROPE_BASE ** -(torch.arange(0, axis, 2, device=joint.device) / axis)
            for place, axis in zip(places.split(1, dim=2), axes, strict=True)
        ],
        dim=2,
    ).unsqueeze(2)
    turns = torch.stack([angles.cos(), angles.sin()])  # once for the queries and keys of all layers
    is_image = torch.arange(words + image_tokens, device=joint.device) >= words
    target = is_image if transformer.config.causal_condition else None
    valid = None if mask is None else torch.cat([mask, mask.new_ones(rows, image_tokens)], dim=1)
    segments = [(0, words, True)]
    for block in transformer.transformer_blocks:
        # In diffusers' order: neither a mask of blocks nor a cache of keys.
        arguments = (joint, modulation, turns, None, target, None, None, None, segments, valid)
        if torch.is_grad_enabled() and transformer.gradient_checkpointing:
            joint = transformer._gradient_checkpointing_func(block, *arguments)
        else:
            joint = block(*arguments)
    joint = transformer.norm_out(joint, embedded, target)
    return (transformer.proj_out(joint[:, words:]),)
