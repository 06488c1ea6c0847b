"""Write components of a model so that programs of all releases read them."""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from ray_jobs.diffusion.adapter_files import CLIP_PREFIX
from ray_jobs.diffusion.weight_files import is_weights, plain_name, variant_of


def save_part(part: Any, folder: Path) -> None:
    """Write a component with its weights into its own folder."""
    part.save_pretrained(folder, safe_serialization=True)
    use_old_names(folder, type(part).__name__)


def save_whole(pipeline: Any, folder: Path) -> None:
    """Write a pipeline in diffusers' format."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            use_old_names(folder / name, type(part).__name__)
        elif type(part).__name__ == "CLIPTokenizer":
            # transformers 5 writes tokenizer.json alone, and CLIPTokenizer of 4 reads these two alone.
            part.backend_tokenizer.model.save(str(folder / name))


def copy_part(source: Path, target: Path, class_name: str | None) -> None:
    """Copy a component's folder, of its weights those that `load_pipeline` takes, under their plain names.

    So a base that has them as a variant becomes a model that is loaded without naming one.

    Args:
        class_name: of the component; None where it is unknown.
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


def use_old_names(folder: Path, class_name: str | None) -> None:
    """Give the tensors of a `CLIPTextModel`'s file the names that all releases of transformers read.

    Since version 5.6 it is written without `text_model.`; version 4 finds none of its tensors then, warns,
    and goes on with random ones. Both read the old names. Other classes kept theirs.
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
