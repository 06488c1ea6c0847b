"""HiDream-I1 (Cai et al., arXiv 2505.22705): Full, and Dev and Fast, which are distilled from it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from ray_jobs.diffusion.families import tiny
from ray_jobs.diffusion.families.codec import Codec
from ray_jobs.diffusion.families.family import Components, Conditions, Family
from ray_jobs.diffusion.families.flux import PATCH
from ray_jobs.diffusion.families.noise_schedule import RectifiedFlow
from ray_jobs.diffusion.families.text import Captions, Encoders, Text
from ray_jobs.diffusion.protocols import Denoiser, Pipeline, Settings

MAX_TOKENS = 128
ATTENTION = ("to_q", "to_k", "to_v", "to_out")  # a layer each, also `to_out`
EXPERTS = "MOEFeedForwardSwiGLU"
DISTILLED_SCHEDULER = "FlowMatchLCMScheduler"  # of Dev and Fast; Full has UniPCMultistepScheduler
MASKED = ("3", "4")  # text encoders with an attention mask


class HiDreamText(Text):
    """The pooled embeddings of two CLIP text encoders, T5, and all layers of Llama 3.1.

    The transformer attends to the padding of T5 and of Llama too.
    """

    tokens = (
        *("input_ids", "input_ids_2", "input_ids_3", "input_ids_4"),
        *("attention_mask_3", "attention_mask_4"),
    )
    embeds = ("prompt_embeds", "pooled_prompt_embeds", "llama_embeds")
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
    max_tokens = dict.fromkeys(tokens[:4], MAX_TOKENS)

    def tokenize(self, pipeline: Pipeline, captions: list[str]) -> Captions:
        found = {}
        for name in self.tokens[:4]:
            rows = self.tokens_of(getattr(pipeline, name.replace("input_ids", "tokenizer")), name, captions)
            found[name] = rows.input_ids.int()
            if name.endswith(MASKED):
                found[name.replace("input_ids", "attention_mask")] = rows.attention_mask.bool()
        return found

    def embed(self, encoders: Encoders, tokens: Captions) -> Captions:
        """Return Llama's layers as N x layers x tokens x width, without its input."""
        pooled = [
            encoders[part](tokens[name]).text_embeds
            for part, name in zip(self.encoders[:2], self.tokens[:2], strict=True)
        ]
        t5 = encoders["text_encoder_3"](
            tokens["input_ids_3"], attention_mask=tokens["attention_mask_3"].int()
        ).last_hidden_state
        llama = encoders["text_encoder_4"](
            tokens["input_ids_4"],
            attention_mask=tokens["attention_mask_4"].long(),
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,  # none are needed
        ).hidden_states
        return {
            "prompt_embeds": t5,
            "pooled_prompt_embeds": torch.cat(pooled, dim=-1),
            "llama_embeds": torch.stack(llama[1:], dim=1),
        }

    def shapes(self, denoiser: Settings) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        t5, llama = denoiser["caption_channels"]
        layers = max(denoiser["llama_layers"]) + 1
        return {
            "prompt_embeds": ((MAX_TOKENS, t5), torch.float32),
            "pooled_prompt_embeds": ((denoiser["text_emb_dim"],), torch.float32),
            "llama_embeds": ((layers, MAX_TOKENS, llama), torch.float32),
        }


class HiDreamCodec(Codec):
    """Latents in patches. Images that are not square are padded to the most patches of a model."""

    def patch(self, denoiser: Settings) -> int:
        return int(denoiser["patch_size"])

    def max_patches(self, denoiser: Settings) -> int | None:
        height, width = denoiser["max_resolution"]
        return height * width // self.patch(denoiser) ** 2


class HiDream(Family):
    """HiDream-I1: a sparse multimodal diffusion transformer that predicts a rectified flow's opposite."""

    pipeline_class = "HiDreamImagePipeline"
    has_dropout = False
    in_comfyui = True
    routed_layers = ".experts."
    trainable = {"transformer": (*ATTENTION, *(f"{name}_t" for name in ATTENTION))}
    own_area = True
    text, codec, schedule = HiDreamText(), HiDreamCodec(), RectifiedFlow(max_shift=1.15)

    def loaded(self, pipeline: Pipeline) -> None:
        """Let gradients reach the experts, and let the transformer return tokens, in training and elsewhere.

        With `force_inference_output`, which other trainers set, no expert and no gate gets a gradient, and
        what lies before them a wrong one.
        """
        if pipeline.transformer is None:
            return
        pipeline.transformer.unpatchify = _as_tokens
        for layer in pipeline.transformer.modules():
            if type(layer).__name__ == EXPERTS:
                layer.forward = partial(_experts, layer)

    def denoise(
        self, model: Components, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        denoiser: Denoiser = model["transformer"]
        predicted = denoiser(
            latents,
            timesteps=timesteps,
            encoder_hidden_states_t5=conditions["prompt_embeds"],
            encoder_hidden_states_llama3=conditions["llama_embeds"].transpose(0, 1),
            pooled_embeds=conditions["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        if predicted.dim() == 3:  # else it is diffusers' own, see `loaded`
            rows, columns = (side // PATCH for side in latents.shape[-2:])
            # The last tokens are padding, if the image is not square.
            grid = (
                predicted[:, : rows * columns].unflatten(2, (PATCH, PATCH, -1)).unflatten(1, (rows, columns))
            )
            predicted = grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return -predicted  # it predicts the image minus the noise

    def recomputed_blocks(self, denoiser: Any) -> list[nn.Module]:
        return [*denoiser.double_stream_blocks, *denoiser.single_stream_blocks]

    def is_distilled(self, pipeline: Pipeline) -> bool:
        return type(pipeline.scheduler).__name__ == DISTILLED_SCHEDULER

    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        from diffusers import (
            FlowMatchEulerDiscreteScheduler,
            HiDreamImagePipeline,
            HiDreamImageTransformer2DModel,
        )
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        tokenizer = tiny.clip_tokenizer(captions, MAX_TOKENS)
        llama_tokenizer = tiny.llama_tokenizer(captions)
        llama = LlamaConfig(
            vocab_size=len(llama_tokenizer),
            hidden_size=tiny.GEMMA_WIDTH,
            intermediate_size=2 * tiny.GEMMA_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        return HiDreamImagePipeline(
            transformer=HiDreamImageTransformer2DModel(
                patch_size=PATCH,
                in_channels=4,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                caption_channels=[tiny.T5_WIDTH, tiny.GEMMA_WIDTH],
                text_emb_dim=tiny.POOLED + tiny.POOLED_2,
                num_routed_experts=4,
                num_activated_experts=2,
                axes_dims_rope=(4, 6, 6),
                max_resolution=(16, 16),
                llama_layers=[0, 1, 2, 3],
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny.shifted_autoencoder(),
            text_encoder=tiny.clip(tokenizer, tiny.CLIP_WIDTH, tiny.POOLED),
            tokenizer=tokenizer,
            text_encoder_2=tiny.clip(tokenizer, tiny.CLIP_2_WIDTH, tiny.POOLED_2),
            tokenizer_2=tokenizer,
            text_encoder_3=tiny.t5_encoder(captions),
            tokenizer_3=tiny.t5_tokenizer(captions),
            text_encoder_4=LlamaForCausalLM(llama),
            tokenizer_4=llama_tokenizer,
        )


def _as_tokens(tokens: torch.Tensor, sizes: torch.Tensor, is_training: bool) -> torch.Tensor:
    """Return tokens as they are: diffusers asks the device for each image's size."""
    return tokens


def _experts(layer: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Run each expert on the tokens that its gate chose, with gradients and one wait for the device.

    diffusers 0.42.1 waits for each expert, and runs them without gradients outside of training. In planning,
    nobody knows which tokens an expert gets: there all get equally many.
    """
    chosen, weights, _ = layer.gate(tokens)  # each tokens x experts of a token
    order = chosen.flatten().argsort(stable=True)
    experts = torch.arange(len(layer.experts), device=order.device)
    if isinstance(tokens, FakeTensor):
        counts = [len(share) for share in order.tensor_split(len(layer.experts))]
    else:
        counts = (chosen.flatten() == experts[:, None]).sum(dim=1).tolist()
    shares = tokens.flatten(0, 1)[order // weights.shape[-1]].split(counts)
    answers = torch.cat([expert(share) for expert, share in zip(layer.experts, shares, strict=True)])
    of_tokens = answers[order.argsort()].view(*weights.shape, -1)
    mixed = (of_tokens * weights.unsqueeze(-1)).sum(dim=1).view(tokens.shape)
    return mixed + layer.shared_experts(tokens)
