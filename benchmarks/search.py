"""The search against the full grid of the same learning rates and step counts, each trained separately.

    python -m benchmarks.search                    # three seeds of the demo; about an hour on two cores
    python -m benchmarks.search --seeds 1 --scheduler asha

A seed's grid and searches that the results hold already are not run again, so another scheduler costs its
search alone. What is compared: computed steps of the denoiser, time, and the test FID of the model that is
found, relative to that of the grid's best, which is the one of the lowest validation FID. A training of few
steps passes through the states that a longer one of the same rate has at that step (`check` trains one
separately and compares the weights bit by bit), so the grid's models are the rungs of climbs that nobody
stops, and its cost is counted as if each had been trained from its beginning. Results go to
benchmarks/results/search.json, those of searches by their scheduler; where only `measured_steps` are told,
those up to measured rungs, the computed ones were not counted.
"""

import argparse
import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from benchmarks.simulation.halving import Halving
from cluster.connect import connect
from cluster.storage import Storage
from ray_jobs.config import Config, SearchConfig, load_config
from ray_jobs.console import quiet_logs, show
from ray_jobs.data.preparation import prepare
from ray_jobs.evaluation.pool import EvaluatorPool, evaluators
from ray_jobs.planning.checks import checked
from ray_jobs.run.records import RungRow
from ray_jobs.run.split import TEST
from ray_jobs.search import search
from ray_jobs.training.checkpoint import find_rungs, weights_of
from ray_jobs.training.trainer import build_trainer
from ray_jobs.tuning.results import spent

RATES = [2e-3, 1e-3, 5e-4, 2e-4]
TOLD = {"trial_id", "step", "fid", "fid_error", "seconds", "behind", "behind_error", "variance_ratio"}
RESULTS = Path(__file__).parent / "results" / "search.json"
AIMS = "aims: at most 0.30 of the steps, a test FID within 1.02 of the grid's best"


def configured(arguments: argparse.Namespace, kind: str, seed: int) -> Config:
    """The demo with four learning rates, searched by a scheduler; `grid` stops no trial."""
    scheduler = "none" if kind == "grid" else kind
    overrides = [f"name=bench-{kind}-{seed}", f"seed={seed}", f"search.learning_rates={RATES}"]
    # The grid's scores are what the searches must find again, to the bit.
    overrides += [f"search.scheduler={scheduler}", "search.pack=off"]
    return load_config(arguments.config, [*overrides, *arguments.overrides])


def searched(config: Config) -> dict[str, Any]:
    """Search, then measure on the test split: the winner, and the rung of the lowest validation score."""
    check = checked(config)
    dataset = prepare(config, check=check)
    config = check().with_ladder(dataset.manifest.rows_an_epoch)
    with evaluators(config, dataset) as pool:
        found = search(config, dataset, pool)
        pool.load(TEST)
        lowest = min(found.rows, key=lambda row: row.score)
        cost = spent(config, found.measured, found.computed)
        return {
            "rungs": [row.model_dump(include=TOLD, exclude_unset=True) for row in found.rows],
            "winner": tested(pool, found.winner),
            "lowest": tested(pool, lowest),
            "steps": sum(trial.steps for trial in cost.trials) + cost.other_steps,
            "measured_steps": sum(trial.measured_steps for trial in cost.trials),
            "seconds": sum(trial.seconds for trial in cost.trials),
        }


def tested(pool: EvaluatorPool, row: RungRow) -> dict[str, Any]:
    """What a rung scores on the test split."""
    score = pool.score(weights_of(row.checkpoint), TEST).fid
    told = {"test_fid": score.value, "test_fid_error": score.standard_error, "num_samples": score.num_samples}
    return row.model_dump(include={"trial_id", "step", "fid"}) | told


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
    config = config.with_ladder(dataset.manifest.rows_an_epoch)
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


def gridded(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One seed: the grid, and no search yet."""
    grid = searched(configured(arguments, "grid", seed))
    return {"seed": seed, "grid": grid, "grid_trained_separately": trained_separately(grid), "searches": {}}


def compared(arguments: argparse.Namespace, seed: dict[str, Any]) -> dict[str, Any]:
    """The search of one seed, and what of it is compared with the grid."""
    ours = searched(configured(arguments, arguments.scheduler, seed["seed"]))
    whole = seed["grid_trained_separately"]
    return ours | {
        "steps_ratio": ours["steps"] / whole["steps"],
        "measured_steps_ratio": ours["measured_steps"] / whole["steps"],
        "seconds_ratio": ours["seconds"] / whole["seconds"],
        "test_fid_ratio": ours["winner"]["test_fid"] / seed["grid"]["lowest"]["test_fid"],
    }


def asha_by_order(grid: dict[str, Any]) -> list[float]:
    """The share of the separate grid's steps, up to measured rungs, that ASHA with one trial at a time takes
    in every order of the rates, if it measures what the grid has measured."""
    fids = {(row["trial_id"], row["step"]): row["fid"] for row in grid["rungs"]}
    trials, ladder = ({key[place] for key in fids} for place in (0, 1))
    whole, shares = len(trials) * sum(ladder), []
    for order in permutations(sorted(trials)):
        halving, steps = Halving(sorted(ladder), SearchConfig.model_fields["reduction_factor"].default), 0
        for number, trial in enumerate(order):
            for step in sorted(ladder):
                last = step
                if halving.stops(number, step, fids[trial, step]):
                    break
            steps += last
        shares.append(steps / whole)
    return shares


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
    parser.add_argument("--scheduler", default="halving", choices=["halving", "asha", "median"])
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quiet_logs()
    done: dict[str, Any] = {"seeds": [], "same_weights": None}
    if arguments.out.exists():
        done = json.loads(arguments.out.read_text())
    with connect(configured(arguments, "grid", 0)):
        for seed in range(arguments.seeds):
            if seed == len(done["seeds"]):
                done["seeds"].append(gridded(arguments, seed))
                written(arguments.out, done)
            searches = done["seeds"][seed]["searches"]
            if arguments.scheduler not in searches:
                searches[arguments.scheduler] = compared(arguments, done["seeds"][seed])
                written(arguments.out, done)
        if done["same_weights"] is None:
            done["same_weights"] = check(configured(arguments, "grid", arguments.seeds - 1))
            written(arguments.out, done)
    show(f"trained separately to the first rung: the same weights: {done['same_weights']}")
    for each in done["seeds"]:
        for scheduler, ours in each["searches"].items():
            ratios = ", ".join(f"{name} {ours[name]:.3f}" for name in ours if name.endswith("_ratio"))
            best = f"grid {_told(each['grid']['lowest'])}, search {_told(ours['winner'])}"
            show(f"seed {each['seed']}, {scheduler}: {ratios}; {best}")
        shares = asha_by_order(each["grid"])
        told = f"{min(shares):.3f} to {max(shares):.3f}, in the mean {np.mean(shares):.3f}"
        show(f"seed {each['seed']}: ASHA's measured_steps_ratio in {len(shares)} orders of the rates: {told}")
    show(AIMS)


if __name__ == "__main__":
    main()
