"""The memory of our server's processes while it is loaded."""

import re
import threading
import time

import httpx
import numpy as np
import psutil

from benchmarks.serving_servers import replica

EVERY_S = 10.0
SETTLES_S = 60.0  # what grows until then is the beginning: caches fill, and memory finds its size
HTTP_MEMORY = re.compile(r"^diffray_process_resident_memory_bytes (\S+)", re.MULTILINE)


class Memory:
    """Resident MiB of the replica's process and of the HTTP application's, sampled by a thread.

    Args:
        url: of our server.
        seconds: of the load; short ones are sampled more often.

    Attributes:
        times: seconds since the block began.
        replica, http: MiB, one a time.
    """

    def __init__(self, url: str, seconds: float) -> None:
        self.url, self.every = url, min(EVERY_S, seconds / 30)
        self.times: list[float] = []
        self.replica: list[float] = []
        self.http: list[float] = []
        self._process = psutil.Process(replica().process)
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self._began = time.perf_counter()
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._sampler.join()

    def _watch(self) -> None:
        with httpx.Client(timeout=60, trust_env=False) as client:
            while not self._done.wait(self.every):
                [found] = HTTP_MEMORY.findall(client.get(f"{self.url}/metrics").text)
                self.times.append(time.perf_counter() - self._began)
                self.http.append(float(found) / 2**20)
                self.replica.append(self._process.memory_info().rss / 2**20)


def growth(times: list[float], mib: list[float], seconds: float) -> dict[str, float]:
    """Of a process once it has settled: the slope of the line through its memory (least squares), MiB an
    hour; how far apart the samples are; and how much the line rises in this time, as a share of the median.

    Args:
        times, mib: the samples.
        seconds: of the load; a fifth of one that is shorter than five minutes is left out.
    """
    settled = np.asarray(times) >= min(SETTLES_S, seconds / 5)
    at, memory = np.asarray(times)[settled], np.asarray(mib)[settled]
    slope = float(np.polyfit(at, memory, 1)[0])
    return {
        "median_mib": float(np.median(memory)),
        "slope_mib_per_hour": 3600 * slope,
        "max_minus_min_mib": float(np.ptp(memory)),
        "rise": slope * float(np.ptp(at)) / float(np.median(memory)),
    }
