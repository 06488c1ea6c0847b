"""Versions of one model in the registry, in MLflow's SQLite file: to add one, to read one, to read all."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.data.measuring import in_fresh_process
from benchmarks.data.pictures import ROOT, configured
from benchmarks.scale.memory import largest, resident
from ray_jobs.config import Config
from ray_jobs.registry.aliases import status
from ray_jobs.registry.models import champion, entries
from ray_jobs.registry.promotion import Measured
from ray_jobs.registry.registration import register

SIZES = (1, 10, 100, 1_000)
LAST = 5  # registrations, and calls, that a median is taken of
MEASURED = Measured(1.0, None, num_samples=1, feature_network="none", data="none")


def run(sizes: list[int]) -> dict[str, Any]:
    found, before = [], 0
    with tempfile.TemporaryDirectory(prefix="diffray-benchmark-") as name:
        for size in sizes:
            adding = in_fresh_process(grow, Path(name), before, size)
            found.append({"size": size, "register_s": adding, **in_fresh_process(read, Path(name))})
            before = size
    return {"sizes": found}


def settings(folder: Path, name: str = "many") -> Config:
    return configured(ROOT / "examples" / "fluent-emoji", folder / "runs", f"publish.model_name={name}")


def grow(folder: Path, before: int, size: int) -> float:
    """Register versions until there are so many; the median seconds of the last ones."""
    import torch
    from safetensors.torch import save_file

    from ray_jobs.weights.loading import LORA_WEIGHTS

    source, spent = folder / "weights", list[float]()
    source.mkdir(exist_ok=True)

    def add(number: int, name: str) -> None:
        save_file({"weight": torch.full((2,), float(number))}, source / LORA_WEIGHTS)
        register(settings(folder, name), source=str(source), measured=MEASURED, params={})

    add(0, "first")  # imports MLflow, and makes the file
    for number in range(before, size):
        spent.append(_seconds(partial(add, number, "many")))
    return median(spent[-LAST:])


def read(folder: Path) -> dict[str, float]:
    """Seconds of what the endpoint and a person ask for, the memory that it takes, and the file's size."""
    config = settings(folder)
    champion(config)  # imports, and opens the file
    before = resident()
    spent = {
        "champion_s": median(_seconds(lambda: champion(config)) for _ in range(LAST)),
        "entries_s": median(
            _seconds(lambda: entries(config, [config.publish.model_name])) for _ in range(LAST)
        ),
        "status_s": _seconds(lambda: status(config)),
    }
    file = Path(config.storage) / "mlflow.db"
    return {
        **spent,
        "driver_mib": largest(),
        "grown_mib": resident() - before,
        "database_mib": file.stat().st_size / 2**20,
    }


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
