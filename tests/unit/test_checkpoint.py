"""Which checkpoint a training goes on from when some are damaged: the last that is as it was written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.storage import Storage
from ray_jobs.config import ConfigError
from ray_jobs.publish import require_intact
from ray_jobs.training.checkpoint import (
    REPORTED,
    damaged,
    digests,
    drop_old_states,
    find_rungs,
    folder_of,
    last_intact,
    rungs_of,
)
from ray_jobs.tuning.trial import intact, unreported

STATE = "state/0001-of-0002.safetensors"
WEIGHTS = "weights/pytorch_lora_weights.safetensors"


def write(trial: Path, step: int, ranks: int = 2, why: str = "rung") -> Path:
    """A checkpoint of two ranks, as a training leaves it, with other bytes for the tensors."""
    folder = trial / folder_of(step)
    files = {f"state/{rank:04d}-of-0002.safetensors": f"state of {rank} at {step}" for rank in range(2)}
    files |= {WEIGHTS: f"weights at {step}", "series.json": "[]", "config.yaml": "name: run"}
    files["progress.json"] = json.dumps({"step": step, "world_size": 2, "why": why})
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    written = digests(folder)
    for rank in range(ranks):
        own = {name: digest for name, digest in written.items() if rank == 0 or name == STATE}
        (folder / f"complete-{rank:04d}-of-0002").write_text(json.dumps(own))
    return folder


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    for step in (2, 4, 6):
        write(tmp_path / "trial", step)
    return tmp_path / "trial"


def found(trial: Path) -> tuple[str, list[str]]:
    """The folder that a training goes on from, and what is told."""
    told: list[str] = []
    folder = last_intact(Storage.open(str(trial)), told.append)
    assert folder is not None
    return Path(folder.path).name, told


def test_the_last_whole_one_is_taken_and_nothing_is_told(trial: Path) -> None:
    assert found(trial) == (folder_of(6), [])


def flip(name: str) -> Callable[[Path], None]:
    """Turns one bit of a file over: its length and all else stay."""

    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (flip(STATE), f"damaged: {STATE}"),
        (flip(WEIGHTS), f"damaged: {WEIGHTS}"),
        (lambda folder: (folder / STATE).unlink(), f"damaged: {STATE}"),
        (lambda folder: (folder / "complete-0001-of-0002").write_text("{"), "damaged: complete-0001-of-0002"),
        (lambda folder: (folder / "complete-0001-of-0002").unlink(), "not whole"),
        (lambda folder: (folder / "progress.json").write_text("{"), "not whole"),
    ],
)
def test_a_damaged_one_is_told_and_the_one_before_it_is_taken(
    trial: Path, damage: Callable[[Path], None], told: str
) -> None:
    damage(trial / folder_of(6))
    name, [line] = found(trial)
    assert name == folder_of(4)
    assert line == f"{trial / folder_of(6)} is passed over: {told}"


def test_between_rungs_only_the_last_two_whole_ones_keep_their_state(tmp_path: Path) -> None:
    whys = {2: "interval", 4: "rung", 6: "interval", 8: "interval", 10: "preemption", 12: "interval"}
    for step, why in whys.items():
        write(tmp_path / "trial", step, why=why, ranks=1 if step == 12 else 2)
        drop_old_states(Storage.open(str(tmp_path / "trial")))
    folders = {step: tmp_path / "trial" / folder_of(step) for step in whys}
    assert [step for step, folder in folders.items() if (folder / "state").exists()] == [4, 8, 10, 12]
    assert all((folder / "series.json").exists() for folder in folders.values())
    assert found(tmp_path / "trial")[0] == folder_of(10)


def test_without_an_intact_one_a_training_begins_anew(trial: Path) -> None:
    for step in (2, 4, 6):
        flip(STATE)(trial / folder_of(step))
    told: list[str] = []
    assert last_intact(Storage.open(str(trial)), told.append) is None
    assert [folder_of(step) in line for step, line in zip((6, 4, 2), told, strict=True)] == [True] * 3


def test_damaged_weights_are_not_published(trial: Path) -> None:
    rung = Storage.open(str(trial / folder_of(6)))
    flip(STATE)(trial / folder_of(6))
    require_intact(rung)  # the state is not published
    flip(WEIGHTS)(trial / folder_of(6))
    with pytest.raises(ConfigError, match=f"{folder_of(6)}: damaged: {WEIGHTS}; delete that folder"):
        require_intact(rung)


def test_a_rung_of_damaged_weights_is_told_and_not_measured(trial: Path) -> None:
    flip(WEIGHTS)(trial / folder_of(4))
    flip(STATE)(trial / folder_of(6))  # of which no score depends
    told: list[str] = []
    kept = [rung for rung in rungs_of(Storage.open(str(trial))) if intact(rung, told.append)]
    assert [rung.step for rung in kept] == [2, 6]
    assert told == [f"{trial / folder_of(4)} is not measured: damaged: {WEIGHTS}"]


def test_what_is_added_to_a_checkpoint_later_is_no_damage(trial: Path) -> None:
    (trial / folder_of(6) / "samples").mkdir()
    (trial / folder_of(6) / "samples" / "0-a-cat.png").write_bytes(b"PNG")
    assert damaged(Storage.open(str(trial / folder_of(6)))) == []


def test_a_rung_whose_report_was_lost_is_found(trial: Path) -> None:
    (trial / folder_of(2) / REPORTED).touch()
    write(trial, 3, why="interval")
    folder = Storage.open(str(trial))
    assert [rung.step for rung in unreported(folder)] == [4, 6]
    assert [rung.step for rung in unreported(folder, until=4)] == [4]


def test_a_rung_with_damaged_measurements_is_none(trial: Path) -> None:
    (trial / folder_of(4) / "progress.json").write_text("no JSON")
    rungs = find_rungs(Storage.open(str(trial.parent)))["trial"]
    assert [rung.step for rung in rungs] == [2, 6]
