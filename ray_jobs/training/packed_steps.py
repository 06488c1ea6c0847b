"""Steps of several trainings at once, whose adapters are members of a pack: no Ray, no storage."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from ray_jobs.diffusion.pack import Pack
from ray_jobs.training.batch import InputMaker, Piece, Sent
from ray_jobs.training.flat import Flat
from ray_jobs.training.steps import seed_dropout

Pieces = Mapping[int, Piece]
"""A piece of each stream of rows, by the number of the first training that has these rows."""

Begun = Mapping[int, Sent]
"""What is sent of pieces, by the number of the first training whose inputs these are."""


class PackedInputs:
    """Maker of the inputs of several trainings; what is alike for some of them is drawn and sent once.

    Args:
        makers: one per training.
        folds: the fold that each training leaves out, which decides on its rows; empty: all read the same.

    Attributes:
        streams: number of the first training that has the same rows, of each training.
    """

    def __init__(self, makers: Sequence[InputMaker], folds: Sequence[int | None] = ()) -> None:
        self.makers = list(makers)
        folds = list(folds) or [None] * len(self.makers)
        alike = [
            (maker.settings, maker.caption_dropout, fold) for maker, fold in zip(makers, folds, strict=True)
        ]
        self.first = [alike.index(each) for each in alike]
        self.streams = [folds.index(fold) for fold in folds]

    def begin(self, pieces: Pieces, step: int) -> Begun:
        """Begin to send pieces, see `InputMaker.begin`; trainings whose rows are not there are left out."""
        return {
            number: self.makers[number].begin(pieces[self.streams[number]], step)
            for number in sorted(set(self.first))
            if self.streams[number] in pieces
        }

    def finish(self, begun: Begun, active: Sequence[int]) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """Return the arguments of `FineTuning` and the rows' loss weights for each active training."""
        wanted = {self.first[number] for number in active}
        made = {
            number: self.makers[number].finish(sent) for number, sent in begun.items() if number in wanted
        }
        return [made[self.first[number]] for number in active]


def accumulate(
    pack: Pack,
    engines: Sequence[Flat],
    inputs: PackedInputs,
    pieces: Sequence[Begun],
    active: Sequence[int],
    *,
    step: int,
    rank: int,
) -> list[torch.Tensor]:
    """Run the pieces of a step forward and backward for the active trainings.

    Args:
        engines: one per training, over the members of the pack.
        active: numbers of trainings.

    Returns:
        This rank's share of the step's mean loss, for each active training: float32, on the device.
    """
    seed_dropout(engines[0].device, inputs.makers[0].seed, step, rank)
    members = [engines[number].module for number in active]
    taking = [engines[number] for number in active]
    shares = [torch.zeros((), device=engine.device) for engine in taking]
    for count, begun in enumerate(pieces, start=1):
        for engine in taking:
            engine.begin_piece(last=count == len(pieces))
        made = inputs.finish(begun, active)
        given = {member.adapter: each for member, (each, _) in zip(members, made, strict=True)}
        losses = pack(given)
        weighted = [
            (losses[member.adapter] * weights).sum()
            for member, (_, weights) in zip(members, made, strict=True)
        ]
        torch.stack(weighted).sum().backward()
        for engine, share, loss in zip(taking, shares, weighted, strict=True):
            engine.end_piece()
            share += loss.detach()
    return shares


def rehearse(pack: Pack, engines: Sequence[Flat], inputs: PackedInputs, piece: Piece) -> None:
    """Take the memory of a piece of all trainings of a pack, as a step's pieces will; see `Flat.rehearse`.

    Raises:
        torch.OutOfMemoryError: there is too little.
    """
    with ExitStack() as stack:
        for engine in engines:
            stack.enter_context(engine.rehearsing())
        pieces = dict.fromkeys(inputs.streams, piece)
        accumulate(pack, engines, inputs, [inputs.begin(pieces, 0)], range(len(engines)), step=0, rank=0)
