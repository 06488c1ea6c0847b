"""Submitting a job: its lines, its exit code, and what is refused before Ray starts."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from cluster.connect import LocalCluster, check_resources
from cluster.submit import run_job, runtime_environment
from ray_jobs.config import Config, ConfigError

ROOT = Path(__file__).resolve().parents[2]


def a_config(**sections: object) -> dict[str, object]:
    return {
        "name": "submitted",
        "data": {"source": "pictures"},
        "model": {"base": "model"},
        "search": {"learning_rates": [1e-3, 1e-4], "ladder": [2]},
    } | sections


def submit(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "cluster.submit", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_workers_ask_their_own_ray_and_not_the_one_that_was_started_last(ray_cluster: LocalCluster) -> None:
    import ray
    from ray._private.services import canonicalize_bootstrap_address
    from ray._private.utils import write_ray_address

    write_ray_address("127.0.0.1:1")  # as another Ray on this machine does
    try:
        asked = ray.get(ray.remote(canonicalize_bootstrap_address).remote(None))
    finally:
        write_ray_address(ray_cluster.gcs_address)
    assert asked == ray_cluster.gcs_address


def test_a_job_gives_its_lines_and_its_own_exit_code(
    ray_cluster: LocalCluster, capfd: pytest.CaptureFixture[str]
) -> None:
    program = "import sys, time; print('first', flush=True); time.sleep(1); print('last'); sys.exit(3)"
    command = [sys.executable, "-c", program]
    assert run_job(ray_cluster.address, command, runtime_environment()) == 3
    assert capfd.readouterr().out.splitlines() == ["first", "last"]


def test_a_job_runs_in_a_copy_of_the_code_and_knows_the_users_folder(
    ray_cluster: LocalCluster, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    program = "import os, ray_jobs.config as c; print(os.getcwd()); print(c.home())"
    environment = runtime_environment({"DIFFRAY_HOME": str(tmp_path)})
    assert run_job(ray_cluster.address, [sys.executable, "-c", program], environment) == 0
    copy, home = capfd.readouterr().out.splitlines()
    assert copy != str(ROOT) and home == str(tmp_path)


def test_an_interrupt_stops_the_job(ray_cluster: LocalCluster, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    program = (
        "import pathlib, sys, time; path = pathlib.Path(sys.argv[1]); print('running', flush=True)\n"
        "while True: path.touch(); time.sleep(0.2)"
    )
    command = [sys.executable, "-m", "cluster.submit", "--config", str(tmp_path / "run.yaml")]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(a_config()))
    address = ["--address", ray_cluster.address, "--", sys.executable, "-c", program, str(alive)]
    process = subprocess.Popen([*command, *address], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    assert process.stdout is not None
    while "running" not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=60) == 130
    watchdog.cancel()
    alive.unlink(missing_ok=True)
    threading.Event().wait(1)
    assert not alive.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"traning": {}}, "traning"),
        ({"search": {"learning_rates": [0], "ladder": [2]}}, "search.learning_rates.0"),
        ({"search": {"learning_rates": [1e-3], "ladder": [4, 2]}}, "ladder must increase"),
        ({"train": {"num_workers": 64, "batch_size": 64}}, "train.num_workers"),
    ],
)
def test_a_bad_configuration_exits_2_with_one_line(
    tmp_path: Path, change: dict[str, object], named: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(a_config(**change)))
    result = submit("--", "python", "-m", "ray_jobs.pipeline", "--config", str(path))
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert named in line


def test_a_missing_configuration_exits_2_with_one_line() -> None:
    result = submit("--config", "configs/none.yaml", "--", "true")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "configs/none.yaml" in result.stderr


def test_an_address_where_nothing_answers_exits_2_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(a_config()))
    result = submit("--config", str(tmp_path / "run.yaml"), "--address", "http://127.0.0.1:9", "--", "true")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "--address http://127.0.0.1:9" in result.stderr


def test_too_few_gpus_are_told_with_the_number_of_missing_nodes() -> None:
    config = Config.model_validate(a_config(train={"num_workers": 4, "use_gpu": True}))
    resources = {"CPU": 64.0, "GPU": 2.0, "node:10.0.0.1": 1.0, "node:10.0.0.2": 1.0}
    with pytest.raises(ConfigError, match="needs 4 logical GPUs and the cluster has 2.*2 more nodes"):
        check_resources(config, resources)


def test_the_token_of_the_embedded_ray_is_asked_for(ray_cluster: LocalCluster) -> None:
    strip = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"}
    environment = {name: value for name, value in os.environ.items() if name not in strip}
    program = f"""
import urllib.error, urllib.request
try:
    urllib.request.urlopen("{ray_cluster.address}/api/jobs/")
except urllib.error.HTTPError as error:
    print(error.code)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "401"
