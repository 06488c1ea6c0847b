"""A whole model as one checkpoint file, under the names that `from_single_file` and other programs read."""

import json
import re
from pathlib import Path
from typing import Any

import torch

from ray_jobs.diffusion.families import Family, family_of
from ray_jobs.weights.loading import class_of, dtype_of
from ray_jobs.weights.model_files import UNUSED, model_folder
from ray_jobs.weights.model_index import NEVER_LOADED, model_index, write_index
from ray_jobs.weights.saving import copy_parts, save_part

_OTHER_COMPONENTS = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_enc")
_PREFIX = re.compile(r"^(model\.)?diffusion_model\.")  # ComfyUI's
_UNUSED_TENSORS = ("norm_final.weight",)  # of the first publications of Lumina 2 and Z-Image


def write_single_file(folder: Path, file: Path) -> None:
    """Write a model in diffusers' format as one checkpoint.

    Args:
        folder: with plain weights as safetensors; they are mapped, and written once.

    Raises:
        ValueError: the family's checkpoints are not written, or a tensor has no name in them.
    """
    from safetensors.torch import load_file, save_file

    family = family_of(model_index(folder)["_class_name"])
    if not family.in_checkpoint:
        raise ValueError(
            f"single files of {family.pipeline_class} are not written, only those of Stable Diffusion 1 and "
            "XL; take --format merged"
        )
    tensors: dict[str, torch.Tensor] = {}
    for component in family.in_checkpoint:
        settings = json.loads((folder / component / "config.json").read_text(encoding="utf-8"))
        own: dict[str, torch.Tensor] = {}
        for path in sorted((folder / component).glob("*.safetensors")):
            own |= load_file(path)
        tensors |= family.checkpoint(component, own, settings)
    save_file(tensors, file, {"format": "pt"})


def read_single_file(file: Path, base: str, folder: Path, revision: str | None = None) -> None:
    """Write a checkpoint in one file as a model in diffusers' format.

    Args:
        file: safetensors: of a whole model, or of a denoiser alone.
        base: folder or hub name of a model of the same layers, for configurations, tokenizers and scheduler.
            Components that the file does not have are taken from it.
        folder: the new one.

    Raises:
        ValueError: the file cannot be read as a checkpoint of the base's family.
    """
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: only safetensors are read: other formats may run any program")
    try:
        dtype = dtype_of(file)
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
    except SafetensorError as error:
        raise ValueError(f"{file}: no whole safetensors file ({error}); fetch it again") from None
    source = model_folder(base, revision=revision, without=UNUSED).absolute()
    family = family_of(model_index(source)["_class_name"])
    is_whole = family.is_unet or any(name.startswith(_OTHER_COMPONENTS) for name in names)
    try:
        parts = (_read_whole if is_whole else _read_denoiser)(file, source, family, dtype)
    except _Misfit as error:
        raise ValueError(f"{file}: {error}") from None
    except Exception as error:  # of any kind: diffusers' converters expect the names that they know
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        model = f"{base}, a {family.pipeline_class}"
        raise ValueError(f"{file}: diffusers cannot read it as a checkpoint of {model} ({reason})") from None
    for name, part in parts.items():
        if any(each.is_meta for each in part.parameters()):
            raise ValueError(
                f"{file}: it lacks weights of {name}, which {base} has; give the base of its size"
            )
    copy_parts(source, folder, without=parts)
    for name, part in parts.items():
        save_part(part, folder / name)
    write_index(source, folder)


class _Misfit(ValueError):
    """A checkpoint that is not the base's."""


def _read_whole(file: Path, source: Path, family: Family, dtype: torch.dtype) -> dict[str, Any]:
    """Return the components of a whole model in one file, by name."""
    import diffusers

    kind = getattr(diffusers, family.pipeline_class)
    if not hasattr(kind, "from_single_file"):
        raise _Misfit(
            f"it has more than the {family.denoiser}, and diffusers reads no such checkpoint of "
            f"{family.pipeline_class}; give one of the {family.denoiser} alone, or convert it"
        )
    given = {name: None for name in NEVER_LOADED if name in model_index(source)}
    pipeline = kind.from_single_file(
        str(file), config=str(source), local_files_only=True, dtype=dtype, **given
    )
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def _read_denoiser(file: Path, source: Path, family: Family, dtype: torch.dtype) -> dict[str, Any]:
    """Return a denoiser alone in one file, by its name."""
    from safetensors.torch import load_file

    name = family.denoiser
    kind = class_of(model_index(source)[name])
    if not hasattr(kind, "from_single_file"):
        raise _Misfit(
            f"diffusers reads no checkpoint of {family.pipeline_class} in one file; convert it to diffusers' "
            "format with the script of its publication"
        )
    tensors = {_PREFIX.sub("", key): tensor for key, tensor in load_file(file).items()}
    stored = sum(tensor.numel() for key, tensor in tensors.items() if key not in _UNUSED_TENSORS)
    part = kind.from_single_file(
        tensors, config=str(source), subfolder=name, local_files_only=True, dtype=dtype
    )
    places = sum(tensor.numel() for tensor in part.state_dict().values())
    if stored > places:  # diffusers leaves out what it finds no place for
        raise _Misfit(
            f"it has {stored:,} numbers, and the {name} of the base {places:,} places; give the base of its "
            "size"
        )
    return {name: part}
