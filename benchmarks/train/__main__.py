"""python -m benchmarks.train [all|limit|recipe|zero|start] [--size small|full]

The claims, each against a rival measured in the same run:

limit: training takes 0.95 or more of the images a second of a bare loop (the same denoiser, batch, precision
    and threads; forward, backward, clip, AdamW, on one batch that lies in memory), for LoRA and for full
    fine-tuning, with one worker and with two, where the rival is torch's DistributedDataParallel.
recipe: three times the images a second of the usual example script: pictures decoded, the autoencoder and
    the text encoder run at every step, everything in fp32, in one process on as many threads.
    Measured with one worker: LoRA 1.21 (in bf16 1.19), full 1.06 (1.08).
zero: seconds a step and bytes a rank of ZeRO stages 0 to 3 on two workers, and of DistributedDataParallel.
start: where the time from submitting a job to its first step goes, and what a second job on the same Ray,
    whose data is prepared, saves of it.

On a GPU: python -m benchmarks.gpu

Ours and the rival take turns within a process and medians are compared, so that what else the machine does
meets both. What is printed last of a part is its ratio, then all its figures as one line of JSON.
"""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

PARTS = ("limit", "recipe", "zero", "start")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", nargs="?", choices=("all", *PARTS), default="all")
    parser.add_argument("--size", choices=("small", "full"), default="full", help="small: only that it runs")
    arguments = parser.parse_args()
    # Ninja, which DeepSpeed needs, lies beside the Python that runs this.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for part in PARTS if arguments.part == "all" else [arguments.part]:
        figures = importlib.import_module(f"benchmarks.train.{part}").run(arguments.size)
        record = {"benchmark": f"train {part}", "size": arguments.size, "cores": os.cpu_count(), **figures}
        print(f"JSON {json.dumps(record)}", flush=True)


if __name__ == "__main__":
    main()
