"""Write docs/memory.md: what `cluster.plan` says of published models' memory on a GPU.

python -m scripts.memory_page
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ray_jobs.config import Config
from ray_jobs.console import GIB
from ray_jobs.planning.memory import HEADROOM, Model
from tests import full_models

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
CARDS = (24, 48, 80)  # GiB
MODELS: dict[str, Callable[[Path], Path]] = {
    "Stable Diffusion 1.5": full_models.stable_diffusion,
    "Stable Diffusion XL": full_models.stable_diffusion_xl,
    "Stable Diffusion 3 Medium": full_models.stable_diffusion_3,
    "FLUX.1-dev": full_models.flux,
    **{name: partial(full_models.published, name) for name in full_models.PUBLISHED},
}
LORA: dict[str, Any] = {"train": {"method": "lora", "lora": {"rank": 16, "alpha": 16}}}
RECOMPUTED = {"gradient_checkpointing": True}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": LORA,
    "LoRA, recomputed": {"train": LORA["train"] | RECOMPUTED},
    "LoRA on nf4, recomputed": {"train": LORA["train"] | RECOMPUTED, "model": {"quantize": "nf4"}},
    "full, recomputed": {"train": {"method": "full"} | RECOMPUTED},
}
INTRODUCTION = f"""\
# Memory of a training

What a training needs on one GPU, in GiB, and the smallest of cards of {", ".join(map(str, CARDS))} GiB
that holds it: one picture of 1024 x 1024 pixels at a time (Stable Diffusion 1.5: 512 x 512), bf16, one
worker, averages kept. LoRA has rank 16 and the family's default layers; "recomputed" is
`train.gradient_checkpointing`, and nf4 is `model.quantize`. Encoders are not on the GPU meanwhile.

`python -m scripts.memory_page` writes this page from what `cluster.plan` computes; a plan of your own
configuration tells more. The figures are planned, not measured on GPUs, and a tenth of a card is left for
what the plan cannot know. Where no card holds a training, workers with `train.zero_stage: 3` divide it.

"""


def page() -> str:
    """Return the page."""
    lines = ["| model | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    return INTRODUCTION + "\n".join([*lines, *(row(name) for name in MODELS), ""])


def row(name: str) -> str:
    """Return a model's row of the table."""
    side = 512 if name == "Stable Diffusion 1.5" else 1024
    with TemporaryDirectory() as folder:
        cells = [cell(gib) for gib in needed(MODELS[name](Path(folder) / "base"), side)]
    return f"| {name} | " + " | ".join(cells) + " |"


def needed(base: Path, side: int) -> Iterator[float]:
    """Yield the GiB of each of `METHODS`."""
    for method in METHODS.values():
        settings = {"use_gpu": True, "num_workers": 1, "batch_size": 1, **method["train"]}
        config = Config.model_validate(
            {
                "name": "planned",
                "data": {"source": "pictures", "resolution": side},
                "model": {"base": str(base), **method.get("model", {})},
                "search": {"learning_rates": [1e-4], "ladder": [1]},
                "train": settings,
            }
        )
        yield Model(config).memory(config.train).device.whole / GIB


def cell(gib: float) -> str:
    """Return the figure and the smallest card that holds it."""
    card = next((card for card in CARDS if gib <= HEADROOM * card), None)
    return f"{gib:.1f} ({card})" if card else f"{gib:.1f}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
