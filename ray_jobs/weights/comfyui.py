"""Write a LoRA file for ComfyUI from one in diffusers' format.

ComfyUI (autumn 2026) looks for each layer under the names that it knows for a model, and leaves out the
others with a line in its log. Of files in diffusers' format it knows neither the layers of UNets nor the
scale, which is in the metadata: it takes alpha / rank as 1. So layers get the family's names
(`Family.comfyui_layer`), and each its `alpha`. For UNets these are kohya's names, which most other programs
read too.

    python -m ray_jobs.weights.comfyui --base stabilityai/stable-diffusion-xl-base-1.0 MODEL_FOLDER FILE
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from ray_jobs.console.commands import command_parser
from ray_jobs.diffusion.families import Family, family_of
from ray_jobs.diffusion.protocols import Settings
from ray_jobs.weights.adapter_files import low_rank_layers, read_adapter_file
from ray_jobs.weights.loading import LORA_WEIGHTS, read_index

DORA = (
    "DoRA: ComfyUI divides its magnitudes by the norms of the base's weights, not by those of their sums "
    "with the updates, and would draw other pictures; train LoRA or rsLoRA for ComfyUI"
)

Factors = tuple[torch.Tensor, torch.Tensor]  # of an update: rank x in, out x rank


class NotForComfyUI(ValueError):
    """ComfyUI lacks the adapter's model, or would compute something else."""


def comfyui_file(base: str, folder: Path, revision: str | None = None) -> bytes:
    """Return an adapter as a LoRA file for ComfyUI.

    Args:
        base: folder or hub name of the adapter's base.
        folder: contains the adapter, in diffusers' format.

    Raises:
        NotForComfyUI: see there.
        ValueError: the folder holds no adapter of a family.
    """
    from safetensors.torch import save

    source = folder / LORA_WEIGHTS
    if not source.exists():
        raise ValueError(f"{folder}: contains no {LORA_WEIGHTS}; only adapters are converted")
    tensors, settings = read_adapter_file(source)
    family = family_of(read_index(base, revision)["_class_name"])
    try:
        converted = comfyui_tensors(family, tensors, settings)
    except ValueError as error:
        raise type(error)(f"{source}: {error}") from error
    return save(converted, {"format": "pt"})


def comfyui_tensors(
    family: Family, tensors: Mapping[str, torch.Tensor], settings: Settings
) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors under ComfyUI's names.

    Args:
        tensors: of the adapter's file, by name.
        settings: of its metadata (`check_adapter`).

    Raises:
        NotForComfyUI: see there.
        ValueError: a tensor is not one of peft's LoRA, or a layer is part of a larger one in ComfyUI, whose
            other parts are missing.
    """
    parts: dict[str, dict[int, Factors]] = {}
    numbers: dict[str, int] = {}
    for (component, layer), own in low_rank_layers(tensors, settings).items():
        if own.magnitude is not None:
            raise NotForComfyUI(DORA)
        if (place := family.comfyui_layer(component, layer)) is None:
            raise NotForComfyUI(f"ComfyUI is not known to read LoRA of {family.pipeline_class}")
        target, part, numbers[target] = place
        parts.setdefault(target, {})[part] = own.down, own.up * own.scale
    converted: dict[str, torch.Tensor] = {}
    for target, found in parts.items():
        if len(found) < numbers[target]:
            raise ValueError(
                f"{target} is {numbers[target]} layers in diffusers, of which the adapter has {len(found)}; "
                "train all of them (train.lora.target_modules)"
            )
        down, up = _joined([found[part] for part in sorted(found)])
        endings = ("lora_down", "lora_up") if target.startswith("lora_") else ("lora_A", "lora_B")
        converted |= {f"{target}.{end}.weight": each for end, each in zip(endings, (down, up), strict=True)}
        converted[f"{target}.alpha"] = torch.tensor(float(len(down)))  # the scale is in the weights
    return converted


def _joined(factors: list[Factors]) -> Factors:
    """Return the factors of the update whose rows are those of several updates, one after another."""
    if len(factors) == 1:
        [(down, up)] = factors
        return down.contiguous(), up.contiguous()
    downs, ups = zip(*factors, strict=True)
    return torch.cat(downs), torch.block_diag(*ups)


def main(given: list[str] | None = None) -> None:
    parser = command_parser(__doc__)
    parser.add_argument("folder", type=Path, help="contains the adapter, for example <storage>/<run>/model")
    parser.add_argument("file", type=Path, help="the new file; in ComfyUI's models/loras")
    parser.add_argument("--base", required=True, help="the adapter's base: a folder or a name on the Hub")
    parser.add_argument("--revision", help="of the base on the Hub")
    arguments = parser.parse_args(given)
    from safetensors import SafetensorError

    if arguments.file.exists():
        sys.exit(f"error: {arguments.file} exists; name a new file")
    try:
        content = comfyui_file(arguments.base, arguments.folder, arguments.revision)
        arguments.file.write_bytes(content)
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"error: {error}")
    print(arguments.file)


if __name__ == "__main__":
    main()
