"""A notebook's way: start a run, close the notebook, find the run again, serve what it made, delete both."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import ImageChops

import diffray
from cluster.local import LocalCluster
from diffray.api import stage_arguments
from diffray.jobs import Job
from ray_jobs.config import load_config

ROOT = Path(__file__).parents[2]
FIELDS: dict[str, Any] = {
    "data": {"resolution": 64, "validation": 0.2, "test": 0.2},
    "train": {"batch_size": 4, "num_workers": 1, "lora": {"target_modules": ["to_q", "to_v"]}},
    "search": {"learning_rates": [1e-3], "pack": "off"},
    "evaluate": {"inference_steps": 2, "num_actors": 1},
    "publish": {"model_name": "tiny"},
    "serve": {"default_steps": 2},
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the user, with the networks that measure FID."""
    (tmp_path / ".cache").symlink_to(ROOT / ".cache")
    monkeypatch.setenv("DIFFRAY_HOME", str(tmp_path))
    return tmp_path


def in_another_notebook(program: str) -> str:
    command = [sys.executable, "-c", f"import diffray\n{program}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


@pytest.mark.ray
def test_a_run_is_started_found_again_scored_served_and_deleted(
    tiny_model: Path, picture_folder: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {"recipe": "demo", "base": str(tiny_model), "epochs": 0.25, "name": "tiny"}
    print(in_another_notebook(f"diffray.fit({str(picture_folder)!r}, **{given!r}, **{FIELDS!r})"))
    run = diffray.run("tiny")
    assert run.status == "running"
    assert diffray.fit(picture_folder, **given, **FIELDS).job.record == run.job.record  # no second one
    run.wait()
    assert "pipeline run tiny; results in" in capsys.readouterr().out

    arguments = stage_arguments(picture_folder, **given, fields=FIELDS)
    asked = load_config(arguments[1], arguments[3::2])
    ran = load_config(home / "runs" / "tiny" / "config.yaml")
    assert ran == asked.with_ladder(ran.search.ladder[-1] * 16)  # a quarter of an epoch, by fours
    assert [row.step for row in run.scores] == ran.search.ladder
    winner = run.winner
    assert winner and winner.registry_version == 1 and winner.test_fid > 0
    assert Path(run.report()).read_text().startswith("<!")
    assert "tiny: finished" in run._repr_html_()

    endpoint = run.deploy(serve={"port": 0})
    pictures = endpoint.draw("a red circle", n=2, seed=1)
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    [again] = endpoint.draw("a red circle", seed=1)
    assert not ImageChops.difference(again, pictures[0]).getbbox()
    assert in_another_notebook('print(diffray.run("tiny").endpoint.url)') == endpoint.url
    with pytest.raises(diffray.EndpointError, match="400: .*steps"):
        endpoint.draw("a red circle", steps=-1)
    endpoint.delete()
    assert run.endpoint is None

    run.delete()
    assert not (home / "runs" / "tiny").exists() and not (home / ".diffray" / "tiny").exists()
    assert list(diffray.versions(storage=str(home / "runs"))["tiny"].versions) == [1]


def test_a_job_runs_on_a_cluster_by_its_address(ray_cluster: LocalCluster, home: Path) -> None:
    job = Job("checks")
    overrides = ["--set", f"model.base={ROOT / 'models' / 'emoji-base'}", "--set", "train.batch_size=0"]
    job.start("ray_jobs.checks", ["--config", "demo", *overrides[:2]], ray_cluster.address, submit=False)
    "".join(job.follow())
    assert job.status == "finished"
    job.start("ray_jobs.checks", ["--config", "demo", *overrides], ray_cluster.address, submit=False)
    assert "train.batch_size: Input should be greater than 0" in "".join(job.follow())
    assert job.status == "failed"
