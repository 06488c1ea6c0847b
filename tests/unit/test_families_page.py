"""docs/families.md is what the tests that pytest collects run on."""

import json

import pytest

from benchmarks.families import RESULTS
from ray_jobs.diffusion.families import FAMILIES
from scripts.families_page import FACETS, PAGE, TESTS, cell, families_of_tests, has, page


@pytest.mark.slow
def test_the_page_is_of_the_present_tests() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m scripts.families_page"


@pytest.mark.slow
def test_what_a_family_says_that_it_has_is_walked_by_the_capabilitys_test_and_nothing_else_is() -> None:
    walked = families_of_tests()
    for what in FACETS:
        assert walked[TESTS[what]] == [name for name in FAMILIES if has(name, what)], what


def test_a_cell_says_what_is_walked_what_is_not_there_and_what_nobody_has_shown() -> None:
    caching, comfyui = "`serve.cache_features`", "adapters for ComfyUI"
    walked = {test: ["StableDiffusionPipeline"] for test in TESTS.values()}
    assert cell("StableDiffusionPipeline", caching, walked) == "x"
    assert cell("FluxPipeline", caching, walked) == "-"
    assert cell("FluxPipeline", comfyui, walked) == ""
    assert cell("SanaPipeline", comfyui, walked) == "-"


def test_every_family_has_been_measured() -> None:
    assert json.loads(RESULTS.read_text(encoding="utf-8"))["families"].keys() == FAMILIES.keys()
