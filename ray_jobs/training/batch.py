"""Turn a rank's rows of a step into the engine's inputs: latents, captions, random draws, loss weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ray_jobs.config import TrainConfig
from ray_jobs.data.feeding.order import rows_of_rank
from ray_jobs.diffusion.families import Captions
from ray_jobs.diffusion.finetuning import FineTuning
from ray_jobs.diffusion.objectives import Draws, per_row
from ray_jobs.diffusion.protocols import Autoencoder
from ray_jobs.diffusion.randomness import draw

COLUMNS = {"sizes": "conditioning"}  # columns of the conditions that belong to the picture


def loss_shares(config: TrainConfig) -> list[float]:
    """Return the weight of each row in the step's loss, training rows first, then class rows.

    The loss is the mean over the training rows plus `prior_loss_weight` (lambda) times the mean over the
    class rows (Ruiz et al., arXiv 2208.12242, eq. 2). Ranks need no even mix of both: gradients are summed
    over all rows, whichever rank has them.
    """
    rows, of_class = config.training_rows, config.class_rows
    return [1 / rows] * rows + [config.prior_loss_weight / max(of_class, 1)] * of_class


@dataclass(frozen=True)
class Piece:
    """A micro-batch: the rows that a rank processes in one forward and backward pass.

    Attributes:
        rows: tensors by column, N x ...
        places: the rows' positions in the step's batch.
        weights: the weight of each row in the step's loss.
    """

    rows: dict[str, torch.Tensor]
    places: list[int]
    weights: list[float]

    @staticmethod
    def cut(
        batch: dict[str, torch.Tensor], shares: Sequence[float], world_size: int, rank: int, pieces: int
    ) -> list["Piece"]:
        """Split a rank's rows of a step into `pieces` pieces whose sizes differ by at most one row.

        A rank with fewer rows than pieces repeats a row with weight 0, so that all ranks run the same number
        of passes.

        Args:
            batch: the rank's rows.
            shares: the loss weight of each row of the whole step, see `loss_shares`.
        """
        mine = rows_of_rank(len(shares), world_size, rank)
        found = []
        for numbers in torch.arange(len(mine)).tensor_split(pieces):
            taken = numbers if len(numbers) else torch.tensor([0])
            places = [mine[number] for number in taken.tolist()]
            found.append(
                Piece(
                    {name: tensor[taken] for name, tensor in batch.items()},
                    places,
                    [shares[place] if len(numbers) else 0.0 for place in places],
                )
            )
        return found


class InputMaker:
    """Builder of a piece's inputs. Random draws depend only on the seed, the step and the row's place.

    Args:
        autoencoder: the pipeline's autoencoder, which gives the scale of its latents.
        empty_caption: the encoded empty caption, from `Dataset.empty_caption`.
        caption_dropout: share of captions that the empty one replaces.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        model: FineTuning,
        empty_caption: Captions,
        device: torch.device,
        *,
        seed: int,
        caption_dropout: float,
    ) -> None:
        self.device, self.settings = device, model.settings
        self.seed, self.caption_dropout = seed, caption_dropout
        self.codec, self.scale = model.family.codec, model.family.codec.scale(autoencoder)
        self.picture_conditions = model.family.picture_conditions
        trained = bool(model.text_encoders)
        names = model.family.text.tokens if trained else model.family.text.embeds
        present = {name: empty_caption[name] for name in names if name in empty_caption}
        # Tokens are stored as int32, and text encoders take int64.
        self.null = {name: t.long() if t.dtype == torch.int32 else t for name, t in present.items()}

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the prepared rows that a step reads."""
        of_picture = (COLUMNS[name] for name in self.picture_conditions)
        return ("latents_mean", "latents_logvar", *self.null, *of_picture)

    def make(self, piece: Piece, step: int) -> tuple[dict[str, Any], torch.Tensor]:
        """Return the arguments of `FineTuning` and the rows' loss weights, both on the device."""
        rows, stored = piece.rows, tuple(piece.rows["latents_mean"].shape[1:])
        drawn = draw(
            (self.seed,),
            step,
            piece.places,
            self.codec.packed_shape(stored),
            self.settings,
            posterior_shape=stored,
        )
        mean, logvar = rows["latents_mean"].float(), rows["latents_logvar"].float()
        dropped = drawn.caption < self.caption_dropout
        conditions = {name: self._dropped(rows[name], name, dropped) for name in self.null}
        conditions |= {name: rows[COLUMNS[name]] for name in self.picture_conditions}
        inputs = {
            "latents": self._there(self.codec.sample(mean, logvar, self.scale, drawn.posterior)),
            "conditions": {name: self._there(tensor) for name, tensor in conditions.items()},
            "draws": self._draws(drawn.loss),
        }
        if self.caption_dropout:
            inputs["dropped"] = self._there(dropped)
        return inputs, torch.tensor(piece.weights, device=self.device)

    def _draws(self, draws: Draws) -> Draws:
        there = {name: self._there(part) for name, part in vars(draws).items() if part is not None}
        return replace(draws, **there)

    def _dropped(self, values: torch.Tensor, name: str, dropped: torch.Tensor) -> torch.Tensor:
        """Replace the dropped captions by the empty one."""
        null = self.null[name]
        return torch.where(per_row(dropped, values), null, values.to(null.dtype))

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)
