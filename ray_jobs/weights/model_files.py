"""A model's files in diffusers' format, read without importing diffusers (which takes ten seconds)."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_jobs.weights.weight_files import is_weights, plain_name, require_safetensors, variant_of

SAFETY_CHECKER = "safety_checker"
IMAGE_ENCODER = "image_encoder"  # of an IP-Adapter
NEVER_LOADED = (SAFETY_CHECKER, IMAGE_ENCODER)  # nor a part of what is written
# Folders of a model that are not needed to draw pictures, or to encode pictures and captions.
UNUSED = (*NEVER_LOADED, "feature_extractor")
NOT_ENCODERS = ("unet", "transformer", "scheduler", *UNUSED)
INDEX = "model_index.json"
CONFIGURATIONS = ("*.json", "*.txt", "*.model")


def model_folder(base: str, *, revision: str | None = None, without: Sequence[str] | None = None) -> Path:
    """The folder of a model: `base` itself, or a hub name's files in the local cache of the hub.

    Args:
        without: of a hub name, the folders whose weights are not fetched; None: only configurations are.

    Raises:
        ValueError: if it is neither a folder with a `model_index.json` nor a name that the hub knows, or a
            component's weights, which are asked for, are in no format that is read.
    """
    on_hub = not Path(base).is_dir()
    folder = _downloaded(base, revision, CONFIGURATIONS) if on_hub else Path(base)
    if not (folder / INDEX).is_file():
        raise ValueError(f"{base}: no model in diffusers' format: it has no {INDEX}")
    if without is None:
        return folder
    listed = _files(base, revision)
    if listed is not None:
        _require_weights(base, folder, listed, without)
    if not on_hub:
        return folder
    weights = ["*/*.safetensors"]
    if listed is not None:
        weights = [
            f"{name}/{file}"
            for name, files in listed.items()
            for file in files
            if name not in without and is_weights(file) and plain_name(file, variant_of(files))
        ]
    return _downloaded(base, revision, [*CONFIGURATIONS, *weights])


def check_weights(base: str, *, revision: str | None = None) -> None:
    """Raise ValueError, naming the component, if weights that are needed are in no format that is read.

    Fetches none of them.
    """
    folder = model_folder(base, revision=revision)
    listed = _files(base, revision)
    if listed is not None:
        _require_weights(base, folder, listed, ())


def _downloaded(base: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=list(patterns)))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{base}: no model in diffusers' format: neither a folder nor a name of the hub ({reason})"
        ) from None


def _files(base: str, revision: str | None) -> dict[str, list[str]] | None:
    """The files of each component of a model, a folder or on the hub; None where the hub cannot be asked."""
    if Path(base).is_dir():
        return _folders(Path(base))
    import httpx2  # the hub's client lets its errors through here, while it answers them where it fetches
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(base, revision=revision)
    except (OSError, httpx2.TransportError):  # offline: the cache was looked at when it was filled
        return None
    found: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.partition("/")
        if file and "/" not in file:
            found.setdefault(folder, []).append(file)
    return found


def _require_weights(
    base: str, folder: Path, files: Mapping[str, Sequence[str]], without: Sequence[str]
) -> None:
    for name, entry in model_index(folder).items():
        is_component = (
            isinstance(entry, list) and entry[0] and not name.startswith(("scheduler", "tokenizer"))
        )
        if is_component and name not in (*UNUSED, *without):
            require_safetensors(f"{base}: {name}", files.get(name, ()))


def model_index(folder: Path) -> dict[str, Any]:
    """The `model_index.json` in a model's folder: its class, and by component library and class."""
    return dict(json.loads((folder / INDEX).read_text(encoding="utf-8")))


def variants(folder: Path) -> dict[str, str | None]:
    """By component of a model's folder, the variant of its weights that is loaded; None: the plain ones."""
    return {name: variant_of(files) for name, files in _folders(folder).items()}


def variant_name(base: str, *, revision: str | None = None) -> str | None:
    """The `variant` that diffusers' `from_pretrained` must be given for a model; None if it needs none.

    With one, diffusers takes it in each component that has it, and plain files in the others.
    """
    listed = _files(base, revision)
    if listed is None:  # what the cache holds of a hub that does not answer
        listed = _folders(model_folder(base, revision=revision))
    found = {variant_of(files) for name, files in listed.items() if name not in UNUSED} - {None}
    return min(found, default=None, key=str)


def _folders(folder: Path) -> dict[str, list[str]]:
    """The files of each component's folder."""
    return {
        part.name: [path.name for path in part.iterdir()]
        for part in sorted(folder.iterdir())
        if part.is_dir()
    }


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


def latent_pixels(base: str, *, revision: str | None = None) -> int:
    """Pixels of a picture's side that a latent stands for, as the model's family has it."""
    family, autoencoder, _ = _of_sizes(base, revision)
    return int(family.latent_pixels(autoencoder))


def max_side(base: str, *, revision: str | None = None) -> int | None:
    """Pixels of the longest side that a model draws, as its family has it; None where there is no limit."""
    family, *configs = _of_sizes(base, revision)
    found = family.max_side(*configs)
    return None if found is None else int(found)


def _of_sizes(base: str, revision: str | None) -> tuple[Any, Any, Any]:
    """A model's family, and the configurations of its autoencoder and its denoiser."""
    from ray_jobs.diffusion.families import family_of  # imports PyTorch

    folder = model_folder(base, revision=revision)
    family = family_of(model_index(folder)["_class_name"])
    return family, _config(folder / "vae"), _config(folder / family.denoiser)


def _config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
