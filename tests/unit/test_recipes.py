"""The recipes of `configs/`: each is read, and fits the machines that its first lines name.

The base models are there in their published sizes, without weights.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from cluster.shape import parse_nodes
from ray_jobs.config import load_config
from ray_jobs.planning.plan import plan
from tests import full_models

pytestmark = pytest.mark.slow  # every test builds a model

CONFIGS = Path(__file__).parents[2] / "configs"
BASES: dict[str, tuple[Callable[[Path], Path], int]] = {
    "sd15-lora": (full_models.stable_diffusion, 859_520_964),
    "controlnet": (full_models.stable_diffusion, 1_220_800_084),  # with the ControlNet
    "sdxl-lora": (full_models.stable_diffusion_xl, 2_567_463_684),
    "sdxl-dreambooth": (full_models.stable_diffusion_xl, 3_385_184_004),  # with its text encoders
    "sd3-full": (full_models.stable_diffusion_3, 2_028_328_000),
    "flux-lora": (full_models.flux, 11_901_408_320),
    "kontext-lora": (partial(full_models.flux, pipeline="FluxKontextPipeline"), 11_901_408_320),
}


@pytest.mark.parametrize("recipe", BASES)
def test_a_recipe_fits_the_machines_that_it_names(recipe: str, tmp_path: Path) -> None:
    build, parameters = BASES[recipe]
    path = CONFIGS / f"{recipe}.yaml"
    named = re.search(r"--config configs/([\w-]+)\.yaml --nodes (\S+)", path.read_text(encoding="utf-8"))
    assert named and named[1] == recipe
    config = load_config(path, [f"model.base={build(tmp_path)}", f"storage={tmp_path}"])
    page, fits = plan(config, parse_nodes(named[2]), None)
    assert fits, page
    [(whole, trained)] = re.findall(r"^model: ([\d,]+) parameters, ([\d,]+) trained", page, re.MULTILINE)
    adapters = number(trained) if config.train.method == "lora" else 0
    assert number(whole) - adapters == parameters
    [needed] = re.findall(r"^    in all +([\d.]+) GiB", page, re.MULTILINE)
    assert float(needed) > 6, "a recipe for a small GPU names one"


def number(text: str) -> int:
    return int(text.replace(",", ""))
