"""Rows that cores compute apart."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import get_ident

import pytest
import torch

from serving.engine.cpu_workers import CPUWorkers


@pytest.fixture
def two() -> Iterator[CPUWorkers]:
    before = torch.get_num_threads()
    workers = CPUWorkers(2)
    yield workers
    workers.close()
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("number", "rows", "sizes"),
    [
        (2, 16, [8, 8]),
        (2, 5, [2, 3]),
        (2, 3, [3]),  # a core would be idle for a quarter of the time
        (2, 1, [1]),
        (4, 13, [3, 3, 3, 4]),
        (4, 9, [9]),
        (1, 7, [7]),
        (None, 7, [7]),
    ],
)
def test_shares_are_even_and_none_where_too_many_cores_would_wait(
    number: int | None, rows: int, sizes: list[int]
) -> None:
    shares = CPUWorkers(number).shares(rows)
    assert [share.stop - share.start for share in shares] == sizes
    assert [row for share in shares for row in range(rows)[share]] == list(range(rows))
    assert CPUWorkers(number, share_out=False).shares(rows) == [slice(0, rows)]


def test_parts_are_computed_by_threads_of_one_core_without_gradients_and_come_back_in_order(
    two: CPUWorkers,
) -> None:
    rows, threads = torch.arange(10.0, requires_grad=True), set()

    def work(share: slice) -> torch.Tensor:
        threads.add((get_ident(), torch.get_num_threads()))
        return 2 * rows[share]

    found = two.apart(work, 10)
    assert found.tolist() == [2.0 * row for row in range(10)] and not found.requires_grad
    assert threads and all(number == 1 and thread != get_ident() for thread, number in threads)


def test_cores_that_are_taken_work_together_on_what_is_not_shared_and_others_begin_with_one(
    two: CPUWorkers,
) -> None:
    def taken() -> list[int]:
        two.take()
        with ThreadPoolExecutor(1) as later:
            ask = torch.get_num_threads
            return [ask(), later.submit(ask).result(), two.together(ask)]

    with ThreadPoolExecutor(1) as engine:
        assert engine.submit(taken).result() == [1, 1, 2]


def test_an_error_of_a_part_is_that_of_the_whole(two: CPUWorkers) -> None:
    def work(share: slice) -> torch.Tensor:
        if share.start:
            raise ValueError("the second one")
        return torch.zeros(2)

    with pytest.raises(ValueError, match="the second one"):
        two.apart(work, 4)
