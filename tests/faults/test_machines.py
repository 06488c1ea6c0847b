"""A cluster of machines that `ray start` brings together: what they refuse, and what is lost when they go."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import grpc
import httpx
import psutil
import pytest
import yaml

from cluster.lease import LEASES
from ray_jobs.config import Config
from ray_jobs.tuning.guidance import MEASURED
from tests.faults.machines import (
    CLIENT,
    GCS,
    HEAD,
    HTTP,
    JOBS,
    ROOT,
    Brake,
    Machines,
    machines,
    redis,
    wait_for,
    why_not,
)
from tests.ray.test_training import tiny_config
from tests.record import record_fault

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
    pytest.mark.skipif(not shutil.which("redis-server"), reason="redis-server is not installed"),
]

CPUS = 5
PATIENT = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30"}  # how long a machine that has gone is asked


SLOW_CORES = 0.6  # that b has of this machine's
AHEAD_S = 3600  # of b's clock


class Nodes:
    """A head, and the machines `a` and `b` that work: b is slow, and its clock is wrong.

    The head's tables are kept in Redis; it runs none of the work, as on Kubernetes.
    """

    def __init__(self, made: Machines, store: str, brake: Brake) -> None:
        self.machines, self.brake = made, brake
        address, password = store.split()
        self.head_options = ["--redis-password", password], {"RAY_REDIS_ADDRESS": address}

    def start(self, name: str) -> None:
        if name == "head":
            options, environment = self.head_options
            machine = self.machines.start_ray(name, *options, cpus=0, more=PATIENT | environment)
        else:
            apart = {"brake": self.brake, "more": PATIENT | self.machines.skewed(AHEAD_S)}
            machine = self.machines.start_ray(
                name, cpus=CPUS, **(apart if name == "b" else {"more": PATIENT})
            )
        machine.wait_until_started()

    def alive(self) -> list[str]:
        """The names of the cluster's nodes."""
        asking = {"Authorization": f"Bearer {self.machines.token}"}
        told = httpx.get(f"http://{HEAD}:{JOBS}/api/v0/nodes", headers=asking, timeout=10, trust_env=False)
        found = told.raise_for_status().json()["data"]["result"]["result"]
        there = [node["node_ip"] for node in found if node["state"] == "ALIVE"]
        return [name for name in self.machines.names if self.machines.address(name) in there]

    def clock(self, name: str) -> float:
        """What a machine's Python takes for the time."""
        first = psutil.Process(self.machines.running[name].process.pid)  # Ray's write over their environment
        program = [sys.executable, "-c", "import time; print(time.time())"]
        told = subprocess.run(program, env=first.environ(), capture_output=True, text=True, check=True)
        return float(told.stdout)

    def submit(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a stage as a job, from outside of the cluster; its configuration is its last argument."""
        where = ["--config", command[-1], "--address", f"http://{HEAD}:{JOBS}"]
        return self.machines.outside("python", "-m", "cluster.submit", *where, "--", *command)

    def processes(self, name: str, title: str) -> list[psutil.Process]:
        """Of a machine, those whose title begins so."""
        told = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True)
        found = [psutil.Process(int(number)) for number in told.stdout.split()]
        return [process for process in found if " ".join(process.cmdline()).startswith(title)]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    logs = tmp_path_factory.mktemp("machines")
    try:
        brake = Brake("b", SLOW_CORES)
    except OSError as error:
        pytest.skip(f"no machine can be made slow: {error}")
    try:
        with machines(["head", "a", "b", "stranger"], logs) as made, redis(logs) as store:
            found = Nodes(made, store, brake)
            for name in ("head", "a", "b"):
                found.start(name)
            yield found
    finally:
        brake.release()


@pytest.fixture(scope="module")
def config(tiny_model: Path, picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run whose two training workers do not fit on one machine."""
    return tiny_config(
        tiny_model,
        picture_folder,
        tmp_path_factory.mktemp("shared"),
        "train.cpus_per_worker=3",
        "train.max_failures=3",
        "search.learning_rates=[1.0e-3,1.0e-4]",
        "search.scheduler=none",
        "search.max_concurrent_trials=1",
        "search.guidance_scales=[1.0,3.0]",
        "evaluate.inference_steps=2",
        "evaluate.num_actors=1",
        "serve.host=0.0.0.0",
        "serve.replicas=2",
        "serve.default_steps=10",
        "serve.request_timeout_s=60",
        "serve.requests_per_minute=100000",
    )


def written(config: Config, folder: Path) -> str:
    path = folder / f"{config.name}.yaml"
    path.write_text(config.to_yaml())
    return str(path)


def test_the_machines_are_one_cluster(nodes: Nodes) -> None:
    assert nodes.alive() == ["head", "a", "b"]


@pytest.mark.parametrize(
    "token", [{"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}]
)
def test_a_machine_without_the_token_does_not_join(nodes: Nodes, token: dict[str, str]) -> None:
    stranger = nodes.machines.start_ray("stranger", cpus=1, more=token)
    assert stranger.process.wait(timeout=120)
    assert "stranger" not in nodes.alive()


def listening(name: str) -> list[int]:
    """The TCP ports of a machine that others reach."""
    told = subprocess.run(
        ["ip", "netns", "exec", name, "ss", "-H", "-l", "-t", "-n"],
        capture_output=True,
        text=True,
        check=True,
    )
    places = [line.split()[3] for line in told.stdout.splitlines()]
    return sorted({int(place.rpartition(":")[2]) for place in places if not place.startswith("127.")})


GRPC = [
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.NodeManagerService/GetSystemConfig",
    "/ray.rpc.RayletDriver/ClusterInfo",
    "/ray.rpc.ReporterService/GetTraceback",
]


OPEN = {
    "200 text/html": "the dashboard's page, which is empty without a token",
    "200 text/plain; version=0.0.4; charset=utf-8": "metrics, for Prometheus",
}


def without_token(address: str, port: int) -> dict[str, str]:
    """What a port answers to somebody who does not know the token, by what was asked."""
    answers = {}
    for path in ("/", "/api/jobs/", "/nodes?view=summary"):
        with contextlib.suppress(httpx.HTTPError):
            told = httpx.get(f"http://{address}:{port}{path}", timeout=5, trust_env=False)
            answers[f"GET {path}"] = f"{told.status_code} {told.headers.get('content-type')}"
    with grpc.insecure_channel(f"{address}:{port}") as channel:
        for path in GRPC:
            try:
                channel.unary_unary(path)(b"", timeout=5)
                answers[path] = "OK"
            except grpc.RpcError as error:
                answers[path] = error.code().name
    return answers


def test_no_port_answers_somebody_without_the_token(nodes: Nodes) -> None:
    found = {
        (name, port): without_token(nodes.machines.address(name), port)
        for name in ("head", "a")
        for port in listening(name)
    }
    asked = {place: {answer.split()[0] for answer in answers.values()} for place, answers in found.items()}
    refused = {place for place, answers in asked.items() if answers & {"401", "UNAUTHENTICATED"}}
    assert {("head", GCS), ("head", JOBS), ("head", CLIENT)} <= refused
    assert any(name == "a" for name, _ in refused)
    told = {answer for answers in found.values() for answer in answers.values()}
    assert {answer for answer in told if answer.startswith(("200", "OK"))} <= set(OPEN)


def test_a_folder_that_each_machine_has_for_itself_is_refused(nodes: Nodes, config: Config) -> None:
    alone = config.model_copy(update={"name": "alone", "storage": str(nodes.machines.folder / "runs")})
    told = nodes.submit("python", "-m", "ray_jobs.prepare", "--config", written(alone, Path(config.storage)))
    assert told.returncode == 2, told.stdout + told.stderr
    assert "does not see the files of" in told.stdout.splitlines()[-1]


SLEEPER = (
    "import time; from ray_jobs.run.command_line import run_stage; "
    "run_stage('', lambda config: time.sleep(300))"
)


def test_a_machine_that_joins_later_and_does_not_see_the_storage_ends_the_run(
    nodes: Nodes, config: Config
) -> None:
    later = config.model_copy(update={"name": "later"})
    path, lease = written(later, Path(config.storage)), Path(config.storage, "later", LEASES)
    with ThreadPoolExecutor(1) as beside:
        job = beside.submit(nodes.submit, "python", "-c", SLEEPER, "--config", path)
        wait_for(lambda: job.done() or any(lease.glob("*.json")), "the run is held")
        nodes.machines.start_ray("stranger", cpus=1, without=config.storage)
        told = job.result()
    nodes.machines.running["stranger"].kill()
    assert told.returncode == 2, told.stdout + told.stderr
    line = told.stdout.splitlines()[-1]
    assert line.startswith(f"error: storage: {config.storage}: ") and "does not see the files of" in line
    wait_for(lambda: nodes.alive() == ["head", "a", "b"], "the stranger has gone")


def test_the_main_job_of_someone_outside_outlives_a_machine(nodes: Nodes, config: Config) -> None:
    results = Path(config.storage, config.name, "search", "results.jsonl")

    def rows() -> list[dict[str, Any]]:
        return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []

    command = ["python", "-m", "ray_jobs.pipeline", "--config", written(config, Path(config.storage))]
    with ThreadPoolExecutor(1) as beside:
        job = beside.submit(nodes.submit, *command)
        before = wait_for(lambda: job.done() or rows(), "the first rung", 300)
        assert not job.done(), job.result()
        assert nodes.clock("b") - nodes.clock("a") == pytest.approx(AHEAD_S, abs=60)
        nodes.machines.running["b"].cut_off()
        gone = time.monotonic()
        nodes.start("b")
        wait_for(lambda: job.done() or len(rows()) > len(before), "the next rung", 300)
        took = time.monotonic() - gone
        told = job.result()
    assert told.returncode == 0, told.stdout[-3000:]
    found = rows()
    assert len(found) == 4 and len({(row["trial_id"], row["step"]) for row in found}) == 4
    assert [row["fid"] for row in found[: len(before)]] == [row["fid"] for row in before]
    scales = [json.loads(line) for line in results.with_name(MEASURED).read_text().splitlines()]
    assert {each["guidance_scale"] for each in scales} == {1.0, 3.0}, "measured after the machine had gone"
    assert Path(config.storage, config.name, "winner.json").exists()
    # Of the worker there, or first of the other one, whose connection broke; by the training's controller or,
    # where that was on the machine too, by Tune.
    assert re.search(r"worker \d (died|failed): |failed and starts again: ", told.stdout), told.stdout[-3000:]
    record_fault("a machine of a training's worker loses its power", recovery_s=took, lost="no measured rung")
    held = nodes.brake.held_back()
    assert held > 0.2, "b was not slow"
    slow = f"nothing; it waited for its core in {held:.0%} of the time that it wanted one"
    record_fault(f"a machine has {SLOW_CORES:g} of a core, the other two", recovery_s=None, lost=slow)
    record_fault("the clock of a machine's Python is an hour ahead", recovery_s=None, lost="nothing")


@dataclass
class Answers:
    """What clients were answered, in time: an HTTP status, or the name of an error without one."""

    url: str
    told: list[tuple[float, int | str]] = field(default_factory=list)

    def ask(self, timeout_s: float = 90) -> None:
        body = {"prompt": "a red circle"}
        try:
            status: int | str = httpx.post(
                f"{self.url}/v1/images/generations", json=body, timeout=timeout_s, trust_env=False
            ).status_code
        except httpx.HTTPError as error:
            status = type(error).__name__
            time.sleep(0.2)
        self.told.append((time.monotonic(), status))

    def since(self, moment: float) -> list[int | str]:
        return [status for told, status in self.told if told > moment]

    def wait_for_quiet(self, since: float) -> float:
        """Wait until 20 answers in a row are pictures; the seconds from `since` to the last failure."""
        wait_for(lambda: self.since(since)[-20:] == [200] * 20, f"20 pictures from {self.url}", 180)
        return max([told - since for told, status in self.told if told > since and status != 200], default=0)


@contextmanager
def under_load(url: str) -> Iterator[Answers]:
    """Three clients ask again and again."""
    answers, enough = Answers(url), Event()

    def ask() -> None:
        while not enough.is_set():
            answers.ask()

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        try:
            wait_for(lambda: answers.since(0)[-6:] == [200] * 6, "the first pictures")
            yield answers
        finally:
            enough.set()
        for each in asking:
            each.result()


@pytest.fixture(scope="module")
def served(nodes: Nodes, config: Config) -> dict[str, str]:
    """The winner, deployed as the RayService deploys it; the machine of the ingress, and the other one."""
    service = next(
        document
        for document in yaml.safe_load_all((ROOT / "k8s/base/serving.yaml").read_text())
        if document["kind"] == "RayService"
    )
    deployed = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert deployed["http_options"]["port"] == HTTP
    deployed["applications"][0]["args"]["config"] = written(config, Path(config.storage))
    file = Path(config.storage, "serve.yaml")
    file.write_text(yaml.safe_dump(deployed))
    told = nodes.machines.outside("serve", "deploy", str(file), "--address", f"http://{HEAD}:{JOBS}")
    assert told.returncode == 0, told.stderr
    for name in ("a", "b"):
        wait_for(ready(nodes, name), f"the endpoint at {name}", 300)
        wait_for(has_model(nodes, name), f"{name}'s model")
    ingress = "a" if nodes.processes("a", "ray::ServeReplica:diffray:Ingress") else "b"
    return {"ingress": ingress, "other": "b" if ingress == "a" else "a"}


def url_of(nodes: Nodes, name: str) -> str:
    return f"http://{nodes.machines.address(name)}:{HTTP}"


def ready(nodes: Nodes, name: str) -> Callable[[], bool]:
    return lambda: httpx.get(f"{url_of(nodes, name)}/readyz", timeout=10, trust_env=False).status_code == 200


def has_model(nodes: Nodes, name: str) -> Callable[[], bool]:
    return lambda: bool(nodes.processes(name, "ray::ServeReplica:diffray:Model"))


def test_a_killed_proxy_is_back_and_the_other_machines_answer_meanwhile(
    nodes: Nodes, served: dict[str, str]
) -> None:
    name, other = served["other"], served["ingress"]
    with under_load(url_of(nodes, name)) as here, under_load(url_of(nodes, other)) as there:
        [proxy] = nodes.processes(name, "ray::ProxyActor")
        killed = time.monotonic()
        os.kill(proxy.pid, signal.SIGKILL)
        took = here.wait_for_quiet(killed)
    assert set(there.since(killed)) == {200}
    assert {status for status in here.since(killed) if isinstance(status, int)} == {200}
    lost = len([status for status in here.since(killed) if status != 200])
    record_fault("kill -9 of the HTTP proxy", recovery_s=took, lost=f"{lost} connections; others answer")


def test_a_machine_of_a_replica_may_lose_its_power(nodes: Nodes, served: dict[str, str]) -> None:
    name = served["other"]
    with under_load(url_of(nodes, served["ingress"])) as answers:
        gone = time.monotonic()
        nodes.machines.running[name].cut_off()
        wait_for(lambda: name not in nodes.alive(), f"{name} is missed")
        took = answers.wait_for_quiet(gone)
    failed = [status for status in answers.since(gone) if status != 200]
    assert set(failed) <= {503, 504}, "each request has an answer"
    record_fault(
        "the machine of a replica loses its power", recovery_s=took, lost=f"{len(failed)} errors of {failed}"
    )
    nodes.start(name)
    wait_for(has_model(nodes, name), "the second replica", 180)


def test_the_head_may_lose_its_power_since_redis_has_its_tables(nodes: Nodes, served: dict[str, str]) -> None:
    with under_load(url_of(nodes, served["ingress"])) as answers:
        gone = time.monotonic()
        nodes.machines.running["head"].cut_off()
        time.sleep(10)
        without = answers.since(gone)
        nodes.start("head")
        wait_for(lambda: nodes.alive() == ["head", "a", "b"], "the head knows its machines")
        took = answers.wait_for_quiet(gone)
    failed = [status for status in answers.since(gone) if status != 200]
    assert 200 in without
    assert not failed
    record_fault("the head (GCS, Redis behind it) loses its power", recovery_s=took, lost="no request")
