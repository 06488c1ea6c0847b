"""The running endpoint follows the registry, shares requests out, and outlives its replicas."""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import psutil
import pytest

from ray_jobs.config import Config
from ray_jobs.registry import aliases
from ray_jobs.registry.models import champion, open_client, registered
from ray_jobs.registry.promotion import Measured
from ray_jobs.registry.registration import register
from serving.messages import placement_of
from serving.rollout import main
from serving.service.rollout import withdraw
from tests.record import record_fault
from tests.serving.conftest import loads, save_adapters, served, wait_until


@pytest.fixture(scope="module")
def followed(config: Config, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Three versions of a model of its own: 1 is the champion, which is fused, 2 and 3 are worse."""
    serve: dict[str, Any] = {
        "follow_s": 0.5,
        "candidate_share": 0.5,
        "shadow_share": 0.5,
        "max_queued_requests": 64,
        "fuse_champion": True,
    }
    serve |= {"keys": None, "allow_anonymous": True, "safety_checker": None, "drift_pictures": 0}
    serve |= {"requests_per_minute": 100_000, "concurrent_requests": 64}
    config = config.model_copy(
        update={
            "name": "following",
            "publish": config.publish.model_copy(update={"model_name": "followed"}),
            "serve": config.serve.model_copy(update=serve),
        }
    )
    for seed, fid in ((1, 10.0), (2, 20.0), (3, 30.0)):
        folder = save_adapters(tiny_model, tmp_path_factory.mktemp("versions") / str(seed), seed)
        measured = Measured(fid, None, num_samples=96, feature_network="inception@1", data="9f" * 32)
        register(config, source=str(folder), measured=measured, params={})
    withdraw(config)
    return config


@pytest.fixture(scope="module")
def url(ray_cluster: Any, followed: Config) -> Iterator[str]:
    with served(followed, champion(followed)) as address:
        yield address


def answer(url: str, **fields: Any) -> httpx.Response:
    body = {"prompt": "a red apple", **fields}
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=120, trust_env=False)


def get(url: str, path: str) -> Any:
    return httpx.get(url + path, timeout=60, trust_env=False).json()


@contextmanager
def under_load(
    url: str, of_client: Callable[[int], dict[str, Any]] = lambda _: {}, **fields: Any
) -> Iterator[list[httpx.Response]]:
    """Four clients ask again and again, each with fields of its own; yields their answers."""
    answers: list[httpx.Response] = []
    enough = Event()

    def ask(client: int) -> None:
        while not enough.is_set():
            answers.append(answer(url, user=f"client {client}", **fields, **of_client(client)))

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, client) for client in range(4)]
        try:
            wait_until(lambda: len(answers) > 8)
            yield answers
        finally:
            enough.set()
        for each in asking:
            each.result()


def test_a_new_champion_takes_over_under_load_without_a_failed_request(url: str, followed: Config) -> None:
    with under_load(url) as answers:
        aliases.promote(followed, 2)
        wait_until(lambda: get(url, "/readyz")["model"] == "followed@2")
        seen = len(answers)
        wait_until(lambda: len(answers) > seen + 16)
    assert {each.status_code for each in answers} == {200}
    assert answers[0].json()["model"] == "followed@1"
    assert answers[-1].json()["model"] == "followed@2"
    assert answer(url, model="followed:previous").json()["model"] == "followed@1"


def test_a_champion_that_changes_ten_times_under_load_fails_no_request(url: str, followed: Config) -> None:
    with under_load(url) as answers:
        begun = time.monotonic()
        for number in 5 * (1, 2):
            aliases.promote(followed, number)
            wait_until(lambda number=number: get(url, "/readyz")["model"] == f"followed@{number}")  # type: ignore[misc]
        took = (time.monotonic() - begun) / 10
    assert {each.status_code for each in answers} == {200}
    assert {each.json()["model"] for each in answers} == {"followed@1", "followed@2"}
    record_fault("the champion changes ten times, under load", recovery_s=took, lost="no request")


def test_a_champion_whose_weights_changed_is_refused_and_the_old_one_stays(
    url: str, followed: Config
) -> None:
    broken = Path(registered(followed, "3").source) / "pytorch_lora_weights.safetensors"
    content = broken.read_bytes()
    broken.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # before anyone looks for a new champion
    try:
        open_client(followed).set_registered_model_alias("followed", "champion", "3")
        damaged = time.monotonic()
        ready = wait_until(lambda: (found := get(url, "/readyz"))["notice"] and found)
        assert ready["model"] == "followed@2"
        assert "followed@3 cannot be served" in ready["notice"]
        assert "not the weights registered as version 3" in ready["notice"]
        assert answer(url).json()["model"] == "followed@2"
        took = time.monotonic() - damaged
        record_fault("a bit turns over in a new champion's weights", recovery_s=took, lost="no request")
    finally:
        open_client(followed).set_registered_model_alias("followed", "champion", "2")
        wait_until(lambda: get(url, "/readyz")["notice"] is None)
        broken.write_bytes(content)  # now that nobody looks: whole, it would be the champion after all


def test_the_candidate_answers_its_share_and_a_user_stays_with_one_version(
    url: str, followed: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    open_client(followed).set_registered_model_alias("followed", "candidate", "3")
    wait_until(lambda: get(url, "/v1/rollout")["candidate"] == "followed@3")
    users = [f"user {number}" for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        first, again = (
            list(pool.map(lambda user: answer(url, user=user).json()["model"], users)) for _ in range(2)
        )
    assert first == again
    counts = Counter(first)
    assert set(counts) == {"followed@2", "followed@3"}
    assert 8 <= counts["followed@3"] <= 32

    file = tmp_path / "config.yaml"
    file.write_text(followed.to_yaml())
    assert main(["status", "--config", str(file), "--url", url]) == 0
    shown = capsys.readouterr().out
    assert "followed@3  candidate" in shown
    assert "followed@2  champion" in shown


def test_shadows_are_stored_with_the_champions_picture_and_never_answered(url: str, followed: Config) -> None:
    assert get(url, "/v1/rollout")["candidate"] == "followed@3"
    seeds = count()

    def stored() -> int:
        """Which requests are drawn again is left to chance, and none are while the model is busy."""
        drawn = answer(url, seed=next(seeds), model="followed:champion").json()
        assert drawn["model"] == "followed@2"
        return int(get(url, "/v1/rollout")["shadow"]["stored"])

    wait_until(lambda: stored() >= 2)
    folder = Path(followed.storage) / "following" / "shadow"
    pair = next(each for each in sorted(folder.iterdir()) if each.is_dir())
    parameters = json.loads((pair / "parameters.json").read_text())
    assert (parameters["champion"], parameters["candidate"]) == ("followed@2", "followed@3")
    assert parameters["prompt"] == "a red apple"
    assert (pair / "champion.png").read_bytes() != (pair / "candidate.png").read_bytes()


def test_versions_are_drawn_by_one_engine_together_but_for_the_fused_champion(
    url: str, followed: Config
) -> None:
    models = ["followed@1", "followed@2", "followed@3", "base"]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda model: answer(url, model=model, seed=1).json(), models))
    assert len({each["data"][0]["b64_json"] for each in answers}) == 4
    (load,) = loads()
    champions = {placement_of(registered(followed, version), fused=True).engine for version in "12"}
    assert set(load.engines) == {"base"} | champions


def watch(url: str, begun: Event) -> Any:
    """The last event of a long stream; `begun` is set at the first."""
    body = {"prompt": "a red apple", "steps": 100, "stream": True, "partial_images": 3}
    with httpx.stream(
        "POST", f"{url}/v1/images/generations", json=body, timeout=120, trust_env=False
    ) as told:
        for line in told.iter_lines():
            begun.set()
            if line.startswith("data: "):
                last = json.loads(line.removeprefix("data: "))
    return last


def mixture(client: int) -> dict[str, Any]:
    """The second client draws with none, the others with two versions at scales of their own."""
    scales = (0.3 * client, -0.5)
    adapters = [{"name": f"followed@{number}", "scale": s} for number, s in zip((1, 3), scales, strict=True)]
    return {"model": "base"} | ({} if client == 1 else {"adapters": adapters})


@pytest.mark.parametrize(
    ("of_client", "fault"),
    [
        (lambda _: {}, "kill -9 of the only replica, under load"),
        (mixture, "kill -9 of the only replica, in a batch of mixed adapters"),
    ],
)
def test_a_killed_replica_loses_no_request_and_another_takes_its_place(
    url: str, followed: Config, of_client: Callable[[int], dict[str, Any]], fault: str
) -> None:
    (load,) = loads()
    with under_load(url, of_client, steps=30) as answers, ThreadPoolExecutor(1) as pool:
        begun = Event()
        watching = pool.submit(watch, url, begun)
        assert begun.wait(60)
        os.kill(load.process, signal.SIGKILL)
        killed, seen = time.monotonic(), len(answers)
        wait_until(lambda: any(each.status_code == 200 for each in answers[seen:]), timeout_s=300)
        took = time.monotonic() - killed
        wait_until(lambda: len(answers) > seen + 12, timeout_s=300)
    failed = [each.json()["error"]["code"] for each in answers if each.status_code != 200]
    assert set(failed) <= {"timeout"}, "what the replica was drawing is drawn again, in its time"
    assert answers[-1].status_code == 200
    last = watching.result()
    assert last["error"]["code"] == "model_lost", "whoever has seen unfinished pictures is told"
    wait_until(lambda: httpx.get(f"{url}/readyz", trust_env=False).status_code == 200)
    assert loads()[0].process != load.process
    record_fault(fault, recovery_s=took, lost=f"{len(failed)} requests")


def ingress() -> psutil.Process:
    """The process that receives the running endpoint's requests."""
    names = ((each, each.info["cmdline"]) for each in psutil.process_iter(["cmdline"]))
    (found,) = (each for each, command in names if command and "ServeReplica:diffray:Ingress" in command[0])
    return found


def test_a_killed_ingress_answers_or_refuses_what_was_asked_and_its_jobs_go_on(
    url: str, followed: Config
) -> None:
    body = {"prompt": "a red apple", "n": 2, "steps": 80, "seed": 5, "model": "base"}
    later = httpx.post(
        f"{url}/v1/images/generations", json=body, headers={"Prefer": "respond-async"}, trust_env=False
    ).json()
    with under_load(url, steps=10) as answers:
        process = ingress()
        process.kill()
        killed, seen = time.monotonic(), len(answers)
        wait_until(lambda: any(each.status_code == 200 for each in answers[seen + 4 :]), timeout_s=300)
        took = time.monotonic() - killed
        wait_until(lambda: len(answers) > seen + 12, timeout_s=300)
    failed = [each.status_code for each in answers if each.status_code != 200]
    assert set(failed) <= {500, 502, 503} and answers[-1].status_code == 200
    assert ingress().pid != process.pid

    def job() -> Any:
        found = get(url, f"/v1/jobs/{later['id']}")
        return found if found.get("finished_at") else None

    finished = wait_until(job, timeout_s=120)
    assert finished["status"] == "completed"
    assert [each["seed"] for each in finished["result"]["data"]] == [5, 6]
    lost = f"{len(failed)} requests of four clients, answered with an error; no job"
    record_fault("kill -9 of the ingress, under load", recovery_s=took, lost=lost)


def test_places_of_versions_differ_by_digest(followed: Config) -> None:
    first = registered(followed, "1")
    assert placement_of(first).engine == "base"
    assert placement_of(first).adapter != placement_of(registered(followed, "2")).adapter
