"""Training on a pretended GPU (`pretend`): devices and dtypes fit, and a step costs what it may."""

import pytest

from tests.cuda.budgets import (
    AVERAGES,
    COPIES_OF_DIFFUSERS,
    ON_HOST,
    OPTIMIZER,
    PLAIN,
    RECOMPUTED_WAITS,
    WAITS_OF_DIFFUSERS,
    Told,
    marks,
    of_family,
    run,
)
from tests.tiny_models import FAMILY_MODELS

pytestmark = marks


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return run("training", tmp_path_factory.mktemp("pretended"))


@pytest.mark.parametrize("family", FAMILY_MODELS)
def test_a_training_step_never_waits_and_its_rows_come_in_one_copy(family: str, trained: Told) -> None:
    of_diffusers = COPIES_OF_DIFFUSERS.get(family, 0)
    for case, found in of_family(trained, family).items():
        pieces = found["pieces"]
        for part in ("send", "passes", "update", "average", "meter"):
            waits, needed = sum(found[part]["waits"].values()), WAITS_OF_DIFFUSERS.get(family, 0)
            if "recomputed" in case:
                needed += RECOMPUTED_WAITS.get(family, 0)
            assert waits == (needed * pieces if part == "passes" else 0), (case, part)
        assert sum(found["send"]["to_device"].values()) == pieces, case
        assert not found["send"]["pageable"], case
        if ON_HOST not in case:
            assert sum(found["passes"]["to_device"].values()) == of_diffusers * pieces, case
        for part in ("update", "average", "meter"):
            assert not found[part]["to_device"], (case, part)


@pytest.mark.parametrize("family", FAMILY_MODELS)
def test_an_optimizer_step_launches_few_kernels_whatever_the_number_of_layers(
    family: str, trained: Told
) -> None:
    for case, found in of_family(trained, family).items():
        assert found["update"]["launches"] <= OPTIMIZER, case
        assert found["average"]["launches"] <= AVERAGES, case


@pytest.mark.parametrize("family", sorted(PLAIN))
def test_a_step_of_a_pack_never_waits_and_rows_that_are_alike_are_sent_once(
    family: str, trained: Told
) -> None:
    found = of_family(trained, "pack")[family]
    assert found["held"] == 2
    for part in ("send", "passes", "update"):
        assert not found[part]["waits"], part
    # Two of the three draw alike.
    assert sum(found["send"]["to_device"].values()) == 2 and not found["send"]["pageable"]
    assert not found["passes"]["to_device"] and not found["update"]["to_device"]
    assert found["update"]["launches"] <= 3 * OPTIMIZER


def test_a_step_with_the_base_on_the_host_is_the_same_and_copies_it_from_pinned_memory(trained: Told) -> None:
    held = {key: found for key, found in trained.items() if key[1].startswith(ON_HOST)}
    assert len(held) == 6
    for (family, case), found in held.items():
        plain = trained[family, case.removeprefix(ON_HOST)]
        for each in (plain, found):
            assert "error" not in each, f"{family}, {case}: {each['error']}"
        assert (found["losses"], found["states"]) == (plain["losses"], plain["states"]), case
        assert found["places"] == {"blocks": ["cpu"], "trained": ["cuda"]}
        assert plain["places"] == {"blocks": ["cuda"], "trained": ["cuda"]}
        assert not found["passes"]["pageable"], case
        # All blocks but the last in each forward pass, all but the first in each backward pass.
        [copies] = [n for line, n in found["passes"]["to_device"].items() if "host_weights" in line]
        assert copies == found["pieces"] * 2 * (found["blocks"] - 1), case
