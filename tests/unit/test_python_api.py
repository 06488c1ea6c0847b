"""The Python API: the same configuration as a file and a command, and jobs that outlive their notebook."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

import diffray
from diffray.endpoints import Endpoint, Pictures
from diffray.jobs import Job, Record
from diffray.settings import PIPELINES, overrides, stage_arguments
from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.config.files import recipes
from ray_jobs.diffusion.families import FAMILIES
from ray_jobs.run.records import RungRow, Winner, write_rows
from tests.notebooks import kernel

ROOT = Path(__file__).parents[2]
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the user, who starts runs there."""
    monkeypatch.setenv("DIFFRAY_HOME", str(tmp_path))
    return tmp_path


def config_of(*data: Any, fields: dict[str, Any] | None = None, **given: Any) -> Config:
    arguments = stage_arguments(*data, **given, fields=fields or {})
    assert arguments[0] == "--config" and set(arguments[2::2]) == {"--set"}
    return load_config(arguments[1], arguments[3::2])


def test_api_file_and_command_give_the_same_configuration(home: Path) -> None:
    own = config_of(
        "photos",
        base=SDXL,
        method="lora",
        epochs=10,
        name="mine",
        fields={"train": {"lora": {"rank": 8}}, "search.learning_rates": [1e-5, 3e-5]},
    )
    (home / "mine.yaml").write_text(
        "extends: sdxl-lora\nname: mine\ndata: {source: photos}\ntrain: {epochs: 10, lora: {rank: 8}}\n"
        "search: {learning_rates: [1.0e-5, 3.0e-5], ladder: []}\n"
    )
    assert own == load_config("mine.yaml")
    command = [sys.executable, "-m", "diffray", "config", "show"]
    command += stage_arguments("photos", recipe="sdxl-lora", epochs=10, name="mine", fields={})
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (
        shown
        == load_config("mine.yaml", ["train.lora.rank=16", "search.learning_rates=[1e-4, 3e-5]"]).to_yaml()
    )


def test_several_sources_take_the_place_of_a_recipes_own() -> None:
    photos = {"path": "photos", "instance_prompt": "a photo of sks dog", "class_prompt": "a photo of a dog"}
    assert config_of([photos], recipe="sdxl-dreambooth") == load_config("sdxl-dreambooth")
    both = config_of([photos, {"path": Path("more")}], recipe="sd15-lora")
    assert [each.path for each in both.data.sources] == ["photos", "more"] and both.data.source is None


def test_settings_are_flattened_through_sections_only() -> None:
    fields = {
        "train": {"lora": {"rank": 8}, "betas": (0.9, 0.99)},
        "search": {"space": {"train.lora.rank": [4, 8]}, "learning_rates": {"low": 1e-5, "high": 1e-3}},
        "data.source": Path("pictures/é"),
        "train.epochs": None,
    }
    assert overrides(fields) == [
        "train.lora.rank=8",
        "train.betas=[0.9, 0.99]",
        'search.space={"train.lora.rank": [4, 8]}',
        'search.learning_rates={"low": 1e-05, "high": 0.001}',
        'data.source="pictures/é"',
        "train.epochs=null",
    ]


def test_a_recipe_is_found_by_its_base_or_asked_for() -> None:
    assert diffray.defaults("sdxl-lora").model.base == SDXL
    assert diffray.defaults("sdxl-lora", train={"batch_size": 4}).train.batch_size == 4
    assert config_of("photos", base="black-forest-labs/FLUX.1-dev").evaluate.guidance_scale == 3.5
    with pytest.raises(ConfigError, match=r"^recipe: give a base, or name the recipe: controlnet, demo, "):
        diffray.fit("photos")


def test_a_base_without_a_recipe_gets_that_of_its_family_or_a_line_with_the_nearest(home: Path) -> None:
    bases = {"own-xl": "StableDiffusionXLPipeline", "qwen": "QwenImagePipeline", "new": "NewPipeline"}
    for name, pipeline in bases.items():
        (home / name).mkdir()
        (home / name / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    config = config_of("photos", base="own-xl")
    assert (config.publish.model_name, config.data.resolution, config.model.base) == (
        "sdxl-lora",
        1024,
        "own-xl",
    )
    assert config_of("photos", base="models/emoji-base") == config_of("photos", recipe="demo")
    for base, method, said in (
        (
            "own-xl",
            "full",
            "(StableDiffusionXLPipeline); name the one to start from, as recipe='sdxl-lora', ",
        ),
        ("qwen", "lora", "(QwenImagePipeline); name the one to start from, as recipe='flux-lora', of"),
        ("qwen", "full", "(QwenImagePipeline); name the one to start from, as recipe='sd3-full', of"),
        ("new", "lora", "(model.base: NewPipeline is not supported, only "),
        (str(home), "lora", "not a model in diffusers' format: it has no model_index.json"),
        (f"file://{home}/new", "lora", "file://"),
    ):
        with pytest.raises(ConfigError) as raised:
            diffray.fit("photos", base=base, method=method)
        told = str(raised.value)
        assert told.startswith(f"recipe: none is made for base={base!r} with method={method!r} (")
        assert said in told and "\n" not in told
    assert not (home / ".diffray").exists()


def test_every_recipe_of_a_method_is_known_by_the_family_of_its_base() -> None:
    methods = [each for each in recipes() if each.endswith(("-lora", "-full"))]
    assert sorted(PIPELINES) == methods
    assert all(pipeline in FAMILIES for pipeline in PIPELINES.values())
    assert all(each.endswith(load_config(each).train.method) for each in methods)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"train": {"lora": {"rnak": 8}}}, "sdxl-lora: train.lora.rnak: unknown key; did you mean rank?"),
        (
            {"train.learning_rat": 1},
            "sdxl-lora: train.learning_rat: unknown key; did you mean learn",
        ),
        ({"trian": {"epochs": 1}}, "sdxl-lora: trian: unknown key; did you mean train?"),
        ({"data": {"resolutio": 64}}, "sdxl-lora: data.resolutio: unknown key; did you mean resolution?"),
        ({"train": {"batch_size": 0}}, "sdxl-lora: train.batch_size: Input should be greater than 0"),
    ],
)
def test_wrong_names_raise_the_line_of_the_command_line(
    fields: dict[str, Any], said: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        diffray.fit("photos", recipe="sdxl-lora", **fields)
    assert str(raised.value).startswith(said)
    from diffray.command import main

    sets = [word for override in overrides(fields) for word in ("--set", override)]
    assert main(["config", "check", "--config", "sdxl-lora", *sets]) == 2
    assert capsys.readouterr().out == f"error: {raised.value}\n"
    assert list(home.iterdir()) == []  # nothing was started


def test_a_cluster_that_is_not_reached_is_told_and_leaves_no_run(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--address http://127\.0\.0\.1:9: "):
        diffray.fit("photos", recipe="sdxl-lora", name="mine", address="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="mine: no run of this name was started here; there are none"):
        diffray.run("mine")


def waited(job: Job, *, seconds: float = 60) -> str:
    deadline = time.monotonic() + seconds
    while job.status == "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return job.status


def test_a_job_outlives_the_process_that_started_it(home: Path) -> None:
    program = """
from diffray.jobs import Job, Record
Job("mine").start("timeit", ["-n1", "-r1", "import time; time.sleep(3); print('drawn')"], None, submit=False)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)
    assert diffray.run("mine").status == "running"
    job = diffray.run("mine").job
    assert "drawn" in "".join(job.follow()) and job.status == "finished"
    assert "1 loop" in job.last_line()
    job.forget()
    assert not job.folder.exists()


def test_a_job_runs_once_though_the_process_that_started_it_was_killed_before_its_record(home: Path) -> None:
    program = """
import os
from diffray.jobs import Job
Job._write = lambda *_: os._exit(9)
Job("mine").start("timeit", ["-n1", "-r1", "open('ran', 'a').write('once ')"], None, submit=False)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 9
    job = Job("mine")
    assert job.record is None
    job.start("timeit", ["-n1", "-r1", "open('ran', 'a').write('once ')"], None, submit=False)
    assert waited(job) == "finished"
    assert (home / "ran").read_text() == "once "


def test_a_job_that_fails_is_told_with_its_last_line(home: Path) -> None:
    run = diffray.Run("mine")
    run.job.start("json.tool", ["nowhere.json"], None, submit=False)
    with pytest.raises(diffray.JobFailed, match=r"^mine: failed: .*nowhere\.json"):
        run.wait()
    with pytest.raises(ConfigError, match=r"mine2: no run of this name .*; did you mean mine\?"):
        diffray.run("mine2")


def test_a_job_is_stopped_and_never_forgotten_while_it_runs() -> None:
    job = Job("mine")
    job.start("timeit", ["-n1", "-r1", "import time; time.sleep(600)"], None, submit=False)
    with pytest.raises(ConfigError, match="mine: it is running; stop it first"):
        job.forget()
    job.stop()
    assert job.status == "stopped"
    job.stop()
    job.start("timeit", ["-n1", "-r1"], None, submit=False)
    assert waited(job) == "finished"


def test_a_job_whose_machine_ended_it_is_stopped() -> None:
    job = Job("mine")
    job.start("timeit", ["-n1", "-r1", "import time; time.sleep(600)"], None, submit=False)
    record = job.record
    assert record
    shell = psutil.Process(record.process)
    for process in (shell, *shell.children()):  # the shell first, which would write an exit code
        process.kill()
    assert waited(job) == "stopped"


def recorded(name: str, arguments: list[str], address: str | None = None) -> Job:
    """A job that ended well, as its record says."""
    job = Job(name)
    job.folder.mkdir(parents=True)
    (job.folder / "job.json").write_text(json.dumps(asdict(Record(arguments, address))))
    (job.folder / "exit").write_text("0\n")
    (job.folder / "log").write_text("[ 1:15] publish  done\n")
    return job


@pytest.fixture
def ended(home: Path) -> diffray.Run:
    """A run that has measured three rungs."""
    fields = {"storage": str(home / "runs")}
    recorded("mine", stage_arguments("photos", recipe="sdxl-lora", name="mine", fields=fields))
    run = diffray.run("mine")
    rows = [
        RungRow(trial_id=trial, learning_rate=rate, step=step, fid=fid, train_loss=0.1, fid_error=1.0)
        for trial, rate, step, fid in (("a", 1e-4, 10, 90.0), ("a", 1e-4, 20, 80.0), ("b", 1e-5, 10, 95.0))
    ]
    write_rows(run.folder.search, rows)
    return run


def test_scores_and_pages_of_a_run_come_from_its_records(ended: diffray.Run) -> None:
    assert [row.fid for row in ended.scores] == [90.0, 80.0, 95.0]
    assert ended.config.data.source == "photos" and ended.status == "finished"
    assert ended.winner is None and ended.endpoint is None
    with pytest.raises(ConfigError, match="mine: no report yet; the run is finished"):
        ended.report()
    with pytest.raises(ConfigError, match="mine: nothing published yet; the run is finished"):
        ended.promote()
    ended.folder.root.write_text("report.html", "<!doctype html>")
    assert Path(ended.report()).read_text() == "<!doctype html>"
    assert repr(ended) == "<Run mine: finished>"


def test_a_notebook_shows_curves_and_rungs_in_a_frame_of_their_own(ended: diffray.Run) -> None:
    state, frame = ended.shown()
    assert ended._repr_html_() == state + frame
    assert frame.startswith("<iframe ") and frame.endswith("</iframe>") and frame.count("<") == 2
    for text in ("mine: finished", "best FID 80.0 at 20 steps", "0.00 worker hours", "publish  done"):
        assert text in state
    for text in ("Validation FID", "Training loss", "80.0"):
        assert text in frame
    assert "data:image" not in frame
    pictures = Pictures([Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4))])
    assert pictures._repr_html_().count('src="data:image/png;base64,') == 2


def test_a_notebook_shows_a_run_while_it_waits(
    ended: diffray.Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a real kernel, and a real job: it prints what takes space."""
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(home / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    for step in (10, 20):
        checkpoint = ended.folder.training("a").child(f"step-{step}")
        losses = [{"step": number, "loss": 1 / number} for number in range(step - 9, step + 1)]
        checkpoint.write_text("series.json", json.dumps(losses))
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "PNG")
        checkpoint.child("samples").write_bytes("0-a-cat.png", buffer.getvalue())
    ended.folder.training("a").child("step-30").write_text("series.json", '[{"step": 21')  # being written
    places = [ended.folder.training("a").child(f"step-{row.step}").uri for row in ended.scores]
    rows = [row | {"checkpoint": place} for row, place in zip(ended.scores, places, strict=True)]
    write_rows(ended.folder.search, rows)
    cell = """
import diffray
run = diffray.run("mine")
run.job.start("diffray.clean", run.job.started.arguments, None, submit=False)
before = run.status
run.wait()
before
"""
    with kernel(cell, home) as notebook:
        state, frame, before = notebook.run("cell")
    assert (state["output_type"], frame["output_type"]) == ("display_data", "display_data")
    assert before["data"]["text/plain"] == "'running'" and "mine: finished" in state["data"]["text/html"]
    assert "of encoded: 0.0 MiB" in state["data"]["text/html"]
    shown = frame["data"]["text/html"]
    assert "One line per training" in shown and "Validation FID" in shown and "data:image/png" in shown
    assert [picture.size for picture in ended.pictures()] == [(8, 8)]


def test_a_model_is_deployed_once_it_is_published(ended: diffray.Run) -> None:
    with pytest.raises(ConfigError, match="publish.model_name: .* holds no champion of 'sdxl-lora'"):
        ended.deploy()
    winner = dict.fromkeys(("validation_fid", "test_fid", "base_test_fid", "base_validation_fid"), 1.0)
    winner |= {"test_floor_fid": 1.0, "learning_rate": 1e-4, "registry_version": 1}
    told = {"trial_id": "a", "step": 10, "feature_network": "n", "num_samples": 4}
    Winner.model_validate(winner | told).write(ended.folder.root)
    with pytest.raises(ConfigError, match=r"mine: its version 1 stayed a candidate, .* run\.promote\(\)"):
        ended.deploy()
    with pytest.raises(ConfigError, match=r"serve.prot: unknown key; did you mean port\?"):
        ended.deploy(serve={"prot": 1})
    with pytest.raises(ConfigError, match="holds no champion"):
        diffray.versions(storage=str(ended.folder.root.path))


def test_deleting_takes_folder_and_record_unless_another_run_needs_them(
    ended: diffray.Run, home: Path
) -> None:
    assert (home / "runs" / "mine" / "search").exists()
    adapter = {"model.adapter": "runs/mine/train/a/step-20/weights"}
    recorded("next", stage_arguments("photos", recipe="sdxl-lora", name="next", fields=adapter))
    recorded("lost", ["--config", "nowhere.yaml"])
    with pytest.raises(
        ConfigError, match=r"^mine: run next needs a file in .*/runs/mine; delete that first$"
    ):
        ended.delete()
    diffray.run("next").delete()
    (home / "runs" / "elsewhere").mkdir()
    config = diffray.defaults("sdxl-lora", name="elsewhere", **{"model.base": "runs/mine/model"})
    (home / "runs" / "elsewhere" / "config.yaml").write_text(
        config.to_yaml()
    )  # by a command, without a record
    with pytest.raises(ConfigError, match="mine: run elsewhere needs a file in"):
        ended.delete()
    assert (home / "runs" / "mine" / "search").exists()
    shutil.rmtree(home / "runs" / "elsewhere")
    ended.delete()
    assert not (home / "runs" / "mine").exists()
    with pytest.raises(ConfigError, match="mine: no run of this name"):
        diffray.run("mine")


def test_an_endpoint_is_called_where_its_settings_say() -> None:
    arguments = stage_arguments("photos", recipe="sdxl-lora", fields={"serve": {"port": 8123}})
    endpoint = Endpoint(recorded("mine/endpoint", arguments))
    assert endpoint.url == "http://127.0.0.1:8123"
    with pytest.raises(diffray.EndpointError, match=r"http://127\.0\.0\.1:8123/v1/images/generations: "):
        endpoint.draw("a cat")
    endpoint.delete()
    assert Endpoint(recorded("mine/endpoint", arguments, "http://head:8265")).url == "http://head:8123"


def test_an_endpoint_of_a_cluster_must_be_reached_from_outside(home: Path) -> None:
    fields = {"storage": str(home / "runs")}
    arguments = stage_arguments("photos", recipe="sdxl-lora", name="mine", fields=fields)
    recorded("mine", arguments, "http://head:8265")
    with pytest.raises(ConfigError, match=r"serve.host, serve.port: 127\.0\.0\.1:8000 is not reached"):
        diffray.run("mine").deploy()


def test_a_second_run_of_a_name_with_other_settings_is_refused(ended: diffray.Run) -> None:
    with pytest.raises(ConfigError, match="name: mine: a run of this name .*; give another name, or delete"):
        diffray.fit("others", recipe="sdxl-lora", name="mine")
    assert ended.status == "finished"
