"""The Ray Train trainer of a training, and the settings that its weights depend on."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cluster.capacity import trials_at_once
from cluster.storage import Storage
from ray_jobs.config import ENDLESS, LEARNING_RATE, Config, ConfigError, Effect, TrainConfig
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.run.folder import TRAININGS, RunFolder
from ray_jobs.run.names import trial_id
from ray_jobs.training.checkpoint import rungs_of
from ray_jobs.training.loop import DIVERGED, LoopSettings, train_worker
from ray_jobs.training.packed import PACK, PackSettings, train_packs
from ray_jobs.weights.assistant import assistant_digest
from ray_jobs.weights.controlnets import given_digest
from ray_jobs.weights.starting_adapter import adapter_digest

DEPENDS_ON = "depends_on.json"


def depends_on(config: Config, dataset: Dataset) -> dict[str, Any]:
    """Return all settings and data that a training's weights depend on, up to rounding."""
    settings = config.affecting(Effect.WEIGHTS)
    train = settings.pop("train")
    schedules = {config.train.schedule, *(stage.schedule for stage in config.train.stages if stage.schedule)}
    return {
        "dataset": dataset.manifest.content,
        **({"votes": dataset.votes.dataset.manifest.content} if dataset.votes else {}),
        **settings,
        "last_step": None if schedules <= ENDLESS else config.search.ladder[-1],
        **{f"train.{name}": value for name, value in train.items()},
    }


def began_with(config: Config, dataset: Dataset, start: str | None) -> dict[str, Any]:
    """Return what a training must have begun with to be resumed.

    Args:
        start: URI of another training's checkpoint that it starts from.
    """
    model = config.model
    others = {"start": start, "adapter": adapter_digest(model), "assistant": assistant_digest(model)}
    others["controlnet"] = given_digest(model)
    return depends_on(config, dataset) | {name: value for name, value in others.items() if value}


def training_name(config: Config) -> str:
    """Return the name of a single training: that of a trial in a search over learning rates."""
    return trial_id({LEARNING_RATE: config.train.learning_rate})


def placement(train: TrainConfig, trials: int, free: Iterable[Mapping[str, float]]) -> str:
    """Return the strategy by which Ray places a training's workers.

    Workers that use GPUs are kept together where one node holds them all, so that they talk over NVLink and
    not over the network. By default Ray fills the node that it takes first, even if another one has room for
    all. Workers that lose their node wait for one with room for all of them.

    Args:
        trials: trainings that may ask for such a place at the same time.
        free: what is free on each node.
    """
    if train.is_elastic or train.min_workers == 1 or not train.use_gpu:
        return "PACK"
    reserved = {"CPU": train.min_workers * train.cpus_per_worker}
    reserved |= {"GPU": train.min_workers}  # above half a GPU, each worker takes its own
    places = sum(min(int(node.get(kind, 0) // each) for kind, each in reserved.items()) for node in free)
    return "STRICT_PACK" if places >= trials else "PACK"


def free_resources() -> list[dict[str, float]]:
    """Return what is free on each node of the cluster."""
    from ray._private.state import available_resources_per_node

    return list(available_resources_per_node().values())


def worker_group(train: TrainConfig, trials: int = 1, free: Iterable[Mapping[str, float]] = ()) -> Any:
    """Return the number of workers, what each reserves and where, as Ray Train's ScalingConfig.

    Args:
        trials, free: see `placement`.
    """
    import ray.train

    return ray.train.ScalingConfig(
        num_workers=(train.min_workers, train.max_workers) if train.is_elastic else train.min_workers,
        use_gpu=train.use_gpu,
        # A worker group that grows restarts from its last checkpoint.
        elastic_resize_monitor_interval_s=60 * train.checkpoint_minutes,
        resources_per_worker={"CPU": train.cpus_per_worker, "GPU": train.gpu_share if train.use_gpu else 0},
        placement_strategy=placement(train, trials, free),
    )


def build_trainer(
    config: Config,
    dataset: Dataset,
    *,
    name: str,
    ladder: list[int] | None = None,
    start: str | None = None,
    callbacks: Sequence[Any] = (),
    board: Any = None,
    wait_for_scores: bool = False,
) -> Any:
    """Return a Ray Train trainer for `config.train` that resumes from its own last checkpoint.

    Args:
        name: name of its folder below `<storage>/<run>/train/`.
        ladder: the beginning of the configuration's ladder; None for all of it.
        start: URI of another training's checkpoint to start from.
        wait_for_scores: pause at each rung until a callback has marked its score as reported (`REPORTED`).
    """
    from ray_jobs.training.failures import FailureReporter

    settings = LoopSettings(
        config, dataset, name, ladder or config.search.ladder, board, start, wait_for_scores
    )
    begin_training(settings)
    reporter = FailureReporter(name, lambda: [settings.trial], config.train.max_failures, board)
    return _trainer(
        train_worker, settings, name, RunFolder.of(config).trainings.uri, callbacks=[reporter, *callbacks]
    )


def begin_training(settings: LoopSettings) -> None:
    """Check that a training can be begun or resumed with its settings, and record them.

    Raises:
        ConfigError: it began with other settings or data, or a checkpoint has a newer format.
    """
    rungs_of(settings.trial)  # a newer format is refused here, not by the workers
    settings.trial.delete(DIVERGED)
    require_same(settings.trial, began_with(settings.config, settings.dataset, settings.start))


def build_pack_trainer(settings: PackSettings) -> Any:
    """Return a Ray Train trainer for what the queue of `settings` has, until that is closed."""
    import ray
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    from ray_jobs.training.failures import FailureReporter
    from ray_jobs.training.pack_callback import PackCallback

    config, folder = settings.config, settings.folder
    folder.delete(CHECKPOINT_MANAGER_SNAPSHOT_FILENAME)  # the trainings know their checkpoints themselves

    def folders() -> list[Storage]:
        return [folder.child(name) for name in ray.get(settings.queue.names.remote())]

    callbacks = [
        FailureReporter(PACK, folders, config.train.max_failures, settings.board),
        PackCallback(settings.queue),
    ]
    return _trainer(train_packs, settings, TRAININGS, RunFolder.of(config).root.uri, callbacks=callbacks)


def _trainer(
    function: Callable[[dict[str, Any]], None],
    settings: LoopSettings | PackSettings,
    name: str,
    storage: str,
    *,
    callbacks: Sequence[Any],
) -> Any:
    """Return a Ray Train trainer that calls a function on each worker of `train`.

    Args:
        name: name of its folder below `storage`, a URI.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    config = settings.config
    free = free_resources() if config.train.use_gpu else ()
    return TorchTrainer(
        function,
        train_loop_config={"settings": settings},
        scaling_config=worker_group(config.train, trials_at_once(config), free),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=config.train.max_failures),
            callbacks=list(callbacks),
        ),
    )


def require_same(trial: Storage, now: dict[str, Any]) -> None:
    """Record what a training depends on, or compare it with the record from when the training began.

    Raises:
        ConfigError: the training began with other settings or data.
    """
    if not trial.exists(DEPENDS_ON):
        trial.write_text(DEPENDS_ON, json.dumps(now, indent=2))
        return
    before = json.loads(trial.read_text(DEPENDS_ON))
    # A setting that came with a later release is left out where it has its default.
    left_out = {name: None for name in before if name not in now and _of_weights(name)}
    for name, value in (now | left_out).items():
        if before.get(name) != value:
            raise ConfigError(
                f"{name}: {value} now, but the training in {trial.uri} started with {before.get(name)}; "
                "give the run another name, change it back, or delete that folder"
            )


def _of_weights(name: str) -> bool:
    """Return whether a name is that of a setting in `train` on which weights depend."""
    section, _, field = name.partition(".")
    known = section == "train" and field in TrainConfig.model_fields
    return known and Effect.WEIGHTS in TrainConfig.effects(field)


def check_diverged(trial: Storage) -> None:
    """Raise RuntimeError with the reason if the training in a folder stopped because its loss diverged."""
    if trial.exists(DIVERGED):
        raise RuntimeError(json.loads(trial.read_text(DIVERGED))["reason"])
