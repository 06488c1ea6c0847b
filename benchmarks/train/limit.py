"""Our training against a bare loop that trains on one batch in memory: what of a step is not the model."""

from typing import Any

from benchmarks.data.measuring import in_fresh_process
from benchmarks.train.measuring import Contest, changed, prepared, run_contests, tell
from benchmarks.train.rivals import BareLoop
from ray_jobs.config import Config
from ray_jobs.training.setup import build_model

TURNS = {"small": 2, "full": 9}
STEPS = {"small": 2, "full": 4}  # of a turn
METHODS = ("lora", "full")
CORES = 2


def run(size: str) -> dict[str, Any]:
    figures = in_fresh_process(measure, size)
    tell(figures, rival="the rival", of="a bare loop's images a second")
    return {"turns": TURNS[size], "steps_a_turn": STEPS[size], "figures": figures}


def measure(size: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    with prepared(size) as (config, dataset, folder):
        for num_workers in (1, CORES):
            workers = "1 worker" if num_workers == 1 else f"{num_workers} workers"
            contests = {
                f"{method}, {workers}": Contest(
                    changed(
                        config,
                        method=method,
                        num_workers=num_workers,
                        cpus_per_worker=CORES // num_workers,
                    ),
                    bare_loop,
                    STEPS[size],
                )
                for method in METHODS
            }
            found |= run_contests(contests, dataset, folder, num_workers=num_workers, turns=TURNS[size])
    return found


def bare_loop(config: Config, inputs: dict[str, Any]) -> BareLoop:
    """The rival, with a model of its own."""
    pipeline, _ = build_model(config)
    batch = {
        "latents": inputs["latents"],
        "noise": inputs["draws"].noise,
        "timesteps": inputs["timesteps"],
        "embeds": inputs["conditions"]["prompt_embeds"],
    }
    return BareLoop(pipeline, config.train, batch)
