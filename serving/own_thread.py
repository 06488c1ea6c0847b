"""Work of PyTorch beside the engine's, in threads that end with it.

Each thread that computes with PyTorch on a CPU gets OpenMP threads of its own, which stay as long as it does.
While there are more of them than cores, libgomp puts each to sleep at every barrier instead of letting it
spin: the engine's denoiser is a quarter slower on two cores for one idle thread that has loaded a model.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


async def in_own_thread(function: Callable[..., T], *arguments: Any) -> T:
    """As `asyncio.to_thread`, in a thread that ends with the call."""
    thread = ThreadPoolExecutor(1)
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, function, *arguments)
    finally:
        thread.shutdown(wait=False)
