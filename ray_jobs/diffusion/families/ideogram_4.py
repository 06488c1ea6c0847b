"""Ideogram 4 (https://huggingface.co/ideogram-ai), whose captions are JSON by training.

Guidance leads away from a second network's prediction, which sees no caption and is not trained. Publications
in fp8 or nf4 whose format is not diffusers' are not read.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch

from ray_jobs.diffusion.families import tiny
from ray_jobs.diffusion.families.family import UNET_ATTENTION, Components, Conditions, Family
from ray_jobs.diffusion.families.flux_2 import PATCH, Flux2Codec, positions, tiny_autoencoder
from ray_jobs.diffusion.families.noise_schedule import RectifiedFlow
from ray_jobs.diffusion.families.text import MASK, Captions, ChatText, Encoders, real_tokens
from ray_jobs.diffusion.protocols import Denoiser, Pipeline, Scheduler, Settings

MAX_TOKENS = 1024  # the pipeline takes 2,048, and refuses longer captions; a token takes 0.1 MB in bf16
LAYERS = (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 35)  # of the text encoder, counted from 0
FIRST_POSITION = 65536  # of an image's rows and columns: far from those of words
STD = 1.5  # of the logits of noise levels
BASE_SIDE, LATENT_SIDE = 512, 16  # pixels: of images whose logits have the mean 0, and of a latent
LOGITS = (-7.5, 9.0)  # of the least and the greatest noise level
UNCONDITIONAL = "unconditional_transformer"


class Ideogram4Text(ChatText):
    """Thirteen layers of Qwen3-VL on a caption in its chat template, interleaved.

    The pipeline pads on the left, here the padding comes last: words are numbered from the first one and see
    none that follows, so that their states are the same.
    """

    caption_tokens, width = MAX_TOKENS, "llm_features_dim"
    max_tokens = {"input_ids": MAX_TOKENS}

    def embed(self, encoders: Encoders, tokens: Captions) -> Captions:
        encoder, mask, last = encoders["text_encoder"], tokens["attention_mask"], list[torch.Tensor]()
        norm = encoder.language_model.norm  # transformers 5 returns the last layer's states normed only
        hook = norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
        try:
            found = encoder(
                input_ids=tokens["input_ids"],
                attention_mask=mask.long(),
                position_ids=torch.arange(mask.shape[1], device=mask.device).expand(3, *mask.shape),
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
        finally:
            hook.remove()
        states = [*(found[layer + 1] for layer in LAYERS[:-1]), last[0]]  # the first are the embeddings
        return self.padded(torch.stack(states, dim=-1).flatten(2), mask)

    def unconditional(self, settings: Settings, empty: Captions) -> Captions:
        """Return captions without a word, for which `UNCONDITIONAL` predicts."""
        return {name: torch.zeros_like(column) for name, column in empty.items()}


class Ideogram4Codec(Flux2Codec):
    """Latents in patches of 2 x 2, whose channels are in the order of rows, columns and then channels."""

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        return super().pack(latents).unflatten(1, (-1, PATCH**2)).transpose(1, 2).flatten(1, 2)

    def unpack(self, latents: torch.Tensor) -> torch.Tensor:
        return super().unpack(latents.unflatten(1, (PATCH**2, -1)).transpose(1, 2).flatten(1, 2))

    def noise(self, generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
        """Return noise that is drawn token by token."""
        channels, *grid = shape
        drawn = torch.randn((1, math.prod(grid), channels), generator=generator)
        return drawn.transpose(1, 2).unflatten(2, grid)


class Ideogram4Schedule(RectifiedFlow):
    """A rectified flow whose noise levels are quantiles of a logit-normal density, by the image's size."""

    def set_timesteps(
        self, scheduler: Scheduler, num_steps: int, latent_shape: Sequence[int], device: str | torch.device
    ) -> None:
        mean = math.log(math.prod(latent_shape[-2:]) ** 0.5 * LATENT_SIDE / BASE_SIDE)
        quantiles = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)[:-1]
        logits = (mean + STD * torch.special.ndtri(quantiles)).clamp(*LOGITS)
        scheduler.set_timesteps(sigmas=torch.sigmoid(logits).float().tolist(), device=device)


class Ideogram4(Family):
    """Ideogram 4: one stream of caption and image tokens that predicts a rectified flow."""

    pipeline_class = "Ideogram4Pipeline"
    trainable = {"transformer": (*UNET_ATTENTION, "w1", "w2", "w3")}
    helpers = (UNCONDITIONAL,)
    text = Ideogram4Text()
    codec = Ideogram4Codec()
    schedule = Ideogram4Schedule(max_shift=1.15, patch=1)
    native = (2048, 2048)
    has_dropout = False

    def loaded(self, pipeline: Pipeline) -> None:
        """Let captions of several lengths share a call, without the text's width for images' tokens."""
        for name in (*self.denoisers, *self.helpers):
            network = getattr(pipeline, name, None)
            if network is not None:
                network.forward = partial(_forward, network)

    def denoise(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        counts, grid = real_tokens(conditions), latents.shape[-2:]
        words = torch.arange(max(counts), device=latents.device)[:, None].expand(-1, 3)
        image = positions(0, *grid, device=latents.device) + FIRST_POSITION
        told = (1 - timesteps.float() / 1000).to(latents.dtype)
        tokens, found = latents.flatten(2).transpose(1, 2), list[torch.Tensor]()
        for has_caption, numbers in groupby(range(len(counts)), lambda row: counts[row] > 0):
            first, *others = numbers
            rows = slice(first, first + 1 + len(others))
            least, most = min(counts[rows]), max(counts[rows])
            network = model["transformer" if has_caption else UNCONDITIONAL]
            found += network(
                tokens[rows],
                timestep=told[rows],
                encoder_hidden_states=conditions["prompt_embeds"][rows, :most],
                encoder_hidden_states_mask=conditions[MASK][rows, :most] if least < most else None,
                position_ids=torch.cat([words[:most], image]),
                return_dict=False,
            )
        return -torch.cat(found).transpose(1, 2).unflatten(2, grid)

    def guidance_arguments(self, denoiser: Settings, scale: float) -> dict[str, Any]:
        return {"guidance_scale": scale, "guidance_schedule": None}

    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline, Ideogram4Transformer2DModel
        from transformers import Qwen3VLModel

        torch.manual_seed(0)
        tokenizer = tiny.qwen_tokenizer(captions)
        conditional, unconditional = (
            Ideogram4Transformer2DModel(
                in_channels=4 * PATCH**2,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                intermediate_size=48,
                adaln_dim=16,
                llm_features_dim=len(LAYERS) * tiny.QWEN_WIDTH,
                mrope_section=(4, 2, 2),
            )
            for _ in range(2)
        )
        return Ideogram4Pipeline(
            transformer=conditional,
            unconditional_transformer=unconditional,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=tiny_autoencoder(),
            text_encoder=Qwen3VLModel(tiny.qwen3_vl_config(tokenizer, LAYERS[-1] + 1)),
            tokenizer=tokenizer,
        )


def _forward(
    transformer: Denoiser,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    position_ids: torch.Tensor,
    encoder_hidden_states_mask: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor]:
    """Predict as `Ideogram4Transformer2DModel` does, whose inputs have the caption's width for all tokens.

    At 1024 x 1024 pixels the 53,248 zeros of each of an image's tokens take 440 MB a row in bf16.
    """
    image, words = transformer.input_proj(hidden_states), encoder_hidden_states.shape[1]
    text = transformer.llm_cond_proj(transformer.llm_cond_norm(encoder_hidden_states))
    is_image = (torch.arange(words + image.shape[1], device=image.device) >= words).long()
    joint = torch.cat([text, image], dim=1) + transformer.embed_image_indicator(is_image)
    embedded = transformer.t_embedding(timestep).unsqueeze(1)
    modulation = torch.nn.functional.silu(transformer.adaln_proj(embedded))
    rotary = tuple(each.to(joint.dtype) for each in transformer.rotary_emb(position_ids[None]))
    mask = None
    if encoder_hidden_states_mask is not None:
        mask = torch.nn.functional.pad(encoder_hidden_states_mask, (0, image.shape[1]), value=True)
        mask = mask[:, None, None]
    for block in transformer.layers:
        if torch.is_grad_enabled() and transformer.gradient_checkpointing:
            joint = transformer._gradient_checkpointing_func(block, joint, mask, rotary, modulation)
        else:
            joint = block(joint, mask, rotary, modulation)
    return (transformer.final_layer(joint[:, words:], conditioning=modulation),)
