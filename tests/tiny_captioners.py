"""Small captioning models of transformers' real classes, with random weights: what they write are words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ray_jobs.diffusion.families import tiny
from tests.conftest import captions

SIDE = 32  # pixels of the pictures that the fixed-size models look at
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {"height": SIDE, "width": SIDE}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def words() -> list[str]:
    return sorted({word for caption in captions() for word in caption.split()})


def drawn(model: Any, spread: float = 0.3) -> Any:
    """Give all weights values so large that what a model writes depends on the picture."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, spread, generator=generator)
    return model.eval()


def blip(folder: Path, side: int = SIDE, tower: dict[str, int] = TOWER) -> Path:
    """A BlipForConditionalGeneration."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
    )

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    vocabulary = {word: number for number, word in enumerate([*special, *words(), "photo", "of"])}
    tokenizer = BertTokenizer(vocab=vocabulary, additional_special_tokens=["[DEC]"])
    text = {
        **tower,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 64,
        "bos_token_id": vocabulary["[DEC]"],
        "eos_token_id": vocabulary["[SEP]"],
        "sep_token_id": vocabulary["[SEP]"],
        "pad_token_id": 0,
    }
    vision = {**tower, "image_size": side, "patch_size": 8 if side == SIDE else 16}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    drawn(BlipForConditionalGeneration(config)).save_pretrained(folder)
    size = {"height": side, "width": side}
    BlipProcessor(BlipImageProcessorPil(size=size), tokenizer).save_pretrained(folder)
    return folder


def blip_2(folder: Path) -> Path:
    """A Blip2ForConditionalGeneration with OPT."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessorPil,
    )

    tokenizer = _byte_pairs()
    processor = Blip2Processor(BlipImageProcessorPil(size=SQUARE), tokenizer, num_query_tokens=4)
    text = {
        "model_type": "opt",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = Blip2Config(
        text_config=text,
        vision_config={**TOWER, "image_size": SIDE, "patch_size": 8},
        qformer_config={**TOWER, "vocab_size": len(tokenizer), "cross_attention_frequency": 1},
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    drawn(Blip2ForConditionalGeneration(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def florence(folder: Path) -> Path:
    """A Florence2ForConditionalGeneration."""
    from transformers import (
        CLIPImageProcessorPil,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
    )

    tokenizer = _byte_pairs(extra_special_tokens={"image_token": "<image>"})
    text = {
        "model_type": "bart",
        "vocab_size": len(tokenizer),
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "decoder_start_token_id": tokenizer.eos_token_id,
        "forced_bos_token_id": tokenizer.bos_token_id,
        "forced_eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "depths": [1, 1],
        "embed_dim": [16, 32],
        "num_heads": [2, 2],
        "num_groups": [2, 2],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "window_size": 4,
        "projection_dim": 32,
    }
    config = Florence2Config(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    drawn(Florence2ForConditionalGeneration(config)).save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size=SQUARE, do_center_crop=False, image_seq_length=(SIDE // 8) ** 2 + 1)
    Florence2Processor(pictures, tokenizer).save_pretrained(folder)
    return folder


def qwen(folder: Path) -> Path:
    """A Qwen2_5_VLForConditionalGeneration, in whose batches pictures have different numbers of tokens."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLImageProcessorPil,
    )

    tokenizer = tiny.qwen_tokenizer(captions())
    tokenizer.chat_template = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    config = Qwen2_5_VLConfig(**tiny.qwen_vl_options(tokenizer, 2, 1e6, fullatt_block_indexes=[0]))
    model = drawn(Qwen2_5_VLForConditionalGeneration(config))
    model.generation_config.update(
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        do_sample=True,
        temperature=0.5,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 28**2, "longest_edge": 112**2}).save_pretrained(folder)
    return folder


def llava(folder: Path) -> Path:
    """A LlavaForConditionalGeneration."""
    from transformers import (
        CLIPImageProcessorPil,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = tiny.qwen_tokenizer(captions())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = {
        **TOWER,
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "num_key_value_heads": 2,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
    }
    config = LlavaConfig(
        text_config=text,
        vision_config={**TOWER, "model_type": "clip_vision_model", "image_size": SIDE, "patch_size": 8},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // 8) ** 2,
    )
    drawn(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>\n"),
    ).save_pretrained(folder)
    return folder


CAPTIONERS: dict[str, Callable[[Path], Path]] = {
    "blip": blip,
    "blip-2": blip_2,
    "florence": florence,
    "qwen": qwen,
    "llava": llava,
}


def _byte_pairs(**options: Any) -> Any:
    """Return a RobertaTokenizer, as BART's and OPT's, in which each word of the captions is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import RobertaTokenizer

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=1,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator([*captions(), *(f" {caption}" for caption in captions())], trainer)
    learnt = json.loads(learner.to_str())["model"]
    return RobertaTokenizer(
        vocab=learnt["vocab"], merges=[tuple(pair) for pair in learnt["merges"]], **options
    )
