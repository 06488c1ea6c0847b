"""LoRA files that a user names (`model.adapter`, `model.assistant`): find, read and place them."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from cluster.fetched import local_path
from ray_jobs.diffusion.families import FAMILIES, Family
from ray_jobs.diffusion.finetuning import inject_adapter
from ray_jobs.diffusion.protocols import Component, Settings
from ray_jobs.weights.adapter_files import (
    IN_FILE,
    file_name,
    layer_in_memory,
    read_adapter_file,
    scaled,
    unscaled,
)
from ray_jobs.weights.dora import SCALE, converted_magnitudes, require_all_or_none
from ray_jobs.weights.loading import LORA_WEIGHTS
from ray_jobs.weights.peft_format import PEFT_CONFIG, PEFT_WEIGHTS, read_peft_format
from ray_jobs.weights.published_names import KOHYA, from_published_names

SCALING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
NAMED = 3  # tensors that an error names
# Tensors of a LoRA by any program's names; diffusers drops others, or fails on them, without naming them all.
_PART = re.compile(r"(lora_[AB](\.\w+)?|lora_?(down|up)|lora\w*\.(down|up))\.weight$|alpha$|lora_magnitude_")
# Down projections, by any program's names: rank x ...
DOWN = re.compile(r"(lora_A(\.\w+)?|lora_down|lora\w*\.down)\.weight$")


def given_file(name: str, revision: str | None, field: str) -> Path:
    """Return the local safetensors file of an adapter, downloading it first if it is not there.

    Args:
        name: file, folder or hub name, as configured.
        field: the setting that it comes from, for errors.

    Raises:
        ValueError: there is no such file, it is one of several, or it is pickled.
    """
    found = Path(local_path(name, field))
    if found.suffix in PICKLED:
        raise ValueError(f"{field}: {name}: {_pickled(found.name)}")
    if found.is_file():
        return found
    if found.is_dir():
        return found / _only(name, [path.name for path in found.iterdir()], field)
    import httpx2  # see model_files._files
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HFValidationError

    repository, file = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    try:
        file = file or _only(name, HfApi().list_repo_files(repository, revision=revision), field)
        if PurePosixPath(file).name == PEFT_WEIGHTS:  # read with the file beside it
            config = str(PurePosixPath(file).with_name(PEFT_CONFIG))
            hf_hub_download(repository, config, revision=revision)
        return Path(hf_hub_download(repository, file, revision=revision))
    except (OSError, HFValidationError, httpx2.TransportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{field}: {name}: neither a file, nor a folder, nor on the hub ({reason})"
        ) from None


def _pickled(name: str) -> str:
    return (
        f"{name} is pickled, and loading it could run any program; convert it to .safetensors: "
        "torch.load(..., weights_only=True) runs none, then safetensors.torch.save_file"
    )


def _only(name: str, files: Iterable[str], field: str) -> str:
    adapters = sorted(file for file in files if file.endswith(".safetensors"))
    if LORA_WEIGHTS in adapters:
        return LORA_WEIGHTS
    if len(adapters) == 1:
        return adapters[0]
    if adapters:
        which = f"has {', '.join(adapters)}; name one of them, as {name}/FILE.safetensors"
    elif pickled := [file for file in files if PurePosixPath(file).suffix in PICKLED]:
        which = _pickled(min(pickled))
    else:
        which = f"has no .safetensors file, as {name}/FILE.safetensors"
    raise ValueError(f"{field}: {name}: {which}")


def file_digest(file: Path) -> str:
    """Return a file's sha256."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_given(
    file: Path, family: Family, denoiser: nn.Module, field: str
) -> tuple[dict[str, torch.Tensor], Settings]:
    """Return an adapter's tensors by diffusers' name, `<component>.<layer>.lora_A.weight`, and its settings.

    Other programs' names are converted as diffusers converts them. Their alphas are then part of the tensors.

    Args:
        denoiser: of a model of the family, for its configuration.

    Raises:
        ValueError: the file is no LoRA, or diffusers does not read all of it.
    """
    import diffusers
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
    from safetensors import SafetensorError

    try:
        if (own := read_peft_format(file, family.denoiser, family.trainable_encoders)) is not None:
            _require_finite(own, file, field)
            return in_convolutions(own, f"{family.denoiser}.", denoiser), {}
        stored, settings = read_adapter_file(file)
    except SafetensorError as error:
        raise ValueError(f"{field}: {file}: no safetensors file ({error})") from None
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
    _require_one_scheme(stored, file, field)
    _require_finite(stored, file, field)
    try:
        published = from_published_names(family, denoiser, stored)
    except ValueError as error:
        raise ValueError(f"{field}: {file}: {error}") from None
    if published is None and not settings:
        published = _with_alphas(stored, (*family.denoisers, *family.trainable_encoders))
    if published is not None:
        return published, {}
    scales_of_dora = {name: stored.pop(name) for name in list(stored) if name.endswith(f".{SCALE}")}
    if foreign := [name for name in stored if not _PART.search(name)]:
        raise ValueError(
            f"{field}: {file}: {_first(foreign)}: no part of a LoRA that diffusers reads; give a file without"
        )
    if not family.has_lora_loader:
        if scales_of_dora:
            raise ValueError(
                f"{field}: {file}: {min(scales_of_dora)}: no name of this model's; give peft's names"
            )
        return stored, settings
    options: dict[str, Any] = {"unet_config": denoiser.config} if family.is_unet else {}
    try:
        # Other programs' names become diffusers'; alphas are returned apart, or not at all.
        tensors, *alphas = getattr(diffusers, family.pipeline_class).lora_state_dict(
            dict(stored), return_alphas=True, return_lora_metadata=True, **options
        )
    except Exception as error:  # of any kind: its converters expect the names that they know
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{field}: {file}: diffusers cannot read it as an adapter of {family.pipeline_class} ({reason})"
            f"{_resemblance(stored, family)}"
        ) from None
    scales = alphas[0] or {} if len(alphas) > 1 else {}
    if family.is_unet:
        tensors, scales = (
            {_in_text_encoder(name): each for name, each in convert_unet_state_dict_to_peft(found).items()}
            for found in (tensors, scales)
        )
    # Where diffusers has no converter, alphas are left among the tensors.
    scales |= {name: tensors.pop(name) for name in list(tensors) if name.endswith(".alpha")}
    before, after = (sum(bool(DOWN.search(name)) for name in names) for names in (stored, tensors))
    if after < before:
        raise ValueError(
            f"{field}: {file}: diffusers reads {after} of its {before} layers"
            f"{_resemblance(stored, family) or '; convert it first'}"
        )
    for name, alpha in scales.items():
        layer = name.removesuffix(".alpha").partition(".lora_A.")[0]
        if (up := f"{layer}.lora_B.weight") in tensors:
            tensors[up] = scaled(tensors[up], float(alpha) / tensors[up].shape[1])
    try:
        tensors |= converted_magnitudes(scales_of_dora, stored, tensors)
    except ValueError as error:
        raise ValueError(f"{field}: {file}: {error}") from None
    return in_convolutions(tensors, f"{family.denoiser}.", denoiser), settings


def _with_alphas(
    stored: Mapping[str, torch.Tensor], components: Sequence[str]
) -> dict[str, torch.Tensor] | None:
    """Return tensors of diffusers' names with the alphas beside them, as for ComfyUI, in the weights.

    None: there are none, or some names are others; diffusers converts such files for some families alone.
    """
    found = {name: tensor for name, tensor in stored.items() if not name.endswith(".alpha")}
    if len(found) == len(stored):
        return None
    if not all(IN_FILE.search(name) and name.partition(".")[0] in components for name in found):
        return None
    for name in stored.keys() - found.keys():
        up = f"{name.removesuffix('.alpha')}.lora_B.weight"
        if up not in found:
            return None
        found[up] = scaled(found[up], float(stored[name]) / found[up].shape[1])
    return found


def in_convolutions(
    tensors: Mapping[str, torch.Tensor], prefix: str, part: nn.Module
) -> dict[str, torch.Tensor]:
    """Return an adapter with its convolutions' matrices, which LoHa and LoKr have, as kernels.

    Args:
        prefix: what the names of the component's layers begin with.
    """
    found = dict(tensors)
    convolutions = {
        layer.removesuffix(".base_layer"): each  # of one with adapters
        for layer, each in part.named_modules()
        if isinstance(each, nn.Conv2d)
    }
    for name, down in tensors.items():
        layer = name.removeprefix(prefix).removesuffix(".lora_A.weight")
        module = convolutions.get(layer)
        if module is None or down.dim() != 2 or down.shape[1] != module.weight[0].numel():
            continue
        found[name] = down.reshape(-1, *module.weight.shape[1:])
        for kind, shape in (
            ("lora_B.weight", (-1, len(down), 1, 1)),
            ("lora_magnitude_vector", (1, -1, 1, 1)),
        ):
            if (other := f"{prefix}{layer}.{kind}") in tensors:
                found[other] = tensors[other].reshape(shape)
    return found


# Names by their beginnings, each of which one kind of program writes.
_SCHEMES = {
    "kohya's": re.compile(rf"{KOHYA}|lora_te\d?_"),
    "ComfyUI's": re.compile(r"(diffusion_model|text_encoders)\."),
    "peft's": re.compile(r"base_model\.model\."),
    "diffusers'": re.compile(r"(?!diffusion_model\.|text_encoders\.|base_model\.)\w+\..*lora_[AB]\."),
}


def _require_one_scheme(names: Iterable[str], file: Path, field: str) -> None:
    """Raise ValueError if a file has names of two programs, of which diffusers would drop those of one."""
    found: dict[str, str] = {}
    for name in names:
        scheme = next((scheme for scheme, begins in _SCHEMES.items() if begins.match(name)), None)
        if scheme:
            found.setdefault(scheme, name)
    if len(found) > 1:
        both = " and ".join(f"{scheme} ({name})" for scheme, name in list(found.items())[:2])
        raise ValueError(f"{field}: {file}: it has names of two programs, {both}; give a file of one")


def _require_finite(tensors: Mapping[str, torch.Tensor], file: Path, field: str) -> None:
    """Raise ValueError if a weight is infinite or not a number; name its tensor."""
    for name, tensor in tensors.items():
        # The extremes are not numbers if any weight is none, and found much faster than where those are.
        numbers = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no extremes
        if tensor.numel() and not torch.stack(numbers.aminmax()).isfinite().all():
            raise ValueError(
                f"{field}: {file}: {name} has weights that are infinite or not a number; its training "
                "diverged, or the file is damaged: take an earlier one"
            )


def _first(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _in_text_encoder(name: str) -> str:
    """Return the name of a text encoder's layer in place of diffusers' old one for kohya's files."""
    name = re.sub(r"\.self_attn\.to_([qkv])\.", r".self_attn.\1_proj.", name)
    name = name.replace(".self_attn.to_out.0.", ".self_attn.out_proj.")
    return name.replace(".lora_linear_layer.up.", ".lora_B.").replace(".lora_linear_layer.down.", ".lora_A.")


def _resemblance(tensors: Mapping[str, torch.Tensor], family: Family | None = None) -> str:
    """Return the families whose adapter a file may be, for errors; empty if it may be of the given one."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    found = [name for name, each in FAMILIES.items() if each.resembles(shapes)]
    if not found or family and family.pipeline_class in found:
        return ""
    return f"; it may be an adapter of {' or '.join(found)}"


def require_places(
    tensors: Mapping[str, torch.Tensor], parts: Mapping[str, nn.Module], file: Path, field: str
) -> None:
    """Raise ValueError unless all tensors of an adapter have a place in the components; name some without.

    DoRA has to be in all layers of a component, or in none.
    """
    misfits = [name for name, tensor in tensors.items() if not _has_place(name, tensor, tensors, parts)]
    if misfits or not tensors:
        raise ValueError(
            f"{field}: {file}: {len(misfits)} of {len(tensors)} tensors have no place in this base "
            f"({_first(misfits)}); give an adapter of this model{_resemblance(tensors)}"
        )
    try:
        require_all_or_none(tensors)
    except ValueError as error:
        raise ValueError(f"{field}: {file}: {error}") from None


def _has_place(
    name: str, tensor: torch.Tensor, others: Mapping[str, torch.Tensor], parts: Mapping[str, nn.Module]
) -> bool:
    """Return whether a tensor of an adapter is part of a layer's whole update, and has its size."""
    component, _, inside = name.partition(".")
    layer, _, side = inside.partition(".lora_")
    try:
        part = parts[component]
        module = part.get_submodule(layer_in_memory(part, layer))
    except (KeyError, AttributeError):
        return False
    needed = {"A.weight": ["B.weight"], "B.weight": ["A.weight"]}
    needed["magnitude_vector"] = ["A.weight", "B.weight"]
    if any(f"{component}.{layer}.lora_{each}" not in others for each in needed.get(side, ["?"])):
        return False
    kind = "channels" if isinstance(module, nn.Conv2d) else "features"
    sizes = {"A.weight": tensor[0].shape[:1], "B.weight": tensor.shape[:1]}
    end, [size] = "in" if side == "A.weight" else "out", sizes.get(side, [tensor.numel()])
    return bool(size == getattr(module, f"{end}_{kind}", None))


def own_part(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a component's own tensors or settings, without its name."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


@torch.no_grad()
def inject_given(
    part: Component,
    tensors: Mapping[str, torch.Tensor],
    settings: Settings,
    adapter: str,
    *,
    dropout: float = 0.0,
    rounded: bool = False,
) -> None:
    """Add an adapter with a file's tensors to a component.

    Args:
        tensors: all have a place (`require_places`); by name in the component.
        settings: peft's, from the file; without any the scale is 1.
        adapter: its name in peft.
        rounded: store it in the precision of its layers, not as float32, in which training begins.
    """
    from peft import LoraConfig

    tensors = {layer_in_memory(part, key): tensor for key, tensor in tensors.items()}
    ranks = {key.partition(".lora_")[0]: len(each) for key, each in tensors.items() if ".lora_A." in key}
    scaling = {name: settings[name] for name in SCALING if name in settings}
    if not scaling:
        scaling = unscaled(ranks)
    config = LoraConfig(
        **scaling,
        target_modules=sorted(ranks),
        lora_dropout=dropout,
        use_dora=any("magnitude" in key for key in tensors),
    )
    inject_adapter(part, config, adapter)
    places = dict(part.named_parameters())
    for key, tensor in tensors.items():
        place = places[f"{key.removesuffix('.weight')}.{adapter}.weight"]
        if place.shape != tensor.shape:
            raise ValueError(
                f"{file_name(part, key)}: {tuple(tensor.shape)}, but its settings need {tuple(place.shape)}"
            )
        if rounded or place.is_meta:
            place.copy_(tensor)
        else:
            place.data = tensor.to(torch.float32, copy=True)
