"""Our training against the usual recipe, which decodes and encodes its pictures at every step."""

import json
from pathlib import Path
from typing import Any

from benchmarks.data.measuring import in_fresh_process
from benchmarks.train.limit import CORES, METHODS, STEPS, TURNS
from benchmarks.train.measuring import Contest, changed, prepared, run_contests, tell
from benchmarks.train.rivals import UsualRecipe
from ray_jobs.config import Config, resolve_path
from ray_jobs.training.setup import build_model
from ray_jobs.weights.loading import load_pipeline

PRECISIONS = ("fp32", "bf16")


def run(size: str) -> dict[str, Any]:
    figures = in_fresh_process(measure, size)
    tell(figures, rival="the recipe", of="the usual recipe's images a second (fp32)")
    return {"turns": TURNS[size], "steps_a_turn": STEPS[size], "figures": figures}


def measure(size: str) -> dict[str, dict[str, Any]]:
    with prepared(size) as (config, dataset, folder):
        contests = {
            f"{method}, {precision}": Contest(
                changed(config, method=method, precision=precision, num_workers=1, cpus_per_worker=CORES),
                usual_recipe,
                STEPS[size],
            )
            for method in METHODS
            for precision in PRECISIONS
        }
        return run_contests(contests, dataset, folder, num_workers=1, turns=TURNS[size])


def usual_recipe(config: Config, inputs: dict[str, Any]) -> UsualRecipe:
    """The rival, with a model of its own in fp32; it reads the pictures, not what was made of them."""
    pipeline, _ = build_model(config)
    # Ours has no use for it: captions come encoded.
    pipeline.text_encoder = load_pipeline(resolve_path(config.model.base)).text_encoder
    folder = Path(str(config.data.source))
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [(folder / row["file_name"], row["text"]) for row in map(json.loads, lines)]
    return UsualRecipe(pipeline, config.train, rows, config.data.resolution)
