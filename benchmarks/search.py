"""The search against the full grid of the same learning rates and step counts, each trained separately.

    python -m benchmarks.search                    # three seeds of the demo; about an hour on two cores
    python -m benchmarks.search --seeds 1

What is compared: steps of the denoiser, time, and the test FID of the model that is found, relative to that
of the grid's best, which is the one of the lowest validation FID. A training of few steps passes through the
states that a longer one of the same rate has at that step (`check` trains one separately and compares the
weights bit by bit), so the grid's models are the rungs of climbs that nobody stops, and its cost is counted
as if each had been trained from its beginning. Results go to benchmarks/results/search.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from cluster.connect import connect
from cluster.storage import Storage
from ray_jobs.config import Config, load_config
from ray_jobs.evaluate import EvaluatorPool, evaluators
from ray_jobs.prepare import prepare
from ray_jobs.progress import quiet_logs, show
from ray_jobs.search import search
from ray_jobs.search_results import spent
from ray_jobs.train import build_trainer, checked
from ray_jobs.training.checkpoint import Rung, find_rungs

RATES = [2e-3, 1e-3, 5e-4, 2e-4]
RESULTS = Path(__file__).parent / "results" / "search.json"
AIMS = "aims: at most 0.30 of the steps, a test FID within 1.02 of the grid's best"


def configured(arguments: argparse.Namespace, kind: str, seed: int) -> Config:
    """The demo with four learning rates; `grid` stops no trial."""
    overrides = [f"name=bench-{kind}-{seed}", f"seed={seed}", f"search.learning_rates={RATES}"]
    if kind == "grid":
        overrides.append("search.scheduler=none")
    return load_config(arguments.config, [*overrides, *arguments.overrides])


def searched(config: Config) -> dict[str, Any]:
    """Search, then measure on the test split: the winner, and the rung of the lowest validation FID."""
    dataset = prepare(config, check=checked(config))
    with evaluators(config, dataset) as pool:
        found = search(config, dataset, pool)
        pool.load("test")
        lowest = min(found.rows, key=lambda row: row["fid"])
        cost = spent(config, found.measured)
        return {
            "rungs": [
                {name: row[name] for name in ("trial_id", "step", "fid", "fid_error", "seconds")}
                for row in found.rows
            ],
            "winner": tested(pool, found.winner),
            "lowest": tested(pool, lowest),
            "steps": sum(trial.steps for trial in cost.trials),
            "seconds": sum(trial.seconds for trial in cost.trials),
        }


def tested(pool: EvaluatorPool, row: dict[str, Any]) -> dict[str, Any]:
    """What a rung scores on the test split."""
    score = pool.score(Rung(row["checkpoint"], row).weights, "test").fid
    told = {"test_fid": score.value, "test_fid_error": score.standard_error, "num_samples": score.num_samples}
    return {name: row[name] for name in ("trial_id", "step", "fid")} | told


def trained_separately(grid: dict[str, Any]) -> dict[str, float]:
    """What the grid costs where each of its models is trained from the beginning.

    A model's time is its climb's up to that rung, the measuring of the rungs before included.
    """
    return {
        "steps": sum(row["step"] for row in grid["rungs"]),
        "seconds": sum(row["seconds"] for row in grid["rungs"]),
    }


def check(config: Config) -> bool:
    """Whether a training to the first rung alone has the very weights of the climb at that rung."""
    dataset = prepare(config)
    first, rate = config.search.ladder[0], RATES[1]
    trainings = Storage.open(config.storage).child(config.name, "train")
    separate = config.with_settings({"train.learning_rate": rate})
    shorter = separate.model_copy(update={"search": config.search.model_copy(update={"ladder": [first]})})
    build_trainer(shorter, dataset, name="separate").fit()
    found = find_rungs(trainings)
    one, other = (tensors(found[name][0].weights) for name in ("separate", f"lr-{rate:g}"))
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def tensors(weights: str) -> dict[str, np.ndarray]:
    """All of a rung's, by file and name."""
    folder = Storage.open(weights)
    return {
        f"{file}/{key}": tensor
        for file in folder.files()
        if file.endswith(".safetensors")
        for key, tensor in load(folder.read_bytes(file)).items()
    }


def compared(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One seed: the grid, the search, and what of them is compared."""
    grid = searched(configured(arguments, "grid", seed))
    ours = searched(configured(arguments, "search", seed))
    whole = trained_separately(grid)
    return {
        "seed": seed,
        "grid": grid,
        "search": ours,
        "grid_trained_separately": whole,
        "steps_ratio": ours["steps"] / whole["steps"],
        "seconds_ratio": ours["seconds"] / whole["seconds"],
        "test_fid_ratio": ours["winner"]["test_fid"] / grid["lowest"]["test_fid"],
    }


def _told(found: dict[str, Any]) -> str:
    score = f"{found['test_fid']:.1f} ± {found['test_fid_error']:.1f}"
    return f"{found['trial_id']} at {found['step']}: {score}"


def written(out: Path, done: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(done, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quiet_logs()
    done: dict[str, Any] = {"seeds": [], "same_weights": None}
    if arguments.out.exists():
        done = json.loads(arguments.out.read_text())
    with connect(configured(arguments, "grid", 0)):
        for seed in range(len(done["seeds"]), arguments.seeds):
            done["seeds"].append(compared(arguments, seed))
            written(arguments.out, done)
        if done["same_weights"] is None:
            done["same_weights"] = check(configured(arguments, "grid", arguments.seeds - 1))
            written(arguments.out, done)
    show(f"trained separately to the first rung: the same weights: {done['same_weights']}")
    for each in done["seeds"]:
        grid, ours = (_told(each[kind][which]) for kind, which in (("grid", "lowest"), ("search", "winner")))
        ratios = " ".join(f"{name} {each[f'{name}_ratio']:.3f}" for name in ("steps", "seconds", "test_fid"))
        show(f"seed {each['seed']}: {ratios}; grid {grid}, search {ours}")
    show(AIMS)


if __name__ == "__main__":
    main()
