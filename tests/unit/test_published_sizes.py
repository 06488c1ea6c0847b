"""Plans and LoRA layers of models in their published sizes, on the meta device."""

from pathlib import Path

import pytest

from ray_jobs.config import Config
from ray_jobs.diffusion.families import FAMILIES
from ray_jobs.planning.footprint import footprint
from ray_jobs.training.setup import empty_finetuning
from tests.full_models import PUBLISHED, published

pytestmark = pytest.mark.slow  # each model has thousands of modules


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_planned_with_the_lora_layers_of_its_family(name: str, tmp_path: Path) -> None:
    found, base = PUBLISHED[name], published(name, tmp_path / "base")
    config = Config.model_validate(
        {
            "name": "planned",
            "data": {"source": "pictures", "resolution": 1024},
            "model": {"base": str(base)},
            "search": {"learning_rates": [1e-3], "ladder": [2]},
            "train": {
                "method": "lora",
                "lora": {"rank": 16, "alpha": 16},
                "precision": "bf16",
                "gradient_checkpointing": True,
            },
        }
    )
    model = empty_finetuning(config)
    adapted = {name.partition(".lora_")[0] for name, _ in model.trained()}
    assert len(adapted) == found.lora_layers
    ends = FAMILIES[found.pipeline].trainable["transformer"]
    assert all(any(layer.endswith(end) for layer in adapted) for end in ends if "blocks." not in end)
    planned = footprint(config)
    assert planned.base / 1e9 == pytest.approx(found.billions, rel=0.005)
    assert planned.trained == sum(p.numel() for _, p in model.trained())
    # More than the latents of 1024 x 1024 pixels, less than would fit without checkpoints.
    assert 1e6 < planned.activations < 80e9
