"""A single training stops by its validation loss as a search stops a trial by its score."""

from pathlib import Path

import pytest

from cluster.capacity import actors_of
from cluster.storage import Storage
from ray_jobs.config import load_config
from ray_jobs.run.records import paired_error
from ray_jobs.tuning.early_stopping import ROWS, LossRow, best_of, waited

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def rows(*losses: list[float]) -> list[LossRow]:
    """One rung per list of the held-out rows' losses, at the steps 10, 20, ..."""
    return [
        LossRow(
            step=10 * number,
            validation_loss=sum(each) / len(each),
            validation_losses=each,
            checkpoint=f"at {10 * number}",
        )
        for number, each in enumerate(losses, start=1)
    ]


def test_what_rows_have_in_common_is_no_error() -> None:
    assert paired_error([1.0, 5.0, 9.0], [2.0, 6.0, 10.0]) == 0
    assert paired_error([1.0, 3.0], [1.0, 1.0]) == pytest.approx(1.0)
    assert paired_error([1.0], [2.0]) is None and paired_error([1.0, 2.0], [1.0]) is None


def test_a_training_stops_after_the_rungs_of_its_patience_without_an_improvement() -> None:
    measured = rows([0.9, 0.1], [0.8, 0.0], [0.7, -0.1], [0.8, 0.1], [0.9, 0.1], [0.6, -0.2])
    assert [waited(measured[:count], 2) for count in range(1, 7)] == [
        *[(False, 0)] * 3,
        (False, 1),
        (True, 2),
        (True, 2),  # a rung that was trained in vain does not start it again
    ]
    assert waited(measured, 3) == (False, 0), "more patience does"


def test_an_improvement_within_its_own_error_is_none() -> None:
    assert waited(rows([0.5, 0.5], [0.2, 0.7]), 1) == (True, 1)  # lower by 0.05 with an error of 0.25


def test_the_best_rung_is_the_lowest_or_an_earlier_one_within_the_error() -> None:
    assert best_of(rows([0.5, 0.5], [0.2, 0.7], [0.6, 0.6])).step == 10
    assert best_of(rows([0.5, 0.5], [0.4, 0.4], [0.6, 0.6])).step == 20


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    folder, written = Storage.open(str(tmp_path)), rows([0.5, 0.25], [0.125, 0.5])
    folder.write_lines(ROWS, (row.versioned() for row in written))
    assert [LossRow.parse(line, ROWS) for line in folder.read_lines(ROWS)] == written


def test_patience_gives_a_single_training_an_evaluator() -> None:
    def kinds(*overrides: str) -> dict[str, int]:
        return {each.kind: each.count for each in actors_of(load_config(DEMO, [*overrides]), "train")}

    assert "evaluator" not in kinds()
    assert kinds("search.patience=2") == kinds() | {"evaluator": 1}
