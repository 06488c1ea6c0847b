"""python -m benchmarks.data [PART] [--size smoke|full]

The claims, each against a rival measured in the same run where there is one:

decode: pictures are decoded, cropped, encoded and written at 0.95 or more of the speed of a torch DataLoader
    that does the same work with as many processes that decode and that encode.
memory: preparing 100,000 pictures takes at most 1.10 of the memory that 10,000 take, over all processes, and
    about 10 times the time.
feed: cached rows reach a trainer that does nothing faster than a real one takes them: how long a step must be
    for it not to wait. A torch DataLoader that reads the same files, and does not keep one order for any
    number of ranks, tells what the machine can do.
duplicates: all planted near duplicates are found, in a small fraction of brute force's time.
captioning: pictures get captions at 0.9 or more of the speed of the bare model in a loop.
class_pictures: they are drawn in batches, faster than by diffusers' pipeline called once for each.

Timings are ratios of one run, on one machine with nothing else to do. Every measurement is made in a process
of its own, so that peaks do not add up. What is printed last of a part is its ratio, then all its figures as
one line of JSON.
"""

import argparse
import importlib
import json
import os

PARTS = ("decode", "memory", "feed", "duplicates", "captioning", "class_pictures")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", nargs="?", choices=PARTS, help="default: all")
    parser.add_argument("--size", choices=("smoke", "full"), default="full", help="smoke: only that it runs")
    arguments = parser.parse_args()
    # One thread of arithmetic a process, in ours and in the rivals.
    os.environ["OMP_NUM_THREADS"] = "1"
    for part in [arguments.part] if arguments.part else PARTS:
        figures = importlib.import_module(f"benchmarks.data.{part}").run(arguments.size)
        record = {"benchmark": part, "size": arguments.size, "cores": os.cpu_count(), **figures}
        print(f"JSON {json.dumps(record)}", flush=True)


if __name__ == "__main__":
    main()
