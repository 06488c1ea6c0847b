"""Write components, adapters and whole pipelines so that all releases of the libraries can read them."""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ray_jobs.diffusion.finetuning import ADAPTER
from ray_jobs.diffusion.pack import Trainable
from ray_jobs.diffusion.protocols import Component, Pipeline, Scheduler
from ray_jobs.weights.adapter_files import CLIP_PREFIX, file_name, unscaled
from ray_jobs.weights.given_adapters import in_convolutions
from ray_jobs.weights.loading import LORA_WEIGHTS
from ray_jobs.weights.model_index import NEVER_LOADED, model_index, write_index
from ray_jobs.weights.peft_format import LYCORIS, from_lycoris
from ray_jobs.weights.weight_files import is_weights, plain_name, variant_of

if TYPE_CHECKING:
    from peft import PeftConfig


def save_part(part: Component, folder: Path) -> None:
    """Write a component with its weights into its own folder."""
    part.save_pretrained(folder, safe_serialization=True)
    use_old_names(folder, type(part).__name__)


def save_whole(pipeline: Pipeline, folder: Path) -> None:
    """Write a pipeline in diffusers' format."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            use_old_names(folder / name, type(part).__name__)
        elif type(part).__name__ == "CLIPTokenizer":
            # transformers 5 writes only tokenizer.json; version 4's CLIPTokenizer reads only these two files.
            part.backend_tokenizer.model.save(str(folder / name))


def copy_part(source: Path, target: Path, class_name: str | None) -> None:
    """Copy a component's folder with only the weights that `load_pipeline` uses, under their plain names.

    So a base whose weights are a variant becomes a model that loads without naming one.

    Args:
        class_name: class of the component, or None if unknown.
    """
    names = {path.name for path in source.iterdir() if path.is_file()}
    variant = variant_of(names)
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.is_dir():
            shutil.copytree(path, target / path.name)
            continue
        name = plain_name(path.name, variant)
        if name is None:
            continue
        if variant and is_weights(path.name) and name.endswith(".json"):
            index = json.loads(path.read_text(encoding="utf-8"))
            index["weight_map"] = {
                key: plain_name(file, variant) for key, file in index["weight_map"].items()
            }
            (target / name).write_text(json.dumps(index, indent=2), encoding="utf-8")
        else:
            shutil.copyfile(path, target / name)
    use_old_names(target, class_name)


def copy_parts(base: Path, folder: Path, *, without: Collection[str] = ()) -> None:
    """Copy a model's components, but those that are never loaded; see `copy_part`.

    Args:
        without: further components that are not copied.
    """
    index = model_index(base)
    for path in base.iterdir():
        if path.is_dir() and path.name not in {*NEVER_LOADED, *without}:
            class_name = (index.get(path.name) or [None, None])[1]
            copy_part(path, folder / path.name, class_name)


def use_old_names(folder: Path, class_name: str | None) -> None:
    """Rename the tensors in a `CLIPTextModel`'s file so that all releases of transformers can read them.

    Since version 5.6, transformers writes them without `text_model.`. Version 4 then does not recognise any
    of the tensors, warns, and continues with random weights. Both read the old names. Other classes kept
    theirs.
    """
    from safetensors import safe_open
    from safetensors.torch import load, save_file

    if class_name != "CLIPTextModel":
        return
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata(), list(file.keys())
        if all(name.startswith(CLIP_PREFIX) for name in names):
            continue
        tensors = load(path.read_bytes())  # in memory: the file is overwritten
        save_file(
            {CLIP_PREFIX + name.removeprefix(CLIP_PREFIX): tensor for name, tensor in tensors.items()},
            path,
            metadata,
        )


def save_lora(
    pipeline: Pipeline, model: Trainable, weights: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """Write adapters as `pytorch_lora_weights.safetensors`, for diffusers' `load_lora_weights`.

    LoHa and LoKr are written as the LoRA that they are: diffusers loads no other kind that peft saves.

    Args:
        weights: the adapters' tensors by their name in `model`.
    """
    from peft.utils import get_peft_model_state_dict

    # Use peft's names: diffusers' own converter renames attention layers only, and its loader then drops
    # those of a file with both kinds of names, with a warning.
    layers: dict[str, dict[str, torch.Tensor]] = {}
    settings: dict[str, dict[str, object]] = {}
    for name, (prefix, part) in model.components.items():
        mine = {
            key.removeprefix(f"{prefix}.").replace(f".{ADAPTER}.", f".{model.adapter}."): w
            for key, w in weights.items()
            if key.startswith(f"{prefix}.")
        }
        if mine:
            config = part.peft_config[model.adapter]
            state = get_peft_model_state_dict(part, state_dict=mine, adapter_name=model.adapter)
            if config.peft_type in LYCORIS:
                state, config = _as_lora(part, state, config)
            layers[name] = {file_name(part, key): value for key, value in state.items()}
            settings[name] = _settings(config)
    if model.family.has_lora_loader:
        arguments: dict[str, object] = {f"{name}_lora_layers": state for name, state in layers.items()}
        arguments |= {f"{name}_lora_adapter_metadata": own for name, own in settings.items()}
        pipeline.save_lora_weights(folder, safe_serialization=True, **arguments)
    else:
        write_adapter(folder, layers, settings)
    assert (folder / LORA_WEIGHTS).exists()


def _as_lora(
    part: nn.Module, state: Mapping[str, torch.Tensor], config: "PeftConfig"
) -> tuple[dict[str, torch.Tensor], "PeftConfig"]:
    """Return LoHa or LoKr as LoRA of scale 1, by names in the component, and its configuration."""
    from peft import LoraConfig

    found = in_convolutions(from_lycoris(state, config.to_dict()), "", part)
    ends = ".lora_A.weight"
    ranks = {name.removesuffix(ends): len(down) for name, down in found.items() if name.endswith(ends)}
    layers = {"target_modules": config.target_modules, "exclude_modules": config.exclude_modules}
    return found, LoraConfig(**unscaled(ranks), **layers)


def write_adapter(
    folder: Path,
    layers: Mapping[str, Mapping[str, torch.Tensor]],
    settings: Mapping[str, Mapping[str, object]],
) -> None:
    """Write adapters as diffusers' pipelines do, for one that does not.

    Args:
        layers: tensors by component and peft's name.
        settings: peft's settings by component and name.
    """
    from safetensors.torch import save_file

    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, state in layers.items()
        for key, value in state.items()
    }
    told = {f"{name}.{key}": value for name, own in settings.items() for key, value in own.items()}
    metadata = {"lora_adapter_metadata": json.dumps(told, indent=2, sort_keys=True)} if told else {}
    folder.mkdir(parents=True, exist_ok=True)  # as diffusers' pipelines do
    save_file(tensors, folder / LORA_WEIGHTS, {"format": "pt"} | metadata)


def _settings(config: "PeftConfig") -> dict[str, object]:
    """Return the part of an adapter's configuration to store in its file.

    That is, settings that differ from peft's defaults, because an older peft (0.17) rejects settings that it
    does not know, and the settings that diffusers 0.35 requires.
    """
    usual = type(config)().to_dict()
    settings = {key: value for key, value in config.to_dict().items() if value != usual[key]}
    # The order of a set differs between processes, but the same weights must give the same file.
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    # diffusers loads an adapter in training mode: with dropout its samples would be random.
    asked = {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}
    return settings | {name: getattr(config, name) for name in sorted(asked)} | {"lora_dropout": 0.0}


@torch.no_grad()
def save_pipeline(
    base: Path,
    components: Mapping[str, tuple[str, Component]],
    weights: Mapping[str, torch.Tensor],
    folder: Path,
    scheduler: Scheduler | None = None,
) -> None:
    """Write a whole pipeline with trained weights in diffusers' format, as safetensors.

    Args:
        base: folder of the base model, whose files are used for all other components.
        components: components with trained weights, by their name in the pipeline. Pass copies, not those in
            training: their weights are overwritten. Each with the prefix of its parameters in `weights`, as
            in `FineTuning.components`.
        weights: trained weights by their name in `FineTuning`.
        scheduler: replacement for the base model's scheduler; None to keep that.
    """
    own: dict[str, torch.Tensor] = {}
    for prefix, part in components.values():
        own |= {f"{prefix}.{key}": parameter for key, parameter in part.named_parameters()}
    for key, value in weights.items():
        own[key].copy_(value)
    for name, (_, part) in components.items():
        save_part(part, folder / name)
    copy_parts(base, folder, without=components)
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
    write_index(base, folder, None if scheduler is None else type(scheduler).__name__)
