"""What is done where a device's memory is too small, and where it is broken."""

import mmap
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from ray_jobs.diffusion.memory import Chunks, device_broken, pictures_at_once
from ray_jobs.training.monitor import memory_gib


def holds(most: int, seen: list[int]) -> Callable[[list[int]], list[int]]:
    """Work that a device with memory for so many items does."""

    def work(part: list[int]) -> list[int]:
        seen.append(len(part))
        if len(part) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [2 * each for each in part]

    return work


def test_where_memory_is_too_small_half_is_tried_and_what_fits_is_remembered() -> None:
    chunks, seen = Chunks(), list[int]()
    done = chunks.run(list(range(10)), holds(3, seen))
    assert sum(done, []) == [2 * each for each in range(10)]
    assert seen == [10, 5, 2, 2, 2, 2, 2]
    assert chunks.run([7, 8, 9], holds(3, seen)) == [[14, 16], [18]]


def test_no_more_items_are_taken_at_a_time_than_the_limit() -> None:
    chunks, seen = Chunks(), list[int]()
    assert chunks.run([1, 2, 3, 4, 5], holds(9, seen), limit=2) == [[2, 4], [6, 8], [10]]
    chunks.run(list(range(4)), holds(1, seen), limit=2)  # and fewer where memory is too small for it
    assert seen == [2, 2, 1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("size", "number"),
    [((512, 512), 16), ((1024, 1024), 4), ((1344, 768), 4), ((2048, 2048), 1), ((4096, 4096), 1)],
)
def test_pictures_at_once_go_by_their_pixels(size: tuple[int, int], number: int) -> None:
    assert pictures_at_once(*size) == number


def test_one_item_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        Chunks().run([1, 2], holds(0, []))


def test_only_errors_of_the_context_break_a_device() -> None:
    assert device_broken(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not device_broken(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not device_broken(ValueError("a prompt"))


def test_what_a_process_shares_is_not_its_memory() -> None:
    """As pages of Ray's object store, of which a training reads more and more."""
    before, size = memory_gib(torch.device("cpu")), 64 << 20
    with mmap.mmap(-1, size) as shared:  # MAP_SHARED
        shared.write(b"1" * size)
        between = memory_gib(torch.device("cpu"))
        own = bytearray(b"1" * size)
        assert between - before < 0.02 < memory_gib(torch.device("cpu")) - between
        assert len(own) == size


PROGRAM = """
import sys
from ray_jobs.evaluation.actor import replaced_if_broken

@replaced_if_broken()
def call():
    raise RuntimeError(sys.argv[1])

try:
    call()
except RuntimeError:
    sys.exit(3)
"""


@pytest.mark.parametrize(("message", "code"), [("CUDA error: device-side assert triggered", 1), ("no", 3)])
def test_an_evaluator_on_a_broken_device_ends_its_process(message: str, code: int) -> None:
    """Ray then starts another one."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, message], env=os.environ | {"PYTHONPATH": os.getcwd()}, check=False
    )
    assert done.returncode == code
