"""How many rows a GPU's memory holds at once: tried before the first step, and learned from failures."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from cluster.storage import Storage
from ray_jobs.config import TrainConfig
from ray_jobs.diffusion.families.text import MASK
from ray_jobs.training.batch import COLUMNS, InputMaker, Piece
from ray_jobs.training.engine import rows_a_worker
from ray_jobs.training.flat import Flat

RESERVE = 0.05  # of a process's GPU memory, for other shapes of pictures and for gaps between tensors
HELD = "memory.json"  # in a trial's folder: how many rows its next start computes at once


def rows_at_once(config: TrainConfig, world_size: int) -> int:
    """Return the greatest number of rows of a forward pass that the settings allow."""
    most = rows_a_worker(config, world_size)
    return min(most, config.micro_batch_size or most)


def rows_that_fit(engine: Flat, maker: InputMaker, shape: tuple[int, ...], most: int) -> int:
    """Return the number of rows, at most `most` and else halved, with which a rehearsal has enough memory.

    Args:
        shape: from `square_latents`.

    Raises:
        torch.OutOfMemoryError: memory is too small for a single row.
    """
    rows = most
    while True:
        try:
            engine.rehearse(*maker.make(blank(maker, shape, rows), 0))
            return rows
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        # Outside of the handler: the error holds on to the activations.
        torch.cuda.empty_cache()
        rows = -(-rows // 2)


def blank(maker: InputMaker, shape: tuple[int, ...], count: int) -> Piece:
    """Return rows like those of a data set, with captions of their greatest length."""
    stored = maker.codec.unpacked_shape(shape)
    rows = {name: torch.zeros((count, *stored)) for name in ("latents_mean", "latents_logvar")}
    for name, empty in maker.null.items():
        row = torch.ones_like(empty) if name == MASK else empty
        rows[name] = row.cpu().expand(count, *row.shape[1:])
    if "sizes" in maker.picture_conditions:
        rows[COLUMNS["sizes"]] = torch.zeros((count, 6), dtype=torch.int32)
    return Piece(rows, list(range(count)), [1.0] * count)


def smaller(trial: str, rows: int, most: int) -> str:
    """Say that fewer rows are computed at once than the settings allow."""
    return (
        f"{trial}: GPU memory holds {rows} of {most} images at once, which train.micro_batch_size: {rows} "
        "says without trying; train.gradient_checkpointing makes room for more"
    )


def held_rows(trial: Storage) -> int | None:
    """Return the number of rows that a failure has left for the next start of a trial; None without one."""
    return int(json.loads(trial.read_text(HELD))["rows"]) if trial.exists(HELD) else None


@contextmanager
def halved_when_it_does_not_fit(
    config: TrainConfig, trial: Storage, name: str, world_size: int, tell: Callable[[str], None]
) -> Iterator[None]:
    """Where the block runs out of GPU memory, let the trial's next start compute half of the rows at once.

    Args:
        config: the settings of the block, with the rows that it computes at once.
        name: the trial's name.

    Raises:
        torch.OutOfMemoryError: in any case; it says which settings to change.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        rows = rows_at_once(config, world_size)
        if config.on_oom == "halve" and rows > 1:
            trial.write_text(HELD, json.dumps({"rows": -(-rows // 2)}))
            tell(smaller(name, -(-rows // 2), rows))
        raise torch.OutOfMemoryError(
            f"{name}: {rows} images at once need more GPU memory than there is: lower "
            "train.micro_batch_size, set train.gradient_checkpointing: true or train.precision: bf16, or use "
            "more workers with train.zero_stage 1 to 3; python -m cluster.plan tells what fits "
            f"({error})"
        ) from error
