"""What a person gets wrong is refused by what a stage calls first: one line, exit code 2, nothing left."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.submit import overrides_in, parsed
from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.pipeline import check_inputs

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo.yaml"


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """Of a run that has not begun."""
    return tmp_path / "runs"


def refused(check: Callable[[Config], Any], storage: Path, *overrides: str) -> str:
    """The one line that a check answers with; what it leaves in the storage is nothing."""
    with pytest.raises(ConfigError) as caught:
        check(load_config(DEMO, [f"storage={storage}", *overrides]))
    assert "\n" not in str(caught.value)
    assert not storage.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.source=nowhere", "data.source: nowhere"),
        ("model.base=./nowhere", "model.base: ./nowhere"),
        ("evaluate.feature_network=nowhere.pt", "evaluate.feature_network: nowhere.pt"),
        ("evaluate.second_network={path: nowhere.safetensors}", "evaluate.second_network"),
        ("publish.tracking_uri=http://127.0.0.1:1", "publish.tracking_uri: http://127.0.0.1:1"),
        ("publish.tracking_uri=postgresql://127.0.0.1:1/x", "publish.tracking_uri: postgresql"),
        ("storage=ftp://somewhere", "storage: ftp://somewhere"),
        ("publish.model_name=team/style", "publish.model_name"),
        ("name=registry", "name: registry"),
        ("search.space={train.lora.rank: [8, 8.0]}", "space.train.lora.rank repeats a value"),
        ("search.space={train.lora.use_dora: [true, maybe]}", "search.space.train.lora.use_dora"),
        ("train.weight_decay=.nan", "train.weight_decay"),
    ],
)
def test_the_pipeline_refuses_before_anything_starts(storage: Path, override: str, named: str) -> None:
    assert named in refused(check_inputs, storage, override)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("serve.safety_checker=no_module:make", "serve.safety_checker: no_module:make: the module cannot"),
        ("serve.safety_checker=json:make", "serve.safety_checker: json:make: json has no function make"),
        ("serve.safety_checker=json", "serve.safety_checker: json: write it as module:function"),
        ("serve.feedback_url=postgresql+psycopg://127.0.0.1:1/x", "serve.feedback_url: postgresql"),
        ("serve.feedback_url=mysql://127.0.0.1/x", "serve.feedback_url: "),
        ("serve.feedback_url=nonsense", "serve.feedback_url: not the URL of a database"),
    ],
)
def test_the_endpoint_refuses_what_would_keep_it_from_starting(
    storage: Path, override: str, named: str
) -> None:
    from serving.app import check_parts

    assert named in refused(check_parts, storage, override)


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("how", ["file", "set"])
def test_a_submitted_job_is_refused_before_ray_starts(storage: Path, tmp_path: Path, how: str) -> None:
    wrong = {"batch_size": 0} if how == "file" else {}
    settings = {
        "name": "submitted",
        "storage": str(storage),
        "data": {"source": "pictures"},
        "model": {"base": "model"},
        "search": {"learning_rates": [1e-3], "ladder": [2]},
        "train": wrong,
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings))
    job = ["python", "-m", "ray_jobs.pipeline", "--config", str(file)]
    job += ["--set", "train.batch_size=0"] if how == "set" else []
    done = run("cluster.submit", "--", *job)
    assert done.returncode == 2 and "starting Ray" not in done.stdout
    [line] = done.stderr.strip().splitlines()
    assert line.startswith(f"error: {file}: train.batch_size: ")
    assert not storage.exists()


def test_overrides_are_those_of_our_own_commands() -> None:
    job = [
        "python",
        "-m",
        "ray_jobs.search",
        "--config",
        "x",
        "--set",
        "a.b=1",
        "--max-steps",
        "9",
        "--set=c=2",
    ]
    assert overrides_in(job) == ["a.b=1", "search.max_steps=9", "c=2"]
    assert overrides_in(["python", "other.py", "--set", "x"]) == []


def test_the_configuration_of_a_job_may_be_given_with_an_equals_sign() -> None:
    options, command = parsed(["--", "python", "-m", "ray_jobs.search", "--config=mine.yaml", "--set=a=1"])
    assert options.config == "mine.yaml"
    assert command[3:] == ["--config", "mine.yaml", "--set=a=1"]
    options, command = parsed(["--", "python", "other.py", "--config=its.own"])
    assert options.config == "configs/demo.yaml" and command[-1] == "--config=its.own"


def test_a_setting_before_the_dashes_is_not_taken_for_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(["--config", "a.yaml", "storage=here", "--", "python", "-m", "ray_jobs.search"])
    assert "storage=here: no option of this command; settings of a stage stand behind --" in (
        capsys.readouterr().err
    )
    assert parsed(["--", "sh", "-c", "exec $0", "--", "x"])[1] == ["sh", "-c", "exec $0", "--", "x"]
