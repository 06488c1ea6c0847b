"""How the phases measure: the device's seconds, memory and kernels, and the waits of the host for it."""

import gc
import time
import warnings
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count

GIB = 2**30
Figures = dict[str, Any]
SYNCHRONISED = "called a synchronizing CUDA operation"  # torch's warning
_aten = torch.ops.aten
ATTENTION_BACKWARD = (
    _aten._scaled_dot_product_flash_attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward,
    _aten._scaled_dot_product_cudnn_attention_backward,
)


def on_gpu() -> bool:
    return torch.cuda.is_available()


# Of what draws; convolutions in bf16 are slow on a CPU.
WORKING_DTYPE = torch.bfloat16 if on_gpu() else torch.float32


def device_name() -> str:
    """Return the device to measure on, as PyTorch names it."""
    return "cuda" if on_gpu() else "cpu"


def synchronise() -> None:
    """Wait until the device has nothing left to do."""
    if on_gpu():
        torch.cuda.synchronize()


def free() -> None:
    """Give back the memory of what is no longer used, and measure peaks from now on."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    """Return the most memory that tensors took since `free`; None on a CPU."""
    return torch.cuda.max_memory_allocated() / GIB if on_gpu() else None


class Laps:
    """The device's seconds between marks. Marks do not wait for the device."""

    def __init__(self) -> None:
        self.marks: list[Any] = []

    def mark(self) -> None:
        if not on_gpu():
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def seconds(self) -> list[float]:
        """Wait for the device; return the seconds of each lap."""
        synchronise()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [first.elapsed_time(last) / 1e3 if on_gpu() else last - first for first, last in pairs]


def seconds_a_call(function: Callable[[], object], *, warm: int, calls: int) -> float:
    """Return the median of the device's seconds of a call."""
    for _ in range(warm):
        function()
    laps = Laps()
    laps.mark()
    for _ in range(calls):
        function()
        laps.mark()
    return median(laps.seconds())


def flops_of(function: Callable[[], object]) -> int:
    """Return the floating-point operations of a call's products and convolutions, as the formulas need them.

    Fused attention computes its scores again in the backward pass. That is a choice of the kernel, so four of
    the five products that torch counts there remain.
    """

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value)) * 4 // 5

    counter = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(ATTENTION_BACKWARD, backward))
    with counter:
        function()
    return int(counter.get_total_flops())


def waits_of(function: Callable[[], object]) -> int | None:
    """Return how often the host waits for the device in a call; None on a CPU."""
    if not on_gpu():
        function()
        return None
    synchronise()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(SYNCHRONISED in str(each.message) for each in seen)


def kernels_of(function: Callable[[], object]) -> tuple[int, float] | None:
    """Return a call's kernels and copies, and the share of it that the device is busy; None on a CPU."""
    if not on_gpu():
        function()
        return None
    synchronise()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        begin = time.perf_counter()
        function()
        synchronise()
        seconds = time.perf_counter() - begin
    events: Iterable[Any] = profiler.events() or []
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    return len(spans), union(spans) / 1e6 / seconds


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length that intervals cover together.

    Args:
        spans: (start, end), by their starts.
    """
    covered, until = 0.0, float("-inf")
    for start, end in spans:
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
