"""python -m benchmarks.serving_engine [--part engine|faster] [--size small|full] [--max-rows N]

faster: a table of what each switch gives and costs; see `benchmarks.serving_faster`.

engine: the claims, without Ray and HTTP, with `models/emoji-base`, requests of 10 to 50 steps with guidance,
all waiting from the start:

limit: the engine draws 0.9 or more of the pictures a second that the bare denoiser would at its best batch
    size: full batches of pairs (with and without the prompt), nothing else, decoding not counted.
requests: more pictures a second than batches of whole requests (up to as many rows, those of equal step count
    together), as `@serve.batch` gives them.
adapters: 50 adapters mixed draw 0.9 or more of the pictures a second of one.

The parts take turns and medians are compared, so that what else the machine does meets all. What is printed
last is all figures as one line of JSON.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import serving_faster
from benchmarks.adapters import write_adapters
from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.sampling import decode_latents, encode_prompts, initial_noise, sample_latents, seeded
from ray_jobs.weights.loading import load_pipeline
from serving.engine.engine import Engine
from serving.request import Request

MODEL = "models/emoji-base"
FASTER = Path(__file__).parent / "results" / "serving_faster.json"
REQUESTS = {"small": 24, "full": 128}
TURNS = {"small": 1, "full": 5}
BATCH_SIZES = {"small": (4, 8, 16), "full": (1, 2, 4, 8, 16, 32, 64)}
ADAPTERS = 50
STEPS = (10, 50)
GUIDANCE_SCALE = 3.0


def requests_of(size: str, adapters: list[str] | None = None) -> list[Request]:
    """The same mixture in every turn; with adapters, they take turns."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(STEPS[0], STEPS[1] + 1, (REQUESTS[size],), generator=generator).tolist()
    prompts = ["a red apple", "a sad face", "a cat", "a rocket"]
    return [
        Request(
            prompts[seed % len(prompts)],
            seed,
            count,
            GUIDANCE_SCALE,
            adapter=adapters[seed % len(adapters)] if adapters else None,
        )
        for seed, count in enumerate(steps)
    ]


@torch.inference_mode()
def bare_rows_per_second(pipeline: Any, batch_size: int) -> float:
    """Denoised rows a second, with their unconditional halves, in calls of `batch_size` rows."""
    family, side = family_of(pipeline), pipeline.unet.config.sample_size
    channels = pipeline.unet.config.in_channels
    latents = initial_noise(seeded(range(2 * batch_size)), (channels, side, side)).to(pipeline.device)
    captions = encode_prompts(pipeline, ["a red apple", ""] * batch_size)
    timesteps = torch.full((2 * batch_size,), 500.0, device=pipeline.device)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        family.denoise(family.model(pipeline), latents, timesteps, captions)
        seconds.append(time.perf_counter() - start)
    return batch_size / median(seconds[1:])


def with_engine(engine: Engine, requests: list[Request]) -> None:
    """All requests at once, until the last picture."""
    futures = [engine.submit(request) for request in requests]
    engine.drain()
    assert all(future.result(0).pixels.shape[-1] == 3 for future in futures)


def by_requests(pipeline: Any, requests: list[Request], max_rows: int) -> None:
    """The usual way: batches in the order of arrival, rows of equal step count drawn together."""
    family, own = family_of(pipeline), pipeline.unet.config
    shape = (own.in_channels, own.sample_size, own.sample_size)
    null = encode_prompts(pipeline, [""])
    for start in range(0, len(requests), max_rows):
        batch = requests[start : start + max_rows]
        for count in dict.fromkeys(request.steps for request in batch):
            rows = [request for request in batch if request.steps == count]
            latents = sample_latents(
                family,
                family.model(pipeline),
                pipeline.scheduler,
                initial_noise(seeded([row.seed for row in rows]), shape),
                encode_prompts(pipeline, [row.prompt for row in rows]),
                null,
                num_steps=count,
                guidance_scale=GUIDANCE_SCALE,
            )
            decode_latents(pipeline, latents)


def seconds_of(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(size: str, max_rows: int | None) -> dict[str, Any]:
    pipeline = load_pipeline(MODEL)
    rows_per_second = {n: bare_rows_per_second(pipeline, n) for n in BATCH_SIZES[size]}
    best = max_rows or max(rows_per_second, key=lambda n: rows_per_second[n])
    requests = requests_of(size)
    with TemporaryDirectory() as folder:
        names = write_adapters(Path(folder), ADAPTERS, MODEL)
        engine = Engine(
            pipeline,
            max_rows=best,
            adapter_folder=lambda name: Path(folder) / name,
            num_cores=os.cpu_count(),
        )
        plain = load_pipeline(MODEL)
        for name in names:  # into memory, all of them: loading is not what is compared
            with_engine(engine, [Request("a cat", 0, 1, 1.0, adapter=name)])
        parts: dict[str, Callable[[], None]] = {
            "diffray": lambda: with_engine(engine, requests),
            "requests": lambda: by_requests(plain, requests, best),
            "one adapter": lambda: with_engine(engine, requests_of(size, names[:1])),
            "50 adapters": lambda: with_engine(engine, requests_of(size, names)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        bare: list[float] = []
        for _ in range(TURNS[size]):
            for name, work in parts.items():
                bare.append(max(bare_rows_per_second(pipeline, n) for n in BATCH_SIZES[size]))
                seconds[name].append(seconds_of(work))
        engine.close()
    steps = mean(request.steps for request in requests)
    speeds = {name: len(requests) / median(times) for name, times in seconds.items()}
    return {
        "max_rows": best,
        "mean_steps": steps,
        "bare_rows_per_second": rows_per_second,
        "pictures_per_second": {"bare denoiser": median(bare) / steps, **speeds},
        "seconds": seconds,
    }


def print_faster(size: str, max_rows: int, switches: list[str] | None) -> None:
    wanted = list(switches or serving_faster.SWITCHES)
    plain = [serving_faster.SWITCHES[name].plain for name in wanted]
    names = dict.fromkeys([serving_faster.BASELINE, *plain, *wanted])
    figures = serving_faster.measure(size, max_rows, list(names))
    print(serving_faster.table(figures))
    record = {"benchmark": "serving faster", "size": size, "cores": os.cpu_count(), "switches": figures}
    print(f"JSON {json.dumps(record)}", flush=True)
    if size == "full":
        stored = json.loads(FASTER.read_text())["switches"] if FASTER.exists() else {}
        FASTER.write_text(json.dumps(record | {"switches": stored | figures}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving_engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=("small", "full"), default="full", help="small: only that it runs")
    parser.add_argument("--part", choices=("engine", "faster"), default="engine")
    parser.add_argument(
        "--max-rows", type=int, help="the bare denoiser's best batch size if left out; faster: 8"
    )
    parser.add_argument("--switches", nargs="+", choices=serving_faster.SWITCHES, help="of faster; else all")
    arguments = parser.parse_args()
    if arguments.part == "faster":
        return print_faster(arguments.size, arguments.max_rows or 8, arguments.switches)
    figures = measure(arguments.size, arguments.max_rows)
    speeds = figures["pictures_per_second"]
    for name, speed in speeds.items():
        print(f"{name:>14}: {speed:.2f} pictures a second", flush=True)
    ratios = {
        "limit": speeds["diffray"] / speeds["bare denoiser"],
        "requests": speeds["diffray"] / speeds["requests"],
        "adapters": speeds["50 adapters"] / speeds["one adapter"],
    }
    print(f"ratio: of the bare denoiser's pictures a second {ratios['limit']:.2f} (aim: 0.9)")
    print(f"ratio: of request-level batching's pictures a second {ratios['requests']:.2f}")
    print(f"ratio: 50 adapters to one {ratios['adapters']:.2f} (aim: 0.9)")
    record = {"benchmark": "serving engine", "size": arguments.size, "cores": os.cpu_count()}
    print(f"JSON {json.dumps(record | figures | {'ratios': ratios})}", flush=True)


if __name__ == "__main__":
    main()
