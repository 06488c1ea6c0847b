"""Peak memory of `prepare`, over all processes, and the seconds of its stages, as the set grows."""

import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.data.measuring import PeakMemory, in_fresh_process, tree_memory
from benchmarks.data.pictures import configured, smooth, write_folder
from cluster.connect import joined
from cluster.local import local_cluster
from ray_jobs.data.preparation import prepare

COUNTS = {"smoke": (200, 500), "full": (1_000, 10_000, 100_000)}
STAGES = ("scan", "decide", "encode")


def run(size: str) -> dict[str, Any]:
    sets = []
    with tempfile.TemporaryDirectory(prefix="diffray-benchmark-") as name:
        folder = Path(name)
        in_fresh_process(write_tiny_model, folder / "model")
        for count in COUNTS[size]:
            write_folder(folder / f"{count}", count, smooth)
            found = in_fresh_process(measure, folder, count)
            sets.append(found)
            print(
                f"{count:>7,} pictures: {found['peak_mib']:6.0f} MiB of up to {found['processes']} processes "
                f"(before: {found['idle_mib']:.0f}; driver alone: {found['driver_mib']:.0f}), "
                f"{found['seconds']:.1f} s ("
                + ", ".join(f"{stage} {found[stage]:.1f}" for stage in STAGES)
                + f"), {found['kept']:,} kept",
                flush=True,
            )
    before, last = sets[-2:]
    ratios = {key: last[key] / before[key] for key in ("peak_mib", "driver_mib", "seconds")}
    print(
        f"ratio: {last['pictures'] / before['pictures']:g} times the pictures take "
        f"{ratios['peak_mib']:.2f} times the memory (driver alone: {ratios['driver_mib']:.2f}) and "
        f"{ratios['seconds']:.1f} times the time",
        flush=True,
    )
    return {"sets": sets, "ratios": ratios}


def write_tiny_model(folder: Path) -> None:
    """A StableDiffusionPipeline of 64 x 64 pixels with random weights: encoding costs next to nothing."""
    from ray_jobs.diffusion.families import FAMILIES

    captions = [f"picture {number} of noise" for number in range(100)]
    FAMILIES["StableDiffusionPipeline"].tiny(captions).save_pretrained(folder)


def measure(folder: Path, count: int) -> dict[str, Any]:
    """Prepare the pictures in `folder/<count>`; MiB, and seconds of the whole and of its stages."""
    storage = folder / f"runs-{count}"
    config = configured(
        folder / f"{count}", storage, f"model.base={folder / 'model'}", "data.cleaning.duplicates=drop"
    )
    with local_cluster(config.local) as cluster, joined(cluster.gcs_address):
        idle = tree_memory() / 2**20
        with PeakMemory() as peak:
            start = time.time()
            dataset = prepare(config)
            seconds = time.time() - start
    # Every stage ends with a file that is then left alone.
    written = storage / config.name / "dataset"
    ends = [
        max(file.stat().st_mtime for file in (written / "index").iterdir()),
        (written / "duplicates.jsonl").stat().st_mtime,
        (written / "parts.json").stat().st_mtime,
    ]
    spent = [end - begin for begin, end in zip([start, *ends], ends, strict=False)]
    return {
        "pictures": count,
        "kept": sum(dataset.num_rows(split) for split in ("train", "validation", "test")),
        "duplicates": dataset.manifest.duplicates.pictures,
        "peak_mib": peak.mib,
        "processes": peak.processes,
        "idle_mib": idle,
        "driver_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "seconds": seconds,
        **dict(zip(STAGES, spent, strict=True)),
    }
