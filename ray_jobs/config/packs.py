"""Which trials of a search can be trained together, as adapters of one base."""

from typing import Any

from ray_jobs.config.data import DataConfig
from ray_jobs.config.search import LEARNING_RATE, SearchConfig
from ray_jobs.config.space import ends
from ray_jobs.config.train import ModelConfig, TrainConfig

PACKABLE = (
    *(LEARNING_RATE, "train.schedule", "train.warmup_steps", "train.schedule_cycles"),
    *("train.schedule_power", "train.schedule_end", "train.decay_share", "train.stages", "train.trainable"),
    *("train.optimizer", "train.weight_decay", "train.betas", "train.epsilon", "train.momentum"),
    "train.max_grad_norm",
    *("train.caption_dropout", "train.ema_decay", "train.loss", "train.lora"),
)
"""Settings, and sections, in which trials of a pack may differ: their rows and their base stay the same."""

MOST = 8  # trials that `search.pack: auto` trains together
MOST_PROPOSED = 4  # with Optuna, which learns from the trials that have ended before it proposes others
LAYERS = ("train.lora.target_modules", "train.lora")  # settings that decide which layers have adapters


def is_packable(setting: str) -> bool:
    """Return whether trials of a pack may differ in a setting of the space."""
    return any(setting == name or setting.startswith(f"{name}.") for name in PACKABLE)


def folds_together(data: DataConfig, search: SearchConfig) -> int:
    """Return how many folds of a trial can be trained together.

    Their rows differ, so their pictures must have one shape.
    """
    return 1 if data.buckets else max(1, search.folds)


def unpackable(model: ModelConfig, train: TrainConfig, search: SearchConfig, folds: int) -> str:
    """Return why no trials can be trained together; empty if they can.

    Args:
        folds: of `folds_together`.
    """
    differing = [name for name in search.dimensions if not is_packable(name)]
    sections = [each for each in ends(search.space.get("train.lora", [])) if isinstance(each, dict)]
    kinds = {train.lora.kind, *ends(search.space.get("train.lora.kind", []))}
    kinds |= {each["kind"] for each in sections if "kind" in each}
    draws = train.lora.dropout or "train.lora.dropout" in search.space or any(map(_draws, sections))
    reasons = {
        f"train.method: {train.method} trains whole layers": train.method != "lora",
        "train.lora.kind: only lora is trained several at a time": kinds != {"lora"},
        f"trials differ in {', '.join(differing)}, which is not of their adapters": bool(differing),
        "trials whose adapters are in different layers draw other numbers for train.lora.dropout": draws
        and any(name in LAYERS for name in search.space),
        "train.preference: a training switches between its adapter and the reference": train.preference
        is not None,
        "train.engine: DeepSpeed takes the steps": not train.flat,
        "train.compile would compile each number of trials anew": train.compile,
        "model.assistant is added to one adapter": bool(model.assistant),
        "search.scheduler: population continues trials from each other": search.scheduler == "population",
        "the search has one trial": search.grid_size * folds < 2,
        f"search.max_concurrent_trials: {search.max_concurrent_trials} asks for workers of each trial's "
        "own": search.max_concurrent_trials > 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _draws(section: dict[str, Any]) -> bool:
    return bool(section.get("dropout"))


def pack_size(model: ModelConfig, train: TrainConfig, search: SearchConfig, folds: int) -> int:
    """Return the most trials of a search that are trained together; 1: each by itself.

    Args:
        folds: of `folds_together`; each fold of a trial counts as one.
    """
    if search.pack == "off" or unpackable(model, train, search, folds):
        return 1
    most = MOST_PROPOSED if search.algorithm == "optuna" else MOST
    return min(most if search.pack == "auto" else search.pack, search.grid_size * folds)
