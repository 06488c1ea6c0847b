"""The benchmark of GPUs on a pretended one (`pretend`): it runs there, and measures steps that never wait."""

import pytest

from benchmarks.gpu.serve import MODELS
from benchmarks.gpu.shapes import SHAPES
from tests.cuda.budgets import Told, marks, of_family, run

pytestmark = marks


@pytest.fixture(scope="module")
def benchmarked(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return run("benchmarking", tmp_path_factory.mktemp("pretended"))


@pytest.mark.parametrize("model", SHAPES["small"])
def test_the_loop_that_is_measured_never_waits_and_launches_less_than_the_plain_one(
    model: str, benchmarked: Told
) -> None:
    cases = of_family(benchmarked, model)
    for method in ("lora", "full"):
        found = cases[method]
        assert not found["waits"] and not found["pageable"], method
        assert sum(found["to_device"].values()) == 1, method
        assert found["launches"] < found["rival"], method


@pytest.mark.parametrize("model", MODELS)
def test_the_evaluator_and_the_engine_that_are_measured_draw(model: str, benchmarked: Told) -> None:
    assert of_family(benchmarked, model)["drawing"] == {
        "family": model,
        "case": "drawing",
        "drawn": 2,
        "served": 3,
    }
