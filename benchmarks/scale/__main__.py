"""python -m benchmarks.scale [--part trials|workers|rows|adapters|versions ...] [--largest N]

What control costs as its work grows, in time and in the driver's memory, each fitted by a + b * n**c:

trials: of a search, 1 to 64, each a formula in the place of a training: Tune's driver and all that draws,
    stops, and records are the search's own.
workers: of a training, 1 to 16 logical ones on this machine, with a tiny model: the time until the first step
    and that of a step.
rows: of a data set, 1,000 to 1,000,000: listing, decisions, parts and order are prepare's own, over an index
    of pictures that do not exist; and what scanning one picture takes.
adapters: in a replica's memory, 1 to 1,000, and as many versions to choose from.
versions: of one model in the registry, 1 to 1,000, in SQLite.

Every size is measured in a process of its own. Memory is that process' largest resident set: of `rows` beside
what it was before. Figures go to benchmarks/results/scale.json, where those of other parts stay.
"""

import argparse
import importlib
from pathlib import Path
from typing import Any

from benchmarks.scale.fitting import fitted
from ray_jobs.console import columns, show

RESULTS = Path(__file__).parents[1] / "results" / "scale.json"
PARTS = ("trials", "workers", "rows", "adapters", "versions")
LEAST = 1e-9  # that is fitted: errors are relative


def measured(part: str, largest: int | None) -> dict[str, Any]:
    """A part's figures by size, and the fits of what grows."""
    module = importlib.import_module(f"benchmarks.scale.{part}")
    sizes = [size for size in module.SIZES if largest is None or size <= largest]
    found: dict[str, Any] = module.run(sizes)
    rows = found["sizes"]
    names = [name for name in rows[0] if name != "size"]
    table = [["size", *names]]
    table += [[f"{row['size']:,}", *(f"{row[name]:.4g}" for name in names)] for row in rows]
    for line in columns(table):
        show(line)
    if len(rows) < 2:
        return found
    counts = [row["size"] for row in rows]
    fits = {name: fitted(counts, [max(LEAST, row[name]) for row in rows]) for name in names}
    for name, fit in fits.items():
        show(f"    {name}: {fit.told()}")
    return found | {"fits": {name: fit.record() for name, fit in fits.items()}}


def main() -> None:
    # Here, since the processes that measure import this file too, and these bring in torch.
    from benchmarks.serving import keep
    from benchmarks.serving_alone import facts

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="all, if left out")
    parser.add_argument("--largest", type=int, metavar="N", help="size to measure")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    for part in options.part:
        show(f"{part}:")
        keep(options.out, part, {"machine": facts(), **measured(part, options.largest)})
    show(f"all figures: {options.out}")


if __name__ == "__main__":
    main()
