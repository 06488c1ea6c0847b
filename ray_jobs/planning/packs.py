"""How many trials of a search are trained together: as the layers with adapters and GPUs' memory allow."""

from collections.abc import Sequence

from cluster.shape import Machine
from ray_jobs.config import Config, ConfigError
from ray_jobs.config.packs import LAYERS
from ray_jobs.config.space import ends
from ray_jobs.console import human_size
from ray_jobs.planning.footprint import check_rows
from ray_jobs.planning.memory import (
    Model,
    misfit,
    needed_here,
    room_of_a_rank,
    trials_that_fit,
)

SIZES = ("train.lora", "train.trainable", "train.stages", "train.optimizer", "train.ema_decay")
"""Settings, and sections, in which trials of a pack may differ and that decide how much memory they need."""


def largest_trial(config: Config, model: Model) -> Config:
    """Return the configuration of the trial of a search that needs the most memory."""
    for name, values in config.search.space.items():
        if not any(name == size or name.startswith(f"{size}.") for size in SIZES):
            continue
        given = ends(values)
        if all(isinstance(each, int | float) for each in given):
            given = [max(given)]
        trials = [config.with_settings({name: each}) for each in given]
        config = max(trials, key=lambda trial: model.memory(trial.train, 1).device.whole)
    return config


def with_pack(config: Config, model: Model, machines: Sequence[Machine]) -> tuple[Config, str]:
    """Return a configuration whose `search.pack`, if `auto`, is decided, and a line about it.

    It becomes `off` if a layer with adapters does not see the rows of the batch. On GPUs it becomes the
    largest number of trials that fit a rank on the smallest one, each with the rows that it would compute at
    once by itself, or `off`. The line is empty if all that the settings allow are trained together.

    Raises:
        ConfigError: `search.pack` is a number, and a layer does not see the rows of the batch.
    """
    most = config.trials_together
    if most == 1:
        return config, ""
    if reason := _of_other_rows(config):
        if config.search.pack != "auto":
            raise ConfigError(reason)
        cause, _, _ = reason.partition("; ")  # without the fix
        return _packed(config, 1), f"search.pack: each trial has its own workers: {cause}"
    if not config.train.use_gpu:
        return config, ""
    room = room_of_a_rank(config, machines)
    if room is None:
        return config, (
            f"search.pack: {most} trials together, whatever the memory of the GPUs, which is not known here; "
            "train.on_oom decides what happens where it is too small"
        )
    if config.search.pack != "auto":
        return config, ""
    train = largest_trial(config, model).train
    fitting = max(1, trials_that_fit(config, model, train, room))
    decided = _packed(config, fitting)
    if fitting == most:
        return decided, ""
    needed = needed_here(config, model.memory(train, fitting + 1))
    short = f"{fitting + 1} need {human_size(needed).strip()} on a rank, which has {human_size(room).strip()}"
    if fitting == 1:
        return decided, f"search.pack: each trial has its own workers: together {short}"
    return decided, f"search.pack: {fitting} of {most} trials together: {short}"


def _packed(config: Config, together: int) -> Config:
    search = config.search.model_copy(update={"pack": together if together > 1 else "off"})
    return config.model_copy(update={"search": search})


def _of_other_rows(config: Config) -> str:
    """Say which layer with adapters does not see the rows of the batch; empty if all do.

    Layers that a family has by default are tested.
    """
    searched = [{name: value} for name in LAYERS for value in config.search.space.get(name, [])]
    for settings in searched or [{}]:
        trial = config.with_settings(settings)
        if trial.train.lora.target_modules or trial.model.adapter:
            try:
                check_rows(trial)
            except ValueError as error:
                return str(error)
    return ""


def checked_pack(config: Config, machines: Sequence[Machine]) -> tuple[Config, str]:
    """Return what `with_pack` does.

    Raises:
        ConfigError: as `with_pack`; or `search.pack` is a number, and so many trials do not fit.
    """
    model = Model(config)
    decided, line = with_pack(config, model, machines)
    is_number = config.search.pack not in ("auto", "off")
    room = room_of_a_rank(config, machines) if is_number and config.train.use_gpu else None
    if room is not None and (problem := misfit(largest_trial(config, model), model, room)):
        raise ConfigError(f"search.pack: {config.search.pack}: {problem}")
    return decided, line
