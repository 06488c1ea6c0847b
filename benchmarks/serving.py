"""python -m benchmarks.serving [--part PART ...] [--seconds S] [--soak MINUTES]

The endpoint over HTTP, with `models/emoji-base` on the CPU, against the usual ways to serve a pipeline of
diffusers (`benchmarks.serving_rivals`): behind FastAPI a request at a time, and in a Ray Serve deployment
with `@serve.batch`. Requests are for 1 to 4 pictures in 10 to 50 steps with guidance, from a process of their
own. All run on the same cores, have the same number of threads and draw the same pictures; in the first two
parts all are up, and one is loaded at a time; in the others ours is the only one.

saturation: images a second with always as many open requests as there are clients, in turns; over those of
    the bare denoiser at its best batch size (nothing else, decoding not counted) beside the idle servers.
latency: p50 and p95 with Poisson arrivals at 50 % and 80 % of each server's own capacity; and ours at the
    load that is 80 % of `@serve.batch`'s; the aim is half of its p95.
alone: ours at saturation without its rivals; the aim is 0.9 of the bare denoiser with no server up.
adapters: 50 LoRA versions mixed against one, at saturation; the aim is 0.9.
overhead: what a request costs beside the networks: to an idle server, less an engine's time for the same.
soak: errors and memory at 80 % load, with the default prompt cache; the aims are none, and a line through the
    resident memory that rises by 1 % or less after the first minute. The exit code is 1 if either is missed.

Capacities that a part needs and that no part before it has measured are measured first. Figures go to
benchmarks/results/serving.json, where those of other parts stay.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.serving_alone import facts
from benchmarks.serving_parts import AGAINST_RIVALS, ALONE, Run, Settings, measure_bare
from benchmarks.serving_servers import BATCHED, OURS, SEQUENTIAL, running
from ray_jobs.console import quiet_logs, say, show

RESULTS = Path(__file__).parent / "results" / "serving.json"
LIMIT = 0.9  # of the bare denoiser's images a second; of one adapter's
HALF = 0.5  # of the p95 of `@serve.batch` at equal load
FLAT = 0.01  # of its median may the line through the memory rise


def measure(settings: Settings, parts: list[str], out: Path) -> dict[str, dict[str, Any]]:
    """The figures of the parts; each is in the file as soon as it is there."""
    figures: dict[str, dict[str, Any]] = {}
    bare = measure_bare(settings) if {"saturation", "alone"} & {*parts} else {}
    shown_settings = asdict(settings) | {"model": Path(settings.model).name}
    for table, rival_batch_size in ((AGAINST_RIVALS, settings.rival_batch_size), (ALONE, None)):
        wanted = [each for each in table if each in parts]
        if not wanted:
            continue
        with (
            TemporaryDirectory(prefix="diffray-benchmark-") as folder,
            running(
                settings.model,
                Path(folder),
                max_batch_size=settings.max_batch_size,
                rival_batch_size=rival_batch_size,
                num_adapters=settings.num_adapters if "adapters" in wanted else 1,
            ) as servers,
        ):
            run = Run(settings, servers, bare)
            for part in wanted:
                say("bench", part)
                figures[part] = table[part](run)
                keep(out, part, {"machine": facts(), "settings": shown_settings, **figures[part]})
    return figures


def keep(out: Path, part: str, figures: dict[str, Any]) -> None:
    """Put a part's figures in the place of those that were in the file."""
    stored = json.loads(out.read_text()) if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(stored | {part: figures}, indent=1) + "\n")


def told(part: str, found: dict[str, Any]) -> list[str]:
    """Lines for a person: ratios and aims."""
    return {
        "saturation": _saturation,
        "latency": _latency,
        "alone": _alone,
        "adapters": _adapters,
        "overhead": _overhead,
        "soak": _soak,
    }[part](found)


def _saturation(found: dict[str, Any]) -> list[str]:
    speeds, ratios = found["images_per_second"], found["ratios"]
    lines = [f"{name:>26}: {speed:.2f} images a second" for name, speed in speeds.items()]
    return [
        *lines,
        f"ratio: of the bare denoiser's images a second (batches of {found['bare_best_batch_size']}) "
        f"{ratios['bare']:.2f}, beside idle servers {ratios['bare beside idle servers']:.2f}",
        f"ratio: of @serve.batch's images a second {ratios[BATCHED]:.2f}, of a request at a time "
        f"{ratios[SEQUENTIAL]:.2f}",
    ]


def _latency(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{server:>10} at {float(share):.0%} of its capacity: p50 {each['p50_s']:.2f} s, "
        f"p95 {each['p95_s']:.2f} s, {each['errors']} errors in {each['requests']} requests"
        for server, shares in found["own_load"].items()
        for share, each in shares.items()
    ]
    rate, ratios = found["equal_load"][OURS]["requests_per_second"], found["ratios"]
    return [
        *lines,
        f"ratio: at equal load ({rate:.2f} requests a second) of @serve.batch's p95 {ratios['p95']:.2f} "
        f"(aim: {HALF}): {_met(ratios['p95'] <= HALF)}, p50 {ratios['p50']:.2f}",
    ]


def _alone(found: dict[str, Any]) -> list[str]:
    ratio = found["ratios"]["bare"]
    of_bare = f"{ratio:.2f} of the bare denoiser's images a second"
    return [f"ratio: without its rivals {of_bare} (aim: {LIMIT}): {_met(ratio >= LIMIT)}"]


def _adapters(found: dict[str, Any]) -> list[str]:
    ratio = found["ratios"]["all to one"]
    return [
        f"ratio: {found['adapters']} adapters to one {ratio:.2f} (aim: {LIMIT}): {_met(ratio >= LIMIT)}; "
        f"one adapter to none {found['ratios']['one to none']:.2f}"
    ]


def _overhead(found: dict[str, Any]) -> list[str]:
    return [
        f"overhead: {each['overhead_ms']:.1f} ms of a request for {pictures} that takes "
        f"{each['request_ms']:.0f} ms; encoding PNG files is {each['png_ms']:.1f} ms"
        for pictures, each in found["pictures"].items()
    ]


def _soak(found: dict[str, Any]) -> list[str]:
    errors = found["errors"]
    lines = [f"soak: {errors} errors in {found['requests']} requests (aim: 0): {_met(not errors)}"]
    for process, each in found["memory"].items():
        lines.append(
            f"soak: {process}: {each['median_mib']:.0f} MiB, {each['slope_mib_per_hour']:+.1f} MiB an hour, "
            f"max - min {each['max_minus_min_mib']:.1f} MiB, the line rises by {each['rise']:.1%} "
            f"(aim: {FLAT:.0%}): {_met(each['rise'] <= FLAT)}"
        )
    return lines


def _met(met: bool) -> str:
    return "met" if met else "missed"


def flat(found: dict[str, Any]) -> bool:
    """Return whether a soak met its aims."""
    return not found["errors"] and all(each["rise"] <= FLAT for each in found["memory"].values())


def main() -> int:
    parts = [*AGAINST_RIVALS, *ALONE]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", nargs="+", choices=parts, default=parts, help="all, if left out")
    parser.add_argument("--model", type=Path, default=Path("models/emoji-base"), help="folder of diffusers")
    parser.add_argument("--seconds", type=float, default=60, help="of a turn at saturation; others follow")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each server at saturation")
    parser.add_argument("--clients", type=int, default=24, help="at saturation")
    parser.add_argument("--max-batch-size", type=int, default=32, help="pictures, of ours")
    parser.add_argument("--rival-batch-size", type=int, default=16, help="pictures, of @serve.batch")
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--lone", type=int, default=30, help="requests whose overhead is measured")
    parser.add_argument("--soak", type=float, default=10, metavar="MINUTES")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    settings = Settings(
        str(arguments.model.resolve()),
        arguments.seconds,
        arguments.rounds,
        arguments.clients,
        arguments.max_batch_size,
        arguments.rival_batch_size,
        arguments.adapters,
        arguments.lone,
        arguments.soak,
    )
    show(f"framework logs: {quiet_logs()}")
    figures = measure(settings, arguments.part, arguments.out)
    for part, found in figures.items():
        for line in told(part, found):
            show(line)
    show(f"all figures: {arguments.out}")
    return 0 if "soak" not in figures or flat(figures["soak"]) else 1


if __name__ == "__main__":
    sys.exit(main())
