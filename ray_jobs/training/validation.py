"""The denoising loss on validation rows: a cheap score that compares checkpoints on the same draws."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ray_jobs.config import Config
from ray_jobs.data.encoding.cache_files import read_schema
from ray_jobs.data.encoding.plan import PartRecord
from ray_jobs.data.encoding.tensors import as_torch
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.data.feeding.streaming import SOURCE, read_rows
from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.finetuning import FineTuning
from ray_jobs.diffusion.objectives import LossSettings
from ray_jobs.diffusion.preferences import PreferenceLoss
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

    split = "validation"
    preference: PreferenceLoss | None = None

    def __init__(
        self, config: Config, dataset: Dataset, device: torch.device, rows: int = 64, timesteps: int = 4
    ) -> None:
        self.train, self.seed = config.train, config.evaluate.seed % 2**64
        self.data = config.data
        self.device, self.empty_caption = device, dataset.empty_caption()
        self.positions = [(number + 0.5) / timesteps for number in range(timesteps)]
        self.pieces = first_rows(dataset, rows, config.evaluate.batch_size, self.split)

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
        model, inputs = self._built(pipeline)
        losses = torch.zeros(self.num_rows, dtype=torch.float64)
        with evaluating(model), torch.inference_mode():
            for piece, made in self._posed(inputs):
                losses[piece.places] += model(**made).double().cpu()
        return losses / len(self.positions)

    @property
    def num_rows(self) -> int:
        return sum(len(piece.places) for piece in self.pieces)

    def _built(self, pipeline: Pipeline) -> tuple[FineTuning, InputMaker]:
        """Return a pipeline as a module with the plain loss, and the maker of its inputs."""
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
            preference=self.preference,
            has_control=self.data.has_control,
        )
        return model, inputs

    def _posed(self, inputs: InputMaker) -> Iterator[tuple[Piece, dict[str, Any]]]:
        """Yield every piece at every position with its inputs, whose noise differs between positions."""
        for piece in self.pieces:
            for step, position in enumerate(self.positions, start=1):
                made, _ = inputs.make(piece, step)
                draws = made["draws"]
                made["draws"] = replace(draws, position=torch.full_like(draws.position, position))
                yield piece, made


class HeldOutVotes(ValidationLoss):
    """Denoising losses of held-out votes: what a model's implicit rewards are the differences of.

    Args:
        config: of `votes_config`.
        dataset: its votes.
        preference: `train.preference.loss`.
        split: the split of the votes.

    Attributes:
        prompts: of the rows, in their order.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        device: torch.device,
        preference: PreferenceLoss,
        split: str,
        timesteps: int = 8,
    ) -> None:
        self.preference, self.split = preference, split
        super().__init__(config, dataset, device, rows=dataset.num_rows(split), timesteps=timesteps)
        keys = dataset.table(split, ["digest", "text"]).to_pylist()
        self.prompts = [text for _, text in sorted((key["digest"], key["text"]) for key in keys)]

    def of_votes(self, pipeline: Pipeline) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses of preferred or liked images, and of the others, as `of_rows`: float64 each.

        Those of pairs are in one order.
        """
        model, inputs = self._built(pipeline)
        one = torch.zeros(self.num_rows, dtype=torch.float64)
        other, liked = torch.zeros_like(one), torch.ones(self.num_rows, dtype=torch.bool)
        with evaluating(model), torch.inference_mode():
            for piece, made in self._posed(inputs):
                rejected = made.pop("rejected", None)
                if rejected is None:
                    liked[piece.places] = made.pop("liked").cpu()
                    del made["counted"]
                one[piece.places] += model(**made).double().cpu()
                if rejected is not None:
                    other[piece.places] += model(**made | {"latents": rejected}).double().cpu()
        one, other = one / len(self.positions), other / len(self.positions)
        return (one, other) if self.preference == "dpo" else (one[liked], one[~liked])


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


def first_rows(dataset: Dataset, count: int, batch_size: int, split: str = "validation") -> list[Piece]:
    """Return the first `count` rows of a split in the order of their digests, batched by latent shape.

    A row's place is its index in this order, its weight 1 / number of rows.

    Raises:
        ValueError: there are no such rows.
    """
    parts = dataset.parts(split)
    if not parts:
        raise ValueError(
            f"data.{split}: the {split} split has no pictures for the denoising loss; raise the share "
            "or add pictures"
        )
    keys = dataset.table(split, ["digest", "text"]).to_pylist()
    origins = [(number, row) for number, part in enumerate(parts) for row in range(part["rows"])]
    order = sorted(range(len(keys)), key=lambda n: (keys[n]["digest"], keys[n]["text"]))[:count]
    wanted: dict[int, dict[int, int]] = defaultdict(dict)  # part -> row in it -> place
    for place, number in enumerate(order):
        part, row = origins[number]
        wanted[part][row] = place
    groups: dict[tuple[int, ...], list[tuple[list[int], dict[str, np.ndarray]]]] = defaultdict(list)
    for number, places in wanted.items():
        tensors = _read(dataset, parts[number], list(places))
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


def _read(dataset: Dataset, part: PartRecord, rows: list[int]) -> dict[str, np.ndarray]:
    """Return all tensors of the given rows of a part, and the number of their source, by column."""
    schema = read_schema(dataset.cache, part["file"])
    names = [field.name for field in schema if b"shape" in (field.metadata or {})]
    return {name: values[rows] for name, values in read_rows(dataset.cache, part, [*names, SOURCE]).items()}
