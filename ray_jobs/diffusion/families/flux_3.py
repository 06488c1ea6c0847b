"""FLUX.3 Image Klein of Black Forest Labs (https://huggingface.co/black-forest-labs), from text to image,
and with reference pictures.

diffusers has only a modular pipeline for it. Its distilled checkpoints (`flux_3_distilled.py`) have another.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ray_jobs.diffusion.families import tiny
from ray_jobs.diffusion.families.family import (
    NEXT_TIMESTEP,
    UNET_ATTENTION,
    Components,
    Conditions,
    Family,
    references_of,
)
from ray_jobs.diffusion.families.flux_2 import Flux2Codec, positions, tiny_autoencoder
from ray_jobs.diffusion.families.noise_schedule import RectifiedFlow
from ray_jobs.diffusion.families.text import Captions, ChatText, Encoders, without_padding
from ray_jobs.diffusion.families.text_processor import text_processor
from ray_jobs.diffusion.protocols import Denoiser, Pipeline

WINDOW = 80  # tokens: captions are padded to a multiple of it, and their padding is attended to
MAX_TOKENS = 8 * WINDOW  # the pipeline cuts at 8,192; columns of captions need a limit
LAYERS = (4, 8, 12, 16, 20, 24, 28, 32)  # of the text encoder
IMAGE_SCALE = 0.5  # of the positions of an image's tokens
REFERENCES = "image_cond"  # name of the layers that only reference images pass


class Flux3Text(ChatText):
    """Eight layers of Qwen3-VL on a caption in its chat template.

    The transformer attends to a caption's window: its tokens and the padding up to a multiple of `WINDOW`.
    The mask is that of windows.
    """

    caption_tokens, width, window = MAX_TOKENS, "joint_attention_dim", WINDOW
    max_tokens = {"input_ids": MAX_TOKENS}

    def embed(self, encoders: Encoders, tokens: Captions) -> Captions:
        real = tokens["attention_mask"]
        places = torch.arange(real.shape[1], device=real.device)
        windows = places < -(real.sum(dim=1, keepdim=True) // -WINDOW) * WINDOW
        found = encoders["text_encoder"](
            tokens["input_ids"],
            attention_mask=real.long(),
            # The position of padding is 1, as it was when the model was trained; transformers 5 would say 0.
            position_ids=places.expand_as(real).masked_fill(~real, 1),
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,  # none are needed
        ).hidden_states
        states = torch.cat([found[layer] for layer in LAYERS], dim=-1)
        return self.padded(states, windows)


class Flux3Klein(Family):
    """FLUX.3 Image Klein: image and caption pass blocks of their own, and then joint ones."""

    pipeline_class = "Flux3ModularPipeline"
    trainable = {"transformer": UNET_ATTENTION}
    text = Flux3Text()
    codec = Flux2Codec()
    schedule = RectifiedFlow(max_shift=1.15, patch=1, even_sigmas=True)
    native = (1024, 1024)
    max_references = 10
    blocks = "Flux3AutoBlocks"
    """Class of the pipeline's blocks."""
    flow_map = False
    """Whether the transformer takes `NEXT_TIMESTEP` (`flow_map` in its configuration)."""

    def loaded(self, pipeline: Pipeline) -> None:
        """Let captions of several windows share a call."""
        transformer = pipeline.transformer
        if transformer is None:
            return
        if transformer.config.flow_map != self.flow_map:
            has, needs = ("a", "none") if transformer.config.flow_map else ("no", "one")
            raise ValueError(
                f"model.base: its transformer is {has} flow map (flow_map), and {self.pipeline_class}, which "
                f"its index names, needs {needs}; only FLUX.3's distilled checkpoints are flow maps"
            )
        transformer.forward = partial(_forward, transformer)
        for block in _blocks(transformer):
            if not isinstance(block.attn.processor, MaskedAttention):
                block.attn.set_processor(MaskedAttention(block.attn.processor))

    def recomputed_blocks(self, denoiser: Any) -> list[nn.Module]:
        return _blocks(denoiser)

    def unused_layers(self, denoiser: Denoiser, num_references: int = 0) -> tuple[str, ...]:
        """Return the layers of reference images, if there are none."""
        if num_references:
            return ()
        return tuple(
            name
            for name, layer in denoiser.named_modules()
            if REFERENCES in name.split(".") and list(layer.parameters(recurse=False))
        )

    def denoise(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        grid, (embeds, mask) = latents.shape[-2:], without_padding(conditions)
        references = references_of(conditions)
        predicted = model["transformer"](
            _tokens(latents),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            timestep=(timesteps / 1000).to(latents.dtype),  # in this order, as its pipeline rounds it
            img_ids=_places(latents),
            txt_ids=positions(0, 0, 0, embeds.shape[1], device=latents.device).float(),
            references=torch.cat([_tokens(each) for each in references], dim=1) if references else None,
            reference_ids=torch.cat([_places(each, -n) for n, each in enumerate(references, start=1)])
            if references
            else None,
            # Without one, as in training, the step has no length: the velocity, as of other flows.
            target_timestep=(conditions.get(NEXT_TIMESTEP, timesteps) / 1000).to(latents.dtype)
            if model["transformer"].config.flow_map
            else None,
        )[0]
        return predicted.transpose(1, 2).unflatten(2, grid)

    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        import diffusers
        from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

        torch.manual_seed(0)
        tokenizer = tiny.qwen_tokenizer(captions)
        transformer = diffusers.Flux3Transformer2DModel(
            in_channels=16,
            cond_in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=len(LAYERS) * tiny.QWEN_WIDTH,
            timestep_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            flow_map=self.flow_map,
        )
        blocks = getattr(diffusers, self.blocks)()
        blocks.sub_blocks.pop("prompt_upsampler")
        pipeline = blocks.init_pipeline()
        pipeline.update_components(
            transformer=transformer,
            vae=tiny_autoencoder(),
            text_encoder=Qwen3VLForConditionalGeneration(tiny.qwen3_vl_config(tokenizer, LAYERS[-1] + 1)),
            tokenizer=text_processor(Qwen3VLProcessor, tokenizer),
        )
        kind = ("transformers", "Qwen3VLProcessor")  # as it is published
        place = {**pipeline.config.tokenizer[2], "type_hint": kind}
        pipeline.register_to_config(tokenizer=(*kind, place))
        return pipeline


class MaskedAttention:
    """Attention of diffusers' processor with a mask, which comes with the rotary embedding.

    Blocks pass that on to their attention as it is, also when they are recomputed.
    """

    def __init__(self, plain: Any) -> None:
        self.plain = plain

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    ) -> torch.Tensor:
        """Return the attention's output, N x tokens x width.

        Args:
            attn: diffusers' layer.
            hidden_states: N x tokens x width.
            image_rotary_emb: cosines and sines, tokens x width of a head, and a mask, bool, broadcast to
                N x heads x tokens x tokens; None if there is none.
        """
        *rotary, mask = image_rotary_emb
        found: torch.Tensor = self.plain(attn, hidden_states, mask, tuple(rotary))
        return found


def _tokens(latents: torch.Tensor) -> torch.Tensor:
    """Return latents, N x C x h x w, as tokens: N x hw x C."""
    return latents.flatten(2).transpose(1, 2)


def _places(latents: torch.Tensor, picture: int = 0) -> torch.Tensor:
    """Return the positions of a picture's tokens: float32, tokens x 4.

    Args:
        picture: position on the last axis: 0 for the image that is drawn, -1, -2, ... for references.
    """
    places = positions(0, *latents.shape[-2:], 0, device=latents.device).float() * IMAGE_SCALE
    places[:, 3] = picture
    return places


def _blocks(transformer: Denoiser) -> list[Any]:
    """Return the blocks that captions and images pass, and both together."""
    return [
        *transformer.txt_mode_blocks,
        *transformer.mode_blocks["image"],
        *transformer.single_transformer_blocks,
    ]


def _forward(
    transformer: Denoiser,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    img_ids: torch.Tensor,
    txt_ids: torch.Tensor,
    encoder_hidden_states_mask: torch.Tensor | None = None,
    references: torch.Tensor | None = None,
    reference_ids: torch.Tensor | None = None,
    target_timestep: torch.Tensor | None = None,
) -> tuple[torch.Tensor]:
    """Predict as `Flux3Transformer2DModel` does, with a mask of captions' tokens.

    The positions of images do not depend on captions, so that each row is as if alone.
    """
    image, text, mask = hidden_states, encoder_hidden_states, encoder_hidden_states_mask
    (rows, words), dtype = text.shape[:2], image.dtype

    def embedded(told: torch.Tensor, embedder: nn.Module = transformer.timestep_embedder) -> torch.Tensor:
        vector: torch.Tensor = embedder(transformer.time_proj(told).to(dtype))
        return vector.unsqueeze(1)

    def run(block: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and transformer.gradient_checkpointing:
            return transformer._gradient_checkpointing_func(block, *arguments)
        return block(*arguments)

    of_image = embedded(timestep.to(dtype) * 1000)
    clean = embedded(timestep.new_zeros(rows, dtype=dtype))  # captions and references have no noise
    if target_timestep is not None:
        end = embedded(target_timestep.to(dtype) * 1000, transformer.target_timestep_embedder)
        of_image, clean = of_image + end, clean + end
    of_image = of_image.expand(-1, image.shape[1], -1)
    vectors = {"image": of_image, "txt": clean.expand(-1, words, -1)}
    if references is not None:
        vectors[REFERENCES] = clean.expand(-1, references.shape[1], -1)
    active = {name: torch.nn.functional.silu(vector) for name, vector in vectors.items()}
    early, joint = (
        {name: each[name](vector) for name, vector in active.items()}
        for each in (transformer.early_stream_modulations, transformer.single_stream_modulations)
    )
    text_rope, image_rope = transformer.pos_embed(txt_ids), transformer.pos_embed(img_ids)
    text_mask = all_mask = None
    if mask is not None:
        text_mask = mask[:, None, None]
    text, image = transformer.context_embedder(text), transformer.x_embedders["image"](image)
    for block in transformer.txt_mode_blocks:
        text = run(block, text, early["txt"], (*text_rope, text_mask))
    for block in transformer.mode_blocks["image"]:
        image = run(block, image, early["image"], (*image_rope, None))
    ropes, modulation, drawn = [text_rope, image_rope], joint["image"], image.shape[1]
    if references is not None:
        rope = transformer.pos_embed(reference_ids)
        further = transformer.x_embedders[REFERENCES](references)
        for block in transformer.mode_blocks[REFERENCES]:
            further = run(block, further, early[REFERENCES], rope)
        ropes.append(rope)
        image = torch.cat([image, further], dim=1)
        modulation = torch.cat([modulation, joint[REFERENCES]], dim=1)
    if text_mask is not None:
        all_mask = torch.nn.functional.pad(text_mask, (0, image.shape[1]), value=True)
    whole = (*(torch.cat(each) for each in zip(*ropes, strict=True)), all_mask)
    for block in transformer.single_transformer_blocks:
        text, image = run(block, image, text, modulation, joint["txt"], whole)
    return (transformer.proj_out(transformer.norm_out(image[:, :drawn], of_image)),)
