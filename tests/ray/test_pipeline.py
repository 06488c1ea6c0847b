"""The main job through the Jobs API: forty pictures in, a measured, registered model out."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from mlflow import MlflowClient
from PIL import Image, ImageChops

from cluster import submit
from cluster.connect import LocalCluster
from cluster.storage import slug
from ray_jobs.compare import compare
from ray_jobs.config import Config, ConfigError
from ray_jobs.evaluate import evaluators
from ray_jobs.prepare import prepare
from tests.cards import draw
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
    fields = {"trial_id", "learning_rate", "step", "train_loss", "images_per_second", "seconds", "checkpoint"}
    scores = {"fid", "fid_error", "kid", "kid_error", "fid_2", "fid_2_error", "feature_network_2"}
    scores.add("validation_loss")
    assert all(set(row) - {"behind", "behind_error"} == fields | scores for row in rows)
    winner = json.loads((run / "winner.json").read_text())
    [best] = [row for row in rows if all(row[key] == winner[key] for key in ("trial_id", "step"))]
    assert winner["validation_fid"] == best["fid"]
    # One of a lower FID took more steps, and on the same noise cannot be told from it.
    assert all(row["fid"] >= best["fid"] or row["step"] > best["step"] for row in rows)
    assert best.get("behind", 0) <= best.get("behind_error", 0)
    assert winner["test_fid_error"] > 0 and winner["test_fid_2"] > 0 and "test_kid" in winner
    reads = [json.loads(line)["event"] for line in (run / "test_reads.jsonl").read_text().splitlines()]
    assert reads == ["read", "published"]
    assert winner["feature_network"].startswith("inception-2015-12-05@sha256:")
    assert winner["num_samples"] == 2 * manifest["test"]  # each caption twice
    assert (run / "config.yaml").exists() and (run / "report.html").read_text().startswith("<!")
    assert (run / "model" / "pytorch_lora_weights.safetensors").exists()
    for path in (run / "samples").glob("*.png"):
        Image.open(path).verify()
    check_samples_of_rungs(run, rows)
    check_series(str(tmp_path), rows)
    check_model_card(run, tiny_model)

    check_comparison(config, winner)

    changed = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert submit.run_job(ray_cluster.address, job, environment) == 0
    for path in (run / "winner.json", run / "search" / "results.jsonl", run / "dataset" / "manifest.json"):
        assert path.stat().st_mtime_ns == changed[path]


def check_comparison(config: Config, winner: dict[str, Any]) -> None:
    """The champion beside its base: scores as in the search, and the error of their difference."""
    dataset = prepare(config)
    with evaluators(config, dataset) as pool:
        found = compare(config, dataset, pool, "champion", "base")
        with pytest.raises(ConfigError, match="7: no version or alias of"):
            compare(config, dataset, pool, "7", "base")
    assert found.value == pytest.approx(winner["validation_fid"] - winner["base_validation_fid"], abs=1e-3)
    assert found.standard_error > 0 and found.variance_ratio > 1
    folder = Path(config.storage) / config.name / "comparisons" / "champion-base"
    assert set(json.loads((folder / "comparison.json").read_text())) == {"version 1", "base", "difference"}
    Image.open(folder / "grid.png").verify()


def check_samples_of_rungs(run: Path, rows: list[dict[str, Any]]) -> None:
    """Each measured rung keeps the pictures of the first captions; the report shows the winner's."""
    captions = json.loads((run / "samples" / "captions.json").read_text())
    expected = [f"{number}-{slug(caption)}.png" for number, caption in enumerate(captions)]
    for row in rows:
        folder = Path(row["checkpoint"]) / "samples"
        assert sorted(path.name for path in folder.iterdir()) == sorted(expected)
        for path in folder.iterdir():
            assert Image.open(path).size == (64, 64)
    # Drawn for the score, they are the pictures that the winner draws from the same noise.
    winner = json.loads((run / "winner.json").read_text())
    [best] = [row for row in rows if all(row[key] == winner[key] for key in ("trial_id", "step"))]
    kept = Image.open(Path(best["checkpoint"]) / "samples" / expected[0])
    drawn = Image.open(run / "samples" / expected[0].replace(".png", "-winner.png"))
    assert max(ImageChops.difference(kept, drawn).tobytes()) <= 2  # other batches round otherwise
    page = (run / "report.html").read_text()
    assert "How it learned" in page and f"{captions[0]}: ★ {best['step']}" in page


def check_series(storage: str, rows: list[dict[str, Any]]) -> None:
    """MLflow has a run a trial, with every step of its series and the FID of each rung."""
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("tiny")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    trials = {row["trial_id"] for row in rows}
    assert set(runs) == {*trials, "tiny"}  # and the one that the registered version belongs to
    for trial in trials:
        measured = {row["step"]: row["fid"] for row in rows if row["trial_id"] == trial}
        histories = {
            name: {
                point.step: point.value for point in client.get_metric_history(runs[trial].info.run_id, name)
            }
            for name in ("train/loss", "train/images_per_second", "validation/fid")
        }
        assert set(histories["train/loss"]) == set(range(1, max(histories["train/loss"]) + 1))
        assert histories["validation/fid"] == pytest.approx(measured)
        assert set(measured) <= set(histories["train/images_per_second"])
        assert runs[trial].info.status == "FINISHED"
        assert float(runs[trial].data.params["train.learning_rate"]) == float(trial.removeprefix("lr-"))


def check_model_card(run: Path, base: Path) -> None:
    """The card beside the weights has a program that draws with them, and its pictures are there."""
    folder = run / "model"
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "diffusers" and "lora" in data["tags"]
    for picture in data["widget"]:
        Image.open(folder / picture["output"]["url"]).verify()
    winner = json.loads((run / "winner.json").read_text())
    assert f"{winner['test_fid']:.1f}" in card.text and winner["feature_network"] in card.text.replace(
        "\\", ""
    )
    assert str(base.parent) not in card.content
    (folder / base.name).symlink_to(base)
    draw(card.text, folder)
    (folder / base.name).unlink()


def test_the_demo_searches_learning_rates_by_sharded_lora_training() -> None:
    """At least two learning rates over an increasing ladder, by sharded LoRA training."""
    from ray_jobs.config import load_config

    config = load_config(DEMO)
    assert len(config.search.learning_rates) >= 2 and len(config.search.ladder) >= 2
    assert (config.train.method, config.train.num_workers, config.train.zero_stage) == ("lora", 2, 2)
