"""A rung's checkpoint: the weights to evaluate, and the state to go on from.

weights/             what was trained, averaged, in diffusers' format (rank 0)
deepspeed/           the engine's own checkpoint (every rank its shard)
ema.safetensors      the averages (rank 0)
progress.json        what the rung reported: step, train_loss, images_per_second (rank 0)
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.storage import Storage
from ray_jobs.config import TrainConfig
from ray_jobs.diffusion.ema import EMA
from ray_jobs.diffusion.finetuning import save_weights
from ray_jobs.training.engine import gathered

WEIGHTS = "weights"
PROGRESS = "progress.json"


def save_checkpoint(
    folder: Path,
    pipeline: Any,
    engine: Any,
    ema: EMA | None,
    config: TrainConfig,
    metrics: dict[str, Any],
) -> None:
    """Write this rank's part of the checkpoint into `folder`; every rank calls it."""
    from safetensors.torch import save_file

    engine.save_checkpoint(str(folder / "deepspeed"), tag="rung", exclude_frozen_parameters=True)
    model = engine.module
    with gathered((p for _, p in model.trained()), config.zero_stage):
        if engine.global_rank != 0:
            return
        # The averages take the place of the weights while they are written.
        trained = {name: parameter.detach().clone() for name, parameter in model.trained()}
        _fill(model, ema.averages if ema else trained)
        save_weights(pipeline, config.method, folder / WEIGHTS)
        _fill(model, trained)
    if ema:
        save_file(ema.averages, folder / "ema.safetensors")
    (folder / PROGRESS).write_text(json.dumps(metrics))


@torch.no_grad()
def _fill(model: Any, values: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.trained():
        parameter.data.copy_(values[name])


def load_checkpoint(checkpoint: Any, engine: Any, ema: EMA | None) -> int:
    """Bring the engine and the averages to the state of a checkpoint; returns its step."""
    from safetensors.torch import load_file

    with checkpoint.as_directory() as name:
        folder = Path(name)
        engine.load_checkpoint(str(folder / "deepspeed"), tag="rung", load_module_strict=False)
        if ema:
            ema.averages = load_file(folder / "ema.safetensors", device=str(engine.device))
        return int(json.loads((folder / PROGRESS).read_text())["step"])


@dataclass(frozen=True)
class Rung:
    """A checkpoint in the run's storage."""

    uri: str
    metrics: dict[str, Any]

    @property
    def weights(self) -> str:
        return f"{self.uri}/{WEIGHTS}"


def find_rungs(trainings: Storage) -> dict[str, list[Rung]]:
    """The complete checkpoints of every trial below `trainings`, by trial, in the order of their steps."""
    found: dict[str, list[Rung]] = {}
    for trial in trainings.folders():
        below = trainings.child(trial)
        names = [name for name in below.folders() if below.exists(f"{name}/{PROGRESS}")]
        rungs = [
            Rung(below.child(name).uri, json.loads(below.read_text(f"{name}/{PROGRESS}"))) for name in names
        ]
        found[trial] = sorted(rungs, key=lambda rung: int(rung.metrics["step"]))
    return found
