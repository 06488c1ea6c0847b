"""Parts of the small models that `Family.tiny` builds, with random weights."""

import json
from collections.abc import Sequence
from typing import Any

from ray_jobs.diffusion.families import architecture
from ray_jobs.diffusion.protocols import Tokenizer

MAX_TOKENS = 16  # of the CLIP text encoders
CLIP_WIDTH, CLIP_2_WIDTH, POOLED, POOLED_2, T5_WIDTH = 32, 48, 16, 24, 96
GEMMA_WIDTH, UMT5_WIDTH, QWEN_WIDTH = 32, 32, 16

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content if message.content is string else message.content[0].text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CHAT_TOKENS = [
    *("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
]

MISTRAL_TOKENS = "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [INST] [/INST] [IMG]"
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% set name = 'INST' if message.role == 'user' else "
    "'SYSTEM_PROMPT' %}[{{ name }}]{{ message.content[0].text }}[/{{ name }}]{% endfor %}"
)


def shifted_autoencoder(scale: float = 1.5, shift: float | None = 0.25) -> Any:
    """Return an autoencoder whose latents are scaled and shifted, as those of flow-matching models are."""
    autoencoder = architecture.build_autoencoder([8, 16, 16, 16], latent_channels=4, resolution=64)
    autoencoder.register_to_config(scaling_factor=scale, shift_factor=shift)
    return autoencoder


def clip_tokenizer(captions: Sequence[str], max_tokens: int = MAX_TOKENS) -> Any:
    """Return a CLIPTokenizer of `max_tokens` tokens."""
    return architecture.build_tokenizer(captions, vocabulary=600, max_tokens=max_tokens)


def clip(tokenizer: Tokenizer, width: int, projection: int | None = None) -> Any:
    """Return a CLIPTextModel, or with a projection a CLIPTextModelWithProjection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=projection or width,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def t5_tokenizer(captions: Sequence[str]) -> Any:
    """Return a T5TokenizerFast that knows the words of the captions, and letters for all others."""
    from transformers import T5TokenizerFast

    words = sorted({f"▁{word}" for caption in captions for word in caption.split()})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    special = [(name, 0.0) for name in ("<pad>", "</s>", "<unk>")]
    pieces = [(word, -1.0) for word in words] + [(letter, -5.0) for letter in ["▁", *letters]]
    return T5TokenizerFast(vocab=special + pieces, extra_ids=0, model_max_length=512)


def t5_encoder(captions: Sequence[str]) -> Any:
    """Return a T5EncoderModel for `t5_tokenizer`."""
    from transformers import T5Config, T5EncoderModel

    size = len(t5_tokenizer(captions))
    return T5EncoderModel(
        T5Config(vocab_size=size, d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


def gemma_tokenizer(captions: Sequence[str]) -> Any:
    """Return a GemmaTokenizerFast that knows the words of the captions, and letters for all others."""
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizerFast

    pieces, merges = _pieces(captions, ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\n"])
    tokenizer = GemmaTokenizerFast(vocab=pieces, merges=merges)
    start = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", pieces["<bos>"])])
    tokenizer.backend_tokenizer.post_processor = start
    return tokenizer


def _pieces(captions: Sequence[str], special: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a vocabulary, numbered, and merges that join the letters of each known word, from its start."""
    words = sorted({f"▁{word}" for caption in captions for word in caption.split()})
    starts = {word[:end] for word in words for end in range(2, len(word) + 1)}
    ordered = sorted(starts, key=lambda start: (len(start), start))
    pieces = [*special, "▁", *map(chr, range(33, 127)), *ordered]
    merges = [(start[:-1], start[-1]) for start in ordered]
    return {piece: number for number, piece in enumerate(pieces)}, merges


def gemma_encoder(tokenizer: Tokenizer) -> Any:
    """Return a Gemma2Model for `gemma_tokenizer`."""
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=GEMMA_WIDTH,
            intermediate_size=2 * GEMMA_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )


def llama_tokenizer(captions: Sequence[str]) -> Any:
    """Return a LlamaTokenizerFast as AuraFlow's, which ends texts with </s>; else as `gemma_tokenizer`."""
    from tokenizers.processors import TemplateProcessing
    from transformers import LlamaTokenizerFast

    pieces, merges = _pieces(captions, ["<unk>", "<s>", "</s>", "<pad>"])
    tokenizer = LlamaTokenizerFast(vocab=pieces, merges=merges, pad_token="<pad>", padding_side="right")
    end = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", pieces["</s>"])])
    tokenizer.backend_tokenizer.post_processor = end
    return tokenizer


def umt5_encoder(tokenizer: Tokenizer) -> Any:
    """Return a UMT5EncoderModel for `tokenizer`."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=UMT5_WIDTH,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def qwen_tokenizer(captions: Sequence[str], templates: Sequence[str] = ()) -> Any:
    """Return a Qwen2Tokenizer with a chat template, in which each word of the captions is one token.

    Args:
        templates: further texts whose words are one token each.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = Qwen2Tokenizer()._tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator([*captions, *templates], trainer)
    learnt = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=learnt["vocab"], merges=[tuple(pair) for pair in learnt["merges"]])
    tokenizer.add_special_tokens({"additional_special_tokens": CHAT_TOKENS})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def mistral_tokenizer(captions: Sequence[str]) -> Any:
    """Return a LlamaTokenizerFast with Mistral's chat template, padded on the left as generators are."""
    tokenizer = llama_tokenizer([*captions, MISTRAL_TOKENS])
    tokenizer.add_special_tokens({"additional_special_tokens": MISTRAL_TOKENS.split()})
    tokenizer.chat_template, tokenizer.padding_side = MISTRAL_TEMPLATE, "left"
    return tokenizer


def qwen_autoencoder() -> Any:
    """Return an AutoencoderKLQwenImage with 4 channels."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.1, 2.0],
    )


def qwen_scheduler() -> Any:
    """Return the scheduler of Qwen-Image's releases."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def qwen3_vl_config(tokenizer: Any, layers: int) -> Any:
    """Return a small Qwen3VLConfig for `tokenizer`."""
    from transformers import Qwen3VLConfig

    options = qwen_vl_options(
        tokenizer, layers, 5e6, num_position_embeddings=16, deepstack_visual_indexes=[0]
    )
    return Qwen3VLConfig(**options)


def qwen_vl_options(tokenizer: Any, layers: int, rope_theta: float, **vision: Any) -> dict[str, Any]:
    """Return the options of a small configuration of Qwen's models for text and pictures.

    Args:
        vision: further options of the vision part.
    """
    special = tokenizer.convert_tokens_to_ids
    text = qwen3_options(tokenizer, layers)
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": rope_theta,
        "mrope_section": [2, 1, 1],
    }
    return {
        "text_config": text,
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": QWEN_WIDTH,
            **vision,
        },
        "image_token_id": special("<|image_pad|>"),
        "video_token_id": special("<|video_pad|>"),
        "vision_start_token_id": special("<|vision_start|>"),
        "vision_end_token_id": special("<|vision_end|>"),
    }


def qwen3_options(tokenizer: Tokenizer, layers: int) -> dict[str, Any]:
    """Return the options of a small Qwen3Config for `tokenizer`."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": QWEN_WIDTH,
        "intermediate_size": 2 * QWEN_WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 2048,
    }
