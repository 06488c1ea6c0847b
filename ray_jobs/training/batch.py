"""Turn a rank's rows of a step into the engine's inputs: latents, captions, random draws, loss weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ray_jobs.config import TrainConfig
from ray_jobs.data.feeding.order import rows_of_rank
from ray_jobs.data.feeding.streaming import SOURCE
from ray_jobs.diffusion.families import Captions
from ray_jobs.diffusion.families.control import CONTROL
from ray_jobs.diffusion.families.family import MASK_PIXELS, MASKED, reference
from ray_jobs.diffusion.families.text import LENGTHS, MASK, NULL
from ray_jobs.diffusion.objectives import Draws, per_row
from ray_jobs.diffusion.pack import Trainable
from ray_jobs.diffusion.preferences import PreferenceLoss
from ray_jobs.diffusion.protocols import Autoencoder
from ray_jobs.diffusion.randomness import draw

COLUMNS = {"sizes": "conditioning"}  # columns of the conditions that belong to the picture
PAINTED = ("masked_mean", "masked_logvar", MASK_PIXELS)  # columns of families that paint masks


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
        batch: dict[str, torch.Tensor],
        shares: Sequence[float],
        world_size: int,
        rank: int,
        pieces: int,
        *,
        equal: bool = False,
    ) -> list["Piece"]:
        """Split a rank's rows of a step into `pieces` pieces whose sizes differ by at most one row.

        A rank with fewer rows than pieces repeats a row with weight 0, so that all ranks run the same number
        of passes.

        Args:
            batch: the rank's rows.
            shares: the loss weight of each row of the whole step, see `loss_shares`.
            equal: fill up the pieces of all ranks to one size in the same way.
        """
        mine = rows_of_rank(len(shares), world_size, rank)
        most = len(rows_of_rank(len(shares), world_size, 0))
        size = -(-most // pieces) if equal else 1
        found = []
        for part in torch.arange(len(mine)).tensor_split(pieces):
            numbers = part.tolist()
            repeated = [0] * max(0, size - len(numbers))
            taken = [*numbers, *repeated]
            # Without repeated rows a view: captions may have megabytes a row.
            place = torch.tensor(taken) if repeated else slice(taken[0], taken[-1] + 1)
            found.append(
                Piece(
                    {name: tensor[place] for name, tensor in batch.items()},
                    [mine[number] for number in taken],
                    [shares[mine[number]] for number in numbers] + [0.0] * len(repeated),
                )
            )
        return found


class InputMaker:
    """Builder of a piece's inputs. Random draws depend only on the seed, the step and the row's place.

    Args:
        autoencoder: the pipeline's autoencoder, which gives the scale of its latents.
        empty_caption: the encoded empty caption, from `Dataset.empty_caption`.
        caption_dropout: share of captions that the empty one replaces.
        num_references: number of each row's reference pictures.
        has_masks: whether each row has a mask.
        preference: loss of `train.preference`, if votes are what is trained on: with `dpo` a row's first
            reference picture is the one that was not preferred; with `kto` liked pictures are of sources with
            an even number.
        has_control: whether each row has a control image.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        model: Trainable,
        empty_caption: Captions,
        device: torch.device,
        *,
        seed: int,
        caption_dropout: float,
        num_references: int = 0,
        has_masks: bool = False,
        preference: PreferenceLoss | None = None,
        has_control: bool = False,
    ) -> None:
        self.preference = preference
        self.control = (CONTROL,) if has_control else ()
        self.control_form = model.family.control_form
        self.masks = ("mask",) if has_masks else ()
        self.references = tuple(map(reference, range(num_references)))
        self.device, self.settings = device, model.settings
        self.seed, self.caption_dropout = seed, caption_dropout
        self.codec = model.family.codec
        shift, factor = self.codec.scale(autoencoder)
        self.scale = shift.to(device), factor.to(device)
        self.picture_conditions = model.family.picture_conditions
        self.painted = PAINTED if model.family.paints_masks else ()
        self.latent_pixels = self.codec.latent_pixels(autoencoder.config)
        trained = bool(model.text_encoders)
        names = model.family.text.tokens if trained else model.family.text.embeds
        present = {name: empty_caption[name] for name in names if name in empty_caption}
        # Tokens are stored as int32, and text encoders take int64.
        self.null = {
            name: (t.long() if t.dtype == torch.int32 else t).to(device) for name, t in present.items()
        }
        self.null_length = int(self.null[MASK].sum()) if MASK in self.null else 0
        # Where text encoders see the references, a dropped caption still has those of its row. They are read
        # where none is dropped too: members of a pack, of which another may drop some, read the same rows.
        self.text = model.family.text
        seen = bool(num_references) and not preference and self.text.sees_references
        self.nulls = tuple(NULL + name for name in self.null if seen)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the prepared rows that a step reads."""
        of_picture = (COLUMNS[name] for name in self.picture_conditions)
        further = (*of_picture, *self.references, *self.nulls, *self.control, *self.masks, *self.painted)
        further += (SOURCE,) if self.preference == "kto" else ()
        return ("latents_mean", "latents_logvar", *self.null, *further)

    def make(self, piece: Piece, step: int) -> tuple[dict[str, Any], torch.Tensor]:
        """Return the arguments of `FineTuning` and the rows' loss weights, both on the device."""
        return self.finish(self.begin(piece, step))

    def begin(self, piece: Piece, step: int) -> "Sent":
        """Draw a piece's random numbers on the CPU, and begin to send them with its rows to the device.

        The draws are the same on every device, and rows are sent as they are stored. It is safe to call this
        in another thread.
        """
        stored = tuple(piece.rows["latents_mean"].shape[1:])
        drawn = draw(
            (self.seed,),
            step,
            piece.places,
            self.codec.packed_shape(stored),
            self.settings,
            posterior_shape=stored,
            with_masked=bool(self.painted),
        )
        dropped = drawn.caption < self.caption_dropout
        lengths = None
        if MASK in self.null:
            of_null = piece.rows[NULL + MASK].sum(dim=1) if self.nulls else self.null_length
            lengths = piece.rows[MASK].sum(dim=1).where(~dropped, of_null)
        loss = {f"draws.{name}": part for name, part in vars(drawn.loss).items() if part is not None}
        return Sent.to(
            self.device,
            {
                **{name: piece.rows[name] for name in self.columns},
                **loss,
                "posterior": drawn.posterior,
                **({} if drawn.masked is None else {"masked_posterior": drawn.masked}),
                "dropped": dropped,
                "weights": torch.tensor(piece.weights),
            },
            {} if lengths is None else {LENGTHS: lengths},
            has_dropped=bool(dropped.any()),
        )

    def finish(self, sent: "Sent") -> tuple[dict[str, Any], torch.Tensor]:
        """Compute the inputs of a piece from what `begin` has sent."""
        there = sent.arrived()
        mean, logvar = there["latents_mean"].float(), there["latents_logvar"].float()
        dropped = there["dropped"]
        conditions = {
            name: self._dropped(there, name) if sent.has_dropped else there[name].to(null.dtype)
            for name, null in self.null.items()
        }
        conditions |= {name: there[COLUMNS[name]] for name in self.picture_conditions} | sent.kept
        conditions |= {
            name: self.codec.normalised(there[name].float(), self.scale) for name in self.references
        }
        if self.control:
            conditions[CONTROL] = self._control(there[CONTROL])
        if self.painted:
            masked = there["masked_mean"].float(), there["masked_logvar"].float()
            conditions[MASKED] = self.codec.sample(*masked, self.scale, there["masked_posterior"])
            conditions[MASK_PIXELS] = there[MASK_PIXELS]
        prefix = "draws."
        inputs = {
            "latents": self.codec.sample(mean, logvar, self.scale, there["posterior"]),
            "conditions": conditions,
            "draws": Draws(
                **{name.removeprefix(prefix): t for name, t in there.items() if name.startswith(prefix)}
            ),
        }
        if self.preference:
            inputs |= self._votes(mean, conditions, there)
        if self.caption_dropout:
            inputs["dropped"] = dropped
        if self.masks:
            inputs["mask"] = there["mask"].float()
        return inputs, there["weights"]

    def _votes(
        self, mean: torch.Tensor, conditions: dict[str, Any], there: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the inputs that are of votes.

        Of the picture that was not preferred the mean of the posterior is stored. So it is the mean of both:
        a draw would tell them apart.
        """
        if self.preference == "dpo":
            [other] = self.references
            return {"latents": self.codec.normalised(mean, self.scale), "rejected": conditions.pop(other)}
        return {"liked": there[SOURCE] % 2 == 0, "counted": there["weights"] > 0}

    def _control(self, stored: torch.Tensor) -> torch.Tensor:
        """Return what a ControlNet looks at: pixels are stored as uint8, latents as the codec has them."""
        if stored.dtype == torch.uint8:
            return stored.float() / 255
        return self.codec.normalised(stored.float(), self.scale)

    def _dropped(self, there: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        """Return a column of captions, with the dropped ones replaced by the empty one."""
        values, null = there[name], self.null[name]
        null = there[NULL + name].to(null.dtype) if self.nulls else null
        return torch.where(per_row(there["dropped"], values), null, values.to(null.dtype))


ALIGNED = 16  # bytes: each tensor begins at a multiple


@dataclass(frozen=True)
class Sent:
    """Tensors on their way to a device, by name, in one copy from pinned memory.

    Attributes:
        tensors: on the device, but not to be read before `arrived` has returned.
        kept: conditions that stay on the CPU, where sizes must be known.
        has_dropped: whether the caption of any row is dropped.
        event: CUDA event after the copy; None on a CPU, where nothing is copied.
    """

    tensors: dict[str, torch.Tensor]
    kept: dict[str, torch.Tensor]
    has_dropped: bool
    event: Any = None

    @staticmethod
    def to(
        device: torch.device,
        tensors: Mapping[str, torch.Tensor],
        kept: dict[str, torch.Tensor],
        *,
        has_dropped: bool,
    ) -> "Sent":
        """Begin to send tensors of the CPU."""
        if device.type == "cpu":
            return Sent(dict(tensors), kept, has_dropped)
        places, end = {}, 0
        for name, tensor in tensors.items():
            places[name] = end
            end += -(-tensor.nbytes // ALIGNED) * ALIGNED
        packed = torch.empty(end, dtype=torch.uint8, pin_memory=True)
        for name, tensor in tensors.items():
            _view(packed, places[name], tensor).copy_(tensor)
        stream = _copying(device)
        with torch.cuda.stream(stream):
            there = packed.to(device, non_blocking=True)
            event = stream.record_event()
        views = {name: _view(there, places[name], tensor) for name, tensor in tensors.items()}
        return Sent(views, kept, has_dropped, event)

    def arrived(self) -> dict[str, torch.Tensor]:
        """Return the tensors. What a GPU computes from them waits for the copy; the caller does not."""
        if self.event is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.event)
            for tensor in self.tensors.values():
                tensor.record_stream(stream)
        return self.tensors


def _view(packed: torch.Tensor, begin: int, like: torch.Tensor) -> torch.Tensor:
    """Return a view of bytes with another tensor's type and shape."""
    return packed[begin : begin + like.nbytes].view(like.dtype).view(like.shape)


@cache
def _copying(device: torch.device) -> Any:
    """Return the stream on which rows are sent to a GPU while it computes."""
    return torch.cuda.Stream(device)
