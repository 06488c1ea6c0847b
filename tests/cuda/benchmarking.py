"""`benchmarks.gpu` on a pretended GPU: its models are made, and its loops, rivals and engines run there.

`python -m tests.cuda benchmarking FOLDER` prints a line of JSON for each case. What measures (events, the
profiler, peaks) and what runs in other threads cannot be pretended.
"""

import json
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import evaluate, serve, train
from benchmarks.gpu.plain import Plain
from benchmarks.gpu.shapes import SHAPES, Shape
from ray_jobs.diffusion.sampling import Prompts
from ray_jobs.training.batch import Piece, Sent
from ray_jobs.training.monitor import LATE
from tests.cuda.pretend import Pretend


class InLine:
    """`InputsAhead` without its thread, which would not see the pretended device."""

    def __init__(
        self, begin: Callable[[Piece, int], Sent], rows: Iterator[list[Piece]], steps: Iterable[int]
    ) -> None:
        self.begin, self.rows, self.steps = begin, rows, iter(steps)

    def __next__(self) -> list[Sent]:
        step = next(self.steps)
        return [self.begin(piece, step) for piece in next(self.rows)]


def training(shape: Shape, method: str, folder: Path, device: Pretend) -> dict[str, Any]:
    """Take steps of both loops; return what the last step of each counted."""
    folder.mkdir()
    shape.write_settings(folder)
    config = shape.config(folder, method=method, batch_size=2, use_gpu=True)
    plain = Plain(shape, config.train, shape.rows(folder, 2), "cuda")
    plain.step()  # Adam has its state then
    device.reset()
    plain.step()
    rival = device.launches
    loop = train.Loop.of(shape, config, folder)
    for _ in range(LATE + 1):
        loop.step()
    device.reset()
    loop.step()
    return {
        "rival": rival,
        "launches": device.launches,
        "waits": dict(device.waits),
        "to_device": dict(device.to_device),
        "pageable": dict(device.pageable),
    }


def drawing(shape: Shape, folder: Path, _: Pretend) -> dict[str, Any]:
    """Draw as the evaluator and as the engine, and call the bare denoiser; return the pictures of both."""
    pipeline = shape.pipeline("cuda", torch.bfloat16)
    drawn = evaluate.draw(Prompts(pipeline, "cuda"), "small", range(2))
    # As while the last batch was drawn.
    encoders, denoisers = shape.family.text.present(pipeline), shape.family.model(pipeline)
    assert {each.device.type for each in encoders.values()} == {"cpu"}
    assert {each.device.type for each in (pipeline.vae, *denoisers.values())} == {"cuda"}
    folder.mkdir()
    engine = serve.engine_of(shape, folder, max_rows=4)[0]
    served = serve.drawn(engine, serve.requests_of("small")[:3])
    serve.bare_denoiser(engine.pipeline, 3)()
    engine.close()
    return {"drawn": len(drawn), "served": len(served)}


def main(folder: Path) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.inference_mode = torch.no_grad  # type: ignore[assignment, misc]  # its tensors know no wrappers
    train.InputsAhead = InLine  # type: ignore[assignment, misc]
    for name, shape in SHAPES["small"].items():
        for method in ("lora", "full"):
            tell(name, method, partial(training, shape, method, folder / f"{name}-{method}"))
    for name in serve.MODELS:
        tell(name, "drawing", partial(drawing, SHAPES["small"][name], folder / f"{name}-drawing"))


def tell(name: str, case: str, work: Callable[[Pretend], dict[str, Any]]) -> None:
    try:
        with Pretend() as device:
            found = work(device)
    except Exception:  # told, so that the other cases are seen too
        found = {"error": traceback.format_exc()}
    print(json.dumps({"family": name, "case": case, **found}), flush=True)
