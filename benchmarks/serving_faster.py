"""python -m benchmarks.serving_engine --part faster [--size small|full]

What each switch of `serving.engine.optimizations` and of the engine gives and costs with
`models/emoji-base`: the same prompts and seeds in every engine, as many rows as `--max-rows`, all waiting
from the start. float32 draws in 20 steps of the model's own solver, DPM-Solver++ 2M.

With `--size full` the figures go to benchmarks/results/serving_faster.json, where those of other switches
stay.

speed: pictures a second over float32's. The switches take turns of a few pictures, and medians are compared.
FID to plain: between a switch's pictures and those of the same seeds without it, which are float32's, and of
    a fused LoRA version its own as an adapter; 0 if they were the same.
change: the FID to real pictures, less float32's FID to them.
"""

import json
import os
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch

from benchmarks.adapters import write_adapters
from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.precision import PRECISIONS
from ray_jobs.metrics.frechet import Moments, frechet_distance
from ray_jobs.metrics.inception import load_inception
from ray_jobs.pictures.reading import decode_image
from ray_jobs.weights.loading import load_pipeline
from serving.engine.adapters import read_adapter
from serving.engine.engine import Engine
from serving.engine.optimizations import prepare
from serving.request import Request

ROOT = Path(__file__).parents[1]
MODEL = "models/emoji-base"
EXAMPLE = ROOT / "examples" / "fluent-emoji"
NETWORK = ROOT / ".cache" / "inception-2015-12-05.pt"
PICTURES = {"small": 32, "full": 128}
TURNS = {"small": 1, "full": 3}
TIMED = 32  # pictures of a turn, the same ones each time
STEPS, GUIDANCE_SCALE = 20, 3.0
SIDE = 64  # pixels
BASELINE = "float32"
LORA = "a LoRA version"


class Switches(NamedTuple):
    """Of `optimizations.prepare` and of the engine; `lora`: a version's weights, for each row or fused."""

    prepare: dict[str, Any]
    engine: dict[str, Any]
    steps: int = STEPS
    lora: Literal["none", "rows", "fused"] = "none"
    plain: str = BASELINE  # whose pictures these should be
    precision: str = "fp32"


SWITCHES = {
    BASELINE: Switches({}, {}),
    "channels_last": Switches({"channels_last": True}, {}),
    "bf16": Switches({}, {}, precision="bf16"),
    "bf16, channels_last": Switches({"channels_last": True}, {}, precision="bf16"),
    "int8_weights": Switches({"int8_weights": True}, {}),
    "bf16, int8_weights": Switches({"int8_weights": True}, {}, precision="bf16"),
    "compile": Switches({"compile": True}, {}),
    "bf16, compile": Switches({"compile": True}, {}, precision="bf16"),
    "cache_features": Switches({}, {"cache_features": True}),
    "bf16, cache_features": Switches({}, {"cache_features": True}, precision="bf16"),
    "attention: flash": Switches({}, {"attention": "flash"}),
    "attention: math": Switches({}, {"attention": "math"}),
    "dpm++, 10 steps": Switches({}, {}, 10),
    "euler, 20 steps": Switches({"solver": "euler"}, {}),
    "ddim, 20 steps": Switches({"solver": "ddim"}, {}),
    "ddim, 50 steps": Switches({"solver": "ddim"}, {}, 50),
    LORA: Switches({}, {}, lora="rows"),
    "fuse_champion": Switches({}, {}, lora="fused", plain=LORA),
}


def read_example(count: int) -> tuple[torch.Tensor, list[str]]:
    """Real pictures, uint8, count x 3 x SIDE x SIDE, and their captions."""
    lines = (EXAMPLE / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:: max(1, len(lines) // count)][:count]]
    pictures = []
    for row in rows:
        data = (EXAMPLE / row["file_name"]).read_bytes()
        pictures.append(torch.tensor(decode_image(data, resolution=SIDE, background="white")))
    return torch.stack(pictures).permute(0, 3, 1, 2).contiguous(), [row["text"] for row in rows]


def engine_of(switches: Switches, device: str, max_rows: int, adapter: Path) -> Engine:
    """A warm one: the number of rows shrinks as the last requests end, so that all is compiled."""
    pipeline = load_pipeline(MODEL, dtype=PRECISIONS[switches.precision])
    options = dict(switches.engine)
    fuse = None
    if switches.lora == "fused":
        fuse = read_adapter(
            adapter.name, adapter, family_of(pipeline).adaptable(pipeline), dtype=torch.float32
        )
    elif switches.lora == "rows":
        options["adapter_folder"] = lambda name: adapter.parent / name
    prepare(pipeline, device, **switches.prepare, fuse=fuse)
    cores = os.cpu_count() if device == "cpu" else None
    engine = Engine(pipeline, device=device, max_rows=max_rows, num_cores=cores, **options)
    name = adapter.name if switches.lora == "rows" else None
    draw(engine, [Request("a cat", seed, 1 + seed, GUIDANCE_SCALE, adapter=name) for seed in range(max_rows)])
    return engine


def draw(engine: Engine, requests: list[Request]) -> torch.Tensor:
    """uint8, N x 3 x SIDE x SIDE."""
    futures = [engine.submit(request) for request in requests]
    engine.drain()
    return torch.stack([future.result(0).pixels for future in futures]).permute(0, 3, 1, 2).contiguous()


def measure(size: str, max_rows: int, names: list[str]) -> dict[str, dict[str, float]]:
    """Pictures a second, speed and the two FIDs of each switch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    real, captions = read_example(PICTURES[size])
    with TemporaryDirectory() as folder:
        (adapter,) = write_adapters(Path(folder), 1, MODEL)
        engines = {
            name: engine_of(SWITCHES[name], device, max_rows, Path(folder) / adapter) for name in names
        }
    requests = {
        name: [
            Request(
                caption,
                seed,
                SWITCHES[name].steps,
                GUIDANCE_SCALE,
                adapter=adapter if SWITCHES[name].lora == "rows" else None,
            )
            for seed, caption in enumerate(captions)
        ]
        for name in names
    }
    pictures = {name: draw(engine, requests[name]) for name, engine in engines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(TURNS[size]):
        for name, engine in engines.items():
            start = time.perf_counter()
            draw(engine, requests[name][:TIMED])
            seconds[name].append(time.perf_counter() - start)
    network = load_inception(NETWORK)
    moments = {
        name: Moments.of(torch.cat([network.features(part) for part in drawn.split(16)]), network.identity)
        for name, drawn in {"real": real, **pictures}.items()
    }
    to_real = {name: frechet_distance(moments[name], moments["real"]) for name in names}
    return {
        name: {
            "pictures_per_second": min(TIMED, len(captions)) / median(seconds[name]),
            "speed": median(seconds[BASELINE]) / median(seconds[name]),
            "fid_to_plain": frechet_distance(moments[name], moments[SWITCHES[name].plain]),
            "fid_change": to_real[name] - to_real[BASELINE],
            "fid_to_real": to_real[name],
        }
        for name in names
    }


def table(figures: dict[str, dict[str, float]]) -> str:
    """One switch a line."""
    lines = [f"{'switch':>22}  pictures/s  speed    FID to plain  change of FID to real"]
    for name, found in figures.items():
        lines.append(
            f"{name:>22}  {found['pictures_per_second']:10.2f}  {found['speed']:5.2f}"
            f"  {found['fid_to_plain']:14.3f}  {found['fid_change']:+8.3f} of {found['fid_to_real']:.2f}"
        )
    return "\n".join(lines)
