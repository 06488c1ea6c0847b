"""Tracking: mirror the metrics of every training to MLflow while it trains; one MLflow run per trial.

The run's storage is the source of truth and MLflow its mirror: each pass logs what the checkpoints and the
evaluated rungs have and MLflow lacks. So the next pass makes up for one that failed, a resumed training
continues the same MLflow run, and no step is logged twice. The passes run in a thread of the driver, so a
single process writes and no training waits for it.
"""

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.sqlite import sqlite_file
from cluster.storage import Storage
from ray_jobs.config import Config, Section
from ray_jobs.console import say
from ray_jobs.registry.models import check_store, open_client, store_errors, tracking_uri
from ray_jobs.registry.store import experiment_id, retried
from ray_jobs.run.folder import RunFolder, SharedFolder
from ray_jobs.run.records import CONTROL, DISAGREEMENT, SUBJECT, SUBJECT_PARTS, Progress, RungRow
from ray_jobs.run.samples import PROMPTS, SAMPLES, sheet
from ray_jobs.training.checkpoint import SERIES, folder_of, read_progress, steps_of
from ray_jobs.training.loop import DIVERGED
from ray_jobs.training.monitor import Series

POLL_S = 10.0  # seconds
PATIENCE = 60.0  # seconds that the end of a stage waits for a slow store
LARGEST_BATCH = 1000  # metrics that MLflow accepts in one call
STEP_METRICS = {"train/loss": "loss", "train/grad_norm": "grad_norm", "train/learning_rate": "learning_rate"}
CHECKPOINT_METRICS = {
    "train/images_per_second": "images_per_second",
    "train/waiting_for_data": "waiting_for_data",
}
RUNG_METRICS = {
    "validation/fid": "fid",
    "validation/fid_error": "fid_error",
    "validation/corrected_fid": "corrected_fid",
    "validation/corrected_fid_error": "corrected_fid_error",
    "validation/spread": "spread",
    "validation/kid": "kid",
    "validation/kid_error": "kid_error",
    "validation/mind": "mind",
    "validation/mind_error": "mind_error",
    **{f"validation/{name}": name for part in (SUBJECT, *SUBJECT_PARTS) for name in (part, f"{part}_error")},
    **{f"validation/{name}": name for part in (CONTROL, DISAGREEMENT) for name in (part, f"{part}_error")},
    "validation/wrong_votes": "votes",
    "validation/wrong_votes_error": "votes_error",
    "validation/fid_2": "fid_2",
    "validation/fid_2_error": "fid_2_error",
    "validation/loss": "validation_loss",
}
RUNG_MARKS = ("validation/fid", "validation/loss")  # one of them means that the rung was logged
# Tags that identify an MLflow run: a digest of the checkpoints' location, and the trial.
TRAININGS_TAG, TRIAL_TAG = "diffray.trainings", "diffray.trial"

Rows = list[RungRow]


@contextmanager
def opened_store(config: Config) -> Iterator[None]:
    """Open the MLflow store while the block runs: importing MLflow and creating a SQLite file take seconds.

    Raises:
        ConfigError: no server answers (raised at once), or the store refuses (raised at the block's end).
    """
    check_store(config)
    with ThreadPoolExecutor(1) as beside:
        opened = beside.submit(_open, config)
        yield
        opened.result()


def _open(config: Config) -> None:
    with store_errors(config):
        _experiment(open_client(config), config)


def _experiment(client: Any, config: Config) -> str:
    """Return the ID of the run's MLflow experiment.

    With a SQLite store, images go to the run's storage too: MLflow's default is the current folder, and a
    job's folder is gone after the job.
    """
    place = None
    if sqlite_file(tracking_uri(config)):
        place = Path(SharedFolder.of(config).artifacts(config.name).uri).as_uri()
    return experiment_id(client, config.name, artifacts=place)


@contextmanager
def tracked(
    config: Config, trials: dict[str, Config], digest: str, rungs: Callable[[], Rows]
) -> Iterator["Mirror"]:
    """Mirror trainings to MLflow while the block runs; errors of the store do not interrupt the block.

    Args:
        trials: configuration of each trial by name; more can be added to the mirror.
        digest: digest of the prepared data.
        rungs: returns the rungs evaluated so far; all `RUNG_METRICS` that they have are logged, and the
            samples of a `checkpoint` are shown.
    """
    mirror, done = Mirror(config, trials, digest, rungs), threading.Event()
    thread = threading.Thread(target=_watch, args=(mirror, done), daemon=True)
    thread.start()
    try:
        yield mirror
        mirror.status = "FINISHED"
    finally:
        done.set()
        thread.join(PATIENCE)
        if thread.is_alive():
            say("tracking", f"{tracking_uri(config)} takes the last steps too slowly: going on without")


def _watch(mirror: "Mirror", done: threading.Event) -> None:
    """Log repeatedly until `done` is set, and then once more.

    A store must not end a training of hours: an error is reported at its first occurrence and at the end, and
    the next pass tries again. A store may accept numbers and refuse images, so each is tried separately.
    """
    said, last = set[str](), False

    def log() -> None:
        mirror.look()
        if last:
            mirror.end()

    while not last:
        last = done.wait(POLL_S)
        for what, file, task in (("steps", SERIES, log), ("pictures", SAMPLES, mirror.show_samples)):
            try:
                task()
            except Exception as error:
                if last or what not in said:
                    reason = " ".join(str(error).split())[:300]
                    then = (
                        f"the checkpoints have them, in {file}" if last else "training goes on, trying again"
                    )
                    say("tracking", f"MLflow lacks the latest {what} ({reason}); {then}")
                said.add(what)


@dataclass
class MlflowRun:
    """State of a trial's MLflow run.

    Attributes:
        step: last step logged.
        rungs: steps whose scores are logged.
        shown: steps whose images were logged since this program started; earlier ones are logged again.
    """

    id: str
    step: int
    rungs: set[int]
    shown: set[int] = field(default_factory=set)


class Mirror:
    """Mirror of a run's trainings in MLflow. Create it before they start or resume.

    Args:
        config, trials, digest, rungs: see `tracked`.
    """

    def __init__(
        self, config: Config, trials: dict[str, Config], digest: str, rungs: Callable[[], Rows]
    ) -> None:
        self.config, self.digest, self.rungs = config, digest, rungs
        self.trainings = RunFolder.of(config).trainings
        self.trials: dict[str, Config] = {}
        self.began_after: dict[str, int] = {}
        for trial, settings in trials.items():
            self.add(trial, settings)
        self.runs: dict[str, MlflowRun] = {}
        self.status = "FAILED"
        self.client: Any = None

    def add(self, trial: str, config: Config) -> None:
        """Mirror another training; call this before it starts or resumes."""
        if trial not in self.trials:
            self.began_after[trial] = max(steps_of(self.trainings.child(trial)), default=0)
            self.trials[trial] = config

    def look(self) -> None:
        """Log the steps and scores that are new since the last pass.

        Raises:
            MlflowException: the store refuses or cannot be reached.
        """
        self.client = self.client or open_client(self.config)
        for trial in list(self.trials):  # another thread adds to it
            self._log_steps(trial)
        for row in self.rungs():
            self._log_rung(row)

    def show_samples(self) -> None:
        """Log the samples of each evaluated rung as one contact sheet (PNG).

        Raises:
            MlflowException: the store refuses or cannot be reached.
        """
        for row in self.rungs():
            run = self.runs.get(row.training_name)
            if run is None or row.step in run.shown or not row.checkpoint:
                continue
            for name in (SAMPLES, PROMPTS):
                if pictures := sheet(Storage.open(row.checkpoint).child(name)):
                    self.client.log_image(run.id, pictures, artifact_file=f"{name}/{folder_of(row.step)}.png")
            run.shown.add(row.step)

    def end(self) -> None:
        """Set the final status of each MLflow run."""
        for trial, run in self.runs.items():
            diverged = self.trainings.child(trial).exists(DIVERGED)
            self.client.set_terminated(run.id, "FAILED" if diverged else self.status)

    def _log_steps(self, trial: str) -> None:
        below, known, some_not_whole = self.trainings.child(trial), self.runs.get(trial), False
        for step in steps_of(below):
            if known and step <= known.step:
                continue
            checkpoint = below.child(folder_of(step))
            progress = read_progress(checkpoint)
            if progress is None:
                some_not_whole = True
                continue
            series = json.loads(checkpoint.read_text(SERIES))
            known = self._run(trial, started=_milliseconds(series[0]))
            if some_not_whole and series[0]["step"] > known.step + 1:
                return  # the steps between are still being written
            self._log_checkpoint(known, series, progress)

    def _log_checkpoint(self, run: MlflowRun, series: Series, progress: Progress) -> None:
        """Log a checkpoint's new steps, in batches that MLflow accepts whole or not at all."""
        from mlflow.entities import Metric

        new = [row for row in series if row["step"] > run.step]
        size = LARGEST_BATCH // len(STEP_METRICS) - 1
        for start in range(0, len(new), size):
            rows = new[start : start + size]
            metrics = [
                Metric(name, float(row[field]), _milliseconds(row), int(row["step"]))
                for row in rows
                for name, field in STEP_METRICS.items()
                if field in row  # a step that was skipped has no gradient norm
            ]
            last = int(rows[-1]["step"])
            if last == progress.step:
                metrics += [
                    Metric(name, getattr(progress, field), _milliseconds(rows[-1]), last)
                    for name, field in CHECKPOINT_METRICS.items()
                ]
            self.client.log_batch(run.id, metrics=metrics)
            run.step = last

    def _log_rung(self, row: RungRow) -> None:
        from mlflow.entities import Metric

        run = self.runs.get(row.training_name)
        found = {name: getattr(row, field) for name, field in RUNG_METRICS.items()}
        finite = {name: value for name, value in found.items() if value is not None and math.isfinite(value)}
        if run is None or row.step in run.rungs or finite.keys().isdisjoint(RUNG_MARKS):
            return
        now = int(1000 * time.time())
        self.client.log_batch(run.id, metrics=[Metric(*each, now, row.step) for each in finite.items()])
        run.rungs.add(row.step)

    def _run(self, trial: str, started: int) -> MlflowRun:
        """Return the MLflow run of a trial: the one from before an interruption, or a new one."""
        if trial not in self.runs:
            experiment = _experiment(self.client, self.config)
            place = hashlib.sha256(self.trainings.uri.encode()).hexdigest()[:16]
            tags = {TRAININGS_TAG: place, TRIAL_TAG: trial}
            run = self._former(experiment, trial, tags) or self._new(experiment, trial, tags, started)
            self.runs[trial] = run
        return self.runs[trial]

    def _former(self, experiment: str, trial: str, tags: dict[str, str]) -> MlflowRun | None:
        wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        newest = ["attributes.start_time DESC"]
        found = self.client.search_runs([experiment], wanted, order_by=newest, max_results=1)
        if not found:
            return None
        run_id = found[0].info.run_id
        steps, *rungs = (
            {metric.step for metric in self.client.get_metric_history(run_id, name)}
            for name in ("train/loss", *RUNG_MARKS)
        )
        run = MlflowRun(run_id, max(steps, default=0), set[int]().union(*rungs))
        if run.step > self.began_after[trial]:
            return None  # belongs to a deleted training of the same name
        if not found[0].data.params:  # it was interrupted before it had any
            self._log_params(run_id, trial)
        self.client.update_run(run_id, status="RUNNING")
        return run

    def _new(self, experiment: str, trial: str, tags: dict[str, str], started: int) -> MlflowRun:
        run = retried(lambda: self.client.create_run(experiment, started, tags, run_name=trial))
        self._log_params(run.info.run_id, trial)
        return MlflowRun(run.info.run_id, 0, set())

    def _log_params(self, run_id: str, trial: str) -> None:
        from mlflow.entities import Param

        params = run_params(self.trials[trial], self.digest)
        self.client.log_batch(run_id, params=[Param(*each) for each in params.items()])


def run_params(config: Config, digest: str) -> dict[str, str]:
    """Return the parameters by which trials are compared: base model, data, seed and `train` section.

    The resolved `train` section is flattened; empty values are left out.
    """
    train = config.train
    return _flat("train", train, set() if train.method == "lora" else {"lora"}) | {
        "seed": str(config.seed),
        **_flat("model", config.model, set()),
        "data.digest": digest,
        "data.resolution": str(config.data.resolution),
    }


def _flat(prefix: str, section: Section, without: set[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section) and name not in without:
            found |= _flat(f"{prefix}.{name}", value, set())
        elif value not in (None, [], {}) and not isinstance(value, Section):
            plain = section.model_dump(mode="json", include={name})[name]
            found[f"{prefix}.{name}"] = plain if isinstance(plain, str) else json.dumps(plain)
    return found


def _milliseconds(row: dict[str, float]) -> int:
    """Return the time at which a step ended, in milliseconds since 1970 as MLflow expects."""
    return int(1000 * row["time"])
