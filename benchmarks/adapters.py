"""LoRA versions to measure with."""

from pathlib import Path

import torch

from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.finetuning import FineTuning, add_lora
from ray_jobs.diffusion.objectives import LossSettings
from ray_jobs.weights.loading import load_pipeline
from ray_jobs.weights.saving import save_lora

RANK = 8


def write_adapters(root: Path, count: int, model: str) -> list[str]:
    """Adapters with random weights as publish writes them: one folder each."""
    pipeline = load_pipeline(model)
    family = family_of(pipeline)
    layers = list(family.trainable[family.denoiser])
    add_lora(pipeline.unet, rank=RANK, alpha=RANK, dropout=0.0, target_modules=layers)
    objective = family.schedule.objective(pipeline.scheduler.config)
    tuned = FineTuning(pipeline, family, objective, LossSettings())
    names = [f"adapter-{number}" for number in range(count)]
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        weights = {key: 0.02 * torch.randn(weight.shape) for key, weight in tuned.trained()}
        (root / name).mkdir()
        save_lora(pipeline, tuned, weights, root / name)
    return names
