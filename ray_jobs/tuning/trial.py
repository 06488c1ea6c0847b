"""One trial of a search: a training that climbs the ladder, each rung measured as it comes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from cluster.storage import Storage
from ray_jobs.config import Config, Settings
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.evaluation.pool import EvaluatorPool
from ray_jobs.run.names import training_of, trial_id
from ray_jobs.training.checkpoint import REPORTED, WEIGHTS, Rung, damaged, rungs_of
from ray_jobs.training.monitor import RUNG
from ray_jobs.training.trainer import build_trainer, check_diverged
from ray_jobs.tuning.space import further


@dataclass(frozen=True)
class Trial:
    """What a trial trains with, and how far.

    Attributes:
        trial_id: what its rungs are found by.
        ladder: its own, up to the rung where it ends.
        fold: of cross-validation: which one judges; None: the validation split.
        training: folder of its checkpoints.
        start: checkpoint to begin from, which another trial has left; None: the base model.
        begins_at: the step of that checkpoint.
    """

    trial_id: str
    settings: Settings
    ladder: list[int]
    training: str
    fold: int | None = None
    start: str | None = None
    begins_at: int = 0

    @staticmethod
    def of(settings: Settings, ladder: list[int], fold: int | None = None) -> "Trial":
        """Named by its settings and its fold."""
        name = trial_id(settings)
        return Trial(name, settings, ladder, name if fold is None else f"{name}_fold-{fold}", fold)

    @property
    def split(self) -> str:
        """Whose pictures judge it."""
        return "validation" if self.fold is None else f"fold-{self.fold}"

    def labels(self, config: Config) -> dict[str, Any]:
        """What tells its rows from others'."""
        rate = config.with_settings(self.settings).train.learning_rate
        found = {
            "trial_id": self.trial_id,
            "training": self.training,  # Tune puts a name of its own in the place of trial_id
            "learning_rate": rate,
            "settings": further(self.settings),
        }
        if self.fold is not None:
            found["fold"] = self.fold
        if self.start:
            found |= {"parent": self.start, "begins_at": self.begins_at}
        return found


Make = Callable[[Settings], Trial]
"""The trial that a point of the space stands for."""


@dataclass(frozen=True)
class Surroundings:
    """What every trial of a search works with.

    Attributes:
        board: handle of a ProgressBoard.
        recorded: rows of rungs that were measured before.
    """

    config: Config
    dataset: Dataset
    pool: EvaluatorPool
    board: Any
    recorded: list[dict[str, Any]]


def run_trial(space: dict[str, Any], *, make: Make, around: Surroundings) -> None:
    """What Tune runs: train to the end of the trial's ladder, reporting the row of each rung.

    Raises:
        RuntimeError: its loss diverged.
    """
    trial, config, pool = make(space), around.config, around.pool
    labels = trial.labels(config)
    known = {row["step"]: row for row in around.recorded if training_of(row) == trial.training}
    folder = Storage.open(config.storage).child(config.name, "train", trial.training)
    tell = _teller(trial, around.board)
    rungs = [rung for rung in rungs_of(folder) if rung.metrics["step"] in known or intact(rung, tell)]
    for rung in rungs:
        step = rung.metrics["step"]
        tune.report(known[step] if step in known else measure(rung, labels, trial.split, pool))
        Storage.open(rung.uri).write_text(REPORTED, "")
    check_diverged(folder)  # it would again
    if not rungs or rungs[-1].metrics["step"] < trial.ladder[-1]:
        waits = config.search.wait_for_scores
        train_trial(trial, around, [RungCallback(trial, labels, pool, folder, tell, waits)])
        for rung in unreported(folder):
            if intact(rung, tell):
                tune.report(measure(rung, labels, trial.split, pool))
            elif rung.metrics["step"] == trial.ladder[-1]:
                raise RuntimeError(f"{rung.uri} is damaged, and is trained again")


Tell = Callable[[str], None]


def _teller(trial: Trial, board: Any) -> Tell:
    """Puts a line on the board, of which the driver prints it."""
    return lambda line: board.post.remote(f"{trial.training}/{line}", line)


def intact(rung: Rung, tell: Tell) -> bool:
    """Whether a rung has the weights that its training wrote; others are told, and worth no score.

    Where there is none behind it, the training passes it over too, and makes it again.
    """
    if wrong := damaged(Storage.open(rung.uri), WEIGHTS):
        tell(f"{rung.uri} is not measured: damaged: {', '.join(wrong)}")
    return not wrong


def unreported(folder: Storage, until: float = math.inf) -> list[Rung]:
    """The rungs of a training, up to a step, that Tune was not told of.

    Workers that die take with them the reports that nobody has fetched yet; their checkpoints stay, and the
    workers that follow go on behind them.
    """
    rungs = [rung for rung in rungs_of(folder) if rung.metrics["step"] <= until]
    return [rung for rung in rungs if not Storage.open(rung.uri).exists(REPORTED)]


def train_trial(trial: Trial, around: Surroundings, callbacks: list[Any]) -> None:
    """Train to the end of a trial's ladder.

    Raises:
        RuntimeError: its loss diverged.
        DamagedPart: a file of the data set was moved aside meanwhile.
    """
    dataset, config = around.dataset, around.config
    dataset.require_parts()
    build_trainer(
        config.with_settings(trial.settings),
        dataset if trial.fold is None else dataset.leave_out(trial.fold),
        name=trial.training,
        ladder=trial.ladder,
        start=trial.start,
        callbacks=callbacks,
        board=around.board,
        # Without callbacks nobody measures a rung.
        wait_for_scores=config.search.wait_for_scores and bool(callbacks),
    ).fit()
    check_diverged(Storage.open(config.storage).child(config.name, "train", trial.training))


def measure(rung: Rung, labels: dict[str, Any], split: str, pool: EvaluatorPool) -> dict[str, Any]:
    """A rung's line: what the training reported, and the scores of its weights, of which samples are kept."""
    scores = pool.score(rung.weights, split, Storage.open(rung.uri))
    measured = {**labels, "checkpoint": rung.uri}
    losses = pool.validation_losses(rung.weights, split)
    measured |= {"validation_loss": fmean(losses), "validation_losses": [round(each, 7) for each in losses]}
    return rung.metrics | measured | scores.row() | scores.origin


class RungCallback(TuneReportCallback):
    """In the training's controller: measure each checkpoint, then tell Tune, whose scheduler decides.

    The workers train on towards the next rung meanwhile, or wait for it (`search.wait_for_scores`).
    """

    def __init__(
        self,
        trial: Trial,
        labels: dict[str, Any],
        pool: EvaluatorPool,
        folder: Storage,
        tell: Tell,
        waits: bool,
    ) -> None:
        super().__init__()
        self.trial, self.labels, self.pool, self.folder = trial, labels, pool, folder
        self.tell, self.waits = tell, waits

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if metrics[0]["why"] != RUNG:
            return  # a checkpoint to go on from, between rungs
        for rung in unreported(self.folder, until=metrics[0]["step"]):
            if not intact(rung, self.tell):
                if self.waits:  # for a score that will never be: the training starts again before it
                    raise RuntimeError(f"{rung.uri} is damaged, and search.wait_for_scores waits for it")
                continue
            row = measure(rung, self.labels, self.trial.split, self.pool)
            super().after_report(run_context, [row], None)
            Storage.open(rung.uri).write_text(REPORTED, "")


def refitted(trial: Trial, step: int, around: Surroundings) -> Rung:
    """Train a trial's settings on training and validation pictures together, to a step.

    Raises:
        RuntimeError: its loss diverged.
    """
    ladder = [rung for rung in trial.ladder if rung <= step]
    last = replace(trial, fold=None, ladder=ladder, training=f"{trial.trial_id}_refit")
    trainings = Storage.open(around.config.storage).child(around.config.name, "train")

    def rungs() -> list[Rung]:
        found = rungs_of(trainings.child(last.training))
        return [rung for rung in found if rung.metrics["step"] == step]

    if not rungs():
        whole = replace(around, dataset=around.dataset.together())
        train_trial(last, whole, [])
    [rung] = rungs()
    return rung
