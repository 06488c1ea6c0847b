"""Signs of trouble in a training's numbers, and the page that each of them links to."""

import math
import random
import re
from pathlib import Path

import pytest

from ray_jobs.config import TrainConfig
from ray_jobs.console.troubleshooting import PAGE, Help, help_link
from ray_jobs.run.records import RungRow
from ray_jobs.run.signs import black_line, change, no_change_line, signs_of
from ray_jobs.training.monitor import Diverged, Meter, slow_data_line
from ray_jobs.training.startup import StartUp
from tests.unit.test_report import report

ROOT = Path(__file__).parents[2]


def rungs(*curves: list[float]) -> list[RungRow]:
    return [
        RungRow(trial_id="lr-1e-07", step=100 * number, fid=1.0, validation_losses=losses)
        for number, losses in enumerate(curves, start=1)
    ]


def test_only_a_curve_that_does_not_move_is_said() -> None:
    draw = random.Random(0)
    first = [draw.uniform(0.02, 0.3) for _ in range(64)]

    def moved(by: float, noise: float) -> list[float]:
        return [loss * (1 - by + draw.gauss(0, noise)) for loss in first]

    said = no_change_line("lr-1e-07", rungs(first, moved(1e-4, 1e-4), moved(2e-4, 2e-4)))
    assert said and re.match(
        r"lr-1e-07: from step 100 to 300 .* changed by 0\.000\d+ of their size: the", said
    )
    assert said.endswith(f"docs/troubleshooting.md#{Help.NO_CHANGE}")
    curves: tuple[list[list[float]], ...] = (
        [first, moved(0.02, 0.01), moved(0.03, 0.01)],  # learns
        [first, moved(0, 0.004), moved(0, 0.004)],  # has learned: its mean stays, its rows go on changing
        [first, moved(0.02, 0.01), moved(-0.05, 0.01)],  # over-fits
        [first],  # was stopped at its first rung
        [[], []],  # was measured without the loss
    )
    for curve in curves:
        assert no_change_line("lr-0.0001", rungs(*curve)) is None
    assert change(rungs([0.1, 0.3], [0.3, 0.1])) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("losses", "said", "section"),
    [
        ([0.1] * 30 + [math.nan], "is not a number at step 31", Help.NOT_A_NUMBER),
        ([0.1] * 30 + [math.inf], "is not a number at step 31", Help.NOT_A_NUMBER),
        ([0.1] * 30 + [2.0] * 20, "rose from 0.1 to 0.575 at step 35", Help.DIVERGENCE),
        ([0.1, 0.4, 0.05] * 40, "", None),  # as noisy as a diffusion loss is
        ([0.1] * 30 + [2.0] + [0.1] * 30, "", None),  # one batch
    ],
)
def test_a_loss_that_explodes_ends_the_training(losses: list[float], said: str, section: Help | None) -> None:
    meter = Meter("trial", [1000], TrainConfig(batch_size=2), None, 1, StartUp())

    def watch() -> None:
        for step, loss in enumerate(losses, start=1):
            meter._watch(step, loss, 1.0)

    if section is None:
        watch()
        return
    with pytest.raises(Diverged, match=f"the loss {said}.*train.learning_rate.*{help_link(section)}$"):
        watch()


def test_waiting_for_data_is_said_where_it_is_long_and_measured_over_a_minute() -> None:
    assert slow_data_line("trial", 0.19, 600) is None and slow_data_line("trial", 0.9, 30) is None
    said = slow_data_line("trial", 0.35, 600)
    assert said == f"trial: waits for data 35% of the time; {help_link(Help.SLOW_DATA)}"


def test_black_pictures_are_said_with_the_precision_that_helps() -> None:
    assert black_line("lr-0.001 at 200", 0, 64, "fp16") is None
    said = black_line("lr-0.001 at 200", 12, 64, "fp16")
    assert said and "12 of 64 pictures are black: set evaluate.precision: bf16 or fp32; docs/" in said
    assert "look at the loss and" in (black_line("lr-0.001 at 200", 12, 64, "fp32") or "")


def test_the_report_says_what_may_be_wrong_with_a_training() -> None:
    still, moves = rungs([0.1, 0.2], [0.1, 0.2]), rungs([0.1, 0.2], [0.2, 0.1], [0.2, 0.2])
    assert signs_of(moves, "fp16") == signs_of(still, "fp16", ended=False) == []
    black = zip(moves, (0, 12, 3), strict=True)
    rows = still + [row | {"trial_id": "lr-1", "num_samples": 64, "black": count} for row, count in black]
    told = report(signs=signs_of(rows, "fp16"))
    for line in (
        f"lr-1e-07: from step 100 to 200 .*; {help_link(Help.NO_CHANGE)}",
        "lr-1 at 200, as at 1 more of its rungs: 12 of 64 pictures are black: set evaluate.precision: .*"
        f"; {help_link(Help.BLACK_PICTURES)}",
    ):
        assert re.search(f'<p class="note alert">{line}</p>', told)


def test_every_section_has_a_link_in_the_code_and_every_link_a_section() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    anchors = [re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert anchors == [str(section) for section in Help]
    tops = ("ray_jobs", "cluster", "serving", "diffray")
    code = "".join(path.read_text(encoding="utf-8") for top in tops for path in (ROOT / top).rglob("*.py"))
    for section in Help:
        assert f"Help.{section.name}" in code, section


def test_every_refusal_on_the_page_is_one_that_the_code_makes() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    table = text[text.index("## Refusals") :]
    said = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    tops = ("ray_jobs", "cluster", "serving", "diffray")
    files = (path.read_text(encoding="utf-8") for top in tops for path in (ROOT / top).rglob("*.py"))
    code = re.sub(r'"\s*f?"', "", "\n".join(files))  # a message that goes over two lines is one
    assert len(said) > 10
    assert [each for each in said if each not in code] == []
