"""The table of docs/exchange.md is what an adapter of each family goes through."""

from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.exchange_page import PAGE, page, table


@pytest.mark.slow
def test_the_table_is_of_the_present_code(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    assert PAGE.read_text(encoding="utf-8") == page(tiny, tmp_path), "python -m scripts.exchange_page"


def test_equal_reasons_have_one_number() -> None:
    lines = table({"A": ["", "old", "new"], "B": ["old", "", ""]}).splitlines()
    assert lines[2:] == [
        "| A | yes | no (1) | no (2) |",
        "| B | no (1) | yes | yes |",
        "",
        "1. old",
        "2. new",
    ]
