"""DeepSpeed's ZeRO (Rajbhandari et al., arXiv 1910.02054): sharded parameters, offloading, fp16."""

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch

from ray_jobs.config import TrainConfig
from ray_jobs.data.feeding.order import rows_of_rank
from ray_jobs.diffusion.finetuning import FineTuning
from ray_jobs.diffusion.precision import PRECISIONS, kept_in_float32
from ray_jobs.training.engine import Engine, parameter_groups, pieces_a_step
from ray_jobs.training.fragments import Fragment
from ray_jobs.training.optimizers import build_optimizer

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
OVERLAPPED_AT_ONCE = 50_000_000  # a bucket as large as the model would leave nothing to overlap with


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
    if config.use_gpu and world_size > 1:
        zero["overlap_comm"] = True
    pieces = pieces_a_step(config, world_size)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": -(-len(rows_of_rank(config.batch_size, world_size, 0)) // pieces),
        "gradient_accumulation_steps": pieces,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": zero,
        # The norm of the whole gradient tells as much, and looking at each one waits for the GPU.
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": False},
        "fp16": {"enabled": config.precision == "fp16"},
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice a step
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


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for a device, without two things that training does not need.

    It would choose the GPU wherever there is one, also for a training on the CPU. Its autotuner imports
    MLflow if installed, which takes longer than all the rest of DeepSpeed. On a CPU it first compiles an
    all-reduce for inference: that needs a compiler, and a worker that dies meanwhile leaves behind a lock
    that all later workers would wait for forever.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    hide = "mlflow" not in sys.modules
    if hide:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # makes importing it an ImportError
    try:
        import deepspeed
    finally:
        if hide:
            del sys.modules["mlflow"]
    if device.type == "cpu":
        # Elsewhere, a look at this table would try every one of DeepSpeed's kernels.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def sharded_for(config: TrainConfig, world_size: int) -> TrainConfig:
    """Return `config` with ZeRO turned off where it would only cost copies: for a single worker.

    ZeRO stays on for adapters, whose many small tensors are clipped faster in its flat buffer; for bf16 and
    fp16, whose fp32 master weights it keeps; and where the user asks for what only ZeRO offers.
    """
    offloads = config.offload_optimizer or config.offload_parameters
    needed = config.method != "full" or config.precision != "fp32" or offloads or config.deepspeed
    return config if world_size > 1 or needed else config.model_copy(update={"zero_stage": 0})


def gradient_buckets(config: TrainConfig, world_size: int, num_trained: int) -> tuple[int, int]:
    """Return how many buckets of gradients a rank has, and the elements of each.

    ZeRO allocates whole ones at every step, however few gradients there are; two where it sends one of them
    while the other is filled (at stage 3 it has one all the same).

    A bucket as large as the trained weights took 0.86 of the time of DeepSpeed's own size: full training of
    `models/emoji-base`, one rank, stage 2, 2 pictures per step, median of 8 paired turns, busy machine.
    """
    zero = deepspeed_config(config, world_size)["zero_optimization"]
    overlaps = bool(zero.get("overlap_comm"))
    most = OVERLAPPED_AT_ONCE if overlaps else REDUCED_AT_ONCE
    count = 2 if overlaps and config.zero_stage < 3 else 1
    return count, int(zero.get("reduce_bucket_size", min(most, num_trained)))


class ZeRO(Engine):
    """DeepSpeed's engine, over Ray Train's process group.

    Attributes:
        engine: the DeepSpeedEngine.
        stage: its ZeRO stage.
    """

    def __init__(self, model: FineTuning, config: TrainConfig, world_size: int, device: torch.device) -> None:
        config = sharded_for(config, world_size)
        settings = deepspeed_config(config, world_size)
        num_trained = sum(parameter.numel() for _, parameter in model.all_trained)
        _, bucket = gradient_buckets(config, world_size, num_trained)
        zero = settings["zero_optimization"]
        zero["reduce_bucket_size"] = bucket
        # In host memory the fused form reads and writes each state once instead of about ten times.
        self.optimizer_name, fused = config.optimizers[0], config.offload_optimizer or None
        optimizer = build_optimizer(self.optimizer_name, parameter_groups(model), config, fused=fused)
        float32 = kept_in_float32(model)  # DeepSpeed casts each parameter
        deepspeed = import_deepspeed(device)
        if zero["stage"] == 3:
            divide_weights(deepspeed, model, settings, PRECISIONS[config.precision], device)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.stage: int = self.engine.zero_optimization_stage()
        if self.stage < 3:  # which divides the weights, all in one precision
            for parameter, values in float32.items():
                parameter.data = values.to(parameter.device)
        if self.stage == 0:
            _keep_gradient_norm(self.engine)
        self.module, self.device = self.engine.module, self.engine.device
        self.rank, self.world_size = self.engine.global_rank, world_size
        self.pieces = pieces_a_step(config, world_size)
        self.optimizer = self.engine.basic_optimizer

    def accumulate(self, inputs: dict[str, Any], weights: torch.Tensor, *, last: bool) -> torch.Tensor:
        loss = (self.engine(**inputs) * weights).sum()
        # DeepSpeed divides by the number of pieces and ranks, but the weights are of the whole batch.
        self.engine.backward(loss * self.pieces * self.world_size)
        if not last:
            self.engine.step()  # only counts the piece
        return loss.detach()

    def update(self, told: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.engine.step()
        self.skipped = self.engine.skipped_steps
        if self.world_size > 1:
            torch.distributed.all_reduce(told)
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)
        return told, norm.to(self.device)

    @property
    def held(self) -> list[Fragment]:
        """Whole parameters under stage 0, else this rank's own parts."""
        pieces = (self._fragment(name, parameter) for name, parameter in self.module.all_trained)
        return [piece for piece in pieces if piece is not None]

    @property
    def owned(self) -> list[Fragment]:
        if self.stage > 0:
            return self.held
        return [part for piece in self.held if (part := piece.share(self.rank, self.world_size))]

    def _fragment(self, name: str, parameter: Any) -> Fragment | None:
        optimizer = self.engine.optimizer
        if self.stage == 0:
            return Fragment(name, 0, parameter, 0, parameter.numel())
        if self.stage == 3:
            group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = self.rank * parameter.partition_numel()
            numel = min(length, parameter.ds_numel - start)  # the last rank's part is padded
            owner = optimizer.fp32_partitioned_groups_flat[group]
            return Fragment(name, start, owner, offset, numel) if numel > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        [owner] = optimizer.param_groups[mapping.param_group_index]["params"]
        address = mapping.get_hp_fragment_address()
        return Fragment(name, mapping.lp_fragment_address.start, owner, address.start, address.numel)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of whole gradients under stages 0 and 1, of this rank's part under 2 and 3."""
        size: int = self.engine.get_data_types()[1].itemsize
        if self.stage < 2:
            return sum(parameter.numel() for _, parameter in self.module.all_trained) * size
        return sum(piece.numel for piece in self.held) * size


def divide_weights(
    deepspeed: Any, model: torch.nn.Module, settings: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    """Divide a model's weights over the ranks, one parameter at a time.

    No device ever holds them all: `deepspeed.initialize` would move the whole model there first.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def _keep_gradient_norm(engine: Any) -> None:
    """Make `get_global_grad_norm` return the norm before clipping without ZeRO too.

    There, DeepSpeed 0.19.8 does not keep the norm that it clips by, and returns None.
    """
    from deepspeed.runtime.utils import clip_grad_norm_

    def clip() -> None:
        engine._global_grad_norm = clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())

    engine.clip_fp32_gradients = clip
