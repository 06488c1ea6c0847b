"""What a run must reach."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

PLAIN, OURS, COMPILED = "diffusers", "diffray", "diffray compiled"
RATIO, RATIO_UNCOMPILED = 1.3, 1.0  # images a second over the plain loop's
MFU = {"SD1.5": 0.35, "SDXL": 0.42, "FLUX": 0.50}
ROWS, SHARE_OF_BARE = 16, 0.8
TOGETHER, PACKED = "SD1.5, 4 trials of 2", 1.5  # trial steps a second over those of one trial
PLAN = 0.15  # by which the planned memory may be off

Record = dict[str, Any]


@dataclass(frozen=True)
class Gate:
    """A figure and its bound.

    Attributes:
        value: None if it was not measured.
    """

    name: str
    value: float | None
    bound: float
    at_most: bool = False

    @property
    def passed(self) -> bool:
        if self.value is None:
            return False
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def line(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.3g}"
        bound = f"{'at most' if self.at_most else 'at least'} {self.bound:.3g}"
        return f"{'ok    ' if self.passed else 'MISSED'} {self.name}: {value} ({bound})"


def gates_of(record: Record, phases: Sequence[str]) -> list[Gate]:
    """Return the gates of the phases that were run; cases that do not fit the device have none.

    Args:
        record: figures by phase and case.
    """
    parts: dict[str, Callable[[Record], list[Gate]]] = {
        "train": _training,
        "evaluate": _evaluation,
        "serve": _serving,
        "packed": _packed,
    }
    return [gate for phase in phases if phase in parts for gate in parts[phase](record[phase])]


def _training(found: Record) -> list[Gate]:
    gates = []
    for case in ("SD1.5 lora", "SD1.5 full", "SDXL lora", "FLUX lora"):
        if case in found:  # it says that it does not fit
            continue
        plain, ours, compiled = (found.get(f"{case}, {who}", {}) for who in (PLAIN, OURS, COMPILED))
        best = max((ours, compiled), key=lambda each: each.get("images_per_second", 0.0))
        gates += [
            Gate(f"{case}: images a second over the plain loop's", _ratio(best, plain), RATIO),
            Gate(f"{case}: the same, not compiled", _ratio(ours, plain), RATIO_UNCOMPILED),
            Gate(f"{case}: waits of the host a step", ours.get("waits"), 0, at_most=True),
            Gate(f"{case}: planned memory is off by", _off(ours), PLAN, at_most=True),
        ]
        if case.endswith("lora"):
            gates.append(Gate(f"{case}: MFU", best.get("mfu"), MFU[case.removesuffix(" lora")]))
    return gates


def _ratio(ours: Record, plain: Record) -> float | None:
    if "images_per_second" not in ours or "images_per_second" not in plain:
        return None
    return float(ours["images_per_second"] / plain["images_per_second"])


def _off(ours: Record) -> float | None:
    if ours.get("peak_gib") is None:
        return None
    return float(abs(ours["planned_gib"] / ours["peak_gib"] - 1))


def _evaluation(found: Record) -> list[Gate]:
    bf16, fp32 = (found.get(f"SD1.5, {precision}", {}) for precision in ("bf16", "fp32"))
    name = "SD1.5: FID in bf16 and in fp32 differ by, in errors"
    if not bf16 or not fp32:
        return [Gate(name, None, 1, at_most=True)]
    return [Gate(name, abs(bf16["fid"] - fp32["fid"]) / fp32["fid_error"], 1, at_most=True)]


def _serving(found: Record) -> list[Gate]:
    return [
        Gate(
            f"{model}: {ROWS} rows a second of the bare denoiser's",
            found.get(f"{model}, {ROWS} rows", {}).get("share_of_bare"),
            SHARE_OF_BARE,
        )
        for model in ("SD1.5", "SDXL")
    ]


def _packed(found: Record) -> list[Gate]:
    name = f"{TOGETHER}: trial steps a second over one trial's"
    return [Gate(name, found.get(TOGETHER, {}).get("times_one_trial"), PACKED)]
