"""Tracking: the series of every training, shown in MLflow while it trains; one MLflow run a trial.

What lies in the run's storage is the truth and MLflow its mirror: each look logs what the checkpoints and
the measured rungs have and MLflow lacks. So a look that fails is made good by the next one, a resumed
training goes on with the same MLflow run, and no step is logged twice. A thread of the driver looks, so one
process writes and no training waits for it.
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
from ray_jobs.run.names import training_of
from ray_jobs.run.samples import SAMPLES, sheet
from ray_jobs.training.checkpoint import SERIES, folder_of, read_progress, steps_of
from ray_jobs.training.loop import DIVERGED

LOOK_EVERY = 10.0  # seconds
PATIENCE = 60.0  # seconds that the end of a stage waits for a slow store
ARTIFACTS = "mlartifacts"  # folder in the storage, of the pictures beside a SQLite store
LARGEST_BATCH = 1000  # metrics that MLflow takes at once
STEP_METRICS = {"train/loss": "loss", "train/grad_norm": "grad_norm", "train/learning_rate": "learning_rate"}
CHECKPOINT_METRICS = {
    "train/images_per_second": "images_per_second",
    "train/waiting_for_data": "waiting_for_data",
}
RUNG_METRICS = {
    "validation/fid": "fid",
    "validation/fid_error": "fid_error",
    "validation/kid": "kid",
    "validation/kid_error": "kid_error",
    "validation/fid_2": "fid_2",
    "validation/fid_2_error": "fid_2_error",
    "validation/loss": "validation_loss",
}
FIRST_RUNG_METRIC = "validation/fid"  # a rung that has it was logged
# What an MLflow run is found by: a digest of where its checkpoints lie, and the trial.
TRAININGS_TAG, TRIAL_TAG = "diffray.trainings", "diffray.trial"

Rows = list[dict[str, Any]]


@contextmanager
def opened_store(config: Config) -> Iterator[None]:
    """Open the MLflow store beside the block; importing MLflow and making a SQLite file take seconds.

    Raises:
        ConfigError: no server answers (at once), or the store refuses (at the block's end).
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
    """The run's experiment. Beside a SQLite file the pictures lie in the storage too: MLflow's own choice is
    the current folder, which of a job is gone after it."""
    place = None
    if sqlite_file(tracking_uri(config)):
        place = Path(Storage.open(config.storage).child(ARTIFACTS, config.name).uri).as_uri()
    return experiment_id(client, config.name, artifacts=place)


@contextmanager
def tracked(
    config: Config, trials: dict[str, Config], digest: str, rungs: Callable[[], Rows]
) -> Iterator["Mirror"]:
    """Mirror trainings to MLflow while the block lasts. Whatever the store does, the block goes on.

    Args:
        trials: the configuration of each, by its name; more can be added to the mirror.
        digest: of the prepared data.
        rungs: the measured ones so far, as dicts of at least `trial_id`, `step`, `fid`; what else of
            `RUNG_METRICS` they have is logged too, and where they have a `checkpoint`, its samples are shown.
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
    """Look until all is done, and once more. Trainings of hours must not end because of a store: an error is
    said, at its first time and at the end, and the next look tries again. A store may take numbers and refuse
    pictures, so each is tried by itself."""
    said, last = set[str](), False

    def log() -> None:
        mirror.look()
        if last:
            mirror.end()

    while not last:
        last = done.wait(LOOK_EVERY)
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
    """What MLflow has of a trial.

    Attributes:
        step: the last one logged.
        rungs: steps whose scores are logged.
        shown: steps whose pictures were logged since this program started; the former are logged again.
    """

    id: str
    step: int
    rungs: set[int]
    shown: set[int] = field(default_factory=set)


class Mirror:
    """The trainings of a run, as MLflow shows them. To be made before they start or go on.

    Args:
        config, trials, digest, rungs: as `tracked` takes them.
    """

    def __init__(
        self, config: Config, trials: dict[str, Config], digest: str, rungs: Callable[[], Rows]
    ) -> None:
        self.config, self.digest, self.rungs = config, digest, rungs
        self.trainings = Storage.open(config.storage).child(config.name, "train")
        self.trials: dict[str, Config] = {}
        self.began_after: dict[str, int] = {}
        for trial, settings in trials.items():
            self.add(trial, settings)
        self.runs: dict[str, MlflowRun] = {}
        self.status = "FAILED"
        self.client: Any = None

    def add(self, trial: str, config: Config) -> None:
        """Mirror this training too; to be called before it starts or goes on."""
        if trial not in self.trials:
            self.began_after[trial] = max(steps_of(self.trainings.child(trial)), default=0)
            self.trials[trial] = config

    def look(self) -> None:
        """Log what has come since the last look.

        Raises:
            MlflowException: the store refuses or cannot be reached.
        """
        self.client = self.client or open_client(self.config)
        for trial in list(self.trials):  # another thread adds to it
            self._log_steps(trial)
        for row in self.rungs():
            self._log_rung(row)

    def show_samples(self) -> None:
        """Log a sheet of the pictures of each measured rung that is logged, one PNG.

        Raises:
            MlflowException: the store refuses or cannot be reached.
        """
        for row in self.rungs():
            run, step = self.runs.get(training_of(row)), int(row["step"])
            if run is None or step in run.shown or "checkpoint" not in row:
                continue
            if pictures := sheet(Storage.open(row["checkpoint"])):
                self.client.log_image(run.id, pictures, artifact_file=f"samples/{folder_of(step)}.png")
            run.shown.add(step)

    def end(self) -> None:
        """Say of each MLflow run how it ended."""
        for trial, run in self.runs.items():
            diverged = self.trainings.child(trial).exists(DIVERGED)
            self.client.set_terminated(run.id, "FAILED" if diverged else self.status)

    def _log_steps(self, trial: str) -> None:
        below, known, some_not_whole = self.trainings.child(trial), self.runs.get(trial), False
        for step in steps_of(below):
            if known and step <= known.step:
                continue
            checkpoint = below.child(folder_of(step))
            measured = read_progress(checkpoint)
            if measured is None:
                some_not_whole = True
                continue
            series = json.loads(checkpoint.read_text(SERIES))
            known = self._run(trial, started=_milliseconds(series[0]))
            if some_not_whole and series[0]["step"] > known.step + 1:
                return  # the steps between are still being written
            self._log_checkpoint(known, series, measured)

    def _log_checkpoint(self, run: MlflowRun, series: Rows, measured: dict[str, Any]) -> None:
        """The steps of a checkpoint that are new, in batches that MLflow takes whole or not at all."""
        from mlflow.entities import Metric

        new = [row for row in series if row["step"] > run.step]
        size = LARGEST_BATCH // len(STEP_METRICS) - 1
        for start in range(0, len(new), size):
            rows = new[start : start + size]
            metrics = [
                Metric(name, float(row[field]), _milliseconds(row), int(row["step"]))
                for row in rows
                for name, field in STEP_METRICS.items()
            ]
            last = int(rows[-1]["step"])
            if last == measured["step"]:
                metrics += [
                    Metric(name, float(measured[field]), _milliseconds(rows[-1]), last)
                    for name, field in CHECKPOINT_METRICS.items()
                ]
            self.client.log_batch(run.id, metrics=metrics)
            run.step = last

    def _log_rung(self, row: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        run, step = self.runs.get(training_of(row)), int(row["step"])
        found = {name: row.get(field) for name, field in RUNG_METRICS.items()}
        finite = {name: value for name, value in found.items() if value is not None and math.isfinite(value)}
        if run is None or step in run.rungs or FIRST_RUNG_METRIC not in finite:
            return
        now = int(1000 * time.time())
        self.client.log_batch(run.id, metrics=[Metric(*each, now, step) for each in finite.items()])
        run.rungs.add(step)

    def _run(self, trial: str, started: int) -> MlflowRun:
        """The MLflow run of a trial: the one it had before it was interrupted, or a new one."""
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
        steps, rungs = (
            {metric.step for metric in self.client.get_metric_history(run_id, name)}
            for name in ("train/loss", FIRST_RUNG_METRIC)
        )
        run = MlflowRun(run_id, max(steps, default=0), rungs)
        if run.step > self.began_after[trial]:
            return None  # of a training of the same name that was deleted since
        self.client.update_run(run_id, status="RUNNING")
        return run

    def _new(self, experiment: str, trial: str, tags: dict[str, str], started: int) -> MlflowRun:
        from mlflow.entities import Param

        run = retried(lambda: self.client.create_run(experiment, started, tags, run_name=trial))
        params = run_params(self.trials[trial], self.digest)
        self.client.log_batch(run.info.run_id, params=[Param(*each) for each in params.items()])
        return MlflowRun(run.info.run_id, 0, set())


def run_params(config: Config, digest: str) -> dict[str, str]:
    """What a person compares trials by: the resolved `train` section, flat, without what is empty; the
    base model, the data."""
    train = config.train
    return _flat("train", train, set() if train.method == "lora" else {"lora"}) | {
        "seed": str(config.seed),
        "model.base": config.model.base,
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


def _milliseconds(row: dict[str, Any]) -> int:
    """When a step ended, in ms since 1970, as MLflow counts."""
    return int(1000 * row["time"])
