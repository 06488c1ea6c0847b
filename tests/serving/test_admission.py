"""Rows are admitted by their number and by their pixels, first come, first served."""

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from ray_jobs.diffusion.families import FAMILIES
from ray_jobs.diffusion.solvers import tabulate
from ray_jobs.weights.loading import load_pipeline
from serving.engine.engine import Engine
from serving.engine.rows import Row
from serving.engine.scheduler import Decoding, QueueFull, Scheduler
from serving.request import Request

OWN = 64
SCHEDULE = tabulate(DDIMScheduler(), FAMILIES["StableDiffusionPipeline"], 2, (4, 8, 8))
TOLERANCE = 0.55  # as in test_engine.py
arrivals = count()


def a_scheduler(max_rows: int = 4, max_waiting: int | None = None, chunk_rows: int = 4) -> Scheduler:
    """Return a scheduler with room for `max_rows` unguided rows of 64 x 64 pixels."""
    pixels = max_rows * OWN**2
    return Scheduler(
        None, max_rows=max_rows, max_pixels=pixels, chunk_rows=chunk_rows, max_waiting=max_waiting
    )


def a_row(side: int, *, guided: bool = False) -> Row:
    return Row(Request("a", 0, 2, 1.0), SCHEDULE, (side, side), next(arrivals), None, guided)


def added(scheduler: Scheduler, *sides: int) -> list[Row]:
    rows = [a_row(side) for side in sides]
    for row in rows:
        scheduler.add(row)
    return rows


def finish(scheduler: Scheduler) -> None:
    """Make two steps of one kind, after which its rows are finished and have left."""
    group = scheduler.next_to_denoise()
    for _ in range(2):
        scheduler.stepped(group)
    scheduler.next_to_decode()


def test_as_many_rows_are_admitted_as_have_the_pixels_of_the_models_own_images() -> None:
    scheduler = a_scheduler()
    rows = added(scheduler, 64, 64, 64, 64, 64)
    assert scheduler.admit() == rows[:4]
    scheduler = a_scheduler()
    rows = added(scheduler, 32, 32, 32, 32, 32)  # small ones are limited by their number
    assert scheduler.admit() == rows[:4]
    scheduler = a_scheduler(max_rows=8)
    rows = added(scheduler, 128, 96, 96, 64)  # 4, 2.25, 2.25 and 1 of 8
    assert scheduler.admit() == rows[:2]


def test_a_guided_row_takes_twice_its_pixels() -> None:
    scheduler = a_scheduler()
    rows = [a_row(64, guided=True) for _ in range(3)]
    for row in rows:
        scheduler.add(row)
    assert scheduler.admit() == rows[:2]


def test_a_row_larger_than_all_room_runs_alone_and_is_passed_by_none() -> None:
    scheduler = a_scheduler()
    first, large, small = added(scheduler, 64, 256, 64)
    assert scheduler.admit() == [first]
    later = added(scheduler, 64)
    assert scheduler.admit() == []
    finish(scheduler)
    assert scheduler.admit() == [large] and scheduler.admit() == []
    finish(scheduler)
    assert scheduler.admit() == [small, *later]


def test_rows_of_all_sizes_are_admitted_in_order_and_never_with_more_pixels_than_there_are() -> None:
    """A simulation in which more small rows keep coming than leave."""
    scheduler, generator = a_scheduler(), torch.Generator().manual_seed(0)
    sides, joined = [32, 64, 96, 128, 192], list[Row]()
    for _ in range(200):
        drawn = torch.multinomial(torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1]), 2, generator=generator)
        added(scheduler, *(sides[kind] for kind in drawn.tolist()))
        joined += scheduler.admit()
        taken = [row.pixels for row in scheduler.running]
        assert 0 < len(taken) <= 4 and (len(taken) == 1 or sum(taken) <= 4 * OWN**2)
        scheduler.stepped(scheduler.next_to_denoise())
        scheduler.next_to_decode()
    assert [row.arrival for row in joined] == sorted(row.arrival for row in joined)
    assert {row.size[0] for row in joined} == set(sides)


def test_rows_that_are_admitted_next_do_not_count_as_waiting() -> None:
    scheduler = a_scheduler(max_waiting=1)
    first, large = added(scheduler, 64, 128)  # beside the first there is no room for the second
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        added(scheduler, 64)
    assert scheduler.admit() == [first]
    with pytest.raises(QueueFull, match="1 requests are waiting"):
        added(scheduler, 64)
    finish(scheduler)
    small = added(scheduler, 64)  # the large one is admitted next
    assert scheduler.admit() == [large] and [*scheduler.waiting.rows] == small


def test_large_pictures_are_encoded_and_decoded_a_few_at_a_time() -> None:
    scheduler = a_scheduler(max_rows=8, chunk_rows=4)
    for side, chunks in ((1024, [4, 2]), (1328, [2, 2, 2]), (2048, [1] * 6)):
        rows = [a_row(side) for _ in range(6)]
        image = torch.zeros(1, dtype=torch.uint8).expand(side, side, 3)
        for row in rows:
            row.request, row.unencoded = replace(row.request, image=image), ["image"]
        scheduler.encoding += rows
        assert [len(scheduler.next_to_encode()) for _ in chunks] == chunks and not scheduler.encoding
        scheduler.decoding += [Decoding(row, row.latents, 2, True) for row in rows]
        assert [len(scheduler.next_to_decode()) for _ in chunks] == chunks and not scheduler.decoding


def test_requests_of_mixed_sizes_are_drawn_as_each_alone_within_the_room(tiny_model: Path) -> None:
    sizes = ((64, 64, 3.0), (128, 128, 3.0), (32, 64, 1.0), (96, 64, 1.0), (64, 128, 3.0), (64, 64, 1.0))
    requests = [
        Request("a small red circle", seed, 2, scale, height=height, width=width)
        for seed, (height, width, scale) in enumerate(sizes)
    ]
    engine, seen = Engine(load_pipeline(str(tiny_model)), max_rows=2), list[int]()

    def note(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(sum(row.pixels for row in engine.scheduler.running))

    hook = engine.denoiser.register_forward_pre_hook(note)
    futures = [engine.submit(request) for request in requests]
    engine.drain()
    hook.remove()
    own = 2 * 64 * 64  # of a guided row
    assert max(seen) == 4 * own and set(seen) - {4 * own} <= set(range(2 * own + 1))
    for request, future in zip(requests, futures, strict=True):
        alone = engine.submit(request)
        engine.drain()
        difference = future.result(0).pixels.float() - alone.result(0).pixels.float()
        assert difference.abs().max() <= 2 * TOLERANCE
