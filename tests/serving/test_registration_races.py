"""Publications of one name at the same moment, on one SQLite file: all end, and the best is the champion."""

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.config import Config
from ray_jobs.registry.aliases import aliases_of
from ray_jobs.registry.models import champion, open_client
from ray_jobs.registry.registration import DECISION, register
from ray_jobs.registry.store import versions_of
from tests.serving.test_registry import named, weights
from tests.serving.test_versions import MEASURED

FIDS = [14.0, 11.0, 17.0, 12.0]  # further apart than their error


def publish(config: Config, folder: Path, number: int) -> str:
    """Register other weights for each number, measured as `FIDS` says."""
    source = weights(folder / f"model-{number}", float(number))
    measured = replace(MEASURED, fid=FIDS[number])
    return register(config, source=source, measured=measured, params={"step": str(number)}).message


def at_once(works: list[Callable[[], Any]]) -> list[BaseException]:
    """Do all of it in threads that begin together; what they raised."""
    together, errors = threading.Barrier(len(works)), list[BaseException]()

    def run(work: Callable[[], Any]) -> None:
        together.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[work]) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def require_settled(config: Config, fids: list[float]) -> None:
    """The best is the champion, every version has its decision, and only what was the best says so."""
    client, name = open_client(config), config.publish.model_name
    found = versions_of(client, name)
    assert len(found) == len(fids) and all(each.tags[DECISION] for each in found)
    assert float(champion(config).metrics["test_fid"]) == min(fids)
    aliases = aliases_of(client, config)
    assert aliases.get("previous") != aliases["champion"]
    assert aliases.get("candidate") != aliases["champion"]
    best = next(each for each in found if int(each.version) == aliases["champion"])
    assert best.tags[DECISION].startswith("champion")


@pytest.mark.parametrize("repeat", range(2))
def test_first_publications_of_one_name_at_once_all_end(config: Config, tmp_path: Path, repeat: int) -> None:
    config = named(config, f"race-{repeat}")
    open_client(config)
    errors = at_once([partial(publish, config, tmp_path, number) for number in range(len(FIDS))])
    assert not errors
    require_settled(config, FIDS)


IN_A_PROCESS = """
import sys
from ray_jobs.config import Config
from ray_jobs.registry.promotion import Measured
from ray_jobs.registry.registration import register
from ray_jobs.registry.models import open_client
config, source, fid = Config.model_validate_json(sys.argv[1]), sys.argv[2], float(sys.argv[3])
open_client(config)
print("ready", flush=True)
sys.stdin.readline()
measured = Measured(fid, 0.5, 96, "inception@sha256:7ff4", "9f" * 32)
register(config, source=source, measured=measured, params={})
"""


def test_first_publications_by_several_processes_all_end(config: Config, tmp_path: Path) -> None:
    config = named(config, "race-of-processes")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", IN_A_PROCESS, config.model_dump_json(), source, str(fid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number, fid in enumerate(FIDS[:2])
        for source in [weights(tmp_path / f"model-{number}", float(number))]
    ]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    ends = at_once([partial(process.communicate, "go\n") for process in processes])
    assert not ends and [process.returncode for process in processes] == [0, 0]
    require_settled(config, FIDS[:2])


def test_who_replaced_a_champion_without_comparing_gives_it_back(config: Config, tmp_path: Path) -> None:
    """Both read the aliases before either wrote: the worse one wrote last."""
    from ray_jobs.registry import registration

    config = named(config, "overwritten")
    client, name = open_client(config), config.publish.model_name
    assert publish(config, tmp_path, 1).startswith("champion")
    assert publish(config, tmp_path, 2).startswith("stays candidate")
    decided = registration.Registered(2, ("champion",), "champion: the first version of its name")
    client.set_model_version_tag(name, "2", DECISION, decided.message)
    client.set_registered_model_alias(name, "champion", "2")
    found = registration._settled(client, config, decided, before=set())
    assert champion(config).version == 1 and found.aliases == ("candidate",)
    assert found.message.startswith("stays candidate: it does not beat version 1")
    # Of the two the other one may be the one that sees it.
    client.set_model_version_tag(name, "2", DECISION, decided.message)
    client.set_registered_model_alias(name, "champion", "2")
    mine = registration.Registered(1, (), "champion: the first version of its name")
    assert registration._settled(client, config, mine, before=set()).aliases == ("champion",)
    assert champion(config).version == 1
