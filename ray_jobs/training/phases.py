"""The stages of a run: each has its range of steps, learning rate and trained layers."""

from dataclasses import dataclass

from ray_jobs.config import StageConfig, TrainConfig
from ray_jobs.diffusion.schedules import LearningRateSchedule


@dataclass(frozen=True)
class Stage:
    """Steps `first` to `last` (counted from 1, inclusive) with the same settings.

    Attributes:
        optimizer: `train.optimizer` of the stage.
        trainable: groups of layers that are trained; None for all.
    """

    first: int
    last: int
    learning_rate: float
    schedule: LearningRateSchedule
    optimizer: str
    weight_decay: float
    betas: tuple[float, float]
    epsilon: float
    momentum: float
    trainable: tuple[str, ...] | None

    def rate(self, step: int) -> float:
        """Return the learning rate at a step of the stage."""
        return self.learning_rate * self.schedule.factor(step - self.first)

    def trains(self, layers: str) -> bool:
        """Return whether a group of layers is trained in this stage."""
        return self.trainable is None or layers in self.trainable


def stages_of(config: TrainConfig, last_step: int) -> list[Stage]:
    """Return the stages up to the end of the ladder; without `train.stages`, one that spans the run."""
    given = config.stages or [StageConfig(steps=last_step)]
    found, first = [], 1
    for number, stage in enumerate(given):
        last = last_step if number == len(given) - 1 else first + stage.steps - 1
        found.append(_stage(config, stage, first, last))
        first = last + 1
    return found


def _stage(config: TrainConfig, own: StageConfig, first: int, last: int) -> Stage:
    settings = {name: getattr(config, name) for name in StageConfig.model_fields if name != "steps"}
    settings |= own.model_dump(exclude={"steps"}, exclude_none=True)
    trainable = settings["trainable"]
    return Stage(
        first,
        last,
        settings["learning_rate"],
        LearningRateSchedule(
            settings["schedule"],
            last - first + 1,
            settings["warmup_steps"],
            cycles=config.schedule_cycles,
            power=config.schedule_power,
            end=config.schedule_end,
            decay_share=config.decay_share,
        ),
        settings["optimizer"],
        settings["weight_decay"],
        tuple(settings["betas"]),
        settings["epsilon"],
        settings["momentum"],
        None if trainable is None else tuple(trainable),
    )


def stage_at(stages: list[Stage], step: int) -> Stage:
    """Return the stage that a step belongs to."""
    return next(stage for stage in stages if step <= stage.last)


def ever_trainable(config: TrainConfig) -> list[str] | None:
    """Return the groups of layers that any stage trains; None for all."""
    chosen = [stage.trainable or config.trainable for stage in config.stages] or [config.trainable]
    if None in chosen:
        return None
    return sorted({group for groups in chosen for group in groups or ()})
