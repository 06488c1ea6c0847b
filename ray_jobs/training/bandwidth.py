"""The bandwidth between the ranks of a training, measured once at its start."""

import time

import torch

BYTES = 256 << 20
ROUNDS = 3
SLOW_GB_S = 5.0
"""Bus bandwidth that a warning asks for. At less, the gradients of a full fine-tuning take longer than its
steps; a network of 10 Gbit/s has 1."""


def bus_bandwidth(device: torch.device, num_bytes: int = BYTES) -> float:
    """Return the bus bandwidth of an all-reduce over all ranks in GB/s; all ranks must call this.

    An all-reduce of B bytes over n ranks moves 2 B (n - 1) / n through each rank's link
    (github.com/NVIDIA/nccl-tests, PERFORMANCE.md).
    """
    import torch.distributed as dist

    ranks, data = dist.get_world_size(), torch.zeros(num_bytes // 4, device=device)
    seconds = []
    for _ in range(1 + ROUNDS):  # the first builds the connections
        begin = time.perf_counter()
        dist.all_reduce(data)
        data[0].item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return 2 * num_bytes * (ranks - 1) / ranks / min(seconds[1:]) / 1e9


def slow_network(device: torch.device, num_bytes: int = BYTES) -> str | None:
    """Return a warning if the ranks are connected slowly, on rank 0 only; all ranks must call this."""
    import torch.distributed as dist

    if dist.get_world_size() == 1:
        return None
    measured = bus_bandwidth(device, num_bytes)
    return warning(measured, dist.get_world_size()) if dist.get_rank() == 0 else None


def warning(measured: float, ranks: int) -> str | None:
    """Return a line about a bus bandwidth in GB/s that slows training down; None if it is fast enough."""
    if measured >= SLOW_GB_S:
        return None
    return (
        f"slow connection: an all-reduce over {ranks} workers runs at {measured:.1f} GB/s; put the workers "
        "on one node, or see docs/cluster.md#gpus for NCCL's settings"
    )
