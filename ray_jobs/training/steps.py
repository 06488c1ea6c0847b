"""Training steps, whatever brings the rows and keeps the results: no Ray, no storage."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

import numpy as np
import torch

from ray_jobs.diffusion.ema import EMA
from ray_jobs.training.batch import InputMaker, Sent
from ray_jobs.training.engine import Engine
from ray_jobs.training.monitor import Meter
from ray_jobs.training.phases import Stage

P = TypeVar("P")
T = TypeVar("T")

AHEAD = 2  # steps whose inputs are made before they are needed


class InputsAhead(Generic[P, T]):
    """The inputs of the coming steps, made in another thread while the device computes.

    Args:
        begin: makes the inputs of a piece at a step, as `InputMaker.begin`.
        rows: the pieces of each of `steps`.
    """

    def __init__(self, begin: Callable[[P, int], T], rows: Iterator[list[P]], steps: Iterable[int]) -> None:
        self.begin, self.rows, self.steps = begin, rows, iter(steps)
        self.pool = ThreadPoolExecutor(1)
        self.ahead: deque[Future[list[T]]] = deque()
        for _ in range(AHEAD):
            self._submit()

    def __enter__(self) -> "InputsAhead[P, T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def __iter__(self) -> "InputsAhead[P, T]":
        return self

    def __next__(self) -> list[T]:
        self._submit()
        return self.ahead.popleft().result()

    def _submit(self) -> None:
        for step in islice(self.steps, 1):
            self.ahead.append(self.pool.submit(self._make, step))

    def _make(self, step: int) -> list[T]:
        return [self.begin(piece, step) for piece in next(self.rows)]


class Steps:
    """One worker's steps.

    Args:
        inputs: maker of the inputs that `take` gets.
        decay: of the averaged weights; 0: none are kept.
    """

    def __init__(self, inputs: InputMaker, engine: Engine, meter: Meter, *, decay: float, rank: int) -> None:
        self.inputs, self.engine, self.meter, self.rank = inputs, engine, meter, rank
        self.averaged = list(engine.averaged.items())
        self.ema = EMA(self.averaged, decay) if decay else None

    def take(self, step: int, stage: Stage, inputs: Iterator[list[Sent]]) -> str:
        """Take a step with the next of `inputs`; return why a checkpoint is due, see `Meter.add`.

        Raises:
            Diverged: on all ranks at once.
        """
        self.engine.set_hyperparameters(stage, step)
        with self.meter.waiting():
            pieces = next(inputs)
        return self.finish(step, stage, self._accumulate(pieces, step))

    def finish(self, step: int, stage: Stage, share: torch.Tensor) -> str:
        """Update the weights after a step's backward passes; return why a checkpoint is due.

        Args:
            share: this rank's share of the step's mean loss.

        Raises:
            Diverged: on all ranks at once.
        """
        told = self.meter.told(share)
        why = self.meter.add(step, stage.rate(step), *self.engine.update(told))
        self._average(step)
        return why

    def _accumulate(self, pieces: list[Sent], step: int) -> torch.Tensor:
        """Run the pieces of a step forward and backward; return this rank's share of the step's mean loss."""
        seed_dropout(self.engine.device, self.inputs.seed, step, self.rank)
        share = torch.zeros((), device=self.engine.device)
        for number, piece in enumerate(pieces, start=1):
            inputs, weights = self.inputs.finish(piece)
            share += self.engine.accumulate(inputs, weights, last=number == len(pieces))
        return share

    def _average(self, step: int) -> None:
        if self.ema:
            self.ema.update(self.averaged, step)


def seed_dropout(device: torch.device, *numbers: int) -> None:
    """Seed the generators of the CPU and of the device by a run's seed, a step and a rank.

    `torch.manual_seed` also seeds kinds of devices that are not in use, and keeps for each of them the stack
    as text: milliseconds of each step.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
