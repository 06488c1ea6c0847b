"""The notebooks, executed: start a run, find it again, score it, serve it, delete all of it."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import ImageChops
from ray.job_submission import JobSubmissionClient

import diffray
from cluster.local import LocalCluster
from diffray.endpoints import Endpoint
from diffray.jobs import RECORDS, Job
from diffray.runs import Run
from diffray.settings import stage_arguments
from ray_jobs.config import ConfigError, load_config
from serving.command import free_port
from tests.notebooks import kernel

ROOT = Path(__file__).parents[2]
FIELDS: dict[str, Any] = {
    "data": {"resolution": 64, "validation": 0.2, "test": 0.2},
    "train": {
        "batch_size": 4,
        "num_workers": 1,
        "lora": {"target_modules": ["to_q", "to_v"]},
    },
    "search": {"learning_rates": [1e-3], "pack": "off"},
    "evaluate": {"inference_steps": 2, "num_actors": 1},
    "publish": {"model_name": "tiny"},
    "serve": {"default_steps": 2, "port": 0},
}
OF_NOTEBOOK: dict[str, dict[str, Any]] = {
    "demo": {"train.epochs": 0.25, "search.ladder": []},
    "subject": {
        "data.num_class_images": 4,
        "train.batch_size": 2,
        "search.ladder": [2],
        "evaluate.num_samples": 4,
        "evaluate.subject_samples": 4,
        "evaluate.prompts": [],
    },
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the user, with the networks that measure FID; what was started from it is stopped."""
    (tmp_path / ".cache").symlink_to(ROOT / ".cache")
    monkeypatch.setenv("DIFFRAY_HOME", str(tmp_path))
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    yield tmp_path
    for record in (tmp_path / RECORDS).rglob("job.json"):
        Job(str(record.parent.relative_to(tmp_path / RECORDS))).stop()


@pytest.mark.ray
@pytest.mark.journeys
@pytest.mark.parametrize("notebook", ["demo", "subject"])
def test_a_notebook_starts_scores_serves_and_deletes_a_run(
    notebook: str, tiny_model: Path, picture_folder: Path, home: Path, ray_cluster: LocalCluster
) -> None:
    """By a real kernel; what this process knows of the run it finds by its name, as another notebook does."""
    photos = {"path": f"{ROOT}/examples/fluent-cat", "instance_prompt": "a nch cat", "class_prompt": "a cat"}
    data: Any = {"demo": str(picture_folder), "subject": [photos]}[notebook]
    recipe = {"demo": "demo", "subject": "dreambooth"}[notebook]
    fields = FIELDS | OF_NOTEBOOK[notebook] | {"model.base": str(tiny_model), "storage": str(home / "runs")}
    with kernel(ROOT / "examples" / "notebooks" / f"{notebook}.ipynb", home) as executed:
        for cell in ("folder", "import"):
            executed.run(cell)
        executed.run("parameters", f"data, recipe, name = {data!r}, {recipe!r}, 'tiny'\nsettings = {fields}")
        executed.run("fit")
        run = diffray.run("tiny")
        assert run.status == "running"
        again = diffray.fit(data, recipe=recipe, name="tiny", **fields)
        assert again.job.record == run.job.record  # no second one
        state, frame, _ = (each["data"]["text/html"] for each in executed.run("wait"))
        assert "tiny: finished winner:" in state.replace("</b>", "") and "data:image/png" in frame
        check_run(run, stage_arguments(data, recipe=recipe, name="tiny", fields=fields))
        executed.run("scores")
        run.promote()  # a random model may draw as badly as its base, and then stays a candidate
        [state] = [each for each in executed.run("deploy") if each["output_type"] == "display_data"]
        assert "http://127.0.0.1:" in state["data"]["text/html"]
        [drawn] = executed.run("draw")
        assert drawn["data"]["text/html"].count("data:image/png") == 4
        if notebook == "demo":
            assert run.endpoint
            check_endpoint(run.endpoint)
        executed.run("delete")
    assert run.endpoint is None
    if notebook == "subject":
        check_deployed_on_a_cluster(run, ray_cluster.address)
    run.delete()
    assert not (home / "runs" / "tiny").exists() and not (home / ".diffray" / "tiny").exists()
    assert list(diffray.versions(storage=str(home / "runs"))["tiny"].versions) == [1]


def check_run(run: Run, arguments: list[str]) -> None:
    """The run is the one that a command line with these arguments has started."""
    ran = load_config(Path(run.folder.root.path) / "config.yaml")
    asked = load_config(arguments[1], arguments[3::2])
    if asked.train.epochs:
        assert ran == asked.with_ladder(16 * ran.search.ladder[-1])  # a quarter of an epoch, by fours
    assert {row.step for row in run.scores} == set(ran.search.ladder)
    winner = run.winner
    assert winner and winner.registry_version == 1 and winner.test_fid > 0
    assert Path(run.report()).read_text().startswith("<!")
    assert "tiny: finished" in run._repr_html_()


def check_deployed_on_a_cluster(run: Run, address: str) -> None:
    """The same run, as if it had been started there."""
    record = run.job.started
    (run.job.folder / "job.json").write_text(json.dumps(asdict(record) | {"address": address, "job": "n"}))
    with pytest.raises(ConfigError, match=r"serve.host, serve.port: 127\.0\.0\.1:0 is not reached"):
        run.deploy()
    given = {"host": "0.0.0.0", "port": free_port("0.0.0.0", 0), "allow_anonymous": True}
    endpoint = run.deploy(serve=given)
    assert urlsplit(endpoint.url).port == given["port"] and endpoint.job.started.address == address
    [picture] = endpoint.draw("a red circle", seed=1)
    assert picture.size == (64, 64)
    endpoint.delete()
    assert run.endpoint is None
    (run.job.folder / "job.json").write_text(json.dumps(asdict(record)))


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
    first = job.started.job
    (job.folder / "job.json").unlink()  # as if this process had been killed before it was written
    job.start("diffray.clean", arguments, ray_cluster.address, submit=False)
    assert job.started.job == first  # no second one
    assert f"{home}: " in "".join(job.follow())
    assert job.status == "finished"
    client = JobSubmissionClient(ray_cluster.address)
    with pytest.raises(
        RuntimeError, match="already exists"
    ):  # what `start_job` relies on between two processes
        client.submit_job(entrypoint="true", submission_id=first)
    job.start("diffray.clean", arguments, ray_cluster.address, submit=False)
    assert job.started.job == first.removesuffix("1") + "2"
    job = Job("clean")
    arguments += ["--set", "train.batch_size=0"]
    job.start("diffray.clean", arguments, ray_cluster.address, submit=False)
    assert "train.batch_size: Input should be greater than 0" in "".join(job.follow())
    assert job.status == "failed"
    record = job.record
    assert record
    (job.folder / "job.json").write_text(json.dumps(asdict(record) | {"job": "raysubmit_none"}))
    assert Job("clean").status == "stopped"  # as after a new start of the cluster
