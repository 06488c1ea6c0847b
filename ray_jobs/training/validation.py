"""The denoising loss on validation rows: a cheap score that compares checkpoints on the same draws."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ray_jobs.config import Config
from ray_jobs.data.encoding.cache_files import read_part, read_schema
from ray_jobs.data.encoding.tensors import as_torch, read_tensors
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.finetuning import FineTuning
from ray_jobs.diffusion.objectives import LossSettings
from ray_jobs.diffusion.protocols import Pipeline
from ray_jobs.training.batch import InputMaker, Piece

# Uniform positions, even for objectives that train on some positions more often.
PLAIN = LossSettings(timestep_sampling="uniform")


class ValidationLoss:
    """Validation loss: the plain squared error of the model's objective on fixed rows, timesteps and noise.

    The objectives are those of Ho et al. (arXiv 2006.11239, eq. 14) and Esser et al. (arXiv 2403.03206,
    eq. 13). No caption is dropped, and `train.loss` is ignored except for `zero_terminal_snr`, which is part
    of the objective.

    Args:
        config: configuration; `evaluate.seed` determines the noise, `evaluate.batch_size` the batches.
        device: the device of the pipelines to be scored.
        rows: maximum number of rows: the first in the order of their digests.
        timesteps: number of equal parts of the schedule; each row is scored at the middle of every part.

    Raises:
        ValueError: there are no validation rows.
    """

    def __init__(
        self, config: Config, dataset: Dataset, device: torch.device, rows: int = 64, timesteps: int = 4
    ) -> None:
        self.train, self.seed = config.train, config.evaluate.seed % 2**64
        self.data = config.data
        self.device, self.empty_caption = device, dataset.empty_caption()
        self.positions = [(number + 0.5) / timesteps for number in range(timesteps)]
        self.pieces = first_rows(dataset, rows, config.evaluate.batch_size)

    def __call__(self, pipeline: Pipeline) -> float:
        """Return the mean of `of_rows`."""
        return self.of_rows(pipeline).mean().item()

    def of_rows(self, pipeline: Pipeline) -> torch.Tensor:
        """Return the loss of each row, averaged over timesteps and elements.

        Where text encoders are trained, the pipeline's own encode the captions.

        Args:
            pipeline: pipeline of the same family as `model.base`, on the device; it is not changed.

        Returns:
            float64, N, on the CPU, in the order of the rows' digests.
        """
        train, family = self.train, family_of(pipeline)
        objective = family.schedule.objective(
            pipeline.scheduler.config, zero_terminal_snr=train.loss.zero_terminal_snr
        )
        model = FineTuning(
            pipeline,
            family,
            objective.to(self.device),
            replace(PLAIN, outside_mask=train.loss.outside_mask),
            text_encoders_trained=train.train_text_encoder,
        )
        inputs = InputMaker(
            pipeline.vae,
            model,
            self.empty_caption,
            self.device,
            seed=self.seed,
            caption_dropout=0.0,
            num_references=self.data.num_references,
            has_masks=self.data.has_masks,
        )
        losses = torch.zeros(sum(len(piece.places) for piece in self.pieces), dtype=torch.float64)
        with evaluating(model), torch.inference_mode():
            for piece in self.pieces:
                for step, position in enumerate(self.positions, start=1):
                    made, _ = inputs.make(piece, step)
                    draws = made.pop("draws")
                    draws = replace(draws, position=torch.full_like(draws.position, position))
                    losses[piece.places] += model(**made, draws=draws).double().cpu()
        return losses / len(self.positions)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode for the block, then restore each module's: adapters load with dropout active."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def first_rows(dataset: Dataset, count: int, batch_size: int) -> list[Piece]:
    """Return the first `count` validation rows in the order of their digests, batched by latent shape.

    A row's place is its index in this order, its weight 1 / number of rows.

    Raises:
        ValueError: there are no validation rows.
    """
    parts = dataset.parts("validation")
    if not parts:
        raise ValueError(
            "data.validation: the validation split has no pictures for the denoising loss; raise the share "
            "or add pictures"
        )
    keys = dataset.table("validation", ["digest", "text"]).to_pylist()
    origins = [(number, row) for number, part in enumerate(parts) for row in range(part["rows"])]
    order = sorted(range(len(keys)), key=lambda n: (keys[n]["digest"], keys[n]["text"]))[:count]
    wanted: dict[int, dict[int, int]] = defaultdict(dict)  # part -> row in it -> place
    for place, number in enumerate(order):
        part, row = origins[number]
        wanted[part][row] = place
    groups: dict[tuple[int, ...], list[tuple[list[int], dict[str, np.ndarray]]]] = defaultdict(list)
    for number, places in wanted.items():
        tensors = read_rows(dataset, parts[number]["file"], list(places))
        groups[tensors["latents_mean"].shape[1:]].append((list(places.values()), tensors))
    pieces = []
    for group in groups.values():
        places_of = [place for places, _ in group for place in places]
        joined = {name: as_torch(np.concatenate([t[name] for _, t in group])) for name in group[0][1]}
        for batch in torch.arange(len(places_of)).split(batch_size):
            chosen = [places_of[n] for n in batch.tolist()]
            rows = {name: tensor[batch] for name, tensor in joined.items()}
            pieces.append(Piece(rows, chosen, [1 / len(order)] * len(chosen)))
    return pieces


def read_rows(dataset: Dataset, file: str, rows: list[int]) -> dict[str, np.ndarray]:
    """Return all tensors of the given rows of a part, by column."""
    schema = read_schema(dataset.cache, file)
    names = [field.name for field in schema if b"shape" in (field.metadata or {})]
    table = read_part(dataset.cache, file, names)
    return {name: values[rows] for name, values in read_tensors(table, names).items()}
