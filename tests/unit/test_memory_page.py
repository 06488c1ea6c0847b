"""docs/memory.md is what a plan computes."""

import pytest

from scripts.memory_page import CARDS, INTRODUCTION, MODELS, PAGE, cell, row

pytestmark = pytest.mark.slow


def test_the_page_has_every_published_model_and_says_what_it_is() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith(INTRODUCTION)
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert rows == ["model", *MODELS]


@pytest.mark.parametrize("name", ["Stable Diffusion 1.5", "PixArt-Sigma"])
def test_a_row_is_what_a_plan_computes(name: str) -> None:
    assert row(name) in PAGE.read_text(encoding="utf-8").splitlines()


def test_a_cell_names_the_smallest_card_that_holds_it_with_a_tenth_left() -> None:
    assert CARDS == (24, 48, 80)
    assert [cell(gib) for gib in (21.6, 21.7, 72.1)] == ["21.6 (24)", "21.7 (48)", "72.1"]
