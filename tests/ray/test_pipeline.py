"""The main job through the Jobs API: forty pictures in, a measured, registered model out."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from mlflow import MlflowClient
from PIL import Image, ImageChops
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_actors
from safetensors import safe_open

from cluster import submit, upload
from cluster.local import LocalCluster
from cluster.storage import slug
from ray_jobs import import_weights
from ray_jobs.compare import compare, look_up
from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.data.preparation import prepare
from ray_jobs.evaluation.pool import evaluators
from ray_jobs.registry.models import registered
from tests.cards import draw
from tests.ray.test_training import DEMO, tiny_config
from tests.record import record_fault

OVERRIDES = [
    *("search.learning_rates=[1.0e-3,1.0e-4]", "search.pack=auto"),
    *("evaluate.inference_steps=2", "evaluate.num_actors=1"),
    *("search.ladder=[]", "train.epochs=0.25"),  # of 17 to 32 rows by four: rungs 1 and 2
]


def test_the_pipeline_runs_end_to_end_through_kills_and_is_skipped_when_it_is_done(
    ray_cluster: LocalCluster,
    tiny_model: Path,
    picture_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = tiny_config(tiny_model, picture_folder, tmp_path, *OVERRIDES)
    written = tmp_path / "tiny.yaml"
    written.write_text(config.to_yaml())
    job = ["python", "-m", "ray_jobs.pipeline", "--config", str(written)]
    environment = upload.runtime_environment(submit.local_variables())
    run = tmp_path / "tiny"
    first, killed = killed_at_its_first_rung(ray_cluster, job, environment, run)
    with killing_a_trial(ray_cluster, run) as trial:
        assert submit.run_job(ray_cluster.address, job, environment) == 0
    rows = [json.loads(line) for line in (run / "search" / "results.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in first.splitlines()]
    again = [{name: row[name] for name in old} for row, old in zip(rows, before, strict=False)]
    assert before and again == before, "a rung was measured again"
    assert " failed and starts again: " in capfd.readouterr().out
    lost = "no measured rung"
    record_fault("kill -9 of the job's driver, submitted again", recovery_s=trial.began - killed, lost=lost)
    record_fault("kill -9 of a trial's driver", recovery_s=trial.went_on - trial.killed, lost=lost)

    manifest = json.loads((run / "dataset" / "manifest.json").read_text())
    assert sum(manifest[split] for split in ("train", "validation", "test")) == 40
    assert sum(manifest["rejected"].values()) == 1
    rejected = json.loads((run / "dataset" / "rejected.jsonl").read_text())
    assert rejected["file_name"].endswith("broken.png")

    fields = {"format", "trial_id", "learning_rate", "settings", "training", "step", "checkpoint"}
    fields |= {"train_loss", "images_per_second", "seconds"}
    scores = {"fid", "fid_error", "kid", "kid_error", "fid_2", "fid_2_error", "feature_network_2"}
    scores |= {"mind", "mind_error"}
    scores |= {"validation_loss", "validation_losses", "feature_network", "num_samples"}
    scores |= {"ranked_by", "corrected_fid", "corrected_fid_error", "fid_means", "spread"}
    compared = {"behind", "behind_error", "variance_ratio"}
    assert all(set(row) - compared == fields | scores for row in rows)
    winner = json.loads((run / "winner.json").read_text())
    [best] = [row for row in rows if all(row[key] == winner[key] for key in ("trial_id", "step"))]
    assert winner["validation_fid"] == best["fid"]
    ranked = "corrected_fid"
    assert winner["ranked_by"] == ranked and winner[f"validation_{ranked}"] == best[ranked]
    # One of a lower score took more steps, and on the same noise cannot be told from it.
    assert all(row[ranked] >= best[ranked] or row["step"] > best["step"] for row in rows)
    assert best.get("behind", 0) <= best.get("behind_error", 0)
    assert winner["test_fid_error"] > 0 and winner["test_fid_2"] > 0 and "test_kid" in winner
    reads = [json.loads(line)["event"] for line in (run / "test_reads.jsonl").read_text().splitlines()]
    assert reads == ["read", "published"]
    assert winner["feature_network"].startswith("inception-2015-12-05@sha256:")
    assert winner["num_samples"] == 2 * manifest["test"]  # each caption twice
    resolved = load_config(run / "config.yaml")
    assert resolved.search.ladder == [1, 2] == sorted({row["step"] for row in rows})
    assert resolved == config.with_ladder(manifest["rows_an_epoch"])
    assert (run / "report.html").read_text().startswith("<!")
    assert (run / "model" / "pytorch_lora_weights.safetensors").exists()
    with safe_open(run / "comfyui" / f"{run.name}.safetensors", "pt") as kohya:
        names = set(kohya.keys())
    assert names and all(name.startswith("lora_unet_") for name in names)
    with safe_open(run / "model" / "reference.features", "numpy") as reference:
        kinds = {"validation", "restored", "near_copy", "published"}
        assert {f"{winner['feature_network']}/{kind}" for kind in kinds} <= set(reference.keys())
    for path in (run / "samples").glob("*.png"):
        Image.open(path).verify()
    check_samples_of_rungs(run, rows)
    check_measures(run, winner, manifest)
    check_series(str(tmp_path), rows)
    check_model_card(run, tiny_model)

    check_comparison(config, winner)
    check_measured_import(config, winner, written)

    changed = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert submit.run_job(ray_cluster.address, job, environment) == 0
    for path in (run / "winner.json", run / "search" / "results.jsonl", run / "dataset" / "manifest.json"):
        assert path.stat().st_mtime_ns == changed[path]


def killed_at_its_first_rung(
    cluster: LocalCluster, job: list[str], environment: dict[str, Any], run: Path
) -> tuple[str, float]:
    """Submit the job and kill its driver once a rung is measured; returns what results.jsonl then holds, and
    when that was."""
    client, results = JobSubmissionClient(cluster.address), run / "search" / "results.jsonl"
    before = {details.submission_id for details in client.list_jobs()}
    with ThreadPoolExecutor(1) as beside:
        code = beside.submit(submit.run_job, cluster.address, job, environment)
        while not (results.exists() and results.read_text().endswith("\n")):
            assert not code.done(), "the job ended before its first rung"
            time.sleep(0.2)
        [mine] = [details for details in client.list_jobs() if details.submission_id not in before]
        assert mine.driver_info
        os.kill(int(mine.driver_info.pid), signal.SIGKILL)
        killed = time.monotonic()
        assert code.result() != 0
    return results.read_text(), killed


@dataclass
class KilledTrial:
    """Moments of one clock.

    Attributes:
        began: the trial was at work.
        went_on: after it was killed, the next checkpoint was whole, or the next rung measured.
    """

    began: float = 0.0
    killed: float = 0.0
    went_on: float = 0.0


@contextmanager
def killing_a_trial(cluster: LocalCluster, run: Path) -> Iterator[KilledTrial]:
    """Kill the process of the first of Tune's trials that begins in the block, which has to go on with it."""
    done, trial = threading.Event(), KilledTrial()

    def written() -> tuple[int, int]:
        results = run / "search" / "results.jsonl"
        rungs = len(results.read_text().splitlines()) if results.exists() else 0
        return rungs, len(list((run / "train").glob("*/step-*/complete-0000-*")))

    def kill() -> None:
        alive = [("class_name", "=", "ImplicitFunc"), ("state", "=", "ALIVE")]
        while not trial.killed and not done.wait(1):
            for actor in list_actors(address=cluster.address, filters=alive)[:1]:
                trial.began = time.monotonic()
                os.kill(actor.pid, signal.SIGKILL)
                trial.killed = time.monotonic()
        before = written()
        while written() == before and not done.wait(0.1):
            pass
        trial.went_on = time.monotonic()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield trial
    finally:
        done.set()
        killer.join()
    assert trial.killed


def check_measures(run: Path, winner: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Of base and winner on the test split, from the pictures of the scores; near copies are shown."""
    names = {
        whose: [record["metric"] for record in winner["measures"][whose]] for whose in ("base", "winner")
    }
    assert names["base"] == names["winner"] and {"precision", "recall", "near copies"} <= set(names["winner"])
    of_training = ("near copies, training captions", "own picture nearest")
    assert set(of_training) <= set(names["winner"])
    for record in winner["measures"]["winner"]:
        drawn = min(32, manifest["train"]) if record["metric"] in of_training else winner["num_samples"]
        assert record["num_samples"] == drawn and "@sha256:" in record["feature_network"]
    [copies] = [each for each in winner["measures"]["winner"] if each["metric"] == "near copies"]
    assert 0 < copies["num_training"] <= manifest["train"]
    assert copies["num_held_out"] == manifest["validation"]
    page = (run / "report.html").read_text()
    assert "Memorisation" in page and "Precision" in page and "Near copies and variety" in page
    assert page.count('alt="nearest training picture') == min(12, winner["num_samples"])


def check_comparison(config: Config, winner: dict[str, Any]) -> None:
    """The version beside its base: scores as in the search, and the error of their difference."""
    with pytest.raises(ConfigError, match="7: no version or alias of"):
        look_up(config, "7")
    dataset = prepare(config)
    with evaluators(config, dataset) as pool:
        found = compare(config, dataset, pool, look_up(config, "1"), look_up(config, "base"))
    scores = [winner[f"{whose}validation_{winner['ranked_by']}"] for whose in ("", "base_")]
    assert found.value == pytest.approx(scores[0] - scores[1], abs=1e-3)
    assert found.standard_error > 0 and found.variance_ratio > 1
    folder = Path(config.storage) / config.name / "comparisons" / "1-base"
    assert set(json.loads((folder / "comparison.json").read_text())) == {"version 1", "base", "difference"}
    Image.open(folder / "grid.png").verify()


def check_measured_import(config: Config, winner: dict[str, Any], written: Path) -> None:
    """The adapter, as a file from elsewhere, has the scores of the version that was trained."""
    file = written.with_name("elsewhere.safetensors")
    shutil.copyfile(Path(config.storage) / config.name / "model" / "pytorch_lora_weights.safetensors", file)
    reads = (Path(config.storage) / config.name / "test_reads.jsonl").read_text()
    name = ["--set", "publish.model_name=elsewhere"]
    assert import_weights.main(["--config", str(written), *name, "--adapter", str(file), "--measure"]) == 0
    found, trained = (
        registered(each, "1") for each in (load_config(written, name[1:]), load_config(written))
    )
    assert found.test_digest == trained.test_digest == winner["test_digest"]
    for score in ("test_fid", "base_test_fid"):
        assert found.metrics[score] == pytest.approx(winner[score], rel=1e-4)
    assert found.guidance_scale == config.evaluate.guidance_scale
    assert reads == (Path(config.storage) / config.name / "test_reads.jsonl").read_text()
    assert not (Path(config.storage) / config.name / "imported").exists()


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
    shown = {(path.parts[-4], path.stem) for path in Path(storage, "mlartifacts", "tiny").rglob("*.png")}
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
        steps = {name for run, name in shown if run == runs[trial].info.run_id}
        assert steps == {f"step-{step:08d}" for step in measured}
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
    assert config.search.grid_size >= 2 and len(config.search.ladder) >= 2
    assert (config.train.method, config.train.num_workers, config.train.zero_stage) == ("lora", 2, 2)
