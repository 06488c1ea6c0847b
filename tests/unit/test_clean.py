"""What takes space, what a rule deletes, and what a version, another run or a run in use keeps from it."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cluster.lease import Lease, Owner
from cluster.storage import Storage
from diffray.clean import main
from diffray.jobs import Job, Record
from diffray.ui.queue import Waiting
from ray_jobs.config import Config
from ray_jobs.data.encoding.cache_files import ASIDE
from ray_jobs.data.encoding.encoding import EMPTY_CAPTION
from ray_jobs.publishing.reuse import publish_settings
from ray_jobs.registry.models import open_client
from ray_jobs.retention.inventory import Inventory, needed_by, take_inventory
from ray_jobs.run.folder import RunFolder, SharedFolder
from ray_jobs.run.records import RungRow, Winner, read_rows, write_rows
from ray_jobs.training.checkpoint import folder_of, place_of
from ray_jobs.tuning.results import result_digest
from tests.unit.test_report import WINNER

MIB = 2**20
ENCODERS = "ab" * 32
PROMPTED = {"evaluate": {"prompts": ["~nobody draws"]}}
SCORES = {2: 30.0, 4: 10.0, 6: 20.0}  # of the rungs; 4 wins


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with one registry for all tests, because a new SQLite file takes seconds."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFRAY_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def configured(storage: Path | str, name: str, **sections: Any) -> Config:
    given = {
        "name": name,
        "storage": str(storage),
        "data": {"source": "unused"},
        "model": {"base": "unused"},
        "search": {"learning_rates": [1e-3], "ladder": [2]},
    }
    return Config.model_validate(given | sections)


def searched(config: Config, parts: list[str]) -> RunFolder:
    """A run whose search has ended: a training of three rungs and a checkpoint between them."""
    run = RunFolder.of(config)
    run.root.write_text("config.yaml", config.to_yaml())
    run.dataset.write_text("manifest.json", json.dumps({"encoders": ENCODERS}))
    run.dataset.write_text("parts.json", json.dumps([{"file": file} for file in parts]))
    rows = []
    for step in (2, 3, 4, 6):
        checkpoint = run.training("lr-0.001").child(folder_of(step))
        checkpoint.write_bytes("state/0000-of-0001.safetensors", bytes(MIB))
        checkpoint.write_text("series.json", "[]")
        if step in SCORES:
            checkpoint.write_bytes("weights/a.safetensors", bytes(MIB))
            where = {"trial_id": "lr-0.001", "step": step, "checkpoint": checkpoint.uri}
            rows.append(RungRow.model_validate(where | {"fid": SCORES[step]}))
    write_rows(run.search, rows)
    run.search.write_text("finished.json", json.dumps({"winner": rows[1].fields()}))
    return run


def published(config: Config, parts: list[str], source: str = "") -> RunFolder:
    """A run whose winner is a version of the registry.

    Args:
        source: folder of the version's weights; "" the usual one, below `registry/`.
    """
    run = searched(config, parts)
    client, name = open_client(config), config.publish.model_name
    if not client.search_registered_models(filter_string=f"name = '{name}'"):
        client.create_registered_model(name)
    if not source:
        source = SharedFolder.of(config).registered(name).child("0123").uri
        Storage.open(source).write_text("a.safetensors", "weights")
    version = int(client.create_model_version(name, source=source).version)
    digest = result_digest(run.search.read_text("finished.json"))
    told = {"registry_version": version, "publish_settings": publish_settings(config)}
    Winner.model_validate(WINNER | told | {"search_digest": digest}).write(run.root)
    return run


def left(run: RunFolder, part: str) -> list[int]:
    """Steps whose checkpoints have a part."""
    trial = run.training("lr-0.001")
    return [step for step in (2, 3, 4, 6) if trial.child(folder_of(step)).exists(part)]


class Cleaner:
    """`diffray clean` for a configuration; returns what it printed."""

    def __init__(self, config: Config, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.file, self.capsys = home / f"{config.name}.yaml", capsys
        self.file.write_text(config.to_yaml())

    def __call__(self, *options: str) -> str:
        assert main(["--config", str(self.file), *options]) == 0
        return " ".join(self.capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("keep", "weights", "freed"), [("rungs", [2, 4, 6], "4.0"), ("winner", [4], "6.0"), ("2", [4, 6], "5.0")]
)
def test_a_rule_gives_up_states_and_keeps_the_weights_that_it_names(
    storage: Path, home: Path, capsys: pytest.CaptureFixture[str], keep: str, weights: list[int], freed: str
) -> None:
    config = configured(storage, f"keeps-{keep}")
    run, clean = published(config, []), Cleaner(config, home, capsys)
    before = run.root.sizes()
    assert "4.0 MiB (--keep rungs), 6.0 MiB (--keep winner)" in clean()
    assert f"to delete, with --delete: {freed} MiB" in clean("--keep", keep)
    assert run.root.sizes() == before
    assert f"deleted: {freed} MiB" in clean("--keep", keep, "--delete")
    assert (left(run, "state"), left(run, "weights")) == ([], weights)
    assert left(run, "series.json") == [2, 3, 4, 6]
    assert not run.root.child("lease").files()
    assert "deleted: 0.0 MiB" in clean("--keep", keep, "--delete")


def test_what_is_referred_to_or_not_finished_is_kept(
    storage: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = configured(storage, "own", publish={"model_name": "own"})
    trainings = RunFolder.of(own).training("lr-0.001")
    # Earlier releases registered weights where they lay; `other` starts from the weights of step 2.
    run = published(own, [], trainings.child(folder_of(6), "weights").uri)
    assert needed_by(own) == "own version 1"
    adapter = trainings.child(folder_of(2), "weights", "a.safetensors").uri
    other = searched(
        configured(storage, "other", model={"base": "unused", "adapter": adapter}, **PROMPTED), []
    )
    lost = published(configured(storage, "lost", publish={"model_name": "lost"}), [])
    open_client(own).delete_model_version("lost", "1")
    # Of a run that is gone; its adapter goes with the checkpoint between the rungs.
    base = {"base": trainings.child(folder_of(3), "weights").uri}
    open_client(own).create_registered_model("adapter")
    open_client(own).create_model_version("adapter", source="elsewhere", tags=base)
    more = published(configured(storage, "more"), [])
    more.search.child("tune").write_text("tuner.pkl", "")  # interrupted on its way to a longer ladder
    clean = Cleaner(own, home, capsys)

    # Its version has the number of another one of this registry.
    apart = published(configured(storage, "apart"), [])
    winner = Winner.read(apart.root)
    at = {"publish.tracking_uri": "http://other:5000"}
    (winner | {"publish_settings": winner.publish_settings | at}).write(apart.root)

    told = clean("--keep", "winner", "--all-runs", "--delete")
    assert (left(run, "state"), left(run, "weights")) == ([2, 3, 6], [2, 4, 6])
    assert "more: kept whole: its search has not ended" in told
    assert (left(more, "state"), left(more, "weights")) == ([2, 3, 4, 6], [2, 4, 6])
    assert "other: kept whole: not published" in told
    assert "lost: kept whole: its lost version 1 is not in the registry" in told
    assert "apart: kept whole: its diffray version" in told and "the registry http://other:5000" in told
    for whole in (other, lost, apart):
        assert (left(whole, "state"), left(whole, "weights")) == ([2, 3, 4, 6], [2, 4, 6])

    other.search.delete("finished.json")
    assert "other nothing: its search" not in told and "nothing: its search has not ended" in clean()


@pytest.fixture
def busy(storage: Path) -> Iterator[RunFolder]:
    """A run that a driver on another machine holds."""
    run = published(configured(storage, "busy"), ["busy.parquet"])
    here = Owner.this()
    driver = Lease(run.root, Owner("id", "elsewhere", "another boot", here.process, 0.0))
    driver.take()
    yield run
    driver.release()


def test_a_run_in_use_and_what_it_may_share_are_kept(
    storage: Path, home: Path, busy: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(storage, "busy")
    cache = SharedFolder.of(config).encoded(ENCODERS)
    cache.write_text("of-nobody.parquet", "rows")
    clean = Cleaner(config, home, capsys)
    told = clean("--keep", "winner", "--unused")
    assert "busy: kept whole: in use by process" in told and "encoded: kept whole: busy is in use" in told
    assert left(busy, "state") == [2, 3, 4, 6] and cache.exists("of-nobody.parquet")
    for name in busy.root.folders():  # it has only begun
        if name != "lease":
            busy.root.delete(name)
    busy.root.delete("config.yaml")
    assert "encoded: kept whole: busy is in use" in clean("--unused")
    assert main(["--config", str(clean.file), "--set", "name=no-run", "--keep", "winner"]) == 2
    assert "has no run no-run; correct it, or give --all-runs" in capsys.readouterr().out


def test_only_encoded_files_that_no_run_uses_and_records_of_lost_runs_are_unused(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(tmp_path / "runs", "cached")
    run = searched(config, ["own.parquet", "shared.parquet"])
    for number, votes in enumerate((run.votes, run.earlier_votes)):
        votes.write_text("manifest.json", json.dumps({"encoders": ENCODERS}))
        votes.write_text("parts.json", json.dumps([{"file": f"votes-{number}.parquet"}]))
    searched(configured(tmp_path / "runs", "second"), ["shared.parquet", "theirs.parquet"])
    shared = SharedFolder.of(config)
    cache, older = shared.encoded(ENCODERS), shared.encoded("cd" * 32)
    kept = [EMPTY_CAPTION, "own.parquet", "shared.parquet", "theirs.parquet"]
    kept += ["votes-0.parquet", "votes-1.parquet"]
    for name in [*kept, "former.parquet", f"own.parquet{ASIDE}"]:
        cache.write_text(name, "rows")
    older.write_text(EMPTY_CAPTION, "rows")
    shared.registered("model").child("0123").write_text("a.safetensors", "weights")
    clean = Cleaner(config, home, capsys)
    for name in ("cached", "gone", "asked-again"):
        job = Job(name)
        job.folder.mkdir(parents=True)
        record = Record(["--config", str(clean.file), "--set", f"name={name}"])
        (job.folder / "job.json").write_text(json.dumps(asdict(record)))
    asked = json.dumps(asdict(Waiting(record.arguments, 0.0)))
    (job.folder / "waiting.json").write_text(asked)

    assert "registry/model/0123: 0.0 MiB, of no version of this registry; delete it by hand" in clean()
    assert "gone: its run's folder is gone" in clean("--unused") and Job("gone").record
    assert len(cache.files()) == 8
    clean("--unused", "--delete")
    assert (cache.files(), older.files()) == (sorted(kept), [])
    assert (Job("cached").record is None, Job("gone").record) == (False, None)
    assert (Job("asked-again").folder / "waiting.json").exists()
    assert shared.registered("model").child("0123").files() == ["a.safetensors"]

    for file, content in (("parts.json", '[{"file'), ("manifest.json", "")):
        before = RunFolder.of(config).dataset.read_text(file)
        RunFolder.of(config).dataset.write_text(file, content)
        assert f"encoded: kept whole: {tmp_path}/runs/cached/dataset/{file}: damaged" in clean("--unused")
        RunFolder.of(config).dataset.write_text(file, before)
    for part in (run.dataset, run.votes):
        before = part.read_text("parts.json")
        part.delete("parts.json")
        assert "encoded: kept whole: cached is not wholly prepared" in clean("--unused")
        part.write_text("parts.json", before)


def test_what_a_run_may_use_that_begins_meanwhile_is_kept(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path / "runs", "first")
    searched(config, ["own.parquet"])
    cache = SharedFolder.of(config).encoded(ENCODERS)
    cache.write_text("of-nobody.parquet", "rows")

    def begun_after(*given: Any) -> Inventory:
        found = take_inventory(*given)
        Lease(RunFolder.of(configured(tmp_path / "runs", "second")).root, Owner.this()).take()
        return found

    monkeypatch.setattr("diffray.clean.take_inventory", begun_after)
    told = Cleaner(config, home, capsys)("--unused", "--delete")
    assert "encoded: kept whole: second has begun" in told and cache.exists("of-nobody.parquet")


def test_a_run_is_known_by_its_own_name_and_a_score_that_is_no_number_is_the_last(
    storage: Path, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(storage, "linked")
    published(config, [])
    begun = searched(configured(storage, "begun"), [])
    begun.search.delete("finished.json")
    os.rename(storage / "linked", tmp_path / "begun")  # a large run, moved to another disk
    os.symlink(tmp_path / "begun", storage / "linked")
    run = RunFolder.of(config)
    rows = [row | {"fid": math.nan} if row.step == 2 else row for row in read_rows(run.search)]
    write_rows(run.search, rows)
    assert "deleted: 5.0 MiB" in Cleaner(config, home, capsys)("--keep", "2", "--delete")
    assert (left(run, "state"), left(run, "weights")) == ([], [4, 6])
    assert (left(begun, "state"), left(begun, "weights")) == ([2, 3, 4, 6], [2, 4, 6])


def test_a_checkpoint_is_found_again_where_its_storage_was_moved() -> None:
    step = folder_of(4)
    assert place_of(f"/old/place/demo/train/lr-0.001/{step}") == ("lr-0.001", step)
    s3 = f"s3://bucket/runs/demo/train/scale-1%2B2/{step}?endpoint_override=localhost:9000"
    assert place_of(s3) == ("scale-1+2", step)


def test_a_rule_that_is_none_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--config", "demo", "--keep", "0"])
    assert "give winner, rungs, or a number of rungs above 0" in capsys.readouterr().err
