"""The DeepSpeed engine of a training worker: its configuration, construction and per-step settings."""

import sys
from collections.abc import Mapping
from typing import Any

import torch

from ray_jobs.config import TrainConfig
from ray_jobs.data.feeding.order import rows_of_rank
from ray_jobs.diffusion.finetuning import FineTuning
from ray_jobs.training.phases import Stage
from ray_jobs.training.state import restart_adam

# DeepSpeed options that `train` has fields for. Set in both places, one of the two would be ignored.
MODELLED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "bf16": "train.precision",
    "bfloat16": "train.precision",  # an older name of bf16
    "fp16": "train.precision",
    "zero_optimization.stage": "train.zero_stage",
    "zero_optimization.offload_optimizer": "train.offload_optimizer",
    "zero_optimization.offload_param": "train.offload_parameters",
    # Older names of the same options.
    "zero_optimization.cpu_offload": "train.offload_optimizer",
    "zero_optimization.cpu_offload_param": "train.offload_parameters",
}

REDUCED_AT_ONCE = 500_000_000  # gradient elements; DeepSpeed's own default


def sharded_for(config: TrainConfig, world_size: int) -> TrainConfig:
    """Return `config` with ZeRO turned off where it would only cost copies: for a single worker.

    ZeRO stays on for adapters, whose many small tensors are clipped faster in its flat buffer; for bf16 and
    fp16, whose fp32 master weights it keeps; and where the user asks for what only ZeRO offers.
    """
    offloads = config.offload_optimizer or config.offload_parameters
    needed = config.method != "full" or config.precision != "fp32" or offloads or config.deepspeed
    return config if world_size > 1 or needed else config.model_copy(update={"zero_stage": 0})


def pieces_a_step(config: TrainConfig, world_size: int) -> int:
    """Return the number of pieces (micro-batches) into which every rank splits its rows of a step."""
    most = len(rows_of_rank(config.batch_size, world_size, 0))
    return -(-most // (config.micro_batch_size or most))


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`, with `train.deepspeed` merged in.

    Raises:
        ValueError: `train.deepspeed` sets an option that `train` has a field for.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    pieces = pieces_a_step(config, world_size)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": -(-len(rows_of_rank(config.batch_size, world_size, 0)) // pieces),
        "gradient_accumulation_steps": pieces,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
        "steps_per_print": 2**31,
        # A plain torch optimizer, so that CPU and GPU run the same arithmetic.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's optimizer for offloading must be compiled first
    }
    if pieces > 1 and config.precision != "fp32":
        # DeepSpeed 0.19.8 sums the gradients of several pieces in the model's precision: in bf16, 512 times
        # 1/512 is then 0.5.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        if config.zero_stage == 1:
            settings["communication_data_type"] = "fp32"  # for the sums; stages 2 and 3 send each piece
    return _merged(settings, config.deepspeed, "")


def _merged(settings: dict[str, Any], raw: Mapping[str, Any], path: str) -> dict[str, Any]:
    merged = dict(settings)
    for key, value in raw.items():
        name = f"{path}{key}"
        if name in MODELLED:
            raise ValueError(f"train.deepspeed: {name}: set {MODELLED[name]} instead")
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value, f"{name}.") if both else value
    return merged


def parameter_groups(model: FineTuning) -> list[dict[str, Any]]:
    """Return the optimizer's groups: per group of layers, parameters with weight decay and those without.

    Biases and norms are not decayed.
    """
    found = []
    for layers, members in model.layer_groups.items():
        for decays in (True, False):
            parameters = [p for p in members.values() if (p.ndim > 1) == decays]
            if parameters:
                found.append({"params": parameters, "layers": layers, "decays": decays})
    return found


def build_optimizer(model: FineTuning, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov & Hutter, arXiv 1711.05101) over the trained parameters."""
    groups = parameter_groups(model)
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.epsilon}
    # In host memory the fused form reads and writes each state once instead of about ten times.
    return torch.optim.AdamW(groups, **settings, fused=config.offload_optimizer or None)


def import_deepspeed() -> Any:
    """Import DeepSpeed without two things that training does not need and that every worker would wait for.

    Its autotuner imports MLflow if installed, which takes longer than all the rest of DeepSpeed. On a CPU it
    first compiles an all-reduce for inference: that needs a compiler, and a worker that dies meanwhile
    leaves behind a lock that all later workers would wait for forever.
    """
    hide = "mlflow" not in sys.modules
    if hide:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # makes importing it an ImportError
    try:
        import deepspeed
    finally:
        if hide:
            del sys.modules["mlflow"]
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def build_engine(model: FineTuning, config: TrainConfig, world_size: int) -> Any:
    """Wrap `model` in a DeepSpeedEngine over the trained parameters, using Ray Train's process group."""
    settings = deepspeed_config(config, world_size)
    # ZeRO allocates a whole bucket for gradients at every step, however few there are.
    num_trained = sum(parameter.numel() for _, parameter in model.all_trained)
    settings["zero_optimization"].setdefault("reduce_bucket_size", min(REDUCED_AT_ONCE, num_trained))
    engine, *_ = import_deepspeed().initialize(
        model=model,
        optimizer=build_optimizer(model, config),
        config=settings,
        dist_init_required=False,
    )
    if engine.zero_optimization_stage() == 0:
        _keep_gradient_norm(engine)
    return engine


def _keep_gradient_norm(engine: Any) -> None:
    """Make `get_global_grad_norm` return the norm before clipping without ZeRO too.

    There, DeepSpeed 0.19.8 does not keep the norm that it clips by, and returns None.
    """
    from deepspeed.runtime.utils import clip_grad_norm_

    def clip() -> None:
        engine._global_grad_norm = clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())

    engine.clip_fp32_gradients = clip


def set_hyperparameters(engine: Any, stage: Stage, step: int) -> None:
    """Set the optimizer's learning rates, weight decay, betas and epsilon for a step.

    Frozen layers stay in the optimizer with a learning rate of 0, so that ZeRO's partitions do not change.
    """
    rate = stage.rate(step)
    for group in engine.optimizer.param_groups:
        active = stage.trains(group["layers"])
        group["lr"] = rate if active else 0.0
        group["weight_decay"] = stage.weight_decay if active and group["decays"] else 0.0
        group["betas"], group["eps"] = stage.betas, stage.epsilon


def enter_stage(engine: Any, stage: Stage, before: Stage | None) -> None:
    """Enable gradients for the layers of a stage and disable them for all others.

    Args:
        before: the stage that has just ended, or None in the middle of a stage. Adam's state is reset for
            layers that `before` did not train.
    """
    for layers, members in engine.module.layer_groups.items():
        if before and stage.trains(layers) and not before.trains(layers):
            restart_adam(engine, members)
        for parameter in members.values():
            parameter.requires_grad_(stage.trains(layers))
