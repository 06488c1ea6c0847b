"""FLUX.1 of Black Forest Labs (https://github.com/black-forest-labs/flux)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ray_jobs.diffusion.families import tiny
from ray_jobs.diffusion.families.codec import Codec
from ray_jobs.diffusion.families.control import (
    CONTROL,
    CONTROLNET,
    Control,
    ControlChannels,
    added,
    of_controlled,
)
from ray_jobs.diffusion.families.family import (
    CLIP_ATTENTION,
    MMDIT_ATTENTION,
    Components,
    Conditions,
    Family,
    references_of,
)
from ray_jobs.diffusion.families.noise_schedule import RectifiedFlow
from ray_jobs.diffusion.families.published import KohyaFiles, Published, renamed
from ray_jobs.diffusion.families.text import Captions, Encoders, Text
from ray_jobs.diffusion.protocols import Denoiser, Pipeline, Settings

PATCH = 2  # side of a patch, in latents
T5_TOKENS = 512
PUBLISHED_BLOCKS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
PUBLISHED_LAYERS = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
PUBLISHED_SINGLE_LAYERS = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}


class FluxText(Text):
    """T5, and the pooled embedding of CLIP."""

    tokens = ("input_ids", "input_ids_2")
    embeds = ("prompt_embeds", "pooled_prompt_embeds")
    encoders = ("text_encoder", "text_encoder_2")
    max_tokens = {"input_ids_2": T5_TOKENS}

    def embed(self, encoders: Encoders, tokens: Captions) -> Captions:
        return {
            "prompt_embeds": encoders["text_encoder_2"](tokens["input_ids_2"]).last_hidden_state,
            "pooled_prompt_embeds": encoders["text_encoder"](tokens["input_ids"]).pooler_output,
        }

    def shapes(self, denoiser: Settings) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            "prompt_embeds": ((T5_TOKENS, denoiser["joint_attention_dim"]), torch.float32),
            "pooled_prompt_embeds": ((denoiser["pooled_projection_dim"],), torch.float32),
        }


class FluxCodec(Codec):
    """Latents of which the transformer takes patches of 2 x 2, as tokens."""

    def patch(self, denoiser: Settings) -> int:
        return PATCH


class FluxFamily(Family):
    """What FLUX.1 and its descendants share: patches as tokens with positions, T5, and the noise schedule."""

    codec = FluxCodec()
    schedule = RectifiedFlow(max_shift=1.15, patch=PATCH, even_sigmas=True)
    adapter_mark = r"single_transformer_blocks|double_blocks|single_blocks"

    def published_layer(self, layer: str, denoiser: Settings) -> Published | None:
        single = layer.startswith("single_")
        return renamed(layer, PUBLISHED_SINGLE_LAYERS if single else PUBLISHED_LAYERS, PUBLISHED_BLOCKS)

    def denoise_tokens(
        self,
        model: Components,
        tokens: torch.Tensor,
        grid: tuple[int, int],
        timesteps: torch.Tensor,
        embeds: torch.Tensor,
        conditions: Conditions,
        **inputs: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the transformer's prediction, in the shape of the latents.

        Args:
            tokens, grid: from `to_tokens`.
            timesteps: N, as for `denoise`.
            embeds: T5's embeddings, N x tokens x width.
            conditions: reference pictures, whose tokens follow, and what a ControlNet looks at, if there are
                any.
            inputs: further inputs of the transformer, by diffusers' names.
        """
        places = [positions(*grid, tokens.device)]
        texts = torch.zeros(embeds.shape[1], 3, device=tokens.device)
        timesteps = timesteps / 1000  # the transformer multiplies it by 1000 again
        control: dict[str, list[torch.Tensor] | None] = {}
        if CONTROL in conditions and CONTROLNET in model:
            named = {"encoder_hidden_states": embeds, "timestep": timesteps, **inputs}
            outputs = model[CONTROLNET](
                of_controlled(conditions, tokens),
                to_tokens(conditions[CONTROL])[0],
                img_ids=places[0],
                txt_ids=texts,
                return_dict=False,
                **{name: of_controlled(conditions, each) for name, each in named.items()},
            )
            names = ("controlnet_block_samples", "controlnet_single_block_samples")
            of_each = (each and added(each, conditions, len(tokens)) for each in outputs)
            control = dict(zip(names, of_each, strict=True))
        further = [to_tokens(latents) for latents in references_of(conditions)]
        places += [positions(*of, tokens.device, picture=n) for n, (_, of) in enumerate(further, start=1)]
        predicted = model["transformer"](
            torch.cat([tokens, *(each for each, _ in further)], dim=1),
            encoder_hidden_states=embeds,
            timestep=timesteps,
            img_ids=torch.cat(places),
            txt_ids=texts,
            return_dict=False,
            **control,
            **inputs,
        )[0]
        return from_tokens(predicted[:, : tokens.shape[1]], grid)


class Flux(FluxFamily):
    """FLUX.1: FLUX.1-dev takes guidance as an input; FLUX.1-schnell has none."""

    pipeline_class = "FluxPipeline"
    in_comfyui = True
    kohya = KohyaFiles("networks.lora_flux", "flux1", "flux-1-dev")
    trainable = {"transformer": MMDIT_ATTENTION, "text_encoder": CLIP_ATTENTION}
    text = FluxText()
    control: Control | None = Control(
        "FluxControlNetPipeline",
        "FluxControlNetModel",
        "latents",
        num_layers={"num_layers": 4, "num_single_layers": 4},
        draws_first=True,
    )
    control_channels: ControlChannels | None = ControlChannels("FluxControlPipeline", "x_embedder")
    variants: tuple[str, ...] = ("", "schnell")
    further_channels = 0  # of the small model's input, beside latents

    def denoise(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        guidance = None
        if self.guidance_embedded(model["transformer"]):
            guidance = conditions.get("guidance", latents.new_ones(len(latents)))
        channels = self.control_channels
        if channels and channels.are_in(model["transformer"]):
            latents = channels.joined(latents, conditions)
        return self.denoise_tokens(
            model,
            *to_tokens(latents),
            timesteps,
            conditions["prompt_embeds"],
            conditions,
            pooled_projections=conditions["pooled_prompt_embeds"],
            guidance=guidance,
        )

    def guidance_embedded(self, denoiser: Denoiser) -> bool:
        return bool(denoiser.config.guidance_embeds)

    def is_distilled(self, pipeline: Pipeline) -> bool:
        shifted = pipeline.scheduler.config.use_dynamic_shifting  # schnell's timesteps are not
        return not (shifted or self.guidance_embedded(pipeline.transformer))

    def guidance_arguments(self, denoiser: Settings, scale: float) -> dict[str, Any]:
        if denoiser["guidance_embeds"]:
            return {"guidance_scale": scale}
        return {"true_cfg_scale": scale, "negative_prompt": ""}  # classifier-free guidance needs both

    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        import diffusers
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

        torch.manual_seed(0)
        tokenizer, embedded = tiny.clip_tokenizer(captions), variant != "schnell"
        return getattr(diffusers, self.pipeline_class)(
            transformer=FluxTransformer2DModel(
                in_channels=4 * (4 + self.further_channels),
                out_channels=4 * 4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=tiny.T5_WIDTH,
                pooled_projection_dim=tiny.CLIP_WIDTH,
                guidance_embeds=embedded,
                axes_dims_rope=(4, 6, 6),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0 if embedded else 1.0, use_dynamic_shifting=embedded
            ),
            vae=tiny.shifted_autoencoder(),
            text_encoder=tiny.clip(tokenizer, tiny.CLIP_WIDTH),
            tokenizer=tokenizer,
            text_encoder_2=tiny.t5_encoder(captions),
            tokenizer_2=tiny.t5_tokenizer(captions),
        )


def to_tokens(latents: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Cut latents into patches of 2 x 2: N x (h/2 * w/2) x 4C. Also return the grid, (h/2, w/2)."""
    packed = pixel_unshuffle(latents, PATCH)
    rows, columns = packed.shape[-2:]
    return packed.flatten(2).transpose(1, 2), (rows, columns)


def from_tokens(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Inverse of `to_tokens`."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), PATCH)


def positions(rows: int, columns: int, device: torch.device, picture: int = 0) -> torch.Tensor:
    """Return (picture, row, column) of each patch: float32, rows * columns x 3.

    Args:
        picture: 0 for the one that is drawn, further ones for references.
    """
    row = torch.arange(rows, dtype=torch.float32, device=device)
    column = torch.arange(columns, dtype=torch.float32, device=device)
    return torch.cartesian_prod(row.new_full((1,), picture), row, column)
