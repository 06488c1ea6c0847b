"""Checkpoints: the state to resume from and, at a rung, the weights to evaluate.

weights/                        rungs only: the trained weights (EMA, if on) in diffusers' format (rank 0)
state/0000-of-0002.safetensors  each rank's own part of the weights, averages and the optimizer's state
series.json                     loss, gradient norm, learning rate and time (seconds since 1970) of each step
                                since the previous checkpoint (rank 0)
progress.json                   step, number of workers, reason for the checkpoint, metrics (rank 0)
config.yaml                     the resolved configuration of the run (rank 0)
complete-0000-of-0002           the sha256 of each of a rank's files, written last by that rank; a checkpoint
                                is complete only when every rank's is there

The position in the data and all randomness follow from the step, so nothing else is stored. Of the
checkpoints between rungs, only the last two keep their state; the other files of older ones stay.
"""

import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import torch

from cluster.storage import Storage
from ray_jobs.diffusion.ema import EMA
from ray_jobs.run.folder import CONFIG
from ray_jobs.run.records import Progress
from ray_jobs.run.series import FOLDER, SERIES
from ray_jobs.training.engine import Engine
from ray_jobs.training.monitor import RUNG, Series
from ray_jobs.training.state import Shards, load_state, snapshot, whole, write_shard

WEIGHTS = "weights"
STATE = "state"
PROGRESS = "progress.json"
MARK = "complete-"
REPORTED = "reported"  # marker file of a rung that was evaluated and whose score was reported to the search

Export = Callable[[dict[str, torch.Tensor], Path], None]


class CheckpointWriter:
    """Background writer of checkpoints: a step waits only for the copy to host memory.

    Args:
        export: function that writes a rung's weights, by name, in diffusers' format. Called on rank 0, in
            another thread.
        config: the run's configuration, as YAML.
        training: name of the training's folder below Ray Train's; empty: that is the training's.
    """

    def __init__(
        self, engine: Engine, ema: EMA | None, export: Export, config: str, training: str = ""
    ) -> None:
        self.engine, self.ema, self.export, self.config = engine, ema, export, config
        self.training = training

    def save(self, progress: Progress, series: Series) -> None:
        """Report a checkpoint of the current state to Ray Train; every rank must call this.

        Args:
            progress, series: the results of `Meter.metrics`.
        """
        import ray.train

        rank, world_size = self.engine.rank, self.engine.world_size
        tensors, counts = snapshot(self.engine, self.ema.averages if self.ema else {})
        weights = self._evaluated_weights() if progress.why == RUNG else {}
        storage = ray.train.get_context().get_storage()

        def upload(checkpoint: Any, name: str) -> Any:
            folder = Path(checkpoint.path)
            mark = f"{storage.build_checkpoint_path_from_name(name)}/{_mark(rank, world_size)}"
            if storage.storage_filesystem.get_file_info(mark).is_file:
                storage.storage_filesystem.delete_file(mark)  # left behind by an attempt that died
            write_shard(folder / STATE, rank, world_size, tensors, counts)
            if rank == 0:
                (folder / SERIES).write_text(json.dumps(series))
                (folder / CONFIG).write_text(self.config, encoding="utf-8")
                (folder / PROGRESS).write_text(json.dumps(progress.versioned()))
                if progress.why == RUNG:
                    self.export(weights, folder / WEIGHTS)
            written = digests(folder)
            there = storage.persist_current_checkpoint(checkpoint, name)
            with there.filesystem.open_output_stream(mark) as stream:
                stream.write(json.dumps(written).encode())
            if rank == 0:
                trial = storage.build_checkpoint_path_from_name(self.training)
                drop_old_states(Storage(trial, storage.storage_filesystem, trial))
            return there

        ray.train.report(
            progress.fields() | {"training": self.training},
            checkpoint=ray.train.Checkpoint.from_directory(tempfile.mkdtemp(prefix="diffray-checkpoint-")),
            checkpoint_dir_name=str(PurePosixPath(self.training, folder_of(progress.step))),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
        )

    def _evaluated_weights(self) -> dict[str, torch.Tensor]:
        """Return the full averages (without EMA the full weights to evaluate) on rank 0."""
        values = self.ema.averages if self.ema else self.engine.evaluated
        return whole(self.engine, values)


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file in a folder, recursively, by relative path."""
    below = Storage.open(str(folder))
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return {name: below.sha256(name) for name in names}


def _mark(rank: int, world_size: int) -> str:
    return f"{MARK}{rank:04d}-of-{world_size:04d}"


def _marks(world_size: int) -> set[str]:
    return {_mark(rank, world_size) for rank in range(world_size)}


class Resumed:
    """A checkpoint to resume from.

    Attributes:
        step: the last step it contains.
        shards: the state of all ranks that wrote it.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / PROGRESS
        progress = Progress.parse(json.loads(file.read_text()), str(file))
        self.step = progress.step
        self.shards = Shards(folder / STATE, progress.world_size)

    def restore(self, engine: Engine, ema: EMA | None) -> None:
        """Restore the optimizer's state and the averages; the model must already have its weights."""
        load_state(self.shards, engine)
        if ema:
            for piece in engine.owned:
                stored = self.shards.read("ema", piece.name, piece.start, piece.numel)
                engine.average(ema.averages, piece).copy_(stored)


@dataclass(frozen=True)
class Rung:
    """A checkpoint in the run's storage whose weights can be evaluated."""

    uri: str
    progress: Progress

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def weights(self) -> str:
        return weights_of(self.uri)


def weights_of(checkpoint: str) -> str:
    """Return the URI of a checkpoint's weights."""
    return Storage.open(checkpoint).child(WEIGHTS).uri


def folder_of(step: int) -> str:
    """Return the name of a step's checkpoint folder in the trial's folder."""
    return f"{FOLDER}{step:08d}"


def place_of(checkpoint: str) -> tuple[str, str]:
    """Return the training of a checkpoint's URI and the name of its folder, wherever the storage lies now."""
    training, folder = checkpoint.partition("?")[0].rstrip("/").split("/")[-2:]
    return unquote(training), folder


def step_of(checkpoint: Storage) -> int:
    """Return the step of a checkpoint's folder."""
    return int(checkpoint.uri.rstrip("/").rpartition(FOLDER)[2])


def steps_of(trial: Storage) -> list[int]:
    """Return the steps of all checkpoints in a trial's folder, complete or not, in ascending order."""
    return sorted(int(name.removeprefix(FOLDER)) for name in trial.folders() if name.startswith(FOLDER))


def last_intact(trial: Storage, tell: Callable[[str], None]) -> Storage | None:
    """Return the folder of the last complete, undamaged checkpoint of a training; None if there is none.

    Ray Train may not know of it: a crash can come between writing and reporting a checkpoint.

    Args:
        tell: callback that receives one line for each checkpoint that is skipped.
    """
    for step in reversed(steps_of(trial)):
        folder = trial.child(folder_of(step))
        whole = read_progress(folder) is not None
        if whole and not (wrong := damaged(folder)):
            return folder
        tell(f"{folder.uri} is passed over: {'damaged: ' + ', '.join(wrong) if whole else 'not whole'}")
    return None


def drop_old_states(trial: Storage) -> None:
    """Delete the training state of all checkpoints except the rungs and the last two complete ones."""
    newer = 0
    for step in reversed(steps_of(trial)):
        folder = trial.child(folder_of(step))
        progress = read_progress(folder)
        if progress and newer >= 2 and progress.why != RUNG:
            if not folder.exists(STATE):
                return  # neither do the earlier ones
            folder.delete(STATE)
        newer += progress is not None


def damaged(folder: Storage, part: str = "") -> list[str]:
    """Return the files of a complete checkpoint that are missing or differ from what its ranks wrote.

    Args:
        part: path prefix; only files below it are checked.
    """
    written: dict[str, str] = {}
    for mark in sorted(_marks(_progress(folder).world_size)):
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
    """Return the complete rungs of every trial below `trainings`, by trial, in ascending order of step."""
    return {trial: rungs_of(trainings.child(trial)) for trial in trainings.folders()}


def rungs_of(trial: Storage) -> list[Rung]:
    """Return the complete rungs of one trial, in ascending order of step; empty before it has begun."""
    return [rung for step in steps_of(trial) if (rung := _rung(trial.child(folder_of(step))))]


def _rung(folder: Storage) -> Rung | None:
    """Return the rung in a folder, or None if the folder holds no complete checkpoint of a rung."""
    progress = read_progress(folder)
    return Rung(folder.uri, progress) if progress and progress.why == RUNG else None


def read_progress(folder: Storage) -> Progress | None:
    """Return the progress of the checkpoint in a folder, or None if it is missing, incomplete or damaged.

    Raises:
        ConfigError: it has a newer format.
    """
    files = set(folder.files())
    if not any(name.startswith(f"{MARK}0000-") for name in files):
        return None  # rank 0 may still be writing progress.json
    try:
        progress = _progress(folder)
    except json.JSONDecodeError:
        return None  # damaged
    return progress if _marks(progress.world_size) <= files else None


def _progress(folder: Storage) -> Progress:
    return Progress.parse(json.loads(folder.read_text(PROGRESS)), f"{folder.uri}/{PROGRESS}")
