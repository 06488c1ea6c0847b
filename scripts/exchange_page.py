"""Write the table of docs/exchange.md: which weights go to and come from other programs, family by family.

python -m scripts.exchange_page
"""

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers
import torch
from safetensors.torch import load_file, save_file

from ray_jobs.diffusion.families import FAMILIES, Family
from ray_jobs.weights.adapter_files import LowRank, low_rank_layers, read_adapter_file
from ray_jobs.weights.comfyui import comfyui_file
from ray_jobs.weights.given_adapters import read_given, require_places
from ray_jobs.weights.kohya import kohya_file
from ray_jobs.weights.loading import LORA_WEIGHTS, empty_model, load_pipeline
from ray_jobs.weights.merging import merge_adapter
from ray_jobs.weights.peft_format import PEFT_CONFIG, PEFT_WEIGHTS
from ray_jobs.weights.single_file import read_single_file, write_single_file
from tests.tiny_models import write
from tests.unit.test_comfyui import adapter

PAGE = Path(__file__).parents[1] / "docs" / "exchange.md"
BEGIN, END = "<!-- python -m scripts.exchange_page -->\n", "<!-- end -->\n"
COLUMNS = (
    *("`diffusers`", "`comfyui`", "`kohya`", "`merged`", "`single-file`"),
    *("diffusers' names", "ComfyUI's", "kohya's", "peft's", "transformer in one file", "model in one file"),
)
OUT = 5  # of the columns; the others are in
FIELD = "adapter"


def walk(name: str, base: Path, scratch: Path) -> Iterator[str]:
    """Yield the cells of a family: empty where what was trained comes out, or in again, else why not.

    Args:
        base: a small model of the family.
        scratch: a new folder.
    """
    family, model = adapter(base, scratch, FAMILIES[name].trainable_encoders), str(base)
    trained = scratch / LORA_WEIGHTS
    comfyui, kohya = scratch / "comfyui.safetensors", scratch / "kohya.safetensors"
    peft = scratch / PEFT_WEIGHTS
    yield tried(lambda: load_pipeline(model, scratch))
    yield tried(lambda: comfyui.write_bytes(comfyui_file(model, scratch)))
    yield tried(lambda: kohya.write_bytes(kohya_file(model, scratch)))
    (scratch / "merged").mkdir()
    yield tried(lambda: merge_adapter(model, scratch, scratch / "merged"))
    yield tried(lambda: write_single_file(base, scratch / "whole.safetensors"))
    yield tried(lambda: read_back(trained, trained, base, family))
    yield (
        tried(lambda: read_back(comfyui, trained, base, family))
        if comfyui.exists()
        else "ComfyUI is not known to read LoRA of it"
    )
    yield (
        tried(lambda: read_back(kohya, trained, base, family))
        if kohya.exists()
        else "kohya's programs are not known to train it"
    )
    as_peft_saves(trained, peft, family)
    yield tried(lambda: read_back(peft, trained, base, family))
    yield from read_checkpoints(base, scratch, family)


def tried(action: Callable[[], object]) -> str:
    """Return why an action is refused, in general words; empty if it is not."""
    try:
        action()
    except ValueError as error:
        reason = re.sub(r"^(adapter: )?(/\S+: )+", "", str(error))
        reason = re.sub(r"of \w+Pipeline", "of it", re.sub(r"train \w+Pipeline", "train it", reason))
        reason = re.sub(r" of /\S+, a \w+Pipeline \(.*", " of it", reason, flags=re.DOTALL)
        return reason.partition("; ")[0]
    return ""


def read_back(file: Path, trained: Path, base: Path, family: Family) -> None:
    """Read an adapter as an import does; raise ValueError unless it is the one that was trained."""
    names = [family.denoiser, *family.trainable_encoders]
    model = empty_model(str(base), names)
    parts = {name: getattr(model, name) for name in names}
    tensors, settings = read_given(file, family, parts[family.denoiser], FIELD)
    require_places(tensors, parts, file, FIELD)
    found, right = low_rank_layers(tensors, settings), low_rank_layers(*read_adapter_file(trained))
    if file.name == PEFT_WEIGHTS:  # of the denoiser
        right = {place: own for place, own in right.items() if place[0] == family.denoiser}
    assert found.keys() == right.keys()
    for place, own in found.items():
        torch.testing.assert_close(update(own), update(right[place]), rtol=0, atol=1e-5)


def update(own: LowRank) -> torch.Tensor:
    return own.scale * own.up.flatten(1) @ own.down.flatten(1)


def as_peft_saves(trained: Path, file: Path, family: Family) -> None:
    """Write the denoiser's part of an adapter in peft's own format."""
    from peft import LoraConfig

    tensors, _ = read_adapter_file(trained)
    own = {
        key.replace(f"{family.denoiser}.", "base_model.model.", 1): tensor
        for key, tensor in tensors.items()
        if key.startswith(f"{family.denoiser}.")
    }
    save_file(own, file)
    LoraConfig(r=2, lora_alpha=6).save_pretrained(str(file.parent))
    assert file.with_name(PEFT_CONFIG).exists()


def read_checkpoints(base: Path, scratch: Path, family: Family) -> Iterator[str]:
    """Yield the cells of checkpoints in one file: of the transformer alone, and of a whole model."""
    if family.is_unet:
        yield "its checkpoints are of the whole model"
        yield tried(lambda: read_single_file(scratch / "whole.safetensors", str(base), scratch / "read"))
        return
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted((base / family.denoiser).glob("*.safetensors")):
        tensors |= load_file(path)
    file = scratch / "alone.safetensors"
    save_file({f"model.diffusion_model.{key}": tensor for key, tensor in tensors.items()}, file)
    yield tried(lambda: read_single_file(file, str(base), scratch / "alone"))
    readable = hasattr(getattr(diffusers, family.pipeline_class), "from_single_file")
    yield "not shown: left to diffusers' pipeline" if readable else "diffusers reads none of it"


def table(rows: dict[str, list[str]]) -> str:
    """Return the table of families' cells, and the reasons below it."""
    reasons = list(dict.fromkeys(cell for cells in rows.values() for cell in cells if cell))
    lines = [f"| | {' | '.join(f'out: {c}' if n < OUT else f'in: {c}' for n, c in enumerate(COLUMNS))} |"]
    lines.append("|---|" + "---|" * len(COLUMNS))
    for name, cells in rows.items():
        told = (f"no ({reasons.index(cell) + 1})" if cell else "yes" for cell in cells)
        lines.append(f"| {name} | {' | '.join(told)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)), ""])


def page(models: Callable[[str], Path], scratch: Path) -> str:
    """Return the page with the table written anew.

    Args:
        models: returns the folder of a family's small model.
    """
    rows = {name: list(walk(name, models(name), scratch / name)) for name in FAMILIES}
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with TemporaryDirectory() as folder:
        PAGE.write_text(
            page(lambda name: write(name, Path(folder, "models", name)), Path(folder)), encoding="utf-8"
        )
