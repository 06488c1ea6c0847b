"""Load a text-to-image model in diffusers' format, with or without what was fine-tuned on it."""

from pathlib import Path
from typing import Any

import torch

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"


def load_pipeline(base: str, weights: str | Path | None = None, *, revision: str | None = None) -> Any:
    """A StableDiffusionPipeline in float32 on the CPU, in evaluation mode.

    Args:
        base: folder or hub name of the base model.
        weights: a folder that holds either LoRA weights (`pytorch_lora_weights.safetensors`), which
            are loaded onto the base, or a whole pipeline (`model_index.json`), which replaces it.
        revision: of the base on the hub.

    Raises:
        ValueError: if `weights` is neither.
    """
    from diffusers import StableDiffusionPipeline

    source = str(weights) if weights and (Path(weights) / "model_index.json").exists() else base
    pipeline = StableDiffusionPipeline.from_pretrained(
        source,
        revision=revision if source == base else None,
        torch_dtype=torch.float32,
        safety_checker=None,
        requires_safety_checker=False,
        use_safetensors=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    if weights and source == base:
        if not (Path(weights) / LORA_WEIGHTS).exists():
            raise ValueError(f"{weights}: holds neither {LORA_WEIGHTS} nor model_index.json")
        load_lora(pipeline, Path(weights))
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    return pipeline


def load_lora(pipeline: Any, folder: Path) -> None:
    """Add the adapters in a folder to a pipeline that has none.

    Raises:
        ValueError: if a layer of the file found no place in the pipeline. diffusers would leave it out and
            go on.
    """
    from safetensors import safe_open

    pipeline.load_lora_weights(str(folder), weight_name=LORA_WEIGHTS)
    with safe_open(folder / LORA_WEIGHTS, "pt") as file:
        names = file.keys()
    stored = sum(name.endswith("weight") for name in names)
    parts = (pipeline.unet, pipeline.text_encoder)
    loaded = sum(".lora_" in name for part in parts for name, _ in part.named_parameters())
    if loaded != stored:
        pipeline.unload_lora_weights()
        raise ValueError(
            f"{folder / LORA_WEIGHTS}: {loaded} of {stored} tensors fit the base model; it was trained on"
            " another one, or names its layers in a way that diffusers does not read"
        )


def tokenize(tokenizer: Any, prompts: list[str]) -> torch.Tensor:
    """Prompts to tokens: int64, N x tokens, cut or padded to the tokenizer's length."""
    tokens = tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return tokens.input_ids


@torch.no_grad()
def embed_tokens(text_encoder: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Tokens (N x tokens) to embeddings: float, N x tokens x width, on the encoder's device."""
    return text_encoder(input_ids.to(text_encoder.device), return_dict=False)[0]


def encode_prompts(tokenizer: Any, text_encoder: Any, prompts: list[str]) -> torch.Tensor:
    """Prompts to embeddings: float, N x tokens x width, on the encoder's device."""
    return embed_tokens(text_encoder, tokenize(tokenizer, prompts))
