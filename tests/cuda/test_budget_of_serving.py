"""Drawing on a pretended GPU (`pretend`): devices and dtypes fit, and a step costs what it may."""

import pytest

from tests.cuda.budgets import (
    BATCH_CHANGE,
    COPIES_OF_DIFFUSERS,
    WAITS_OF_DIFFUSERS,
    Told,
    marks,
    of_family,
    run,
)
from tests.tiny_models import FAMILY_MODELS

pytestmark = marks
DENOISER_OFFLOADED = {"model offloaded", "on nf4, offloaded"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return run("serving", tmp_path_factory.mktemp("pretended"))


@pytest.mark.parametrize("family", FAMILY_MODELS)
def test_a_denoising_step_never_waits_and_copies_its_coefficients_once(family: str, served: Told) -> None:
    of_diffusers = COPIES_OF_DIFFUSERS.get(family, 0)
    for case, found in of_family(served, family).items():
        if case in ("sampling", "turns", "adapters", *DENOISER_OFFLOADED):
            continue
        fewest_waits = min(sum(step["waits"].values()) for step in found["steps"])
        assert fewest_waits == WAITS_OF_DIFFUSERS.get(family, 0), case
        plain = [step for step in found["steps"] if sum(step["waits"].values()) == fewest_waits]
        fewest = min(sum(step["to_device"].values()) for step in plain)
        # Cached features divide the rows anew at each step.
        assert fewest <= (4 if case == "cached features" else 1) + of_diffusers, case


@pytest.mark.parametrize("family", FAMILY_MODELS)
def test_a_step_of_an_offloaded_denoiser_copies_each_layer_once_from_pinned_memory_and_never_waits(
    family: str, served: Told
) -> None:
    of_diffusers, found = COPIES_OF_DIFFUSERS.get(family, 0), of_family(served, family)
    for case in found.keys() & DENOISER_OFFLOADED:
        plain, steps = found["bf16"]["steps"], found[case]["steps"]
        fewest_waits = min(sum(step["waits"].values()) for step in steps)
        assert fewest_waits == WAITS_OF_DIFFUSERS.get(family, 0), case
        step = min(steps, key=lambda each: sum(each["to_device"].values()))
        # The coefficients, and what is copied ahead where another part may come next.
        assert sum(step["to_device"].values()) <= found[case]["layers"] + 2 + of_diffusers, case
        # Of the whole drawing, with its captions and its pictures.
        assert sum(each["pageable"] for each in steps) <= sum(each["pageable"] for each in plain), case


@pytest.mark.parametrize("family", FAMILY_MODELS)
def test_an_evaluator_draws_on_the_device(family: str, served: Told) -> None:
    waits = of_family(served, family)["sampling"]["waits"]
    # Of two batches, before and after their four steps, and in these.
    assert sum(waits.values()) <= 2 * (10 + 4 * WAITS_OF_DIFFUSERS.get(family, 0)), waits


@pytest.mark.parametrize("family", FAMILY_MODELS)
def test_denoiser_and_text_encoders_of_an_evaluator_are_never_on_the_device_together(
    family: str, served: Told
) -> None:
    found = of_family(served, family)["turns"]
    assert found["denoising"] == ["cuda cpu"] and found["encoding"] == ["cpu cuda"]


def test_a_change_of_a_batch_with_adapters_launches_few_kernels_whatever_the_number_of_layers(
    served: Told,
) -> None:
    found = [each for (_, case), each in served.items() if case == "adapters"]
    assert len(found) == 3
    for each in found:
        assert each["launches"] <= BATCH_CHANGE
        assert not each["waits"] and sum(each["to_device"].values()) == 1
