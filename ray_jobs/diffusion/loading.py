"""Load a text-to-image model in diffusers' format, with or without what was fine-tuned on it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ray_jobs.diffusion.families import Captions, family_of
from ray_jobs.diffusion.model_files import SAFETY_CHECKER
from ray_jobs.diffusion.schedulers import has_scheduler, load_scheduler

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"


def load_pipeline(
    base: str,
    weights: str | Path | None = None,
    *,
    revision: str | None = None,
    without: Sequence[str] = (),
) -> Any:
    """A pipeline of one of the families in float32 on the CPU, frozen, in evaluation mode.

    Args:
        base: folder or hub name of the base model.
        weights: a folder that holds either LoRA weights (`pytorch_lora_weights.safetensors`), which
            are loaded onto the base, with the scheduler that may lie beside them, or a whole pipeline
            (`model_index.json`), which replaces it.
        revision: of the base on the hub.
        without: components that are not loaded.

    Raises:
        ValueError: if `weights` is neither, or the model is of no known family.
    """
    from diffusers import DiffusionPipeline

    source = str(weights) if weights and (Path(weights) / "model_index.json").exists() else base
    revision = revision if source == base else None
    index = read_index(source, revision)
    family_of(index["_class_name"])
    options = left_out(index, [SAFETY_CHECKER, *without])
    if SAFETY_CHECKER in index:
        options["requires_safety_checker"] = False
    pipeline = DiffusionPipeline.from_pretrained(
        source, revision=revision, dtype=torch.float32, use_safetensors=True, **options
    )
    pipeline.set_progress_bar_config(disable=True)
    if weights and source == base:
        if not (Path(weights) / LORA_WEIGHTS).exists():
            raise ValueError(f"{weights}: holds neither {LORA_WEIGHTS} nor model_index.json")
        load_lora(pipeline, Path(weights))
        if has_scheduler(Path(weights)):
            pipeline.scheduler = load_scheduler(Path(weights))
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipeline


def empty_model(base: str, parts: Sequence[str], *, revision: str | None = None) -> Any:
    """An object with a model's scheduler, configuration and some of its other components, their weights
    without memory.

    Args:
        parts: names of components that hold weights. One that the model leaves out is None.
    """
    import importlib
    from types import SimpleNamespace

    from accelerate import init_empty_weights
    from diffusers import ModelMixin

    index = read_index(base, revision)
    found = SimpleNamespace(config=index)
    for name in ("scheduler", *parts):
        library, class_name = index.get(name, (None, None))
        if library is None:
            setattr(found, name, None)
            continue
        kind = getattr(importlib.import_module(library), class_name)
        options = {"subfolder": name, "revision": revision}
        if name == "scheduler":
            found.scheduler = kind.from_pretrained(base, **options)
            continue
        with init_empty_weights():
            if issubclass(kind, ModelMixin):
                part = kind.from_config(kind.load_config(base, **options))
            else:
                part = kind(kind.config_class.from_pretrained(base, **options))
        setattr(found, name, part)
    return found


def read_index(base: str, revision: str | None = None) -> dict[str, Any]:
    """The `model_index.json` of a folder or hub name: the pipeline's class and its components."""
    from diffusers import DiffusionPipeline

    return dict(DiffusionPipeline.load_config(base, revision=revision))


def left_out(index: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The named components, and those that the model itself leaves out, as None for `from_pretrained`."""
    return {name: None for name, entry in index.items() if name in names or entry == [None, None]}


def load_lora(pipeline: Any, folder: Path) -> None:
    """Add the adapters in a folder to a pipeline that has none; none of them drops anything out.

    Raises:
        ValueError: if a layer of the file found no place in the pipeline. diffusers would leave it out and
            go on.
    """
    from safetensors import safe_open

    pipeline.load_lora_weights(str(folder), weight_name=LORA_WEIGHTS)
    with safe_open(folder / LORA_WEIGHTS, "pt") as file:
        names = file.keys()
    # An alpha is a scale, not a layer; diffusers' files have it in their metadata.
    stored = sum(not name.endswith("alpha") for name in names)
    family = family_of(pipeline)
    parts = (getattr(pipeline, family.denoiser), *family.encoders(pipeline).values())
    for part in parts:
        part.eval()  # peft makes adapters that still train
    loaded = sum(".lora_" in name for part in parts for name, _ in part.named_parameters())
    if loaded != stored:
        pipeline.unload_lora_weights()
        raise ValueError(
            f"{folder / LORA_WEIGHTS}: {loaded} of {stored} tensors fit the base model; it was trained on"
            " another one, or names its layers in a way that diffusers does not read"
        )


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: list[str], device: str | torch.device | None = None) -> Captions:
    """What the denoiser takes of N prompts: float, N x ..., by name.

    Args:
        device: that the text encoders run on; None: the pipeline's.
    """
    family = family_of(pipeline)
    tokens = family.tokenize(pipeline, prompts)
    placed = {name: ids.to(device or pipeline.device) for name, ids in tokens.items()}
    return family.embed(family.encoders(pipeline), placed)
