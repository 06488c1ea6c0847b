"""Our training against the usual recipe, which decodes and encodes its pictures at every step."""

import json
from pathlib import Path
from typing import Any

from benchmarks.data.measuring import in_fresh_process
from benchmarks.train.limit import CORES, METHODS
from benchmarks.train.measuring import Contest, changed, prepared, run_contests
from benchmarks.train.rivals import UsualRecipe
from ray_jobs.config import Config, resolve_path
from ray_jobs.diffusion.loading import load_pipeline
from ray_jobs.training.setup import build_model

TURNS = {"small": 2, "full": 9}
STEPS = {"small": 2, "full": 4}  # of a turn
PRECISIONS = ("fp32", "bf16")


def run(size: str) -> dict[str, Any]:
    figures = in_fresh_process(measure, size)
    for name, found in figures.items():
        speeds = found["images_per_second"]
        print(f"{name}: {speeds['ours']:.1f} images a second, the recipe {speeds['rival']:.1f}", flush=True)
        for who, causes in found["ms_a_step"].items():
            told = ", ".join(f"{cause} {ms:.1f}" for cause, ms in causes.items())
            print(f"    {who:>5}, ms a step: {told}", flush=True)
    said = ", ".join(f"{name}: {found['ratio']:.2f}" for name, found in figures.items())
    print(f"ratio: of the usual recipe's images a second (fp32), {said}", flush=True)
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
