"""FLUX.2 dev of Black Forest Labs (https://github.com/black-forest-labs/flux2)."""

from collections.abc import Sequence
from typing import Any

import torch

from ray_jobs.diffusion.families import tiny
from ray_jobs.diffusion.families.flux_2 import Flux2Family, Flux2Text
from ray_jobs.diffusion.families.published import KohyaFiles
from ray_jobs.diffusion.protocols import Pipeline, Tokenizer

SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
IMAGE = "[IMG]"  # stands for an image in the encoder's texts


class Flux2DevText(Flux2Text):
    """Three layers of Mistral Small on a system message and the caption."""

    layers = (10, 20, 30)

    def as_prompt(self, caption: str) -> str:
        return caption.replace(IMAGE, "")

    def written(self, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
        chats = [{"system": SYSTEM_MESSAGE, "user": text} for text in texts]
        messages = [
            [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in chat.items()]
            for chat in chats
        ]
        return [tokenizer.apply_chat_template(each, tokenize=False) for each in messages]

    def tokens_of(self, tokenizer: Tokenizer, name: str, captions: list[str], **options: Any) -> Any:
        # The template has the special tokens.
        return super().tokens_of(tokenizer, name, captions, add_special_tokens=False, **options)


class Flux2Dev(Flux2Family):
    """FLUX.2 dev: FLUX.2 with guidance as an input and Mistral Small as its text encoder."""

    pipeline_class = "Flux2Pipeline"
    in_comfyui = True
    kohya = KohyaFiles("networks.lora_flux_2", "flux_2_dev", "Flux.2-dev")
    text = Flux2DevText()

    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        from diffusers import Flux2Pipeline
        from transformers import Mistral3Config, Mistral3ForConditionalGeneration

        torch.manual_seed(0)
        tokenizer = tiny.mistral_tokenizer([*captions, SYSTEM_MESSAGE])
        config = Mistral3Config(
            text_config={
                "model_type": "mistral",
                "vocab_size": len(tokenizer),
                "hidden_size": tiny.QWEN_WIDTH,
                "intermediate_size": 2 * tiny.QWEN_WIDTH,
                "num_hidden_layers": self.text.layers[-1] + 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 8,
            },
            vision_config={
                "model_type": "pixtral",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "head_dim": 8,
                "image_size": 28,
            },
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        )
        parts = self.tiny_parts(guidance_embeds=True)
        text_encoder = Mistral3ForConditionalGeneration(config)
        return Flux2Pipeline(text_encoder=text_encoder, tokenizer=tokenizer, **parts)
