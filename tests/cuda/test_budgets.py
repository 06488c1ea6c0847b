"""Training and serving on a pretended GPU (`pretend`): devices and dtypes fit, and a step costs what it may.

A kernel launch takes some microseconds of the host, a wait for the device makes it run dry: their number
decides the speed of small batches, and it is the same on a real GPU.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import FAMILY_MODELS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which compiles the pretended device"),
]

ROOT = Path(__file__).parents[2]
OPTIMIZER = 40  # launches of an optimizer step, whatever the number of layers
AVERAGES = 4  # of the moving average
# diffusers 0.42.1 makes a constant on the CPU in each call of Chroma (transformer_chroma.py, guidance_proj).
COPIES_OF_DIFFUSERS = {"ChromaPipeline": 1}


def run(program: str, folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Run a program of this folder in a process of its own; return what it tells, by family and case."""
    command = [sys.executable, "-m", "tests.cuda", program, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(each["family"], each["case"]): each for each in told}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pretended")


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return run("training", folder)


@pytest.fixture(scope="module")
def served(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return run("serving", folder)


def of_family(found: dict[tuple[str, str], dict[str, Any]], family: str) -> dict[str, dict[str, Any]]:
    """Return the cases of a family; none of them may have failed."""
    cases = {case: each for (name, case), each in found.items() if name == family}
    assert cases
    for case, each in cases.items():
        assert "error" not in each, f"{case}: {each['error']}"
    return cases


@pytest.mark.parametrize("family", FAMILY_MODELS)
def test_a_training_step_never_waits_and_its_rows_come_in_one_copy(
    family: str, trained: dict[tuple[str, str], dict[str, Any]]
) -> None:
    of_diffusers = COPIES_OF_DIFFUSERS.get(family, 0)
    for case, found in of_family(trained, family).items():
        pieces = found["pieces"]
        for part in ("send", "passes", "update", "average", "meter"):
            assert not found[part]["waits"], (case, part)
        assert sum(found["send"]["to_device"].values()) == pieces, case
        assert not found["send"]["pageable"], case
        assert sum(found["passes"]["to_device"].values()) == of_diffusers * pieces, case
        for part in ("update", "average", "meter"):
            assert not found[part]["to_device"], (case, part)


@pytest.mark.parametrize("family", FAMILY_MODELS)
def test_an_optimizer_step_launches_few_kernels_whatever_the_number_of_layers(
    family: str, trained: dict[tuple[str, str], dict[str, Any]]
) -> None:
    for case, found in of_family(trained, family).items():
        assert found["update"]["launches"] <= OPTIMIZER, case
        assert found["average"]["launches"] <= AVERAGES, case


@pytest.mark.parametrize("family", FAMILY_MODELS)
def test_a_denoising_step_never_waits_and_copies_its_coefficients_once(
    family: str, served: dict[tuple[str, str], dict[str, Any]]
) -> None:
    of_diffusers = COPIES_OF_DIFFUSERS.get(family, 0)
    for case, found in of_family(served, family).items():
        if case == "sampling" or "offloaded" in case:
            continue  # what is offloaded is copied in each step
        plain = [step for step in found["steps"] if not step["waits"]]
        assert plain, case
        fewest = min(sum(step["to_device"].values()) for step in plain)
        # Cached features divide the rows anew at each step.
        assert fewest <= (4 if case == "cached features" else 1) + of_diffusers, case


@pytest.mark.parametrize("family", FAMILY_MODELS)
def test_an_evaluator_draws_on_the_device(family: str, served: dict[tuple[str, str], dict[str, Any]]) -> None:
    waits = of_family(served, family)["sampling"]["waits"]
    assert sum(waits.values()) <= 7 * 2, waits  # of two batches, before and after their steps
