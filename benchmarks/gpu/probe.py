"""The device, and what it reaches at best: the rate of a product of matrices, and of a copy."""

from collections.abc import Iterator

import torch

from benchmarks.gpu.chips import peak_tflops
from benchmarks.gpu.measuring import GIB, Figures, device_name, on_gpu, seconds_a_call

SIDE = {"small": 256, "full": 8192}
COPIED = {"small": 1 << 20, "full": 4 << 30}  # bytes


def run(size: str) -> Iterator[tuple[str, Figures]]:
    device = device_name()
    name = torch.cuda.get_device_name() if on_gpu() else "CPU"
    yield "device", {"name": name, "peak_tflops": peak_tflops(name), **versions()}
    side = SIDE[size]
    generator = torch.Generator(device).manual_seed(0)
    factor = torch.randn((side, side), generator=generator, device=device).bfloat16()
    product = torch.empty_like(factor)
    seconds = seconds_a_call(lambda: torch.mm(factor, factor, out=product), warm=3, calls=10)
    yield "product of matrices", {"side": side, "tflops": 2 * side**3 / seconds / 1e12}
    source = torch.zeros(COPIED[size], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_a_call(lambda: target.copy_(source), warm=2, calls=10)
    yield "copy", {"bytes": COPIED[size], "terabytes_per_second": 2 * COPIED[size] / seconds / 1e12}


def versions() -> Figures:
    found: Figures = {"torch": torch.__version__}
    if not on_gpu():
        return found
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return found | {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "capability": [properties.major, properties.minor],
        "memory_gib": total / GIB,
        "free_gib": free / GIB,
    }
