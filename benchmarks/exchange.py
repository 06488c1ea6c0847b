"""Importing an adapter and a checkpoint in one file, beside safetensors' own load of the same file.

    python -m benchmarks.exchange [--adapter 100] [--checkpoint 2000] [--turns 3]

Random weights of Stable Diffusion's layers: the checkpoint in fp16, of a UNet as wide as its size in MB asks;
the adapter in kohya's names and bf16, of the same base, with the rank that its size asks, and half of that as
its alpha. Each measure is a process of its own, which has imported a small one before, and reads from the
page cache. `load` reads every tensor; `load and save` also writes them to a new file, as an import does. What
registration adds, a digest and a copy to the storage, is left out. Memory is the largest resident set over
that before, mapped pages of the file included.
"""

import argparse
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ray_jobs.config import load_config
from ray_jobs.diffusion.families import FAMILIES
from ray_jobs.import_weights import imported_adapter, imported_model
from ray_jobs.weights.single_file import write_single_file

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
FAMILY = FAMILIES["StableDiffusionPipeline"]
MB = 1_000_000
CHECKPOINT, ADAPTER, BASE = "checkpoint.safetensors", "adapter.safetensors", "base"
LAYERS = (".to_q", ".to_k", ".to_v", ".to_out.0")


def unet(width: int, usual: Any) -> Any:
    import diffusers

    channels = tuple(width * 2**number for number in range(len(usual["block_out_channels"])))
    return diffusers.UNet2DConditionModel.from_config(dict(usual) | {"block_out_channels": channels})


def write_files(folder: Path, checkpoint: float, adapter: float) -> None:
    """Write base, checkpoint and adapter of about these sizes in MB."""
    from safetensors.torch import save_file

    pipeline: Any = FAMILY.tiny(["a red circle"], "")
    width = 32
    with torch.device("meta"):
        while 2 * unet(width + 32, pipeline.unet.config).num_parameters() < checkpoint * MB:
            width += 32
    torch.manual_seed(0)
    pipeline.register_modules(unet=unet(width, pipeline.unet.config))
    pipeline.to(torch.float16)
    pipeline.save_pretrained(folder / BASE)
    write_single_file(folder / BASE, folder / CHECKPOINT)
    layers = {
        f"lora_unet_{name.replace('.', '_')}": (len(part.weight), part.weight[0].numel())
        for name, part in pipeline.unet.named_modules()
        if name.endswith(LAYERS)
    }
    rank = max(1, round(adapter * MB / sum(2 * sum(sides) for sides in layers.values())))
    tensors = {}
    for name, (rows, columns) in layers.items():
        tensors[f"{name}.lora_up.weight"] = torch.randn(rows, rank, dtype=torch.bfloat16)
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, columns, dtype=torch.bfloat16)
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors, folder / ADAPTER)


def load(file: Path, saved: Path | None = None) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    if saved:
        save_file(tensors, saved)
    else:
        for tensor in tensors.values():
            tensor.flatten().view(torch.uint8).amax()  # reads it


def run(kind: str, folder: Path) -> None:
    """Do one of the things that are measured with the files of a folder."""
    name = ADAPTER if "adapter" in kind else CHECKPOINT
    if kind.startswith("load"):
        with tempfile.TemporaryDirectory(dir=folder) as own:
            load(folder / name, Path(own) / name if "save" in kind else None)
        return
    config = load_config(DEMO, [f"model.base={folder / BASE}", "publish.model_name=benchmark"])
    given = str(folder / name)
    with imported_adapter(config, [given]) if name == ADAPTER else imported_model(config, given):
        pass


def peak(begin: bool = False) -> float:
    """Return the largest resident set of this process in MB, since the last call with `begin`."""
    if begin:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / MB


def measured(kind: str, small: Path, folder: Path, report: Any) -> None:
    """Send the seconds and the MB of one thing, done by a process that has done it before."""
    torch.set_num_threads(1)
    run(kind, small)
    before = peak(begin=True)
    start = time.perf_counter()
    run(kind, folder)
    report.send((time.perf_counter() - start, peak() - before))


def child(kind: str, small: Path, folder: Path) -> tuple[float, float]:
    here, there = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=measured, args=(kind, small, folder, there))
    process.start()
    there.close()
    found: tuple[float, float] = here.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", type=float, default=100, help="MB")
    parser.add_argument("--checkpoint", type=float, default=2000, help="MB")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small", Path(folder) / "large"
        write_files(small, 10, 1)
        write_files(large, arguments.checkpoint, arguments.adapter)
        for file in (ADAPTER, CHECKPOINT):
            what = file.partition(".")[0]
            kinds = [f"load {what}", f"load and save {what}", f"import {what}"]
            turns = [[child(kind, small, large) for kind in kinds] for _ in range(arguments.turns)]
            print(f"{what}: {(large / file).stat().st_size / MB:.0f} MB")
            medians = [
                [median(each) for each in zip(*found, strict=True)] for found in zip(*turns, strict=True)
            ]
            for kind, (seconds, memory) in zip(kinds, medians, strict=True):
                ratios = f"{medians[-1][0] / seconds:.2f} and {medians[-1][1] / max(memory, 1):.2f}"
                print(f"  {kind}: {seconds:.2f} s, {memory:.0f} MB; of it an import takes {ratios}")


if __name__ == "__main__":
    main()
