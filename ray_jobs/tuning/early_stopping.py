"""Early stopping of a single training by its validation loss, with `search.patience` as in a search.

A rung is measured in the training's controller, by an evaluator, while the workers train on or wait
(`search.wait_for_scores`). Its row is kept in the training's folder, so that a training that starts again
measures nothing twice and decides as before.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ray.train import ControllerError, UserCallback

from cluster.storage import Storage
from ray_jobs.config import Config
from ray_jobs.console import say
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.evaluation.pool import EvaluatorPool, evaluators
from ray_jobs.metrics.ranking import Candidate, winner
from ray_jobs.run.folder import RunFolder
from ray_jobs.run.records import Record, RungRow, paired_error
from ray_jobs.run.signs import no_change_line
from ray_jobs.training.checkpoint import REPORTED, Rung, rungs_of
from ray_jobs.training.monitor import RUNG
from ray_jobs.tuning.stopping import Patience
from ray_jobs.tuning.trial import intact

ROWS = "validation.jsonl"


class LossRow(Record):
    """A measured rung of a single training (one line of validation.jsonl).

    Attributes:
        validation_losses: loss of each held-out row, in the order of their digests.
        checkpoint: URI of the checkpoint.
    """

    step: int
    validation_loss: float
    validation_losses: list[float]
    checkpoint: str


class StoppedEarly(Exception):
    """The validation loss has not improved for `search.patience` rungs."""


def waited(rows: Sequence[LossRow], patience: int) -> tuple[bool, int]:
    """Return whether a training stops after its measured rungs, and at how many it has not improved.

    An improvement is larger than its own standard error, from the pairs of losses of each held-out row.

    Args:
        rows: in ascending order of step.
    """
    stopper = Patience(patience)
    best: LossRow | None = None
    for row in rows:
        error = paired_error(row.validation_losses, best.validation_losses) if best else None
        result = {"step": row.step, "score": row.validation_loss, "score_error": error}
        if stopper("", result):
            return True, patience
        if best is None or row.validation_loss < best.validation_loss:
            best = row
    return False, stopper.waited.get("", 0)


def best_of(rows: Sequence[LossRow]) -> LossRow:
    """Return the row of the lowest loss, or an earlier one within the error of the difference."""
    lowest = min(rows, key=lambda row: (row.validation_loss, row.step))

    def candidate(row: LossRow) -> Candidate:
        earlier = row.step < lowest.step  # one with more steps cannot win a tie
        error = paired_error(row.validation_losses, lowest.validation_losses) if earlier else None
        return Candidate(row.validation_loss - lowest.validation_loss, error or 0.0, row.step)

    return rows[winner([candidate(row) for row in rows])]


@dataclass(frozen=True)
class Validation:
    """Validation of a training: measures its rungs and decides when it has waited long enough.

    Attributes:
        name: name of the training.
        pool: one evaluator.
        board: handle of a ProgressBoard.
    """

    config: Config
    name: str
    pool: EvaluatorPool
    board: Any

    @property
    def folder(self) -> Storage:
        return RunFolder.of(self.config).training(self.name)

    @property
    def rows(self) -> list[LossRow]:
        """The measured rungs in ascending order of step."""
        where = f"{self.folder.uri}/{ROWS}"
        return [LossRow.parse(line, where) for line in self.folder.read_lines(ROWS)]

    def rung_rows(self) -> list[RungRow]:
        """Return the same as rows that tracking mirrors: without scores of pictures."""
        return [RungRow(trial_id=self.name, fid=math.nan, **row.fields()) for row in self.rows]

    @property
    def has_stopped(self) -> bool:
        """Return whether the measured rungs stop the training."""
        return waited(self.rows, self._patience)[0]

    @property
    def _patience(self) -> int:
        assert self.config.search.patience is not None
        return self.config.search.patience

    def measure(self, until: float = math.inf) -> None:
        """Measure the rungs up to a step that are not measured yet, unless the training stops before.

        Raises:
            StoppedEarly: the training stops.
            RuntimeError: a rung is damaged whose loss the workers wait for.
        """
        rows = self.rows
        done = {row.step for row in rows}
        for rung in rungs_of(self.folder):
            if waited(rows, self._patience)[0]:
                break
            if rung.step in done or rung.step > until:
                continue
            if not intact(rung, lambda line: self.board.post.remote(line, line)):
                if self.config.search.wait_for_scores:  # the training restarts before this rung
                    raise RuntimeError(f"{rung.uri} is damaged, and search.wait_for_scores waits for it")
                continue
            rows.append(self._row(rung))
            self.folder.write_lines(ROWS, (row.versioned() for row in rows))
            self._tell(rows)
            Storage.open(rung.uri).write_text(REPORTED, "")
        if waited(rows, self._patience)[0]:
            raise StoppedEarly

    def _row(self, rung: Rung) -> LossRow:
        losses = self.pool.validation_losses(rung.weights)
        return LossRow(
            step=rung.step,
            validation_loss=fmean(losses),
            validation_losses=[round(each, 7) for each in losses],
            checkpoint=rung.uri,
        )

    def _tell(self, rows: list[LossRow]) -> None:
        count = waited(rows, self._patience)[1]
        since = f", no improvement at {count} of {self._patience} rungs" if count else ""
        line = f"{self.name}  rung {rows[-1].step}: validation loss {rows[-1].validation_loss:.4f}{since}"
        self.board.post.remote(f"{self.name}/loss at {rows[-1].step}", line)

    def fit(self, trainer: Any) -> None:
        """Train to the end of the ladder, or until the validation loss no longer improves."""
        try:
            self.measure()  # what an earlier start has left
            trainer.fit()
            self.measure()  # reports are lost with their workers
        except StoppedEarly:
            pass
        except ControllerError as error:
            if not isinstance(error.controller_failure, StoppedEarly):
                raise

    def best(self) -> Rung:
        """Return the best measured rung, and name it."""
        rows = self.rows
        best, lowest = best_of(rows), min(rows, key=lambda row: row.validation_loss)
        if self.has_stopped:
            say("train", f"stopped early: no improvement at {self._patience} rungs (search.patience)")
        if line := no_change_line(self.name, rows):
            say("train", line)
        tie = "the lowest"
        if best is not lowest:
            tie = f"within the error of the lowest ({lowest.validation_loss:.4f} at step {lowest.step})"
        say(
            "train",
            f"best: step {best.step}, validation loss {best.validation_loss:.4f}, {tie}; checkpoint "
            f"{best.checkpoint}",
        )
        [found] = [rung for rung in rungs_of(self.folder) if rung.step == best.step]
        return found


class ValidationCallback(UserCallback):
    """Callback in the training's controller: measure each rung; end the training if it has waited enough."""

    def __init__(self, validation: Validation) -> None:
        self.validation = validation

    def after_report(self, run_context: object, metrics: list[dict[str, Any]], checkpoint: object) -> None:
        if metrics[0]["why"] == RUNG:
            self.validation.measure(until=metrics[0]["step"])


@contextmanager
def validated(config: Config, dataset: Dataset, name: str, board: Any) -> Iterator[Validation | None]:
    """Yield the validation of a single training, with an evaluator of its own; None without `patience`."""
    if config.search.patience is None:
        yield None
        return
    if not dataset.manifest.held_out:
        say(
            "train",
            "search.patience: too few pictures to hold any out: the loss is that of training pictures",
        )
    evaluate = config.evaluate.model_copy(update={"num_actors": 1})
    with evaluators(config.model_copy(update={"evaluate": evaluate}), dataset) as pool:
        pool.wait_until_placed()  # before workers that are elastic take its place
        yield Validation(config, name, pool, board)
