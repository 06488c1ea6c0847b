"""docs/families.md is what the tests that pytest collects run on."""

import pytest

from scripts.families_page import PAGE, page


@pytest.mark.slow
def test_the_page_is_of_the_present_tests() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m scripts.families_page"
