"""Trials that are trained together, at SD1.5's size: steps of packs beside those of a trial by itself.

As in `train`, but inputs are made between the steps, and nothing is averaged.
"""

from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.gpu.measuring import Figures, device_name, free, on_gpu, peak_gib, seconds_a_call
from benchmarks.gpu.shapes import SHAPES, Shape
from benchmarks.gpu.train import attempted
from ray_jobs.config import Config
from ray_jobs.diffusion.precision import PRECISIONS
from ray_jobs.training.batch import InputMaker, Piece, loss_shares
from ray_jobs.training.packed_steps import PackedInputs, accumulate
from ray_jobs.training.phases import stages_of
from ray_jobs.training.setup import build_engines, packed_finetuning

MODEL = "SD1.5"
TRIALS = {"small": (1, 2), "full": (1, 4, 8)}
BATCHES = {"small": (1,), "full": (1, 2, 4, 8)}  # pictures of a trial's step
WARM, COUNTED = 2, 5  # steps
STEPS = 1000  # of the schedule


def run(size: str) -> Iterator[tuple[str, Figures]]:
    shape = SHAPES[size][MODEL]
    with TemporaryDirectory() as folder:
        shape.write_settings(Path(folder))
        for batch_size in BATCHES[size]:
            alone = 0.0
            for trials in TRIALS[size]:
                found = attempted(partial(measured, shape, Path(folder), trials, batch_size))
                alone = alone or found.get("trial_steps_per_second", 0.0)
                if alone and "trial_steps_per_second" in found:
                    found["times_one_trial"] = found["trial_steps_per_second"] / alone
                yield f"{MODEL}, {trials} trials of {batch_size}", found


def measured(shape: Shape, folder: Path, trials: int, batch_size: int) -> Figures:
    free()
    rates = [1e-4 * (number + 1) for number in range(trials)]
    configs = [
        shape.config(folder, method="lora", batch_size=batch_size, use_gpu=on_gpu(), learning_rate=rate)
        for rate in rates
    ]
    seconds = seconds_a_call(Pack(shape, configs, folder).step, warm=WARM, calls=COUNTED)
    return {"trial_steps_per_second": trials / seconds, "ms_a_step": 1e3 * seconds, "peak_gib": peak_gib()}


class Pack:
    """Steps of trials that are trained together, over a batch that comes again and again."""

    def __init__(self, shape: Shape, configs: list[Config], folder: Path) -> None:
        device, train = torch.device(device_name()), configs[0].train
        pipeline = shape.trainable(device.type, PRECISIONS[train.precision])
        self.pack = packed_finetuning(configs, pipeline, shape.family, device.type)
        empty = {name: each.float() for name, each in shape.rows(folder, 1).items()}
        makers = [
            InputMaker(pipeline.vae, member, empty, device, seed=0, caption_dropout=train.caption_dropout)
            for member in self.pack.members.values()
        ]
        self.inputs, self.numbers = PackedInputs(makers), count(1)
        self.engines = build_engines(self.pack, configs, 1, device)
        self.stages = [stages_of(config.train, STEPS)[0] for config in configs]
        rows = shape.rows(folder, train.batch_size, makers[0].columns)
        [self.piece] = Piece.cut(rows, loss_shares(train), 1, 0, 1)

    def step(self) -> None:
        step = next(self.numbers)
        for engine, stage in zip(self.engines, self.stages, strict=True):
            engine.set_hyperparameters(stage, step)
        begun, everyone = [self.inputs.begin({0: self.piece}, step)], range(len(self.engines))
        shares = accumulate(self.pack, self.engines, self.inputs, begun, everyone, step=step, rank=0)
        for engine, share in zip(self.engines, shares, strict=True):
            engine.update(share[None])
