"""Load a text-to-image model in diffusers' format, with or without fine-tuned weights."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.protocols import Component, Pipeline
from ray_jobs.weights.adapter_files import check_adapter, place_tensors
from ray_jobs.weights.model_files import INDEX, NEVER_LOADED, SAFETY_CHECKER, UNUSED, model_folder, variants
from ray_jobs.weights.schedulers import has_scheduler, load_scheduler

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"


def load_pipeline(
    base: str,
    weights: str | Path | None = None,
    *,
    revision: str | None = None,
    without: Sequence[str] = (),
) -> Pipeline:
    """Load a pipeline in float32 on the CPU, frozen and in evaluation mode.

    Args:
        base: folder or hub name of the base model.
        weights: folder with either LoRA weights (`pytorch_lora_weights.safetensors`), which are loaded onto
            the base, together with a scheduler in the same folder if there is one; or a whole pipeline
            (`model_index.json`), which replaces the base.
        revision: revision of the base on the hub.
        without: components that are not loaded.

    Raises:
        ValueError: `weights` is neither, or the model belongs to no known family.
    """
    whole = bool(weights and (Path(weights) / INDEX).exists())
    pipeline = (
        read_pipeline(str(weights), without=without)
        if whole
        else read_pipeline(base, revision=revision, without=without)
    )
    pipeline.set_progress_bar_config(disable=True)
    if weights and not whole:
        if not (Path(weights) / LORA_WEIGHTS).exists():
            raise ValueError(f"{weights}: contains neither {LORA_WEIGHTS} nor model_index.json")
        load_lora(pipeline, Path(weights))
        if has_scheduler(Path(weights)):
            pipeline.scheduler = load_scheduler(Path(weights))
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipeline


def read_pipeline(base: str, *, revision: str | None = None, without: Sequence[str] = ()) -> Pipeline:
    """Load a model's pipeline in float32 as diffusers builds it.

    Each component is loaded from its plain weights if present, else from a variant such as fp16.

    Args:
        base: folder or hub name.
        without: components that are not loaded, in addition to those of `NEVER_LOADED` (the safety checker
            and the IP-Adapter's image encoder).

    Raises:
        ValueError: the model belongs to no known family, or a component's weights are in no supported format.
    """
    from diffusers import DiffusionPipeline

    without = [*NEVER_LOADED, *without]
    family_of(read_index(base, revision)["_class_name"])
    folder = model_folder(base, revision=revision, without=[*UNUSED, *without])
    index = read_index(str(folder))
    options = left_out(index, without)
    for name, variant in variants(folder).items():
        if variant and isinstance(index.get(name), list) and name not in options:
            kind = _class_of(index[name])
            options[name] = kind.from_pretrained(
                str(folder), subfolder=name, variant=variant, dtype=torch.float32, use_safetensors=True
            )
    if SAFETY_CHECKER in index:
        options["requires_safety_checker"] = False
    return DiffusionPipeline.from_pretrained(
        str(folder), dtype=torch.float32, use_safetensors=True, **options
    )


def _class_of(entry: Sequence[str]) -> Any:
    """Return a component's class, given its library and name in `model_index.json`."""
    library, class_name = entry
    return getattr(importlib.import_module(library), class_name)


def empty_model(base: str, parts: Sequence[str], *, revision: str | None = None) -> Any:
    """Return an object with a model's configuration, scheduler and named parts, without allocating weights.

    As from `load_pipeline`, the parts are frozen and in evaluation mode.

    Args:
        parts: names of components with weights. Those that the model leaves out are None in the result.
    """
    from types import SimpleNamespace

    from accelerate import init_empty_weights
    from diffusers import ModelMixin

    index = read_index(base, revision)
    found = SimpleNamespace(config=index)
    for name in ("scheduler", *parts):
        entry = index.get(name, (None, None))
        if entry[0] is None:
            setattr(found, name, None)
            continue
        kind = _class_of(entry)
        options = {"subfolder": name, "revision": revision}
        if name == "scheduler":
            found.scheduler = kind.from_pretrained(base, **options)
            continue
        with init_empty_weights():
            if issubclass(kind, ModelMixin):
                part = kind.from_config(kind.load_config(base, **options))
            else:
                part = kind(kind.config_class.from_pretrained(base, **options))
        if not issubclass(kind, ModelMixin):
            part.tie_weights()  # without memory, shared parameters are created separately
        setattr(found, name, part.requires_grad_(False).eval())
    return found


def read_index(base: str, revision: str | None = None) -> dict[str, Any]:
    """Read the `model_index.json` of a folder or hub name: the pipeline's class and its components."""
    from diffusers import DiffusionPipeline

    return dict(DiffusionPipeline.load_config(base, revision=revision))


def left_out(index: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Map the named components, and those that the model leaves out, to None for `from_pretrained`."""
    return {name: None for name, entry in index.items() if name in names or entry == [None, None]}


def load_lora(pipeline: Pipeline, folder: Path) -> None:
    """Add the adapters in a folder to a pipeline that has none, with dropout inactive.

    Raises:
        ValueError: the file is not an adapter of a base, or its layers do not all fit the pipeline; diffusers
            would skip those that do not.
    """
    from safetensors import safe_open

    path = folder / LORA_WEIGHTS
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        settings = check_adapter(path, tensors, file.metadata() or {})
    parts = family_of(pipeline).adaptable(pipeline)
    if family_of(pipeline).has_lora_loader:
        pipeline.load_lora_weights(str(folder), weight_name=LORA_WEIGHTS)
    else:
        _inject(parts, tensors, settings)
    for part in parts.values():
        part.eval()  # peft creates adapters in training mode
    # An alpha is a scale, not a layer; diffusers' files keep it in their metadata.
    stored = sum(not name.endswith("alpha") for name in tensors)
    placed, parameters = place_tensors(parts, tensors)
    if not placed == stored == parameters:
        unload_lora(pipeline)
        raise ValueError(
            f"{path}: {placed} of {stored} tensors fit the base model, which has {parameters} places; it "
            "was trained on another base, or diffusers does not read its names of layers"
        )


def unload_lora(pipeline: Pipeline) -> None:
    """Remove the adapters that `load_lora` added."""
    family = family_of(pipeline)
    if family.has_lora_loader:
        pipeline.unload_lora_weights()
        return
    from diffusers.utils import recurse_remove_peft_layers

    for part in family.adaptable(pipeline).values():
        if hasattr(part, "peft_config"):
            recurse_remove_peft_layers(part)
            del part.peft_config


def _inject(
    parts: Mapping[str, Component], tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> None:
    """Add adapters as diffusers' loader does: with a file's settings, or else at the scale 1.

    Args:
        parts: components by name.
        tensors, settings: the file's, by `<component>.<layer>` and `<component>.<setting>`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    for name, part in parts.items():
        prefix = f"{name}."
        stored = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        own = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
        ranks = [tensor.shape[1] for key, tensor in stored.items() if key.endswith("lora_B.weight")]
        if ranks:
            own = own or {"r": ranks[0], "lora_alpha": ranks[0]}
            layers = sorted({key.partition(".lora_")[0] for key in stored})
            inject_adapter_in_model(LoraConfig(**own | {"target_modules": layers}), part)
