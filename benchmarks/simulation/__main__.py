"""python -m benchmarks.simulation [--calibrate RUN_FOLDER] [--compare RUN_FOLDER ...] [--gpus N ...]

A search on N GPUs in simulated time, calibrated by one that was made: its time, and what it costs.

compare: what was predicted of a real search from another one's seconds, against what it took. Without run
    folders these are the searches of benchmarks/results/search.json, calibrated by its grids of all seeds.
project: the same search on more devices, with failures of nodes, from the calibration's seconds or from
    those that are given (`--startup-seconds`, `--step-seconds`, `--evaluation-seconds`).

Results go to benchmarks/results/simulation.json.
"""

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.simulation.prediction import predicted, synthetic_scores
from benchmarks.simulation.runs import Run, read_benchmark, read_run
from benchmarks.simulation.search import Cluster, Plan, Scores, Timing
from ray_jobs.config import load_config
from ray_jobs.console import columns, show

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DAY = 86_400.0
PLACES = ("calibrate", "compare", "config", "out")  # options that name files


def pooled(runs: Sequence[Run]) -> Timing:
    """The seconds of several searches."""
    names = [field.name for field in fields(Timing)]
    return Timing(**{name: [each for run in runs for each in getattr(run.timing, name)] for name in names})


def compare(run: Run, timing: Timing, replicates: int) -> dict[str, Any]:
    """Predicted against real, with the FIDs that were measured; errors in per cent of what was real."""
    cluster = Cluster(
        run.plan.workers * run.plan.concurrent, run.evaluators, run.plan.workers, price=run.price
    )

    def measured(draw: random.Random) -> Scores:
        return run.scores

    found = predicted(run.plan, cluster, timing, measured, replicates=replicates)
    real = {"seconds": run.seconds, "worker_hours": run.worker_hours}
    return {
        "name": run.name,
        "trials": run.plan.trials,
        "real": real,
        "predicted": {name: found[name] for name in (*real, "steps")},
        "error_percent": {name: 100 * (found[name]["mean"] / real[name] - 1) for name in real},
    }


def project(options: argparse.Namespace, plan: Plan, timing: Timing) -> list[dict[str, Any]]:
    """The search on each number of GPUs."""
    rows = []
    for gpus in options.gpus:
        if gpus < plan.workers:
            continue
        cluster = Cluster(
            gpus,
            options.evaluators,
            options.gpus_a_node,
            DAY * (options.node_mtbf_days or math.inf),
            options.restart_seconds,
            options.price,
        )

        def drawn(draw: random.Random) -> Scores:
            return synthetic_scores(plan.trials, plan.ladder, draw)

        found = predicted(plan, cluster, timing, drawn, replicates=options.replicates)
        rows.append({"gpus": gpus, **found})
    return rows


def told(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table of `project`'s rows."""
    head = ["GPUs", "hours", "90 %", "worker hours", "cost", "steps", "lost", "failures"]
    lines = [head]
    for row in rows:
        time = {name: value / 3600 for name, value in row["seconds"].items()}
        means = {name: each["mean"] for name, each in row.items() if name != "gpus"}
        lines.append(
            [
                f"{row['gpus']}",
                f"{time['mean']:.2f}",
                f"{time['low']:.2f} to {time['high']:.2f}",
                f"{means['worker_hours']:.1f}",
                f"{means['cost']:,.2f}",
                f"{means['steps']:,.0f}",
                f"{means['lost_steps']:,.1f}",
                f"{means['failures']:.2f}",
            ]
        )
    return columns(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--calibrate", nargs="+", metavar="RUN_FOLDER", help="searches that give the seconds")
    parser.add_argument("--compare", nargs="+", metavar="RUN_FOLDER", help="searches to predict")
    parser.add_argument("--config", default=str(ROOT / "configs" / "demo.yaml"), help="of search.json's runs")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 32, 64], help="to project to")
    parser.add_argument("--gpus-a-node", type=int, default=8)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--workers", type=int, default=8, help="GPUs of a trial")
    parser.add_argument("--ladder", type=int, nargs="+", default=[1_000, 2_000, 4_000, 8_000], help="steps")
    parser.add_argument("--evaluators", type=int, default=8, help="GPUs beside those of --gpus")
    parser.add_argument("--checkpoint-minutes", type=float, default=10)
    parser.add_argument("--node-mtbf-days", type=float, help="mean time between failures; without: none")
    parser.add_argument("--restart-seconds", type=float, help="after a failure; without: a start-up")
    parser.add_argument("--price", type=float, default=0.0, help="of a GPU for an hour")
    for name in ("startup", "step", "evaluation"):
        parser.add_argument(f"--{name}-seconds", type=float, help="instead of the measured ones")
    parser.add_argument("--replicates", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS / "simulation.json")
    return parser.parse_args()


def searches(folders: list[str] | None, kind: str, options: argparse.Namespace) -> list[Run]:
    """Those in run folders, or else of search.json."""
    if folders:
        return [read_run(folder) for folder in folders]
    return read_benchmark(RESULTS / "search.json", kind, load_config(options.config))


def main() -> None:
    options = arguments()
    base = searches(options.calibrate, "grid", options)
    timing = pooled(base)
    real = searches(options.compare, "search", options)
    comparison = [compare(run, timing, options.replicates) for run in real]
    for each in comparison:
        time, error = each["predicted"]["seconds"], each["error_percent"]["seconds"]
        show(
            f"{each['name']}: {each['real']['seconds']:.0f} s, predicted {time['mean']:.0f} s "
            f"({time['low']:.0f} to {time['high']:.0f}), {error:+.1f} %"
        )
    # GPUs are not shared: a training and the evaluators do not hold each other up.
    given = {name: getattr(options, f"{name}_seconds") for name in ("startup", "step", "evaluation")}
    larger = Timing(**{name: [value] if value else getattr(timing, name) for name, value in given.items()})
    plan = Plan(
        options.trials,
        options.ladder,
        workers=options.workers,
        concurrent=options.trials,
        checkpoint_s=60 * options.checkpoint_minutes,
    )
    rows = project(options, plan, larger)
    for line in told(rows):
        show(line)
    settings = {name: value for name, value in vars(options).items() if name not in PLACES}
    written = {
        "calibration": {"searches": [run.name for run in base], **vars(timing)},
        "comparison": comparison,
        "projection": {"settings": settings, "seconds": vars(larger), "rows": rows},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(written, indent=1) + "\n")
    show(f"all figures: {options.out}")


if __name__ == "__main__":
    main()
