"""The adapter of `model.assistant`: frozen, active beside the one in training, and nowhere else.

A model that was distilled for a few steps loses that by plain training. A de-distillation adapter makes it
predict as before the distillation; what is trained meanwhile works without it too
(https://huggingface.co/ostris/zimage_turbo_training_adapter).
"""

from collections.abc import Mapping
from pathlib import Path

from ray_jobs.config import ModelConfig
from ray_jobs.diffusion.families import Family
from ray_jobs.diffusion.finetuning import ADAPTER
from ray_jobs.diffusion.protocols import Component
from ray_jobs.weights.given_adapters import (
    file_digest,
    given_file,
    inject_given,
    own_part,
    read_given,
    require_places,
)

ASSISTANT = "assistant"  # name of the adapter in peft
FIELD = "model.assistant"


def assistant_file(model: ModelConfig) -> Path:
    """Return the local file of `model.assistant`; see `given_file`."""
    return given_file(str(model.assistant), model.assistant_revision, FIELD)


def assistant_digest(model: ModelConfig) -> str | None:
    """Return the sha256 of the file of `model.assistant`; None without one."""
    return file_digest(assistant_file(model)) if model.assistant else None


def add_assistant(parts: Mapping[str, Component], family: Family, model: ModelConfig) -> None:
    """Add the adapter of `model.assistant`, frozen, to denoisers that have adapters in training.

    Each layer adds its output after that of the adapter in training, so that DoRA scales the base alone, as
    it will do without the assistant.

    Args:
        parts: denoisers by name.

    Raises:
        ValueError: the file is no LoRA, or not all of its tensors have a place in the denoisers.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    file = assistant_file(model)
    tensors, settings = read_given(file, family, parts[family.denoiser], FIELD)
    if scaled := next((name for name in tensors if "lora_magnitude_vector" in name), None):
        raise ValueError(f"{FIELD}: {file}: {scaled} belongs to DoRA, but an assistant must be a LoRA")
    require_places(tensors, parts, file, FIELD)
    for name, part in parts.items():
        own = own_part(tensors, name)
        if not own:
            continue
        inject_given(part, own, own_part(settings, name), ASSISTANT, rounded=True)
        for layer in part.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.set_adapter([ADAPTER, ASSISTANT])
        for key, parameter in part.named_parameters():
            if f".{ASSISTANT}." in key:
                parameter.requires_grad_(False)
