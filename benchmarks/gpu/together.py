"""Training, an evaluator that draws and an engine that serves, each in a process of its own on one GPU."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Barrier, BrokenBarrierError
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.measuring import WORKING_DTYPE, Figures, device_name, on_gpu, peak_gib
from cluster.gpus import take_share

if TYPE_CHECKING:
    from benchmarks.gpu.train import Loop

MODEL = "SD1.5"
SHARES = {"train": 0.5, "evaluate": 0.2, "serve": 0.3}  # of the GPU's memory
SECONDS, ALONE_SECONDS = {"small": 1.0, "full": 20.0}, {"small": 0.5, "full": 5.0}
REQUESTS_PER_SECOND = 1.0
AT_ONCE = 4  # steps between looks at the clock

_barrier: Barrier


def run(size: str) -> Iterator[tuple[str, Figures]]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        len(SHARES), mp_context=context, initializer=_join, initargs=(context.Barrier(len(SHARES)),)
    ) as pool:
        futures = {role: pool.submit(work, role, size) for role in SHARES}
        errors = [error for future in futures.values() if (error := future.exception())]
        # Those that only waited for the part that failed come last.
        for error in sorted(errors, key=lambda each: isinstance(each, BrokenBarrierError)):
            raise error
        for role, future in futures.items():
            yield role, future.result()


def _join(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def work(role: str, size: str) -> Figures:
    """Do a part's work in this process while the others do theirs; return its figures."""
    torch.set_num_threads(max(1, torch.get_num_threads() // len(SHARES)))
    parts: dict[str, Callable[[str, float], Figures]] = {"train": train, "evaluate": evaluate, "serve": serve}
    try:
        if on_gpu():
            take_share(SHARES[role])
        return parts[role](size, SHARES[role]) | {"share": SHARES[role], "peak_gib": peak_gib()}
    except BaseException:
        _barrier.abort()  # the others would wait for ever
        raise


# Each process imports what its part needs, which takes seconds.


def train(size: str, share: float) -> Figures:
    from benchmarks.gpu.train import CASES, Contest, Loop

    with TemporaryDirectory() as folder:
        contest = Contest.of(CASES[0], size, Path(folder), share=share)
        with Loop.of(contest.shape, contest.config(), contest.folder) as loop:
            loop.run(AT_ONCE)
            _barrier.wait()
            alone = images_per_second(loop, ALONE_SECONDS[size])
            _barrier.wait()
            shared = images_per_second(loop, SECONDS[size])
    return {
        "batch_size": contest.case.batch_size,
        "images_per_second_alone": alone,
        "images_per_second": shared,
        "share_of_alone": shared / alone,
    }


def images_per_second(loop: "Loop", seconds: float) -> float:
    begin, steps = time.perf_counter(), 0
    while (taken := time.perf_counter() - begin) < seconds:
        loop.run(AT_ONCE)
        steps += AT_ONCE
    return steps * loop.train.batch_size / taken


def evaluate(size: str, share: float) -> Figures:
    from benchmarks.gpu.evaluate import BATCH, draw
    from benchmarks.gpu.shapes import SHAPES
    from ray_jobs.diffusion.sampling import Prompts

    pipeline = SHAPES[size][MODEL].pipeline(device_name(), WORKING_DTYPE)
    prompts, seeds = Prompts(pipeline, device_name()), range(BATCH[size])
    draw(prompts, size, seeds)
    _barrier.wait()
    _barrier.wait()
    begin, pictures = time.perf_counter(), 0
    while (taken := time.perf_counter() - begin) < SECONDS[size]:
        pictures += len(draw(prompts, size, seeds))
    return {"pictures_per_second": pictures / taken}


def serve(size: str, share: float) -> Figures:
    from benchmarks.gpu.serve import drawn, engine_of, open_loop, requests_of
    from benchmarks.gpu.shapes import SHAPES

    with TemporaryDirectory() as folder:
        engine, _ = engine_of(SHAPES[size][MODEL], Path(folder), max_rows=8)
        requests = requests_of(size)
        drawn(engine, requests[:2])
        _barrier.wait()
        _barrier.wait()
        count = max(1, round(SECONDS[size] * REQUESTS_PER_SECOND))
        return open_loop(engine, requests[:count], REQUESTS_PER_SECOND)
