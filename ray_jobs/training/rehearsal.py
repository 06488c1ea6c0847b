"""How many rows a GPU's memory holds at once: tried before the first step, and learned from failures."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from cluster.gpus import leaving_free
from cluster.storage import Storage
from ray_jobs.config import TrainConfig
from ray_jobs.console.troubleshooting import Help, help_link
from ray_jobs.data.feeding.streaming import SOURCE
from ray_jobs.diffusion.families.control import CONTROL
from ray_jobs.diffusion.families.text import MASK, NULL
from ray_jobs.training.batch import COLUMNS, InputMaker, Piece
from ray_jobs.training.engine import rows_a_worker

RESERVE = 0.05  # of a process's GPU memory, for other shapes of pictures and for gaps between tensors
HELD = "memory.json"  # in a trial's folder: how many rows its next start computes at once


def rows_at_once(config: TrainConfig, world_size: int) -> int:
    """Return the greatest number of rows of a forward pass that the settings allow."""
    most = rows_a_worker(config, world_size)
    return min(most, config.micro_batch_size or most)


def rehearsed(
    config: TrainConfig, rehearse: Callable[[int], None], world_size: int, device: torch.device
) -> TrainConfig:
    """Return the settings with a `micro_batch_size` that the memory of every rank holds.

    All ranks must call this.

    Args:
        rehearse: see `rows_that_fit`.

    Raises:
        torch.OutOfMemoryError: memory is too small for a single row.
    """
    most = rows_at_once(config, world_size)
    with leaving_free(RESERVE, config.gpu_share, device):
        held = torch.tensor(rows_that_fit(rehearse, most), device=device)
    if world_size > 1:
        torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MIN)
    rows = int(held)
    return config if rows == most else config.model_copy(update={"micro_batch_size": rows})


def rows_that_fit(rehearse: Callable[[int], None], most: int) -> int:
    """Return the number of rows, at most `most` and else halved, with which a rehearsal has enough memory.

    Args:
        rehearse: computes with so many rows, and leaves nothing behind.

    Raises:
        torch.OutOfMemoryError: memory is too small for a single row.
    """
    rows = most
    while True:
        try:
            rehearse(rows)
            return rows
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        # Outside of the handler: the error holds on to the activations.
        torch.cuda.empty_cache()
        rows = -(-rows // 2)


def blank(
    maker: InputMaker, shape: tuple[int, ...], count: int, references: Sequence[tuple[int, ...]] = ()
) -> Piece:
    """Return rows like those of a data set, with captions of their greatest length.

    Args:
        shape: from `square_latents`.
        references: from `square_references`.
    """
    stored = maker.codec.unpacked_shape(shape)
    rows = {name: torch.zeros((count, *stored)) for name in ("latents_mean", "latents_logvar")}
    if maker.painted:
        *posterior, mask = maker.painted
        rows |= {name: torch.zeros((count, *stored)) for name in posterior}
        height, width = (side * maker.latent_pixels for side in stored[-2:])
        rows[mask] = torch.ones((count, 1, height, width), dtype=torch.bool)
    shown = 0
    if maker.nulls:
        spaces = [maker.codec.unpacked_shape(latents)[-2:] for latents in references]
        shown = maker.text.shown_tokens(
            [(height * maker.latent_pixels, width * maker.latent_pixels) for height, width in spaces]
        )
    for name, empty in maker.null.items():
        row = torch.ones_like(empty) if name == MASK else empty
        if shown:
            row = torch.cat([row, row[:, :1].expand(-1, shown, *row.shape[2:])], dim=1)
        rows[name] = row.cpu().expand(count, *row.shape[1:])
    rows |= {name: rows[name.removeprefix(NULL)] for name in maker.nulls}
    if "sizes" in maker.picture_conditions:
        rows[COLUMNS["sizes"]] = torch.zeros((count, 6), dtype=torch.int32)
    for name, latents in zip(maker.references, references, strict=True):
        rows[name] = torch.zeros((count, *maker.codec.unpacked_shape(latents)))
    if SOURCE in maker.columns:
        rows[SOURCE] = torch.zeros(count, dtype=torch.int32)
    if maker.control:
        rows[CONTROL] = blank_control(maker, shape, count)
    if maker.masks:
        rows["mask"] = torch.ones((count, 1, *shape[1:]))
    return Piece(rows, list(range(count)), [1.0] * count)


def blank_control(maker: InputMaker, shape: tuple[int, ...], count: int) -> torch.Tensor:
    """Return the stored conditions of `count` rows for a ControlNet: black pictures, or their latents."""
    stored = maker.codec.unpacked_shape(shape)
    if maker.control_form == "latents":
        return torch.zeros((count, *stored))
    height, width = (side * maker.latent_pixels for side in stored[-2:])
    return torch.zeros((count, 3, height, width), dtype=torch.uint8)


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
    config: TrainConfig,
    trial: Storage,
    name: str,
    world_size: int,
    tell: Callable[[str], None],
    lower: str = "train.micro_batch_size",
) -> Iterator[None]:
    """Where the block runs out of GPU memory, let the trial's next start compute half of the rows at once.

    Args:
        config: the settings of the block, with the rows that it computes at once.
        name: the trial's name.
        lower: settings that ask for less memory where they are lower.

    Raises:
        torch.OutOfMemoryError: in any case; it says which settings to change.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        rows = rows_at_once(config, world_size)
        if config.may_halve and rows > 1:
            trial.write_text(HELD, json.dumps({"rows": -(-rows // 2)}))
            tell(smaller(name, -(-rows // 2), rows))
        raise torch.OutOfMemoryError(
            f"{name}: {rows} images at once need more GPU memory than there is: lower {lower}, "
            "set train.gradient_checkpointing: true or train.precision: bf16, or use "
            "more workers with train.zero_stage 1 to 3; python -m cluster.plan tells what fits; "
            f"{help_link(Help.OUT_OF_MEMORY)} ({error})"
        ) from error
