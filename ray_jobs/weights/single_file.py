"""A whole model as one checkpoint file, under the names that `from_single_file` and other programs read."""

import json
from pathlib import Path

import torch

from ray_jobs.diffusion.families import family_of
from ray_jobs.weights.loading import dtype_of
from ray_jobs.weights.model_files import UNUSED, model_folder
from ray_jobs.weights.model_index import NEVER_LOADED, model_index, write_index
from ray_jobs.weights.saving import save_whole


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
        file: safetensors.
        base: folder or hub name of a model of the same layers, for configurations, tokenizers and scheduler.
            Components that the file does not have are taken from it.
        folder: the new one.

    Raises:
        ValueError: the file cannot be read as a checkpoint of the base's family.
    """
    import diffusers
    from safetensors import SafetensorError

    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: only safetensors are read: other formats may run any program")
    try:
        dtype = dtype_of(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: no whole safetensors file ({error}); fetch it again") from None
    source = model_folder(base, revision=revision, without=UNUSED).absolute()
    index = model_index(source)
    kind = getattr(diffusers, index["_class_name"])
    if not hasattr(kind, "from_single_file"):
        raise ValueError(
            f"{file}: diffusers reads no checkpoint of {index['_class_name']} in one file; convert it to "
            "diffusers' format with the script of its publication"
        )
    given = {name: None for name in NEVER_LOADED if name in index}
    try:
        pipeline = kind.from_single_file(
            str(file), config=str(source), local_files_only=True, dtype=dtype, **given
        )
    except Exception as error:  # of any kind: its converters expect the names that they know
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"{file}: diffusers cannot read it as a checkpoint of {base}, a {index['_class_name']} ({reason})"
        ) from None
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and any(each.is_meta for each in part.parameters()):
            raise ValueError(
                f"{file}: it lacks weights of {name}, which {base} has; give the base of its size"
            )
    folder.mkdir()
    save_whole(pipeline, folder)
    write_index(source, folder)
