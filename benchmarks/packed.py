"""Trials that are trained together beside the same trials one after the other.

    python -m benchmarks.packed [--trials 4] [--batches 1 2 4 8] [--steps 5] [--turns 3]
    python -m benchmarks.packed --search [--ladder 80 160 320] [--turns 3]

The demo's base and adapters of four learning rates, on random pictures; no Ray. In turns, in one process:
steps of the pack, then as many of each trial by itself, whose models are all in memory. What it prints is the
median over the turns, of trial steps a second: a step of a pack of four counts four. The memory is the
largest that a process of its own has had after its steps, with one trial, and with the pack.

With `--search`, whole searches of the demo's data by successive halving, with packs and without, in turns:
seconds from the command to the winner, Ray's start and the evaluators' included. The data set is prepared
before.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ray_jobs.config import Config, load_config
from ray_jobs.training.batch import InputMaker, Piece, loss_shares
from ray_jobs.training.flat import Flat
from ray_jobs.training.packed_steps import PackedInputs, accumulate
from ray_jobs.training.phases import stages_of
from ray_jobs.training.setup import build_engine, build_engines, build_model, build_pack
from ray_jobs.weights.encoders import Encoders

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
CPU = torch.device("cpu")
CAPTIONS = ["a red circle", "a blue cross", "a green square", "a black heart"]


def configured(rate: float, batch_size: int) -> Config:
    """The demo's configuration with one worker."""
    settings = [f"train.learning_rate={rate}", f"train.batch_size={batch_size}", "train.num_workers=1"]
    return load_config(DEMO, settings)


def rates(trials: int) -> list[float]:
    return [1e-4 * (number + 1) for number in range(trials)]


class Rows:
    """Random pictures with captions, encoded by the base."""

    def __init__(self, config: Config) -> None:
        encoders, side = Encoders(config.model.base), config.data.resolution
        generator = torch.Generator().manual_seed(0)
        size = (config.train.batch_size, side, side, 3)
        pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).numpy()
        mean, logvar = encoders.encode_pictures(pixels)
        captions = [CAPTIONS[number % len(CAPTIONS)] for number in range(config.train.batch_size)]
        self.columns = {
            "latents_mean": mean,
            "latents_logvar": logvar,
            **encoders.encode_captions(captions),
        }
        self.empty = encoders.encode_captions([""])

    def maker(self, config: Config, pipeline: Any, model: Any) -> InputMaker:
        dropout = config.train.caption_dropout
        return InputMaker(pipeline.vae, model, self.empty, CPU, seed=0, caption_dropout=dropout)

    def piece(self, config: Config, maker: InputMaker) -> Piece:
        rows = {name: self.columns[name] for name in maker.columns}
        [piece] = Piece.cut(rows, loss_shares(config.train), 1, 0, 1)
        return piece


Step = Callable[[], None]


def alone(config: Config, rows: Rows) -> Step:
    """Steps of one trial by itself."""
    pipeline, model = build_model(config)
    maker = rows.maker(config, pipeline, model)
    engine = build_engine(model, config.train, 1)
    [stage], steps = stages_of(config.train, 1000), count(1)

    def step() -> None:
        number = next(steps)
        engine.set_hyperparameters(stage, number)
        inputs, weights = maker.make(rows.piece(config, maker), number)
        engine.accumulate(inputs, weights, last=True)
        engine.update(torch.zeros(1))

    return step


def together(configs: Sequence[Config], rows: Rows) -> Step:
    """Steps of a pack."""
    pipeline, pack = build_pack(configs)
    pairs = list(zip(configs, pack.members.values(), strict=True))
    inputs = PackedInputs([rows.maker(config, pipeline, member) for config, member in pairs])
    engines: list[Flat] = build_engines(pack, configs, 1)
    stages, steps = [stages_of(config.train, 1000)[0] for config in configs], count(1)
    everyone = range(len(configs))

    def step() -> None:
        number = next(steps)
        for engine, stage in zip(engines, stages, strict=True):
            engine.set_hyperparameters(stage, number)
        begun = [inputs.begin({0: rows.piece(configs[0], inputs.makers[0])}, number)]
        accumulate(pack, engines, inputs, begun, everyone, step=number, rank=0)
        for engine in engines:
            engine.update(torch.zeros(1))

    return step


def seconds(step: Step, times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        step()
    return time.perf_counter() - began


def compare(trials: int, batch_size: int, steps: int, turns: int) -> tuple[float, float]:
    """Trial steps a second of the pack, and of the trials one after the other: medians over the turns."""
    configs = [configured(rate, batch_size) for rate in rates(trials)]
    rows = Rows(configs[0])
    packed, singles = together(configs, rows), [alone(config, rows) for config in configs]
    for step in (packed, *singles):
        step()
    found = [
        (seconds(packed, steps), sum(seconds(single, steps) for single in singles)) for _ in range(turns)
    ]
    for ours, theirs in found:
        print(f"    turn: {trials * steps / ours:.2f} and {trials * steps / theirs:.2f}", flush=True)
    return tuple(trials * steps / median(column) for column in zip(*found, strict=True))


def peak_mib(trials: int, batch_size: int, steps: int) -> float:
    """Largest memory of a process that trains so many trials together, or one by itself."""
    command = [sys.executable, "-m", "benchmarks.packed", "--only", str(trials)]
    command += ["--batches", str(batch_size), "--steps", str(steps)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def only(trials: int, batch_size: int, steps: int) -> None:
    """Take steps, and print the process's largest memory in MiB."""
    configs = [configured(rate, batch_size) for rate in rates(trials)]
    rows = Rows(configs[0])
    step = together(configs, rows) if trials > 1 else alone(configs[0], rows)
    seconds(step, steps)
    # Not getrusage's, which a child takes over from its parent.
    [line] = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmHWM")]
    print(int(line.split()[1]) / 1024)


def search(name: str, storage: str, pack: str, ladder: Sequence[int], trials: int) -> tuple[float, str]:
    """Run a search; return its seconds, and the line that names the winner."""
    settings = [
        f"name={name}",
        f"storage={storage}",
        f"search.pack={pack}",
        f"search.ladder={list(ladder)}",
        f"search.learning_rates={rates(trials)}",
        "search.scheduler=halving",
    ]
    command = [sys.executable, "-m", "ray_jobs.search", "--config", str(DEMO)]
    command += [word for setting in settings for word in ("--set", setting)]
    began = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    took = time.perf_counter() - began
    [winner] = [line for line in done.stdout.splitlines() if "winner: " in line]
    return took, winner.partition("winner: ")[2]


def compare_searches(ladder: Sequence[int], trials: int, turns: int) -> None:
    found: dict[str, list[float]] = {"auto": [], "off": []}
    with tempfile.TemporaryDirectory() as storage:
        command = [
            sys.executable,
            "-m",
            "ray_jobs.prepare",
            "--config",
            str(DEMO),
            "--set",
            f"storage={storage}",
        ]
        subprocess.run(command, check=True, capture_output=True)
        for turn in range(turns):
            for pack, taken in found.items():
                took, winner = search(f"{pack}-{turn}", storage, pack, ladder, trials)
                taken.append(took)
                print(f"    pack: {pack}: {took:.0f} s, {winner}", flush=True)
    packed, alone = (median(taken) for taken in found.values())
    print(
        f"{trials} trials, ladder {list(ladder)}: {packed:.0f} s with a pack, {alone:.0f} s without: "
        f"{packed / alone:.2f} of the time"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 2, 4, 8], help="images of a trial's step"
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--search", action="store_true", help="whole searches")
    parser.add_argument("--ladder", type=int, nargs="+", default=[80, 160, 320], help="of --search")
    given = parser.parse_args()
    if given.search:
        compare_searches(given.ladder, given.trials, given.turns)
        return
    if given.only:
        only(given.only, given.batches[0], given.steps)
        return
    for size in given.batches:
        ours, theirs = compare(given.trials, size, given.steps, given.turns)
        print(
            f"batch {size}: {ours:.2f} trial steps a second together, {theirs:.2f} one after the other: "
            f"{ours / theirs:.2f} times",
            flush=True,
        )
        one, packed = (peak_mib(trials, size, given.steps) for trials in (1, given.trials))
        print(f"    memory: {packed:.0f} MiB together, {one:.0f} MiB of one: {packed / one:.2f} times")


if __name__ == "__main__":
    main()
