"""The main job through the Jobs API: forty pictures in, a measured, registered model out."""

import json
from pathlib import Path

from PIL import Image

from cluster import submit
from cluster.connect import LocalCluster
from tests.ray.test_training import DEMO, tiny_config

OVERRIDES = ["search.learning_rates=[1.0e-3,1.0e-4]", "evaluate.inference_steps=2", "evaluate.num_actors=1"]


def test_the_pipeline_runs_end_to_end_and_the_second_time_is_skipped(
    ray_cluster: LocalCluster, tiny_model: Path, picture_folder: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_model, picture_folder, tmp_path, *OVERRIDES)
    written = tmp_path / "tiny.yaml"
    written.write_text(config.to_yaml())
    job = ["python", "-m", "ray_jobs.pipeline", "--config", str(written)]
    environment = submit.runtime_environment(submit.local_variables())
    assert submit.run_job(ray_cluster.address, job, environment) == 0

    run = tmp_path / "tiny"
    manifest = json.loads((run / "dataset" / "manifest.json").read_text())
    assert sum(manifest[split] for split in ("train", "validation", "test")) == 40
    assert sum(manifest["rejected"].values()) == 1
    rejected = json.loads((run / "dataset" / "rejected.jsonl").read_text())
    assert rejected["file_name"].endswith("broken.png")

    rows = [json.loads(line) for line in (run / "search" / "results.jsonl").read_text().splitlines()]
    fields = {"trial_id", "learning_rate", "step", "fid", "train_loss", "images_per_second", "checkpoint"}
    assert all(set(row) == fields for row in rows)
    winner = json.loads((run / "winner.json").read_text())
    best = min(rows, key=lambda row: (row["fid"], row["step"]))
    assert (winner["trial_id"], winner["step"]) == (best["trial_id"], best["step"])
    assert winner["validation_fid"] == best["fid"]
    assert winner["feature_network"].startswith("inception-2015-12-05@sha256:")
    assert winner["num_samples"] == 2 * manifest["test"]  # each caption twice
    assert (run / "config.yaml").exists() and (run / "report.html").read_text().startswith("<!")
    assert (run / "model" / "pytorch_lora_weights.safetensors").exists()
    for path in (run / "samples").glob("*.png"):
        Image.open(path).verify()

    changed = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert submit.run_job(ray_cluster.address, job, environment) == 0
    for path in (run / "winner.json", run / "search" / "results.jsonl", run / "dataset" / "manifest.json"):
        assert path.stat().st_mtime_ns == changed[path]


def test_the_demo_searches_learning_rates_by_sharded_lora_training() -> None:
    """At least two learning rates over an increasing ladder, by sharded LoRA training."""
    from ray_jobs.config import load_config

    config = load_config(DEMO)
    assert len(config.search.learning_rates) >= 2 and len(config.search.ladder) >= 2
    assert (config.train.method, config.train.num_workers, config.train.zero_stage) == ("lora", 2, 2)
