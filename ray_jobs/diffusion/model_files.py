"""A model's files in diffusers' format, read without importing diffusers (which takes ten seconds)."""

import hashlib
import json
from pathlib import Path
from typing import Any

# Folders of a model that are not needed to encode pictures and captions.
NOT_ENCODERS = ("unet", "transformer", "scheduler", "safety_checker", "feature_extractor", "image_encoder")
INDEX = "model_index.json"


def model_folder(base: str, *, revision: str | None = None, weights: bool = False) -> Path:
    """The folder of a model: `base` itself, or a hub name's files in the local cache of the hub.

    Args:
        weights: also the weights of its encoders, else the configurations only.

    Raises:
        ValueError: if it is neither a folder with a `model_index.json` nor a name that the hub knows.
    """
    folder = Path(base) if Path(base).is_dir() else _downloaded(base, revision, weights)
    if not (folder / INDEX).is_file():
        raise ValueError(f"{base}: no model in diffusers' format: it has no {INDEX}")
    return folder


def _downloaded(base: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    kinds = ["*.json", "*.txt", "*.model", *(["*.safetensors"] if weights else [])]
    left_out = [f"{name}/*.safetensors" for name in NOT_ENCODERS] + ["*.fp16.safetensors", "*.onnx*", "flax*"]
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
    folder, digest = model_folder(base, revision=revision, weights=True), hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_dir() or len(inside.parts) < 2 or inside.parts[0] in NOT_ENCODERS:
            continue
        with path.open("rb") as file:
            digest.update(f"{inside.as_posix()} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def size_multiple(base: str, *, revision: str | None = None) -> int:
    """What the sides of a picture, in pixels, must be multiples of: the autoencoder's factor, times the patch
    size where the denoiser is a transformer."""
    folder = model_folder(base, revision=revision)
    factor = 2 ** (len(_config(folder / "vae")["block_out_channels"]) - 1)
    if not (folder / "transformer").is_dir():
        return int(factor)
    return int(factor * _config(folder / "transformer").get("patch_size", 1))


def _config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
