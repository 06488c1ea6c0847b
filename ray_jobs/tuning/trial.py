"""One trial of a search: a training that climbs the ladder and is measured at each rung."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.tune.integration.ray_train import TuneReportCallback

from cluster.promise import Promise
from cluster.storage import Storage
from ray_jobs.config import Config, Settings
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.evaluation.pool import EvaluatorPool
from ray_jobs.run.folder import RunFolder
from ray_jobs.run.names import trial_id
from ray_jobs.run.records import RungRow, read_rows
from ray_jobs.run.split import VALIDATION, Split, refit_of, training_of
from ray_jobs.training.checkpoint import REPORTED, WEIGHTS, Rung, damaged, rungs_of
from ray_jobs.training.loop import LoopSettings
from ray_jobs.training.monitor import RUNG
from ray_jobs.training.trainer import begin_training, build_trainer, check_diverged
from ray_jobs.tuning.space import other_settings
from ray_jobs.tuning.stopping import WORKER_SECONDS

Tell = Callable[[str], None]
Labels = dict[str, Any]
"""Columns of results.jsonl that identify a trial."""


@dataclass(frozen=True)
class Trial:
    """Settings and extent of a trial.

    Attributes:
        trial_id: name that identifies its rungs.
        ladder: the trial's own ladder, up to its last rung.
        training: folder of its checkpoints.
        fold: cross-validation fold to evaluate on; None: the validation split.
        start: checkpoint of another trial to start from; None: the base model.
        begins_at: step of that checkpoint.
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
        """Create a trial named after its settings and fold."""
        name = trial_id(settings)
        split = VALIDATION if fold is None else Split.of_fold(fold)
        return Trial(name, settings, ladder, training_of(name, split), fold)

    @property
    def split(self) -> Split:
        """Split that the trial is evaluated on."""
        return VALIDATION if self.fold is None else Split.of_fold(self.fold)

    def labels(self, config: Config) -> Labels:
        """Columns that identify this trial in results.jsonl."""
        rate = config.with_settings(self.settings).train.learning_rate
        found: Labels = {
            "trial_id": self.trial_id,
            "training": self.training,  # Tune replaces trial_id with its own
            "learning_rate": rate,
            "settings": other_settings(self.settings),
        }
        if self.fold is not None:
            found["fold"] = self.fold
        if self.start:
            found |= {"parent": self.start, "begins_at": self.begins_at}
        return found


Make = Callable[[Settings], Trial]
"""Function that creates the trial of a point in the space."""


@dataclass(frozen=True)
class SearchContext:
    """Context shared by all trials of a search.

    Attributes:
        pool: what measures the rungs; promised, since trials start while it measures real pictures.
        board: handle of a ProgressBoard.
        queue: handle of a PackQueue; None if each trial has its own workers.
    """

    config: Config
    dataset: Dataset
    pool: Promise[EvaluatorPool]
    board: ActorHandle
    queue: ActorHandle | None = None


def run_trial(space: Settings, *, make: Make, around: SearchContext) -> None:
    """Train to the end of the trial's ladder, reporting each rung's row to Tune. This is Tune's trainable.

    Raises:
        RuntimeError: the loss diverged, or the last rung is damaged.
    """
    trial, config, pool = make(space), around.config, around.pool
    labels = trial.labels(config)
    # Read here: a driver that starts again finds the rungs that were measured meanwhile.
    rows = read_rows(RunFolder.of(config).search)
    known = {row.step: row for row in rows if row.training_name == trial.training}
    folder = RunFolder.of(config).training(trial.training)
    tell = _teller(trial, around.board)
    rungs = [rung for rung in rungs_of(folder) if rung.step in known or intact(rung, tell)]
    for rung in rungs:
        row = known.get(rung.step) or measure(rung, labels, trial.split, pool.wait())
        tune.report(reported(row) | _share(trial, around))
        Storage.open(rung.uri).write_text(REPORTED, "")
    check_diverged(folder)  # a diverged training would diverge again
    if rungs and rungs[-1].step >= trial.ladder[-1]:
        return
    if around.queue is not None:
        train_packed(trial, around, tell, rungs[-1].step if rungs else 0)
    else:
        waits = config.search.wait_for_scores
        train_trial(trial, around, [RungCallback(trial, labels, pool, folder, tell, waits)])
        for rung in unreported(folder):
            if intact(rung, tell):
                tune.report(reported(measure(rung, labels, trial.split, pool.wait())))
            elif rung.step == trial.ladder[-1]:
                raise RuntimeError(f"{rung.uri} is damaged, and is trained again")


def train_packed(trial: Trial, around: SearchContext, tell: Tell, step: int) -> None:
    """Train to the end of a trial's ladder together with other trials, reporting each rung's row to Tune.

    Args:
        step: of the last rung that is measured; 0 without one.

    Raises:
        RuntimeError: the loss diverged, the last rung is damaged, or the worker group has failed.
    """
    assert around.queue is not None
    settings = loop_settings(trial, around)
    begin_training(settings)
    folder, labels, queue = settings.trial, trial.labels(around.config), around.queue
    to_repeat = unreported(folder)
    if to_repeat and not settings.wait_for_scores:  # others are passed over, but for the last checkpoint
        last = rungs_of(folder)[-1].step
        to_repeat = [rung for rung in to_repeat if rung.step == last]
    if any(damaged(Storage.open(rung.uri), WEIGHTS) for rung in to_repeat):
        ray.get(queue.leave.remote(trial.training))  # to train again what an earlier start found damaged
    ray.get(queue.join.remote(trial.training, settings))
    while step < trial.ladder[-1]:
        found: int = ray.get(queue.news.remote(trial.training, step))
        for rung in unreported(folder, until=found):
            if intact(rung, tell):
                row = measure(rung, labels, trial.split, around.pool.wait())
                tune.report(reported(row) | _share(trial, around))
                Storage.open(rung.uri).write_text(REPORTED, "")
            elif rung.step == trial.ladder[-1] or (settings.wait_for_scores and rung.step > step):
                raise RuntimeError(f"{rung.uri} is damaged, and is trained again")
        if not found:
            check_diverged(folder)
        step = max(step, found)


def _share(trial: Trial, around: SearchContext) -> Labels:
    """Return what Tune gets to know of the workers' time if the trial shares them with others."""
    if around.queue is None:
        return {}
    seconds: float = ray.get(around.queue.seconds.remote(trial.training))
    return {WORKER_SECONDS: seconds}


def loop_settings(trial: Trial, around: SearchContext) -> LoopSettings:
    """Return what a trial's workers are told.

    Raises:
        DamagedPart: a file of the dataset has been moved aside as damaged.
    """
    dataset, config = around.dataset, around.config
    dataset.require_parts()
    return LoopSettings(
        config.with_settings(trial.settings),
        dataset if trial.fold is None else dataset.leave_out(trial.fold),
        trial.training,
        trial.ladder,
        around.board,
        trial.start,
        config.search.wait_for_scores,
    )


def _teller(trial: Trial, board: ActorHandle) -> Tell:
    """Return a function that posts a line on the board, for the driver to print."""
    return lambda line: board.post.remote(f"{trial.training}/{line}", line)


def intact(rung: Rung, tell: Tell) -> bool:
    """Return whether a rung's weights are as its training wrote them; a damaged rung is reported, not scored.

    If no rung follows it, the training skips it too and trains up to it again.
    """
    if wrong := damaged(Storage.open(rung.uri), WEIGHTS):
        tell(f"{rung.uri} is not measured: damaged: {', '.join(wrong)}")
    return not wrong


def unreported(folder: Storage, until: float = math.inf) -> list[Rung]:
    """Rungs of a training, up to a step, that have not been reported to Tune.

    Reports not yet fetched are lost when workers die. The checkpoints remain, and the next workers resume
    after them.
    """
    rungs = [rung for rung in rungs_of(folder) if rung.step <= until]
    return [rung for rung in rungs if not Storage.open(rung.uri).exists(REPORTED)]


def train_trial(trial: Trial, around: SearchContext, callbacks: list["RungCallback"]) -> None:
    """Train to the end of a trial's ladder.

    Raises:
        RuntimeError: the loss diverged.
        DamagedPart: a file of the dataset has been moved aside as damaged.
    """
    settings = loop_settings(trial, around)
    build_trainer(
        settings.config,
        settings.dataset,
        name=settings.trial_id,
        ladder=settings.ladder,
        start=settings.start,
        callbacks=callbacks,
        board=settings.board,
        # Without callbacks no rung is scored, so the workers would wait forever.
        wait_for_scores=settings.wait_for_scores and bool(callbacks),
    ).fit()
    check_diverged(settings.trial)


def measure(rung: Rung, labels: Labels, split: Split, pool: EvaluatorPool) -> RungRow:
    """Score a rung's weights, saving pictures; return its row of training metrics and scores."""
    folder = Storage.open(rung.uri)
    scores = pool.score(rung.weights, split, folder)
    pool.prompts_of(rung.weights, folder)
    losses = pool.validation_losses(rung.weights, split)
    return RungRow.model_validate(
        {
            **labels,
            "step": rung.step,
            "ranked_by": pool.ranked_by(split),
            **scores.row(),
            **scores.origin,
            **({"black": scores.black} if scores.black else {}),
            "train_loss": rung.progress.train_loss,
            "validation_loss": fmean(losses),
            "validation_losses": [round(each, 7) for each in losses],
            "images_per_second": rung.progress.images_per_second,
            "checkpoint": rung.uri,
        }
    )


def reported(row: RungRow) -> Labels:
    """Return what Tune gets to know of a rung: its row, and what ranks it."""
    return row.fields() | {"score": row.score, "score_error": row.score_error}


class RungCallback(TuneReportCallback):
    """Callback in the training's controller: measure each checkpoint, then report it to Tune's scheduler.

    Meanwhile the workers train towards the next rung, or wait for the score (`search.wait_for_scores`).
    """

    def __init__(
        self,
        trial: Trial,
        labels: Labels,
        pool: Promise[EvaluatorPool],
        folder: Storage,
        tell: Tell,
        waits: bool,
    ) -> None:
        super().__init__()
        self.trial, self.labels, self.pool, self.folder = trial, labels, pool, folder
        self.tell, self.waits = tell, waits

    def after_report(self, run_context: object, metrics: list[Labels], checkpoint: object) -> None:
        if metrics[0]["why"] != RUNG:
            return  # a resume checkpoint between rungs
        for rung in unreported(self.folder, until=metrics[0]["step"]):
            if not intact(rung, self.tell):
                if self.waits:  # the score would never come; restart the training before this rung
                    raise RuntimeError(f"{rung.uri} is damaged, and search.wait_for_scores waits for it")
                continue
            row = measure(rung, self.labels, self.trial.split, self.pool.wait())
            super().after_report(run_context, [reported(row)], None)
            Storage.open(rung.uri).write_text(REPORTED, "")


def refitted(trial: Trial, step: int, around: SearchContext) -> Rung:
    """Train a trial's settings up to `step` on the training and validation splits together.

    Raises:
        RuntimeError: the loss diverged.
    """
    ladder = [rung for rung in trial.ladder if rung <= step]
    last = replace(trial, fold=None, ladder=ladder, training=refit_of(trial.trial_id))
    folder = RunFolder.of(around.config).training(last.training)

    def rungs() -> list[Rung]:
        found = rungs_of(folder)
        return [rung for rung in found if rung.step == step]

    if not rungs():
        whole = replace(around, dataset=around.dataset.together())
        if whole.queue is None:
            train_trial(last, whole, [])
        else:
            _train_unmeasured(last, whole)
    [rung] = rungs()
    return rung


def _train_unmeasured(trial: Trial, around: SearchContext) -> None:
    """Train to the end of a trial's ladder in the workers of a pack, without scores.

    Raises:
        RuntimeError: the loss diverged, or the worker group has failed.
    """
    queue = around.queue
    assert queue is not None
    settings = replace(loop_settings(trial, around), wait_for_scores=False)
    begin_training(settings)
    ray.get(queue.begin.remote(1))
    ray.get(queue.join.remote(trial.training, settings))
    step = 0
    while step < trial.ladder[-1]:
        step = ray.get(queue.news.remote(trial.training, step))
        if not step:
            check_diverged(settings.trial)
