"""Class pictures: the stage that draws them in batches, against diffusers' pipeline called once for each.

Both draw the same pictures' numbers with the demo's base, on one thread of arithmetic, in alternation, and
write PNGs. Loading is not counted. On a CPU a batch saves what Python and small matrices cost; how much a
batch gains on a GPU is another matter, and not measured here.
"""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.data.measuring import in_fresh_process
from benchmarks.data.pictures import configured
from cluster.storage import Storage
from ray_jobs.data.encoding.class_pictures import TOGETHER, DrawClassPictures

ROUNDS = {"smoke": 1, "full": 5}
PROMPT = "a cat"


def run(size: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="diffray-benchmark-") as name:
        ours, plain = in_fresh_process(rounds, Path(name), ROUNDS[size])
    ratio = median(their / own for own, their in zip(ours, plain, strict=True))
    speeds = {"diffray": TOGETHER / median(ours), "one at a time": TOGETHER / median(plain)}
    for each, speed in speeds.items():
        print(f"{each:>15}: {speed:6.2f} pictures a second", flush=True)
    print(f"ratio: {ratio:.2f} of the pictures a second of one at a time", flush=True)
    return {"batch_size": TOGETHER, **speeds, "ratio": ratio}


def rounds(folder: Path, count: int) -> tuple[list[float], list[float]]:
    """Seconds of each round of `TOGETHER` pictures: of the stage, and of the pipeline."""
    import torch

    from ray_jobs.weights.loading import load_pipeline

    torch.set_num_threads(1)
    config = configured(folder, folder / "runs")
    storage = Storage.open(str(folder / "class"))
    stage = DrawClassPictures(config, {PROMPT: storage})
    pipeline: Any = load_pipeline(config.model.base)
    pipeline.set_progress_bar_config(disable=True)
    evaluate, side = config.evaluate, config.data.resolution

    def batched(first: int) -> None:
        stage({"prompt": PROMPT, "first": first, "numbers": list(range(first, first + TOGETHER))})

    def one_at_a_time(first: int) -> None:
        for number in range(first, first + TOGETHER):
            picture = pipeline(
                PROMPT,
                height=side,
                width=side,
                num_inference_steps=evaluate.inference_steps,
                guidance_scale=evaluate.guidance_scale,
                generator=torch.Generator().manual_seed(number),
            ).images[0]
            picture.save(folder / f"{number}.png")

    took: tuple[list[float], list[float]] = [], []
    for each in range(count + 1):  # the first one warms up
        for seconds, draw in zip(took, (batched, one_at_a_time), strict=True):
            begin = time.monotonic()
            draw(each * TOGETHER)
            seconds.append(time.monotonic() - begin)
    return took[0][1:], took[1][1:]
