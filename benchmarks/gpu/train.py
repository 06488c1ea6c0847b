"""Training as the product runs it, without Ray, beside diffusers' plain loop on the same device.

Rows lie in the host's memory as `prepare` stores them. Each step cuts them into pieces, draws noise and sends
both in a thread (`InputsAhead`), runs `Steps.take` (engine, averaged weights, meter), and saves nothing.
"""

import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu.chips import peak_tflops
from benchmarks.gpu.gates import COMPILED, OURS, PLAIN
from benchmarks.gpu.measuring import (
    GIB,
    Figures,
    Laps,
    device_name,
    flops_of,
    free,
    kernels_of,
    on_gpu,
    peak_gib,
    seconds_a_call,
    waits_of,
)
from benchmarks.gpu.plain import Plain
from benchmarks.gpu.shapes import SHAPES, Shape
from ray_jobs.config import Config
from ray_jobs.diffusion.families import Captions
from ray_jobs.diffusion.finetuning import FineTuning
from ray_jobs.diffusion.precision import PRECISIONS
from ray_jobs.diffusion.protocols import Pipeline
from ray_jobs.planning.memory import Model
from ray_jobs.training.batch import InputMaker, Piece, loss_shares
from ray_jobs.training.engine import pieces_a_step
from ray_jobs.training.monitor import Meter
from ray_jobs.training.phases import stages_of
from ray_jobs.training.setup import build_engine, finetuning
from ray_jobs.training.startup import StartUp
from ray_jobs.training.steps import InputsAhead, Steps

HEADROOM = 0.85  # of the memory, that the estimate of a case may take
WARM, COUNTED = {"small": 1, "full": 3}, {"small": 2, "full": 15}  # steps
STEPS = 1000  # of the schedule


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        model: a name in `SHAPES`.
        batch_size: pictures a step; fewer where memory is too small.
    """

    model: str
    method: str
    batch_size: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.method}"


CASES = (
    Case("SD1.5", "lora", 64),
    Case("SD1.5", "full", 16),
    Case("SDXL", "lora", 8),
    Case("FLUX", "lora", 2),
)
SMALL_BATCH = 2


def run(size: str) -> Iterator[tuple[str, Figures]]:
    with TemporaryDirectory() as folder:
        contests = [Contest.of(case, size, Path(folder)) for case in CASES]
        for contest in contests:
            if contest.too_large:
                yield contest.case.name, {"does_not_fit": contest.too_large}
        fitting = [contest for contest in contests if not contest.too_large]
        for contest in fitting:
            yield f"{contest.case.name}, {PLAIN}", attempted(contest.plain)
            yield f"{contest.case.name}, {OURS}", attempted(contest.ours)
        # Compiling takes longest, so it comes last: a phase that is cut has the other figures.
        # On a CPU it would take minutes for nothing.
        with nullcontext() if on_gpu() else torch.compiler.set_stance("force_eager"):
            for contest in reversed(fitting):
                unet = contest.shape.family.is_unet
                ours = partial(contest.ours, compile=True, channels_last=unet)
                yield f"{contest.case.name}, {COMPILED}", attempted(ours)


def attempted(measure: Callable[[], Figures]) -> Figures:
    """Return the figures, or the error: a loop that fails does not end the others."""
    try:
        return measure()
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


@dataclass
class Contest:
    """Our loop and the plain one on one case.

    Attributes:
        folder: with the model's settings.
        planned_bytes: the plan's estimate of our loop.
        too_large: what a single row needs and what there is, if that is less.
        flops: of a step's forward and backward passes; known once the plain loop has run.
    """

    case: Case
    size: str
    shape: Shape
    folder: Path
    planned_bytes: int
    too_large: str = ""
    flops: int = 0

    @staticmethod
    def of(case: Case, size: str, root: Path, share: float = 1.0) -> "Contest":
        """Return the contest with as large a batch as fits into a share of the device's memory."""
        shape = SHAPES[size][case.model]
        folder = root / case.name.replace(" ", "-")
        folder.mkdir()
        shape.write_settings(folder)
        case = case if size == "full" else replace(case, batch_size=SMALL_BATCH)
        room = HEADROOM * share * torch.cuda.mem_get_info()[1] if on_gpu() else math.inf
        model = Model(config_of(case, shape, folder))
        while (needed := model.memory(config_of(case, shape, folder).train).device.whole) > room:
            if case.batch_size == 1:
                return Contest(
                    case, size, shape, folder, needed, f"{needed / GIB:.1f} of {room / GIB:.1f} GiB"
                )
            case = replace(case, batch_size=case.batch_size // 2)
        return Contest(case, size, shape, folder, needed)

    def config(self, **train: Any) -> Config:
        return config_of(self.case, self.shape, self.folder, **train)

    def plain(self) -> Figures:
        free()
        train = self.config().train
        loop = Plain(self.shape, train, self.shape.rows(self.folder, train.batch_size), device_name())
        self.flops = flops_of(loop.passes)
        loop.optimizer.zero_grad()
        seconds = seconds_a_call(loop.step, warm=WARM[self.size], calls=COUNTED[self.size])
        return self._figures(seconds) | counts(loop.step)

    def ours(self, **train: Any) -> Figures:
        torch.compiler.reset()
        free()
        warm, steps = WARM[self.size], COUNTED[self.size]
        with Loop.of(self.shape, self.config(**train), self.folder) as loop:
            loop.run(warm)
            before = loop.meter.waited
            found = self._figures(median(loop.run(steps)))
            waited = loop.meter.waited - before
            return (
                found
                | counts(loop.step)
                | {
                    "ms_waiting_for_inputs": 1e3 * waited / steps,
                    "ms_of_the_inputs_thread": 1e3 * loop.seconds_to_send(),
                    "planned_gib": self.planned_bytes / GIB,
                }
            )

    def _figures(self, seconds: float) -> Figures:
        tflops = self.flops / seconds / 1e12
        peak = peak_tflops(torch.cuda.get_device_name()) if on_gpu() else None
        return {
            "batch_size": self.case.batch_size,
            "images_per_second": self.case.batch_size / seconds,
            "ms_a_step": 1e3 * seconds,
            "tflops": tflops,
            "mfu": tflops / peak if peak else None,
            "peak_gib": peak_gib(),
        }


def counts(step: Callable[[], object]) -> Figures:
    """Return a step's kernels and waits, and the share of it that the device is busy; nothing on a CPU."""
    waits, kernels = waits_of(step), kernels_of(step)
    return {} if kernels is None else {"waits": waits, "kernels": kernels[0], "busy": kernels[1]}


class Loop:
    """Training's steps on one device, over a batch that comes again and again.

    Args:
        model: over the denoiser of `pipeline`.
        empty: the encoded empty caption, by column.
        rows: a batch as `prepare` stores it, by column; columns that a step does not read are left out.
    """

    def __init__(
        self,
        config: Config,
        pipeline: Pipeline,
        model: FineTuning,
        empty: Captions,
        rows: dict[str, torch.Tensor],
        device: torch.device,
    ) -> None:
        train = config.train
        self.maker = InputMaker(
            pipeline.vae,
            model,
            empty,
            device,
            seed=config.seed,
            caption_dropout=train.caption_dropout,
            num_references=config.data.num_references,
            has_control=config.data.has_control,
        )
        engine = build_engine(model, train, 1, device)
        self.meter = Meter("bench-gpu", [STEPS], train, None, 1, StartUp())  # rank 0 asks Ray for preemptions
        self.steps = Steps(self.maker, engine, self.meter, decay=train.ema_decay, rank=0)
        [self.stage] = stages_of(train, STEPS)
        engine.enter_stage(self.stage, None)
        self.meter.start(engine)
        self.rows, self.train = {name: rows[name] for name in self.maker.columns}, train
        self.done = 0
        self.ahead = InputsAhead(self.maker.begin, self._pieces(), count(1))

    @classmethod
    def of(cls, shape: Shape, config: Config, folder: Path) -> "Loop":
        """Return the loop of a shape with random weights and rows."""
        device, train = torch.device(device_name()), config.train
        pipeline = shape.trainable(device.type, PRECISIONS[train.precision])
        model = finetuning(config, pipeline, shape.family, device.type)
        empty = {name: each.float() for name, each in shape.rows(folder, 1).items()}
        return cls(config, pipeline, model, empty, shape.rows(folder, train.batch_size), device)

    def __enter__(self) -> "Loop":
        return self

    def __exit__(self, *error: object) -> None:
        self.ahead.__exit__(*error)

    def _pieces(self) -> Iterator[list[Piece]]:
        shares, pieces = loss_shares(self.train), pieces_a_step(self.train, 1)
        while True:
            yield Piece.cut(self.rows, shares, 1, 0, pieces)

    def step(self) -> None:
        self.done += 1
        self.steps.take(self.done, self.stage, self.ahead)

    def run(self, steps: int) -> list[float]:
        """Take steps; return the device's seconds of each."""
        laps = Laps()
        laps.mark()
        for _ in range(steps):
            self.step()
            laps.mark()
        return laps.seconds()

    def seconds_to_send(self) -> float:
        """Return the seconds that the thread spends on the inputs of a step while the device computes."""
        begin = time.perf_counter()
        for piece in next(self._pieces()):
            self.maker.begin(piece, self.done)
        return time.perf_counter() - begin


def config_of(case: Case, shape: Shape, folder: Path, **train: Any) -> Config:
    settings = {"method": case.method, "batch_size": case.batch_size, "use_gpu": on_gpu()}
    return shape.config(folder, **settings, **train)
