"""A checkpoint: the state to go on from and, at a rung, the weights to evaluate.

weights/                        rungs: what was trained, averaged, in diffusers' format (rank 0)
state/0000-of-0002.safetensors  what each rank owns of weights, averages and Adam's moments
series.json                     loss, gradient norm, learning rate and time (seconds since 1970) of each step
                                since the last one (rank 0)
progress.json                   step, number of workers, why it was written, what was measured (rank 0)
config.yaml                     the resolved configuration of the run (rank 0)
complete-0000-of-0002           written last by each rank, the sha256 of its files: without all of these the
                                checkpoint is not whole

The position in the data and all randomness follow from the step, so there is no more to keep. Between rungs
only the last two checkpoints keep their state; what older ones tell of the training stays.
"""

import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.storage import Storage
from ray_jobs.diffusion.ema import EMA
from ray_jobs.training.monitor import RUNG
from ray_jobs.training.state import Shards, load_state, owned_fragments, snapshot, whole, write_shard

WEIGHTS = "weights"
STATE = "state"
PROGRESS = "progress.json"
SERIES = "series.json"
CONFIG = "config.yaml"
FOLDER = "step-"
MARK = "complete-"
REPORTED = "reported"  # file of a rung that was measured, and whose score the search was told

Export = Callable[[dict[str, torch.Tensor], Path], None]


class CheckpointWriter:
    """Writes checkpoints beside the training: a step waits for a copy to the host's memory only.

    Args:
        export: writes a rung's weights, by name, in diffusers' format; called on rank 0, in another thread.
        config: the run's, as YAML.
    """

    def __init__(self, engine: Any, ema: EMA | None, export: Export, config: str) -> None:
        self.engine, self.ema, self.export, self.config = engine, ema, export, config

    def save(self, metrics: dict[str, Any], series: list[dict[str, float]], *, why: str) -> None:
        """Report a checkpoint of the present state to Ray Train; every rank calls it.

        Args:
            metrics, series: from the meter.
            why: RUNG, INTERVAL or PREEMPTION.
        """
        import ray.train

        rank, world_size = self.engine.global_rank, self.engine.world_size
        metrics = metrics | {"why": why}
        tensors, steps = snapshot(self.engine, self.ema.averages if self.ema else {})
        weights = self._evaluated_weights() if why == RUNG else {}
        storage = ray.train.get_context().get_storage()

        def upload(checkpoint: Any, name: str) -> Any:
            folder = Path(checkpoint.path)
            mark = f"{storage.build_checkpoint_path_from_name(name)}/{_mark(rank, world_size)}"
            if storage.storage_filesystem.get_file_info(mark).is_file:
                storage.storage_filesystem.delete_file(mark)  # an attempt that died left it here
            write_shard(folder / STATE, rank, world_size, tensors, steps)
            if rank == 0:
                progress = metrics | {"world_size": world_size}
                (folder / SERIES).write_text(json.dumps(series))
                (folder / CONFIG).write_text(self.config, encoding="utf-8")
                (folder / PROGRESS).write_text(json.dumps(progress))
                if why == RUNG:
                    self.export(weights, folder / WEIGHTS)
            written = digests(folder)
            there = storage.persist_current_checkpoint(checkpoint, name)
            with there.filesystem.open_output_stream(mark) as stream:
                stream.write(json.dumps(written).encode())
            if rank == 0:
                trial = storage.experiment_fs_path
                drop_old_states(Storage(trial, storage.storage_filesystem, trial))
            return there

        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(tempfile.mkdtemp(prefix="diffray-checkpoint-")),
            checkpoint_dir_name=folder_of(metrics["step"]),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
        )

    def _evaluated_weights(self) -> dict[str, torch.Tensor]:
        """The averages, or the weights where nothing is averaged, whole, on rank 0."""
        if self.ema:
            return whole(self.engine, self.ema.averages)
        return whole(self.engine, {piece.key: piece.weights for piece in owned_fragments(self.engine)})


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of each file below a folder, by its path in it."""
    below = Storage.open(str(folder))
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return {name: below.sha256(name) for name in names}


def _mark(rank: int, world_size: int) -> str:
    return f"{MARK}{rank:04d}-of-{world_size:04d}"


def _marks(world_size: int) -> set[str]:
    return {_mark(rank, world_size) for rank in range(world_size)}


class Resumed:
    """A checkpoint to go on from, for the lifetime of a block.

    Attributes:
        step: the last one it contains.
        shards: the state of all ranks that wrote it.
    """

    def __init__(self, folder: Path) -> None:
        progress = json.loads((folder / PROGRESS).read_text())
        self.step = int(progress["step"])
        self.shards = Shards(folder / STATE, int(progress["world_size"]))

    def restore(self, engine: Any, ema: EMA | None) -> None:
        """Bring the optimizer's state and the averages to the stored ones; the model has its weights."""
        load_state(self.shards, engine)
        if ema:
            for piece in owned_fragments(engine):
                stored = self.shards.read("ema", piece.name, piece.start, piece.numel)
                ema.averages[piece.key].copy_(stored)


@dataclass(frozen=True)
class Rung:
    """A checkpoint in the run's storage whose weights can be evaluated."""

    uri: str
    metrics: dict[str, Any]

    @property
    def weights(self) -> str:
        return Storage.open(self.uri).child(WEIGHTS).uri


def folder_of(step: int) -> str:
    """The name of a checkpoint's folder in its trial's."""
    return f"{FOLDER}{step:08d}"


def steps_of(trial: Storage) -> list[int]:
    """The steps of the checkpoints in a trial's folder, whole or not, in their order."""
    return sorted(int(name.removeprefix(FOLDER)) for name in trial.folders() if name.startswith(FOLDER))


def last_intact(trial: Storage, tell: Callable[[str], None]) -> Storage | None:
    """The folder of the last whole checkpoint of a training that is as it was written; None if there is none.

    It may be one that Ray Train does not know of: a crash can come between writing it and reporting it.

    Args:
        tell: is given a line about each that is passed over because it is damaged.
    """
    for step in reversed(steps_of(trial)):
        folder = trial.child(folder_of(step))
        whole = read_progress(folder) is not None
        if whole and not (wrong := damaged(folder)):
            return folder
        tell(f"{folder.uri} is passed over: {'damaged: ' + ', '.join(wrong) if whole else 'not whole'}")
    return None


def drop_old_states(trial: Storage) -> None:
    """Delete what is there to go on from in all checkpoints but the rungs and the last two that are whole."""
    newer = 0
    for step in reversed(steps_of(trial)):
        folder = trial.child(folder_of(step))
        progress = read_progress(folder)
        if progress and newer >= 2 and progress["why"] != RUNG:
            if not folder.exists(STATE):
                return  # nor do those before
            folder.delete(STATE)
        newer += progress is not None


def damaged(folder: Storage, part: str = "") -> list[str]:
    """The files of a whole checkpoint that are missing, or other than its ranks wrote them.

    Args:
        part: only those below this folder of it are read.
    """
    written: dict[str, str] = {}
    for mark in sorted(_marks(json.loads(folder.read_text(PROGRESS))["world_size"])):
        try:
            written |= json.loads(folder.read_text(mark))
        except ValueError:
            return [mark]

    def differs(name: str) -> bool:
        try:
            return folder.sha256(name) != written[name]
        except FileNotFoundError:
            return True

    names = [name for name in written if name.startswith(part)]
    with ThreadPoolExecutor() as pool:
        return [name for name, wrong in zip(names, pool.map(differs, names), strict=True) if wrong]


def find_rungs(trainings: Storage) -> dict[str, list[Rung]]:
    """The whole rungs of every trial below `trainings`, by trial, in the order of their steps."""
    return {trial: rungs_of(trainings.child(trial)) for trial in trainings.folders()}


def rungs_of(trial: Storage) -> list[Rung]:
    """The whole rungs of one trial, in the order of their steps; none if it has not begun."""
    return [rung for step in steps_of(trial) if (rung := _rung(trial.child(folder_of(step))))]


def _rung(folder: Storage) -> Rung | None:
    """The rung in a folder, or None if it holds something else or a checkpoint that is not whole."""
    metrics = read_progress(folder)
    return Rung(folder.uri, metrics) if metrics and metrics["why"] == RUNG else None


def read_progress(folder: Storage) -> dict[str, Any] | None:
    """What was measured up to the checkpoint in a folder, or None if there is none that is whole."""
    files = set(folder.files())
    if not any(name.startswith(f"{MARK}0000-") for name in files):
        return None  # rank 0 may be in the middle of writing progress.json
    try:
        metrics: dict[str, Any] = json.loads(folder.read_text(PROGRESS))
    except ValueError:
        return None  # damaged
    return metrics if _marks(metrics["world_size"]) <= files else None
