"""The DeepSpeed engine of a training worker."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ray_jobs.config import TrainConfig
from ray_jobs.diffusion.finetuning import FineTuning


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """What `deepspeed.initialize` takes as its configuration."""
    return {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 2**31,
        # Ours is a plain torch optimizer, so that CPU and GPU run the same arithmetic.
        "zero_allow_untested_optimizer": True,
    }


def learning_rate_factor(config: TrainConfig, step: int, total_steps: int) -> float:
    """What the learning rate is multiplied with at optimizer step `step` (from 0).

    A linear warm-up, then constant, or half a cosine down to 0.
    """
    import math

    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "constant":
        return warmup
    return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))


def build_engine(model: FineTuning, config: TrainConfig, total_steps: int) -> Any:
    """Wrap `model` in a DeepSpeedEngine with AdamW over its trained parameters.

    The process group is Ray Train's, set up before.
    """
    import deepspeed

    optimizer = torch.optim.AdamW(
        [parameter for _, parameter in model.trained()],
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(config, step, total_steps)
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=deepspeed_config(config),
        dist_init_required=False,
    )
    return engine


def gathered(parameters: Iterable[torch.Tensor], zero_stage: int) -> AbstractContextManager[None]:
    """Within it, every rank sees whole parameters: ZeRO stage 3 shards them, the others don't."""
    if zero_stage < 3:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))
