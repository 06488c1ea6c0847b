"""Run trials under Ray Tune, recording every rung as soon as it is measured."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ray
from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.stopper import CombinedStopper

from cluster.capacity import PACKED_CPUS
from cluster.storage import Storage
from ray_jobs.config import SearchConfig, Settings
from ray_jobs.console import say
from ray_jobs.data.encoding.cache_files import DamagedPart
from ray_jobs.run.command_line import damage_message, refusal
from ray_jobs.run.records import RungRow, read_rows, write_rows
from ray_jobs.run.signs import black_line, no_change_line
from ray_jobs.training.failures import LONGEST
from ray_jobs.training.tracking import Mirror
from ray_jobs.tuning.computed_steps import ComputedSteps
from ray_jobs.tuning.optuna import Proposals
from ray_jobs.tuning.results import TUNE, with_error
from ray_jobs.tuning.space import points
from ray_jobs.tuning.stopping import Budget, Refusal, Result, spent, stoppers
from ray_jobs.tuning.trial import Make, SearchContext, Trial, run_trial

BEGUN = "trials.jsonl"  # settings of every started trial
MEMBER = "trial"  # the single Tune dimension when the trials are given as a list

Climb = Callable[..., None]


class Trials:
    """Trials of a search, including those of earlier starts.

    Args:
        around: shared context.
        storage: folder of the search, whose recorded rows it goes on after.
        climb: Tune's trainable, called with the point of the space, `make` and `around`; it reports rows.

    Attributes:
        rows: rows of the measured rungs.
        settings: settings of the started trials, by `trial_id`.
        computed: steps of the trials' trainings.
        errors: error messages of failed trials.
    """

    def __init__(
        self, around: SearchContext, storage: Storage, mirror: Mirror, climb: Climb = run_trial
    ) -> None:
        self.storage, self.mirror, self.climb = storage, mirror, climb
        self.around, self.rows = around, read_rows(storage)
        self.settings: dict[str, Settings] = {
            line["trial_id"]: line["settings"] for line in storage.read_lines(BEGUN)
        }
        self.computed = ComputedSteps(storage, around.board)
        self.errors: list[str] = []
        if self.rows:
            say("search", f"going on after {len(self.rows)} measured rungs")

    @property
    def budget_is_spent(self) -> bool:
        """Return whether a configured limit is reached, so that no further trial may start."""
        return Budget(self.around.config, self.rows, self.computed.take).stop_all()

    def run_space(self, make: Make) -> None:
        """Run the trials that `search.algorithm` draws from the space.

        Raises:
            ConfigError: the storage refuses a trial's writes.
        """
        config = self.around.config
        if config.search.algorithm == "optuna":
            proposals = Proposals(config, list(self.settings.values()), self._expect)
            self._run(make, {}, config.search.grid_size, proposals, config.search.grid_size)
        else:
            self.run_all([make(settings) for settings in points(config)])

    def run_all(self, trials: list[Trial]) -> None:
        """Run the given trials.

        Where several folds are among them the scheduler stops none: their scores do not compare.
        """
        named = {trial.training: trial for trial in trials}
        comparable = len({trial.fold for trial in trials}) == 1
        space = {MEMBER: tune.grid_search(list(named))}
        self._run(partial(_named, named), space, len(named), None, 1, comparable)

    def begin(self, trial: Trial) -> None:
        """Record the start of a trial."""
        if trial.trial_id not in self.settings:
            self.settings[trial.trial_id] = trial.settings
            lines = [{"trial_id": name, "settings": each} for name, each in self.settings.items()]
            self.storage.write_lines(BEGUN, lines)
        self.mirror.add(trial.training, self.around.config.with_settings(trial.settings))

    def add(self, row: RungRow) -> bool:
        """Record a row; return False if it is already recorded."""
        if any((row.training_name, row.step) == (old.training_name, old.step) for old in self.rows):
            return False
        self.rows.append(row)
        write_rows(self.storage, self.rows)
        return True

    def _expect(self, trials: int) -> None:
        """Tell the pack, if there is one, that no more than so many trials come."""
        if self.around.queue is not None:
            self.around.queue.expect.remote(trials)

    def _run(
        self,
        make: Make,
        space: Settings,
        count: int,
        algorithm: Proposals | None,
        num_samples: int,
        comparable: bool = True,
    ) -> None:
        config, recorded = self.around.config, list(self.rows)
        refused = Refusal(self.around.pool)
        trainable = tune.with_parameters(self.climb, make=make, around=self.around)
        if self.around.queue is not None:
            ray.get(self.around.queue.begin.remote(count))
        together = config.trials_together
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"CPU": 1 if together == 1 else PACKED_CPUS}),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="score",
                mode="min",
                search_alg=algorithm,
                num_samples=num_samples,
                max_concurrent_trials=config.search.max_concurrent_trials if together == 1 else together,
                scheduler=scheduler(config.search) if comparable else FIFOScheduler(),
            ),
            run_config=tune.RunConfig(
                name=TUNE,
                storage_path=self.storage.uri,
                verbose=0,
                # Restarts a trial's driver, which resumes from the training's checkpoints.
                failure_config=tune.FailureConfig(max_failures=config.train.max_failures),
                callbacks=[Recorder(self, make, count, refused)],
                stop=CombinedStopper(refused, *stoppers(config, recorded, self.computed.take)),
            ),
        )
        # Tune would take the first Ctrl-C for the end of its trials, and a winner would be chosen of those.
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        results = tuner.fit()
        if refused.error:
            raise refused.error
        if self.around.pool.has_failed:
            self.around.pool.wait()  # raises why
        for error in results.errors:
            if damage := damage_message(error):  # every trial reads this part, so the search must end
                raise DamagedPart(damage)
        self.errors += [str(error).strip().splitlines()[-1] for error in results.errors]
        self.storage.delete(TUNE)


def _named(trials: dict[str, Trial], point: Settings) -> Trial:
    return trials[point[MEMBER]]


def scheduler(search: SearchConfig) -> TrialScheduler:
    """Build the Tune scheduler. ASHA's own rungs equal the ladder's if the ladder doubles."""
    if search.scheduler == "asha":
        return ASHAScheduler(
            time_attr="step",
            max_t=search.ladder[-1],
            grace_period=search.ladder[0],
            reduction_factor=search.reduction_factor,
        )
    if search.scheduler == "median":
        # Tune's rule needs three trials before it stops one. It compares a trial's best score so far with the
        # other trials' running means, so if FID falls from rung to rung it stops almost no trial.
        return MedianStoppingRule(time_attr="step", grace_period=search.ladder[0])
    return FIFOScheduler()


class Recorder(Callback):
    """Tune callback that records each rung as it is reported and prints a line about it."""

    def __init__(self, trials: Trials, make: Make, count: int, refused: Refusal) -> None:
        self.trials, self.make, self.count, self.refused = trials, make, count, refused
        self.started: set[str] = set()
        self.spent_before: dict[str, float] = {}  # seconds of earlier starts, by training
        for row in trials.rows:
            name = row.training_name
            self.spent_before[name] = max(self.spent_before.get(name, 0.0), row.seconds)

    def __getstate__(self) -> dict[str, object]:
        """Return an empty state: Tune saves callbacks with its own state, from which no search resumes."""
        return {}

    def _trial(self, trial: TuneTrial) -> Trial:
        return self.make(trial.config)

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: object) -> None:
        self.trials.computed.take_if_due()

    def on_trial_start(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object
    ) -> None:
        mine = self._trial(trial)
        self.started.add(mine.training)
        self.trials.begin(mine)
        doing = "starting its workers" if self.trials.around.queue is None else "joining the others"
        say("search", f"trial {len(self.started)}/{self.count}: {mine.training}, {doing}")

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: Result, **info: object
    ) -> None:
        if "score" not in result:
            return
        mine = self._trial(trial)
        seconds = self.spent_before.get(mine.training, 0.0) + spent(result)
        # Tune has replaced the trial's ID with its own.
        known = {**result, "trial_id": mine.trial_id, "seconds": seconds}
        row = RungRow.model_validate({name: known[name] for name in RungRow.model_fields if name in known})
        if self.trials.add(row):
            say(
                "search",
                f"{mine.training}  rung {row.step}/{mine.ladder[-1]}: validation {with_error(row)}, "
                f"loss {row.train_loss:.4f}, {row.images_per_second:.0f} images/s",
            )
            precision, place = self.trials.around.config.evaluate.precision, f"{mine.training} at {row.step}"
            if line := black_line(place, row.black, row.num_samples or 0, precision):
                say("search", line)

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object
    ) -> None:
        mine, step = self._trial(trial), (trial.last_result or {}).get("step", 0)
        self._leave(mine)
        rungs = [row for row in self.trials.rows if row.training_name == mine.training]
        if line := no_change_line(mine.training, sorted(rungs, key=lambda row: row.step)):
            say("search", line)
        if step < mine.ladder[-1]:
            say("search", f"{mine.training} stopped at rung {step}")

    def _leave(self, trial: Trial) -> None:
        """Let a trial that has ended leave the pack, if there is one."""
        if (queue := self.trials.around.queue) is not None:
            queue.leave.remote(trial.training)

    def on_trial_recover(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object
    ) -> None:
        say("search", f"{self._trial(trial).training} failed and starts again: {_reason(trial)}")

    def on_trial_error(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object
    ) -> None:
        self.refused.error = self.refused.error or refusal(self.trials.around.config, _failures(trial))
        self._leave(self._trial(trial))
        left_out = "ends the search" if self.refused.error else "is left out"
        say("search", f"{self._trial(trial).training} failed and {left_out}: {_reason(trial)}")


def _failures(trial: TuneTrial) -> str:
    """Read a trial's tracebacks from the driver's local file.

    The storage, which `get_error` reads, receives them only later.
    """
    file = trial.error_file
    return Path(file).read_text() if file and Path(file).exists() else ""


def _reason(trial: TuneTrial) -> str:
    """Return the last line of the last traceback."""
    lines = (_failures(trial) or "its process died").strip().splitlines()
    return " ".join(lines[-1].split())[:LONGEST]
