"""Export a version of the registry in the form of another program, into a new folder.

    python -m ray_jobs.export_weights --config configs/demo.yaml --version 3 --format kohya --out exports/3

diffusers: an adapter (`pytorch_lora_weights.safetensors`) or a whole model, as diffusers loads it.
comfyui, kohya: an adapter as one file, with the names, scales and metadata that these programs read.
merged: a whole model, the base with the adapter in it, in the precision of the base.
single-file: the same as one checkpoint, of Stable Diffusion 1 and XL.
"""

import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.fetched import local_path
from ray_jobs.config import ConfigError, add_config_arguments, load_config
from ray_jobs.console import complain, show
from ray_jobs.console.commands import command_parser
from ray_jobs.registry.local_weights import local_weights
from ray_jobs.registry.models import CHAMPION, RegisteredModel, registered
from ray_jobs.weights.comfyui import comfyui_file
from ray_jobs.weights.kohya import kohya_file
from ray_jobs.weights.loading import LORA_WEIGHTS
from ray_jobs.weights.merging import merge_adapter
from ray_jobs.weights.model_index import INDEX, MODULAR_INDEX
from ray_jobs.weights.schedulers import SCHEDULER, has_scheduler
from ray_jobs.weights.single_file import write_single_file

FORMATS = ("diffusers", "comfyui", "kohya", "merged", "single-file")


def export_version(version: RegisteredModel, form: str, out: Path) -> list[str]:
    """Write a version in one of `FORMATS`; return what the user should know of it, line by line.

    Args:
        out: a new or an empty folder; it is written whole, or not at all.

    Raises:
        ConfigError: the folder is not empty, or the version cannot have this form.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out: {out} is not empty; name a new folder, so that no older file is read")
    with local_weights(version) as weights, _whole(out) as folder:
        try:
            return _write(version, form, weights, folder)
        except ValueError as error:
            reason = str(error).replace("\n", " ")
            raise ConfigError(f"--format: {form}: version {version.version}: {reason}") from error


def _write(version: RegisteredModel, form: str, weights: Path, folder: Path) -> list[str]:
    is_adapter, notes = version.method == "lora", list[str]()
    kind = "a ControlNet" if version.has_controlnet else "a whole model"
    single = "" if version.has_controlnet else " or single-file"
    file = folder / f"{re.sub('[^A-Za-z0-9._-]', '-', version.name)}-{version.version}.safetensors"
    if form == "diffusers":
        _copy(weights, folder, is_adapter)
    elif form in ("comfyui", "kohya"):
        if not is_adapter:
            raise ValueError(f"it is {kind}, not an adapter; take --format diffusers{single}")
        convert: Callable[[str, Path, str | None], bytes] = comfyui_file if form == "comfyui" else kohya_file
        file.write_bytes(convert(local_path(version.base), weights, version.base_revision))
        if has_scheduler(weights):
            notes.append("it was trained with a scheduler of its own, which such a file cannot hold")
    elif version.has_controlnet:
        raise ValueError(f"it is {kind}, which has no such form; take --format diffusers")
    elif not is_adapter:
        if form == "merged":
            raise ValueError("it is a whole model, to which nothing has to be added; take --format diffusers")
        write_single_file(weights, file)
    else:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            target = folder if form == "merged" else Path(own)
            rounding = merge_adapter(local_path(version.base), weights, target, version.base_revision)
            if form == "single-file":
                write_single_file(target, file)
        dtypes = ", ".join(sorted(str(each).removeprefix("torch.") for each in rounding.dtypes))
        notes.append(f"stored as {dtypes}: rounding changed {rounding.share:.2%} of the update (by its norm)")
        if version.quantization:
            notes.append(f"it was trained on the base in {version.quantization}, not on these plain weights")
    if form == "single-file":
        notes.append("a single file has no scheduler; programs take the usual one of the family")
    return notes


def _copy(weights: Path, folder: Path, is_adapter: bool) -> None:
    """Copy what diffusers loads; pictures, cards and features stay behind."""
    if is_adapter:
        shutil.copyfile(weights / LORA_WEIGHTS, folder / LORA_WEIGHTS)
    for path in weights.iterdir():
        if path.is_dir() and (path.name == SCHEDULER or not is_adapter and path.name != "images"):
            shutil.copytree(path, folder / path.name)
        elif path.name in (INDEX, MODULAR_INDEX):
            shutil.copyfile(path, folder / path.name)


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Provide a folder that becomes `out` at the end, and vanishes after an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        folder.replace(out)  # of an empty folder too
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code, 2 for an error that the user must fix."""
    parser = command_parser(__doc__)
    add_config_arguments(parser)
    parser.add_argument("--version", default=CHAMPION, help="a number or an alias; the champion by default")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    arguments = parser.parse_args(argv)
    try:
        version = registered(load_config(arguments.config, arguments.overrides), arguments.version)
        notes = export_version(version, arguments.format, arguments.out)
    except ConfigError as error:
        return complain(error)
    for note in notes:
        show(f"export: {note}")
    show(f"export: version {version.version} of {version.name!r} for {arguments.format} in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
