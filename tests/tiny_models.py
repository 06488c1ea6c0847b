"""The small models of every family and variant, on which the tests of every room run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from ray_jobs.data.encoding.encoding import with_masks
from ray_jobs.diffusion.families import FAMILIES, Conditions, Family, family_of, tiny
from ray_jobs.diffusion.families.family import MASK_PIXELS, MASKED
from ray_jobs.diffusion.families.tiny import MAX_TOKENS

BY_NAME = {
    f"{name}-{variant}".removesuffix("-"): (family, variant)
    for name, family in FAMILIES.items()
    for variant in family.variants
}
MODELS = tuple(BY_NAME)  # for example FluxPipeline and FluxPipeline-schnell
FAMILY_MODELS = tuple(FAMILIES)  # the first of each family


def write(name: str, folder: Path) -> Path:
    """Write one of `MODELS` into `folder`, in diffusers' format; return `folder`."""
    family, variant = BY_NAME[name]
    pipeline = family.tiny(captions(), variant)
    modular = {"overwrite_modular_index": True} if isinstance(pipeline, diffusers.ModularPipeline) else {}
    pipeline.save_pretrained(str(folder), **modular)
    return folder


def guidance(pipeline: Any, scale: float) -> float:
    """A scale of guidance, which is 1 for models that sample without."""
    return scale if family_of(pipeline).has_guidance(pipeline.config) else 1.0


def half_painted(pixels: np.ndarray) -> np.ndarray:
    """Return pictures, N x H x W x 3, with their left halves to be painted, for `Encoders.encode_masked`."""
    masks = np.zeros(pixels.shape[:3], np.uint8)
    masks[:, :, : pixels.shape[2] // 2] = 255
    return with_masks(pixels, masks)


def painted(family: Family, shape: tuple[int, ...], rows: int) -> Conditions:
    """Random conditions of families that paint masks, for latents of this shape; none of others."""
    if not family.paints_masks:
        return {}
    generator = torch.Generator().manual_seed(1)
    masked = torch.randn((rows, *shape), generator=generator)
    pixels = [8 * side for side in shape[1:]]
    return {MASKED: masked, MASK_PIXELS: torch.rand((rows, 1, *pixels), generator=generator) < 0.5}


def captions() -> list[str]:
    from tests.conftest import captions

    return captions()


def clip_tokenizer() -> Any:
    return tiny.clip_tokenizer(captions())


def t5_tokenizer() -> Any:
    return tiny.t5_tokenizer(captions())


def image_classifier(folder: Path, labels: Sequence[str] = ("dark", "bright")) -> Path:
    """A classifier of 32 pixels with random weights, and its processor."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = dict(enumerate(labels))
    numbers = {name: number for number, name in names.items()}
    config = ViTConfig(**sizes, image_size=32, patch_size=8, id2label=names, label2id=numbers)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def clip_model(folder: Path, side: int) -> Path:
    """A whole CLIPModel, of pictures and captions, with its processor; `side`: pixels of what it looks at."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **tower,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**tower, "image_size": side, "patch_size": 14}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    square = {"height": side, "width": side}
    pictures = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
    CLIPProcessor(image_processor=pictures, tokenizer=tokenizer).save_pretrained(folder)
    return folder
