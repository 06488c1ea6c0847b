"""What a step may cost on the pretended GPU, and the programs that tell what it costs.

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

marks = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which compiles the pretended device"),
]

ROOT = Path(__file__).parents[2]
OPTIMIZER = 40  # launches of an optimizer step, whatever the number of layers
AVERAGES = 4  # of the moving average
BATCH_CHANGE = 20  # of other rows with other adapters, in the serving engine
ON_HOST = "base on the host, "  # how the names of cases begin that are those without it, with `offload_base`
PLAIN = {
    "StableDiffusionPipeline",
    "FluxPipeline",
}  # families that also take steps of further cases, packs too
# What diffusers 0.42.1 copies to the device in each call of a transformer: Chroma's constant for guidance,
# Qwen-Image's and Lumina 2's tables of rotary positions, HiDream's number of patches. Qwen-Image-Edit is told
# which tokens are of references, too.
COPIES_OF_DIFFUSERS = {
    "ChromaPipeline": 1,
    "HiDreamImagePipeline": 1,
    "QwenImagePipeline": 1,
    "QwenImageEditPlusPipeline": 2,
    "Lumina2Pipeline": 3,
}
# Lumina 2 in diffusers asks the mask for the captions' lengths. Each of HiDream's four blocks counts the
# tokens of its experts, also when it is recomputed.
WAITS_OF_DIFFUSERS = {"Lumina2Pipeline": 1, "HiDreamImagePipeline": 4}
RECOMPUTED_WAITS = {"HiDreamImagePipeline": 4}

Told = dict[tuple[str, str], dict[str, Any]]
"""What a program tells, by family and case."""


def run(program: str, folder: Path) -> Told:
    """Run a program of this folder in a process of its own; return what it tells, by family and case."""
    command = [sys.executable, "-m", "tests.cuda", program, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(each["family"], each["case"]): each for each in told}


def of_family(found: Told, family: str) -> dict[str, dict[str, Any]]:
    """Return the cases of a family; none of them may have failed."""
    cases = {case: each for (name, case), each in found.items() if name == family}
    assert cases
    for case, each in cases.items():
        assert "error" not in each, f"{case}: {each['error']}"
    return cases
