"""Submitting a job: its lines, its exit code, and what is refused before Ray starts."""

import hashlib
import json
import os
import pty
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from ray.job_submission import JobSubmissionClient

from cluster.capacity import check_resources, sized
from cluster.lease import LEASES
from cluster.local import LocalCluster
from cluster.submit import main, run_job
from cluster.upload import runtime_environment
from ray_jobs.config import Config, ConfigError, LocalConfig
from ray_jobs.run.command_line import FULL
from tests.interruptible import interruptible
from tests.ray.test_training import tiny_config

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
    from ray._private.utils import get_ray_address_file, write_ray_address

    # Ray makes this folder only where it keeps its own files in it.
    Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
    write_ray_address("127.0.0.1:1")  # as another Ray on this machine does
    try:
        asked = ray.get(ray.remote(canonicalize_bootstrap_address).remote(None))
    finally:
        write_ray_address(ray_cluster.gcs_address)
    assert asked == ray_cluster.gcs_address


def test_workers_find_relative_paths_from_whatever_folder_they_run_in(ray_cluster: LocalCluster) -> None:
    import ray

    def found_elsewhere() -> tuple[str, str]:
        from ray_jobs.config import home, resolve_path

        os.chdir("/")
        return str(home()), resolve_path("configs/demo.yaml")

    expected = str(Path.cwd()), str(Path.cwd() / "configs" / "demo.yaml")
    assert ray.get(ray.remote(max_calls=1)(found_elsewhere).remote()) == expected


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


PRINT_DIGESTS = """
import hashlib, os, sys
import ray
import cluster

def seen():
    import cluster
    return os.environ.get("HF_TOKEN", "")

ray.init()
tokens = [seen(), ray.get(ray.remote(seen).remote())]
print([hashlib.sha256(token.encode()).hexdigest() for token in tokens], os.environ.get("HF_ENDPOINT"))
"""


def test_a_token_reaches_job_and_tasks_and_is_written_nowhere(
    ray_cluster: LocalCluster,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Neither into Ray's logs nor into what its Jobs API tells."""
    token = "hf_" + secrets.token_hex(16)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.org")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(a_config()))
    options = ["--address", ray_cluster.address, "--config", str(tmp_path / "run.yaml")]
    assert main([*options, "--", sys.executable, "-c", PRINT_DIGESTS]) == 0
    digest = hashlib.sha256(token.encode()).hexdigest()
    assert capfd.readouterr().out.splitlines()[-1] == f"{[digest] * 2} https://hub.example.org"
    told = str(JobSubmissionClient(ray_cluster.address).list_jobs())
    assert "hub.example.org" in told and token not in told
    logs = [path for path in ray_cluster.logs.rglob("*") if path.is_file()]
    assert any(b"hub.example.org" in path.read_bytes() for path in logs)
    assert [path.name for path in logs if token.encode() in path.read_bytes()] == []


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


@pytest.mark.parametrize("where", [[], ["--address", "http://127.0.0.1:9"]])
def test_too_much_to_upload_is_refused_before_anything_starts(
    where: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(a_config()))
    monkeypatch.setattr("cluster.upload.MAX_UPLOAD_MB", 1)
    former = signal.getsignal(signal.SIGTERM)
    assert main(["--config", str(tmp_path / "run.yaml"), *where, "--", "true"]) == 2
    signal.signal(signal.SIGTERM, former)
    told = capsys.readouterr()
    [line] = told.err.splitlines()
    assert told.out == "" and line.startswith(f"error: {ROOT}/models: ")
    assert "the limit is 1; move data to shared storage" in line


def test_a_configuration_of_the_users_own_goes_with_the_job(
    ray_cluster: LocalCluster, tmp_path: Path
) -> None:
    """It lies beside the packages, and extends a recipe; nothing else of what lies there is uploaded."""
    checkout = tmp_path / "checkout"
    for package in ("cluster", "ray_jobs", "configs"):
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "runs").mkdir()
    (checkout / "runs" / "large").touch()
    (checkout / "mine.yaml").write_text("extends: configs/demo.yaml\nname: mine")
    code = "import os, ray_jobs.config as c; print(c.load_config('mine.yaml').name, os.path.exists('runs'))"
    command = [sys.executable, "-m", "cluster.submit", "--address", ray_cluster.address]
    command += ["--", "python", "-c", code, "--config", "mine.yaml"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "mine False" in done.stdout.splitlines()


PREPARE = ("-m", "ray_jobs.prepare")


def stage(
    config: Path, program: tuple[str, str] = PREPARE, /, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """A stage run as a driver of its own, on the cluster that RAY_ADDRESS names.

    Args:
        program: as Python's options name it.
    """
    command = [sys.executable, *program, "--config", str(config)]
    variables = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)


def test_a_head_node_that_does_not_answer_exits_2_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(a_config(storage=str(tmp_path))))
    result = stage(tmp_path / "run.yaml", RAY_ADDRESS="127.0.0.1:9")
    assert result.returncode == 2
    assert result.stdout.splitlines()[-1].startswith("error: RAY_ADDRESS: 127.0.0.1:9: no answer")


OVER_QUOTA = """
import errno, os, ray
from ray_jobs.run.command_line import run_stage

def write():
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/storage/part")

run_stage("A stage.\\n\\n    python -m stage", lambda config: ray.get(ray.remote(write).remote()))
"""


def test_a_quota_that_is_used_up_exits_2_with_one_line(ray_cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(a_config(storage=str(tmp_path))))
    result = stage(tmp_path / "run.yaml", ("-c", OVER_QUOTA), RAY_ADDRESS=ray_cluster.gcs_address)
    assert result.returncode == 2
    [line] = [line for line in result.stdout.splitlines() if line.startswith("error")]
    assert (
        line.startswith(f"error: storage: {tmp_path}, or a node's") and f"{FULL[1]}: free some space" in line
    )


def test_a_wrong_token_exits_2_with_one_line(ray_cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(a_config(storage=str(tmp_path))))
    result = stage(
        tmp_path / "run.yaml",
        RAY_ADDRESS=ray_cluster.gcs_address,
        RAY_AUTH_TOKEN="0" * 64,
        RAY_AUTH_MODE="token",
    )
    assert result.returncode == 2
    assert result.stdout.splitlines()[-1].startswith(f"error: RAY_ADDRESS: {ray_cluster.gcs_address}: ")
    (tmp_path / "token").write_text("0" * 64)
    where = ["--config", str(tmp_path / "run.yaml"), "--address", ray_cluster.address]
    result = submit("--token-file", str(tmp_path / "token"), *where, "--", "true")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"--address {ray_cluster.address}" in result.stderr


class OlderRay(BaseHTTPRequestHandler):
    """A dashboard of Ray 2.50; it notes what it is sent."""

    sent: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        version = {"version": "4", "ray_version": "2.50.0", "ray_commit": "", "session_name": "session"}
        body = json.dumps(version).encode()
        self.sent.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Not to the tests' output."""


def test_a_cluster_of_another_ray_exits_2_with_one_line_before_anything_is_uploaded(tmp_path: Path) -> None:
    import ray

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(a_config()))
    with ThreadingHTTPServer(("127.0.0.1", 0), OlderRay) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        result = submit("--config", str(tmp_path / "run.yaml"), "--address", address, "--", "true")
        server.shutdown()
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert f"--address {address}: the cluster runs Ray 2.50.0" in result.stderr
    assert f"this machine has {ray.__version__}; install ray[default]==2.50.0" in result.stderr
    assert set(OlderRay.sent) == {"/api/version"}


def test_a_driver_of_another_ray_exits_2_with_one_line(ray_cluster: LocalCluster, tmp_path: Path) -> None:
    import ray

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(a_config(storage=str(tmp_path))))
    program = "ray_jobs.prepare", None, "__main__"
    older = f"import ray, runpy; ray.__version__ = '2.50.0'; runpy.run_module{program}"
    result = stage(tmp_path / "run.yaml", ("-c", older), RAY_ADDRESS=ray_cluster.gcs_address)
    assert result.returncode == 2, result.stdout
    line = result.stdout.splitlines()[-1]
    assert line.startswith(f"error: RAY_ADDRESS: {ray_cluster.gcs_address}: Version mismatch: ")
    assert ray.__version__ in line and "2.50.0" in line and "the same Ray" in line


def test_of_two_drivers_of_one_run_the_second_is_refused_and_the_first_goes_on(
    ray_cluster: LocalCluster, tiny_model: Path, picture_folder: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_model, picture_folder, tmp_path)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    address = {"RAY_ADDRESS": ray_cluster.gcs_address}
    command = [sys.executable, "-m", "ray_jobs.prepare", "--config", str(tmp_path / "run.yaml")]
    first = subprocess.Popen(command, cwd=ROOT, env=os.environ | address, stdout=subprocess.DEVNULL)
    leases = tmp_path / "tiny" / LEASES
    while not (leases.exists() and list(leases.glob("*.json"))):
        assert first.poll() is None, "it ended before it held the run"
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)  # else it might be done before the second one begins
    second = stage(tmp_path / "run.yaml", **address)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    assert f"process {first.pid} on" in second.stdout.splitlines()[-1]
    assert first.wait(timeout=120) == 0


def test_a_job_that_is_not_waited_for_runs_with_the_token_of_a_file(
    ray_cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.job_submission import JobSubmissionClient

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(a_config()))
    (tmp_path / "token").write_text(os.environ["RAY_AUTH_TOKEN"] + "\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    where = ["--config", str(tmp_path / "run.yaml"), "--address", ray_cluster.address]
    result = submit("--no-wait", "--token-file", str(tmp_path / "token"), *where, "--", "sleep", "1")
    monkeypatch.undo()
    assert result.returncode == 0, result.stderr
    job = result.stdout.split()[1].rstrip(";")
    client = JobSubmissionClient(ray_cluster.address)
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.2)
    assert client.get_job_status(job) == "SUCCEEDED"


def test_the_documented_ray_job_submit_runs_a_stage_of_the_repositorys_code(
    ray_cluster: LocalCluster, tiny_model: Path, picture_folder: Path, tmp_path: Path
) -> None:
    """The command of docs/cluster.md, with a stage that is soon done."""
    (tmp_path / "run.yaml").write_text(tiny_config(tiny_model, picture_folder, tmp_path).to_yaml())
    documented = (ROOT / "docs" / "cluster.md").read_text()
    [command] = [line for line in documented.splitlines() if line.strip().startswith("ray job submit")]
    options, job = (shlex.split(part) for part in command.split(" -- "))
    options[options.index("--address") + 1] = ray_cluster.address
    options[0] = str(Path(sys.executable).with_name("ray"))
    assert job[:2] == ["python", "-m"]
    program = "import os, runpy; print('ran in', os.getcwd(), os.listdir('.')); runpy.run_module{}"
    dry_run = program.format(("ray_jobs.prepare", None, "__main__"))
    result = subprocess.run(
        [*options, "--", sys.executable, "-c", dry_run, "--dry-run", "--config", str(tmp_path / "run.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    [line] = [line for line in result.stdout.splitlines() if line.startswith("ran in")]
    assert str(ROOT) not in line.split()[2] and "'ray_jobs'" in line
    assert not any(f"'{name}'" in line for name in (".venv", ".cache", "runs", "tests", ".git"))
    assert f"nothing encoded; see {tmp_path}/tiny/dataset/preview.html" in result.stdout


HOLDER = """
import os, sys, time
import ray
from ray.util.placement_group import placement_group
ray.init(log_to_driver=False)
@ray.remote(num_cpus=1)
class Worker:
    def pid(self):
        return os.getpid()
group = placement_group([{"CPU": 1}])
ray.get(group.ready())
worker = Worker.remote()
print("process", ray.get(worker.pid.remote()), os.getpid(), flush=True)
if sys.argv[1] == "fail":
    sys.exit(3)
if sys.argv[1] == "wait":
    time.sleep(300)
"""


def free_cpus(wanted: float) -> bool:
    """Whether so many CPUs become free within half a minute."""
    import ray

    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < wanted and time.monotonic() < deadline:
        time.sleep(0.2)
    return ray.available_resources().get("CPU", 0) >= wanted


@pytest.mark.parametrize(("way_out", "code"), [("succeed", 0), ("fail", 3), ("wait", 130)])
def test_every_way_out_releases_actors_placement_groups_and_processes(
    ray_cluster: LocalCluster, tmp_path: Path, way_out: str, code: int
) -> None:
    import psutil
    import ray
    from ray.util.state import list_actors, list_placement_groups

    def held() -> set[str]:
        """What is alive on the cluster, without what other tests keep."""
        actors = list_actors(address=ray_cluster.address, filters=[("class_name", "=", "Worker")], limit=1000)
        groups = list_placement_groups(address=ray_cluster.address, limit=1000)
        found = {actor.actor_id for actor in actors if actor.state != "DEAD"}
        return found | {group.placement_group_id for group in groups if group.state != "REMOVED"}

    before, held_before = ray.available_resources()["CPU"], held()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(a_config()))
    where = ["--config", str(tmp_path / "run.yaml"), "--address", ray_cluster.address]
    program = [sys.executable, "-c", HOLDER, way_out]
    command = [sys.executable, "-m", "cluster.submit", *where, "--", *program]
    process = subprocess.Popen(interruptible(command), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    assert process.stdout is not None
    line = process.stdout.readline()
    while not line.startswith("process"):
        assert line, "the job ended before it began"
        line = process.stdout.readline()
    if way_out == "wait":
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == code
    watchdog.cancel()

    assert free_cpus(before)
    assert held() <= held_before
    gone = time.monotonic() + 20
    pids = [int(pid) for pid in line.split()[1:]]
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < gone:
        time.sleep(0.2)
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize(
    ("typed", "answer"), [("l\n", "leave"), ("what?\nf\n", "follow"), ("stop\n", "stop"), ("\x03", "stop")]
)
def test_in_a_terminal_an_interrupt_asks_what_to_do_with_the_job(typed: str, answer: str) -> None:
    terminal, inside = pty.openpty()
    program = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from cluster.submit import _ask
print('answered', _ask('raysubmit_1'))
"""
    process = subprocess.Popen(
        interruptible([sys.executable, "-c", program]),
        cwd=ROOT,
        stdin=inside,
        stdout=subprocess.PIPE,
        stderr=inside,
        text=True,
        start_new_session=True,
    )
    os.close(inside)
    asked = b""
    while b"ollowing it?" not in asked:
        asked += os.read(terminal, 1000)
    os.write(terminal, typed.encode())
    assert process.communicate(timeout=60)[0] == f"answered {answer}\n"
    os.close(terminal)


def test_a_run_for_gpus_on_a_cluster_without_any_is_told_which_setting_asks_for_them() -> None:
    config = Config.model_validate(a_config(train={"use_gpu": True}, evaluate={"use_gpu": True}))
    with pytest.raises(ConfigError, match="train.use_gpu, evaluate.use_gpu: .* has none; set use_gpu: false"):
        check_resources(config, {"CPU": 64.0, "node:10.0.0.1": 1.0})


def test_the_embedded_ray_takes_from_the_machine_only_what_is_not_set() -> None:
    whole = LocalConfig()
    assert sized(LocalConfig(num_cpus=3, object_store_mb=90)) == LocalConfig(num_cpus=3, object_store_mb=90)
    found = sized(whole)
    assert found.num_cpus >= max(whole.num_cpus, len(os.sched_getaffinity(0)))
    assert found.object_store_mb >= whole.object_store_mb


def test_too_few_gpus_are_told_with_the_number_of_missing_nodes() -> None:
    config = Config.model_validate(a_config(train={"num_workers": 4, "use_gpu": True}))
    resources = {"CPU": 64.0, "GPU": 2.0, "node:10.0.0.1": 1.0, "node:10.0.0.2": 1.0}
    with pytest.raises(ConfigError, match="needs 4 logical GPUs, but the cluster has 2.*2 more nodes"):
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
