"""Adapters in a replica's memory: reading one, finding it again, choosing its version, and what all hold."""

import shutil
import tempfile
import threading
import time
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.data.measuring import in_fresh_process
from benchmarks.data.pictures import ROOT
from benchmarks.scale.memory import resident
from ray_jobs.registry.models import CHAMPION, RegisteredModel, RegistryEntry
from serving.engine.adapters import AdapterCache, read_adapter
from serving.request import alone
from serving.service.routing import Catalogue

SIZES = (1, 10, 100, 1_000)
MODEL = ROOT / "models" / "emoji-base"
FEW = 20  # calls that a mean is taken of
MIB = 2**20


def run(sizes: list[int]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="diffray-benchmark-") as name:
        folder = Path(name)
        in_fresh_process(write_one, folder)
        # Under names of their own: what is read is the same, but the cache does not know that.
        for number in range(1, max(sizes)):
            shutil.copytree(folder / "adapter-0", folder / f"adapter-{number}")
        return {"sizes": [in_fresh_process(measure, folder, size) for size in sizes]}


def write_one(folder: Path) -> None:
    from benchmarks.adapters import write_adapters

    write_adapters(folder, 1, str(MODEL))


def measure(folder: Path, size: int) -> dict[str, float]:
    """Milliseconds a call; MiB that the process grew by while all adapters were kept."""
    from ray_jobs.diffusion.families import family_of
    from ray_jobs.weights.loading import load_pipeline

    pipeline = load_pipeline(str(MODEL))
    family = family_of(pipeline)
    parts = family.adaptable(pipeline)
    read_adapter("first", folder / "adapter-0", parts)  # what is imported and allocated once
    arrived = threading.Event()
    cache = AdapterCache(
        lambda name: read_adapter(name, folder / name, parts), max_bytes=1 << 40, on_loaded=arrived.set
    )
    names, before = [f"adapter-{number}" for number in range(size)], resident()
    begin = time.perf_counter()
    for name in names:
        while cache.get(alone(name)) is None:
            arrived.wait()
            arrived.clear()
    reading = time.perf_counter() - begin
    grown, held = resident() - before, cache.num_bytes
    begin = time.perf_counter()
    for _ in range(FEW):
        for name in names[-FEW:]:
            cache.get(alone(name))
    hit = (time.perf_counter() - begin) / FEW / len(names[-FEW:])
    cache.close()
    return {
        "size": size,
        "read_ms": 1e3 * reading / size,
        "hit_us": 1e6 * hit,
        "adapters_mib": held / MIB,
        "grown_mib": grown,
        **choosing(size),
    }


def choosing(size: int) -> dict[str, float]:
    """Milliseconds to find the oldest of so many versions, and to list all."""
    versions = {
        number: RegisteredModel("many", number, "", f"{number:064d}", "base", None, "lora", {})
        for number in range(1, size + 1)
    }
    catalogue = Catalogue("many", versions[size])
    catalogue.entries = {"many": RegistryEntry(versions, {CHAMPION: size})}
    calls = {"find_ms": lambda: catalogue.find("many@1"), "offers_ms": lambda: list(catalogue.offers())}
    return {name: 1e3 * mean(_seconds(call) for _ in range(FEW)) for name, call in calls.items()}


def _seconds(call: Any) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
