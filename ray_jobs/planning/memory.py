"""Memory of a rank: what a training needs, what it has, and changes that make it fit."""

from collections.abc import Sequence

from cluster.capacity import trials_at_once
from cluster.fetched import local_path
from cluster.shape import Machine
from ray_jobs.config import Config, ConfigError, Settings, TrainConfig
from ray_jobs.console import GIB, human_size
from ray_jobs.diffusion.precision import PRECISIONS
from ray_jobs.planning.estimate import Placement, rank_memory
from ray_jobs.planning.footprint import Footprint, footprint
from ray_jobs.training.engine import pieces_a_step, rows_a_worker
from ray_jobs.weights.model_files import model_folder

HEADROOM = 0.9  # usable share of a device's memory; the rest is for context, workspaces and fragmentation

SHAPES = {
    *("method", "precision", "gradient_checkpointing", "checkpoint_every", "train_text_encoder"),
    *("lora", "dropout", "groups", "trainable", "stages"),
}
"""Settings of `train` that decide the sizes of a training's module and of what autograd keeps."""


class Model:
    """Sizes of the training that a configuration describes, and of variations on it.

    Raises:
        ConfigError: the base model is missing.
    """

    def __init__(self, config: Config) -> None:
        try:
            model_folder(local_path(config.model.base), revision=config.model.revision)
        except ValueError as error:
            raise ConfigError(f"model.base: {error}") from None
        self.config = config
        self._footprints: dict[str, Footprint] = {}

    def footprint(self, train: TrainConfig) -> Footprint:
        """Return the sizes with other settings of `train`.

        Raises:
            ConfigError: a setting does not suit the base model.
        """
        key = train.model_dump_json(include=SHAPES)
        if key not in self._footprints:
            try:
                self._footprints[key] = footprint(with_train(self.config, train))
            except ValueError as error:
                raise ConfigError(str(error)) from None
        return self._footprints[key]

    def memory(self, train: TrainConfig, together: int | None = None) -> Placement:
        """Estimate the memory per rank.

        Args:
            together: trials that a worker group trains; None: as the model's configuration says.
        """
        found, workers = self.footprint(train), train.min_workers
        together = with_train(self.config, train).trials_together if together is None else together
        rows = -(-rows_a_worker(train, workers) // pieces_a_step(train, workers))
        activations = together * rows * found.activations + found.fixed
        if together > 1:  # a layer's adapters are stacked for the pass
            activations += PRECISIONS[train.precision].itemsize * together * found.trained
        return rank_memory(
            train,
            whole=found.whole(train.method) + (together - 1) * found.trained,
            trained=together * found.trained,
            workers=workers,
            activations=activations,
            together=together,
            quantized=found.quantized,
            quantized_bytes=found.quantized_bytes,
            blocks=found.blocks,
            two_blocks=found.two_blocks,
            moments=found.moments,
        )


def needed_here(config: Config, found: Placement) -> int:
    """Bytes needed of what `room_of_a_rank` returns: of the device, or on CPUs of the host, with offloads."""
    return found.device.whole + (0 if config.train.use_gpu else found.offloaded.whole)


def room_of_a_rank(config: Config, machines: Sequence[Machine]) -> int | None:
    """Bytes available to a rank: a GPU's memory, or its share of the host's; None if unknown."""
    if config.train.use_gpu:
        sizes = [machine.gpu_gib for machine in machines if machine.gpus and machine.gpu_gib]
        return int(HEADROOM * config.train.gpu_share * min(sizes) * GIB) if sizes else None
    workers = config.train.min_workers * trials_at_once(config)
    a_machine = -(-workers // len(machines))
    sizes = [machine.memory_gib for machine in machines if machine.memory_gib]
    return int(HEADROOM * min(sizes) * GIB / a_machine) if sizes else None


def trials_that_fit(config: Config, model: Model, train: TrainConfig, room: int) -> int:
    """Return the most trials, at most those that the settings allow, that fit a rank together; 0: not one.

    Args:
        train: settings of each.
    """
    counts = range(config.trials_together, 0, -1)
    return next((k for k in counts if needed_here(config, model.memory(train, k)) <= room), 0)


def misfit(config: Config, model: Model, room: int) -> str:
    """Say that a rank does not fit, with fixes; empty if it does."""
    needed = needed_here(config, model.memory(config.train, config.trials_together))
    if needed <= room:
        return ""
    what = "; ".join(fixes(config, model, room)) or "a smaller model, or devices with more memory"
    return f"a rank needs {human_size(needed).strip()} and has {human_size(room).strip()}: {what}"


def fixes(config: Config, model: Model, room: int) -> list[str]:
    """Single changes that make a rank fit, the cheapest first; else a combination, if one fits."""
    train, workers = config.train, config.train.min_workers
    rows = rows_a_worker(train, workers)
    changes: list[Settings] = []
    if train.precision == "fp32" and train.use_gpu and train.zero_stage:
        changes.append({"precision": "bf16"})
    changes += [{"micro_batch_size": size} for size in _halves(train.micro_batch_size or rows)]
    if not train.gradient_checkpointing:
        changes.append({"gradient_checkpointing": True})
    if not train.offload_base:
        changes.append({"offload_base": True})
    changes += [{"zero_stage": stage} for stage in range(train.zero_stage + 1, 4) if workers > 1]
    if train.zero_stage and train.use_gpu and not train.offload_optimizer:
        changes.append({"offload_optimizer": True})
    if train.method == "full":
        changes.append({"method": "lora"})
    found, kinds = _smaller_packs(config, model, room), set()
    for change in changes:
        [(field, value)] = change.items()
        if field not in kinds and _allowed(config, change) and _fits(config, model, change, room):
            kinds.add(field)
            found.append(f"train.{field}: {str(value).lower()}")
    if found:
        return ["one of " + ", ".join(found)]
    together: Settings = {}
    for change in changes:
        if "method" in change or not _allowed(config, together | change):
            continue
        together |= change
        if _fits(config, model, together, room):
            return ["together " + ", ".join(f"train.{f}: {str(v).lower()}" for f, v in together.items())]
    return []


def _smaller_packs(config: Config, model: Model, room: int) -> list[str]:
    """Return the change of `search.pack` that makes a rank fit, if one does."""
    fitting = trials_that_fit(config, model, config.train, room)
    if fitting > 1:
        return [f"search.pack: {fitting}"]
    # On CPUs several worker groups divide the room.
    alone = config.train.use_gpu or config.search.max_concurrent_trials == 1
    return ["search.pack: off"] if fitting and alone and config.trials_together > 1 else []


def _halves(size: int) -> list[int]:
    found = []
    while size > 1:
        size = -(-size // 2)
        found.append(size)
    return found


def _allowed(config: Config, change: Settings) -> bool:
    """Return whether settings go together: some changes need another one first."""
    try:
        train = TrainConfig.model_validate(config.train.model_dump() | change)
    except ValueError:
        return False
    return config.search.pack in ("auto", "off") or not with_train(config, train).why_not_together


def _fits(config: Config, model: Model, change: Settings, room: int) -> bool:
    changed = with_train(config, config.train.model_copy(update=change))
    return needed_here(changed, model.memory(changed.train, changed.trials_together)) <= room


def with_train(config: Config, train: TrainConfig) -> Config:
    """Return a configuration with another section `train`."""
    return config.model_copy(update={"train": train})
