"""The demo's notebook, cell by cell: start a run, find it again, score it, serve it, delete all of it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import ImageChops

import diffray
from cluster.local import LocalCluster
from diffray.api import Run
from diffray.endpoints import Endpoint
from diffray.jobs import RECORDS, Job
from diffray.settings import stage_arguments
from ray_jobs.config import load_config

ROOT = Path(__file__).parents[2]
FIELDS: dict[str, Any] = {
    "data": {"resolution": 64, "validation": 0.2, "test": 0.2},
    "train": {
        "batch_size": 4,
        "num_workers": 1,
        "lora": {"target_modules": ["to_q", "to_v"]},
        "epochs": 0.25,
    },
    "search": {"learning_rates": [1e-3], "ladder": [], "pack": "off"},
    "evaluate": {"inference_steps": 2, "num_actors": 1},
    "publish": {"model_name": "tiny"},
    "serve": {"default_steps": 2, "port": 0},
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the user, with the networks that measure FID; what was started from it is stopped."""
    (tmp_path / ".cache").symlink_to(ROOT / ".cache")
    monkeypatch.setenv("DIFFRAY_HOME", str(tmp_path))
    yield tmp_path
    for record in (tmp_path / RECORDS).rglob("job.json"):
        Job(str(record.parent.relative_to(tmp_path / RECORDS))).stop()


def cells(notebook: str) -> Iterator[tuple[str, str]]:
    """Name and source of each cell of code."""
    text = (ROOT / "examples" / "notebooks" / notebook).read_text(encoding="utf-8")
    for cell in json.loads(text)["cells"]:
        if cell["cell_type"] == "code":
            yield cell["id"], "".join(cell["source"])


def in_another_notebook(expression: str) -> str:
    command = [sys.executable, "-c", f"import diffray\nprint({expression})"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.ray
@pytest.mark.journeys
def test_the_demos_notebook_starts_scores_serves_and_deletes_a_run(
    tiny_model: Path, picture_folder: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = FIELDS | {"model.base": str(tiny_model)}
    here: dict[str, Any] = {}
    for name, source in cells("demo.ipynb"):
        exec(source, here)
        if name == "parameters":
            here |= {"data": str(picture_folder), "name": "tiny", "settings": fields}
        if name == "fit":
            assert in_another_notebook("diffray.run('tiny').status") == "running"
            once_more = diffray.fit(here["data"], recipe="demo", name="tiny", **fields)
            assert once_more.job.record == here["run"].job.record  # no second one
        if name == "wait":
            assert "pipeline run tiny; results in" in capsys.readouterr().out
            check_run(here["run"], stage_arguments(here["data"], recipe="demo", name="tiny", fields=fields))
        if name == "scores":
            here["run"].promote()  # a random model may draw as badly as its base, and then stays a candidate
        if name == "draw":
            assert in_another_notebook("diffray.run('tiny').endpoint.url") == here["endpoint"].url
            check_endpoint(here["endpoint"])
    run: Run = here["run"]
    assert run.endpoint is None
    run.delete()
    assert not (home / "runs" / "tiny").exists() and not (home / ".diffray" / "tiny").exists()
    assert list(diffray.versions(storage=str(home / "runs"))["tiny"].versions) == [1]


def check_run(run: Run, arguments: list[str]) -> None:
    """The run is the one that a command line with these arguments has started."""
    ran = load_config(Path(run.folder.root.path) / "config.yaml")
    asked = load_config(arguments[1], arguments[3::2])
    assert ran == asked.with_ladder(16 * ran.search.ladder[-1])  # a quarter of an epoch, by fours
    assert [row.step for row in run.scores] == ran.search.ladder
    winner = run.winner
    assert winner and winner.registry_version == 1 and winner.test_fid > 0
    assert Path(run.report()).read_text().startswith("<!")
    assert "tiny: finished" in run._repr_html_()


def check_endpoint(endpoint: Endpoint) -> None:
    pictures = endpoint.draw("a red circle", n=2, seed=1)
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    [again] = endpoint.draw("a red circle", seed=1)
    differences = ImageChops.difference(again, pictures[0]).tobytes()
    assert max(differences) <= 2  # rounding, in a batch of another size
    with pytest.raises(diffray.EndpointError, match="400: .*steps"):
        endpoint.draw("a red circle", steps=-1)


def test_a_job_runs_on_a_cluster_by_its_address(ray_cluster: LocalCluster, home: Path) -> None:
    """A module that needs neither PyTorch nor a model: it is about jobs."""
    arguments = ["--config", "demo", "--set", f"storage={home}"]
    job = Job("clean")
    job.start("diffray.clean", arguments, ray_cluster.address, submit=False)
    assert f"{home}: " in "".join(job.follow())
    assert job.status == "finished"
    job = Job("clean")
    arguments += ["--set", "train.batch_size=0"]
    job.start("diffray.clean", arguments, ray_cluster.address, submit=False)
    assert "train.batch_size: Input should be greater than 0" in "".join(job.follow())
    assert job.status == "failed"
    record = job.record
    assert record
    (job.folder / "job.json").write_text(json.dumps(asdict(record) | {"job": "raysubmit_none"}))
    assert Job("clean").status == "stopped"  # as after a new start of the cluster
