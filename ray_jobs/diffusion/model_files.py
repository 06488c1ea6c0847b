"""A model's files in diffusers' format, read without importing diffusers (which takes ten seconds)."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SAFETY_CHECKER = "safety_checker"  # never loaded, nor a part of what is written
# Folders of a model that are not needed to draw pictures, or to encode pictures and captions.
UNUSED = (SAFETY_CHECKER, "feature_extractor", "image_encoder")
NOT_ENCODERS = ("unet", "transformer", "scheduler", *UNUSED)
INDEX = "model_index.json"


def model_folder(base: str, *, revision: str | None = None, without: Sequence[str] | None = None) -> Path:
    """The folder of a model: `base` itself, or a hub name's files in the local cache of the hub.

    Args:
        without: of a hub name, the folders whose weights are not fetched; None: only configurations are.

    Raises:
        ValueError: if it is neither a folder with a `model_index.json` nor a name that the hub knows.
    """
    folder = Path(base) if Path(base).is_dir() else _downloaded(base, revision, without)
    if not (folder / INDEX).is_file():
        raise ValueError(f"{base}: no model in diffusers' format: it has no {INDEX}")
    return folder


def _downloaded(base: str, revision: str | None, without: Sequence[str] | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    kinds = ["*.json", "*.txt", "*.model", *(["*/*.safetensors"] if without is not None else [])]
    left_out = [f"{name}/*.safetensors" for name in without or ()]
    left_out += ["*.fp16.safetensors", "*.non_ema.safetensors", "*.onnx*", "flax*"]
    try:
        return Path(
            snapshot_download(base, revision=revision, allow_patterns=kinds, ignore_patterns=left_out)
        )
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{base}: no model in diffusers' format: neither a folder nor a name of the hub ({reason})"
        ) from None


def encoders_digest(base: str, *, revision: str | None = None) -> str:
    """The sha256 of all that encodings depend on: weights and configurations of the autoencoder, the
    tokenizers and the text encoders."""
    return _digest(base, revision, NOT_ENCODERS)


def model_digest(base: str, *, revision: str | None = None) -> str:
    """The sha256 of all that a model's pictures depend on: its encoders, denoiser and scheduler, and their
    classes."""
    components = (model_folder(base, revision=revision) / INDEX).read_bytes()
    return hashlib.sha256(components + _digest(base, revision, UNUSED).encode()).hexdigest()


def _digest(base: str, revision: str | None, without: Sequence[str]) -> str:
    folder, digest = model_folder(base, revision=revision, without=without), hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_dir() or len(inside.parts) < 2 or inside.parts[0] in without:
            continue
        with path.open("rb") as file:
            digest.update(f"{inside.as_posix()} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def size_multiple(base: str, *, revision: str | None = None) -> int:
    """Pixels that both sides of a picture must be multiples of, as the model's family has it."""
    family, *configs = _of_sizes(base, revision)
    return int(family.size_multiple(*configs))


def max_side(base: str, *, revision: str | None = None) -> int | None:
    """Pixels of the longest side that a model draws, as its family has it; None where there is no limit."""
    family, *configs = _of_sizes(base, revision)
    found = family.max_side(*configs)
    return None if found is None else int(found)


def _of_sizes(base: str, revision: str | None) -> tuple[Any, Any, Any]:
    """A model's family, and the configurations of its autoencoder and its denoiser."""
    from ray_jobs.diffusion.families import family_of  # imports PyTorch

    folder = model_folder(base, revision=revision)
    family = family_of(json.loads((folder / INDEX).read_text(encoding="utf-8"))["_class_name"])
    return family, _config(folder / "vae"), _config(folder / family.denoiser)


def _config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
