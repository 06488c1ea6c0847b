"""Read a model's files in diffusers' format without importing diffusers (which takes ten seconds)."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ray_jobs.weights.model_index import (
    INDEX,
    MODULAR_INDEX,
    NEVER_LOADED,
    elsewhere,
    index_path,
    is_modular,
    model_index,
)
from ray_jobs.weights.weight_files import is_weights, plain_name, require_safetensors, variant_of

if TYPE_CHECKING:
    from ray_jobs.diffusion.families import Family
    from ray_jobs.diffusion.protocols import Settings

UNUSED = (*NEVER_LOADED, "feature_extractor")  # folders of a model that are not needed to sample
CONFIGURATIONS = ("*.json", "*.txt", "*.model", "*.jinja")  # the last one: chat templates


def model_folder(base: str, *, revision: str | None = None, without: Sequence[str] | None = None) -> Path:
    """Return the folder of a model: `base` itself, or for a hub name its files in the local hub cache.

    Args:
        without: folders whose weights are not fetched from the hub; None to fetch only configurations.

    Raises:
        ValueError: `base` is neither a folder with an index (`model_index`) nor a model on the hub, a
            component lies in another repository, or the weights of a requested one are in no supported
            format.
    """
    on_hub = not Path(base).is_dir()
    folder = _downloaded(base, revision, CONFIGURATIONS) if on_hub else Path(base)
    if index_path(folder) is None:
        raise ValueError(f"{base}: not a model in diffusers' format: it has no {INDEX}, nor {MODULAR_INDEX}")
    for name, place in elsewhere(folder).items():
        raise ValueError(
            f"{base}: {name} is not in its folder {name}, but in {place or 'no place'}; put a copy there, "
            "and give the model as a folder"
        )
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
    """Raise ValueError, naming the component, if weights that are needed are in no supported format.

    No weights are fetched.
    """
    folder = model_folder(base, revision=revision)
    for path in sorted(folder.glob("*/config.json")):
        stored = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
        if stored and path.parent.name not in UNUSED:
            kind = stored.get("quant_method", "an unknown method")
            raise ValueError(
                f"{base}: {path.parent.name} is stored in few bits ({kind}); give the model with plain "
                "weights, and model.quantize to keep its denoiser in 4 or 8 bits"
            )
    listed = _files(base, revision)
    if listed is not None:
        _require_weights(base, folder, listed, ())
    require_own_layers(base, folder)


def require_own_layers(base: str, folder: Path) -> None:
    """Raise ValueError if a component was saved with an adapter on its layers, or a file is not whole.

    Libraries find no weights for such layers, and start them at random with a warning.

    Args:
        base: the model's name for the message.
        folder: its folder; of the files that are there, the headers of those are read that are loaded.
    """
    from safetensors import SafetensorError, safe_open

    loaded = (
        folder / name / file
        for name, files in _folders(folder).items()
        for file in files
        if name not in UNUSED and file.endswith(".safetensors") and plain_name(file, variant_of(files))
    )
    for path in sorted(loaded):
        try:
            with safe_open(path, "np") as opened:
                layers = list(opened.keys())
        except SafetensorError as error:
            raise ValueError(
                f"{base}: {path.relative_to(folder)}: cannot be read ({error}); fetch it again, from a Git "
                "LFS repository by `git lfs pull`"
            ) from None
        if any(".base_layer." in layer for layer in layers):
            raise ValueError(
                f"{base}: {path.parent.name} was saved with an adapter on its layers; load it with diffusers "
                "as it was, call fuse_lora() and unload_lora_weights(), and save it again"
            )


def _downloaded(base: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=list(patterns)))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{base}: not a model in diffusers' format: neither a folder nor a hub name ({reason})"
        ) from None


def _files(base: str, revision: str | None) -> dict[str, list[str]] | None:
    """List the files of each component, from a folder or the hub; None if the hub is unreachable."""
    if Path(base).is_dir():
        return _folders(Path(base))
    import httpx2  # the hub's client lets httpx2's errors through here, but handles them when downloading
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(base, revision=revision)
    except (OSError, httpx2.TransportError):  # offline: the cache was checked when it was filled
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
        # Settings may be lists too, as Krea 2's layers of the text encoder.
        is_component = (
            isinstance(entry, list)
            and isinstance(entry[0], str)
            and not name.startswith(("scheduler", "tokenizer", "processor", "guider", "image_processor"))
        )
        if is_component and name not in (*UNUSED, *without):
            require_safetensors(f"{base}: {name}", files.get(name, ()))


def variants(folder: Path) -> dict[str, str | None]:
    """Return the weight variant to load for each component of a model's folder; None for plain weights."""
    return {name: variant_of(files) for name, files in _folders(folder).items()}


def variant_name(base: str, *, revision: str | None = None) -> str | None:
    """Return the `variant` to pass to diffusers' `from_pretrained` for a model; None if it needs none.

    Given one, diffusers uses it for each component that has it, and plain files for the others.
    """
    listed = _files(base, revision)
    if listed is None:  # the hub does not answer: use the cached files
        listed = _folders(model_folder(base, revision=revision))
    found = {variant_of(files) for name, files in listed.items() if name not in UNUSED} - {None}
    return min(found, default=None, key=str)


def _folders(folder: Path) -> dict[str, list[str]]:
    """List the files in each component's folder."""
    return {
        part.name: [path.name for path in part.iterdir()]
        for part in sorted(folder.iterdir())
        if part.is_dir()
    }


def encoders_digest(base: str, *, revision: str | None = None, text_quantization: str | None = None) -> str:
    """Return the sha256 of everything that encodings depend on.

    That is, the weights and configurations of the autoencoder, the tokenizers and the text encoders, and the
    format in which these are stored.
    """
    digest = _digest(base, revision, not_encoders())
    if text_quantization is None:
        return digest
    return hashlib.sha256(f"{digest} {text_quantization}".encode()).hexdigest()


def model_digest(base: str, *, revision: str | None = None) -> str:
    """Return the sha256 of everything that a model's images depend on.

    That is, its encoders, denoiser and scheduler, and their classes.
    """
    folder = model_folder(base, revision=revision)
    index = model_index(folder)  # without the places of a modular one's components
    components = json.dumps(index).encode() if is_modular(index) else (folder / INDEX).read_bytes()
    return hashlib.sha256(components + _digest(base, revision, UNUSED).encode()).hexdigest()


def not_encoders() -> tuple[str, ...]:
    """Return the folders of models that are not needed to encode images and captions."""
    from ray_jobs.diffusion.families import FAMILIES  # imports PyTorch

    denoisers = {name: None for family in FAMILIES.values() for name in family.networks}
    return (*denoisers, "scheduler", *UNUSED)


def _digest(base: str, revision: str | None, without: Sequence[str]) -> str:
    folder, digest = model_folder(base, revision=revision, without=without), hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_dir() or len(inside.parts) < 2 or inside.parts[0] in without:
            continue
        with path.open("rb") as file:
            digest.update(f"{inside.as_posix()} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def family_in(base: str, *, revision: str | None = None) -> "Family":
    """Return the family of a model."""
    from ray_jobs.diffusion.families import family_of  # imports PyTorch

    return family_of(model_index(model_folder(base, revision=revision))["_class_name"])


def size_multiple(base: str, *, revision: str | None = None) -> int:
    """Return the pixel count that both sides of an image must be multiples of, by the model's family."""
    family, *configs = _of_sizes(base, revision)
    return int(family.codec.size_multiple(*configs))


def latent_shapes(
    base: str, sizes: Sequence[tuple[int, int]], *, revision: str | None = None
) -> list[tuple[int, ...]]:
    """Return the shapes, C x ..., of the latents of images of these heights and widths, by the family."""
    family, autoencoder, _ = _of_sizes(base, revision)
    return [tuple(family.codec.shape(autoencoder, *size)) for size in sizes]


def max_side(base: str, *, revision: str | None = None) -> int | None:
    """Return the longest side, in pixels, that a model can generate, by its family; None for no limit."""
    family, *configs = _of_sizes(base, revision)
    found = family.codec.max_side(*configs)
    return None if found is None else int(found)


def max_area(base: str, *, revision: str | None = None) -> int | None:
    """Return the most pixels of an image that is not square, by a model's family; None for no limit."""
    family, autoencoder, denoiser = _of_sizes(base, revision)
    patches = family.codec.max_patches(denoiser)
    return None if patches is None else int(patches * family.codec.size_multiple(autoencoder, denoiser) ** 2)


def without_lora_loader(base: str, *, revision: str | None = None) -> str | None:
    """Return the component that adapters change, if diffusers' pipeline has no LoRA loader; else None."""
    family = family_in(base, revision=revision)
    return None if family.has_lora_loader else family.denoiser


def _of_sizes(base: str, revision: str | None) -> "tuple[Family, Settings, Settings]":
    """Return a model's family, and the configurations of its autoencoder and its denoiser."""
    folder, family = model_folder(base, revision=revision), family_in(base, revision=revision)
    return family, _config(folder / "vae"), _config(folder / family.denoiser)


def _config(folder: Path) -> "Settings":
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
