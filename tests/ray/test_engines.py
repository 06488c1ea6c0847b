"""What both engines make of a step, on two workers and with numbers that are known beforehand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.config import WHOLE_TENSORS
from tests.engine_cases import (
    OPTIMIZERS,
    PIECES,
    VARIANTS,
    expected_by,
    expected_in_stages,
    expected_of_switches,
    expected_schedule_free,
    gradient_in_pieces,
    told_of_bandwidth,
    weights_in_stages,
)
from tests.workers import Workers


def on_ranks(
    case: Callable[[dict[str, Any]], Any], folder: Path, workers: Workers, **arguments: Any
) -> list[Any]:
    """What a function returns on each rank; it is given `arguments`."""

    def run(loop: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        rank = torch.distributed.get_rank()
        Path(loop["folder"], f"{rank}.json").write_text(json.dumps(case(loop)))

    workers.run(run, {"folder": str(folder), **arguments})
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_the_gradient_of_a_step_in_pieces_is_exact_at_every_stage_and_in_bf16(
    two_workers: Workers, tmp_path: Path
) -> None:
    exact = sum(PIECES) / len(PIECES) * 8**0.5
    for found in on_ranks(gradient_in_pieces, tmp_path, two_workers):
        assert len(found) == len(VARIANTS)
        for variant, step in found.items():
            assert step["norm"] == pytest.approx(exact, rel=1e-6), variant
            assert step["told"] == [2, 2], variant
        of_bf16 = [found[f"deepspeed bf16 {stage}"]["state"]["gradients"] for stage in (1, 2, 3)]
        assert of_bf16 == [8 * 4, 4 * 4, 4 * 4]  # in fp32 while they are summed
        moved = [found[f"deepspeed {precision}"]["moved"] for precision in ("fp32 2", "fp32 3", "bf16 3")]
        assert moved == [1, 0, 0]  # stage 3 divides the weights before any device has them all


def test_the_bandwidth_between_ranks_is_measured_by_all_and_told_by_one(
    two_workers: Workers, tmp_path: Path
) -> None:
    (first, line), (second, none) = on_ranks(told_of_bandwidth, tmp_path, two_workers)
    assert first > 0 and second > 0
    assert line.startswith("slow connection: an all-reduce over 2 workers")  # 1 KiB never fills a link
    assert none is None


def test_stages_are_as_with_torchs_own_optimizers_at_every_stage_offloaded_and_after_a_restart(
    two_workers: Workers, tmp_path: Path
) -> None:
    """Layers decay, are frozen and come back; the optimizer changes, and then begins without moments."""
    found, _ = on_ranks(weights_in_stages, tmp_path, two_workers)
    frozen = expected_in_stages()
    first_again = torch.tensor(frozen[5]["first.weight"]) - torch.tensor(frozen[4]["first.weight"])
    torch.testing.assert_close(first_again.abs(), torch.full((3, 4), 0.1))  # Adam's first step is the rate
    right = {
        "frozen": frozen,
        "switched": expected_of_switches(),
        "lion": expected_of_switches(only_lion=True),
        **{name: expected_by(name) for name in OPTIMIZERS},
        "schedule_free": [averages for _, averages in expected_schedule_free()],
    }
    assert {schedule: len(variants) for schedule, variants in found.items()} == {
        "frozen": 21,
        "switched": 9,
        "lion": 6,
        **{name: 3 if name in WHOLE_TENSORS else 7 for name in OPTIMIZERS},
    }
    for schedule, variants in found.items():
        for variant, seen in variants.items():
            for step, (mine, expected) in enumerate(zip(seen, right[schedule], strict=True), start=1):
                for name in expected:
                    torch.testing.assert_close(
                        torch.tensor(mine[name]),
                        torch.tensor(expected[name]),
                        rtol=0,
                        atol=2e-6,
                        msg=f"{schedule}, {variant}: {name}, step {step}: {mine[name]}, not {expected[name]}",
                    )
