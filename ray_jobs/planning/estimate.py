"""Memory estimate of a training per rank, from the sizes of its module and the configuration.

Memory held between the backward pass and the step follows the ZeRO paper (Rajbhandari et al., arXiv
1910.02054, section 5), as `ray_jobs/training/memory.py` measures it. Activations are those of
`ray_jobs/planning/footprint.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from ray_jobs.config import TrainConfig
from ray_jobs.diffusion.precision import PRECISIONS
from ray_jobs.training import flat
from ray_jobs.training.engine import pieces_a_step
from ray_jobs.training.optimizers import MOST_MOMENTS
from ray_jobs.training.zero import gradient_buckets, sharded_for

LIVE_AT_ONCE = (
    1_000_000_000  # elements that ZeRO-3 may keep gathered (DeepSpeed's stage3_max_live_parameters)
)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by kind.

    Attributes:
        parameters: model parameters, trained and frozen, without encoders and autoencoder.
        gradients: gradients between backward and step.
        master_weights: fp32 weights that the optimizer updates; 0 if it updates the parameters themselves.
        moments: the optimizer's, of the stage that has most.
        averages: exponential moving average, fp32.
        buckets: the engine's gradient buckets, and at stage 3 the parameters gathered at once.
        activations: estimated activations of one micro batch.
    """

    parameters: int
    gradients: int
    master_weights: int
    moments: int
    averages: int
    buckets: int
    activations: int

    @property
    def kept(self) -> int:
        """Bytes counted by `benchmarks/train/zero.py`: parameters, gradients and optimizer states."""
        return self.parameters + self.gradients + self.master_weights + self.moments

    @property
    def whole(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Placement:
    """Memory of a rank by location: on its device, or offloaded to host memory."""

    device: Memory
    offloaded: Memory


def moment_bytes(train: TrainConfig, moments: Mapping[str, float] | None = None) -> float:
    """Return the bytes that the optimizer keeps for each parameter, at most over the stages.

    Args:
        moments: how many numbers some optimizers keep for each, see `Footprint`; None: the most.
    """
    counts: Mapping[str, float] = MOST_MOMENTS | dict(moments or {})
    return 4 * max(counts[name] for name in train.optimizers)


def effective_stage(train: TrainConfig, workers: int) -> int:
    """Return the ZeRO stage that the engine uses."""
    return flat.stage_of(train, workers) if train.flat else sharded_for(train, workers).zero_stage


def rank_memory(
    train: TrainConfig,
    *,
    whole: int,
    trained: int,
    workers: int,
    activations: int = 0,
    together: int = 1,
    quantized: int = 0,
    quantized_bytes: int = 0,
    blocks: int = 0,
    two_blocks: int = 0,
    moments: Mapping[str, float] | None = None,
) -> Placement:
    """Estimate the memory of one rank.

    Args:
        whole: number of parameters of the model that the engine wraps, including adapters.
        trained: number of trained parameters.
        activations: bytes of activations of a micro batch.
        together: trainings that these sizes are of: in one pass, whose end all gradients wait for.
        quantized, quantized_bytes: how many of `whole` are stored quantized, and in how many bytes.
        blocks, two_blocks: bytes of the frozen weights of all blocks and of the two largest.
        moments: see `moment_bytes`.
    """
    found = _unrounded_memory(train, whole - quantized, trained, workers, activations, together, moments)
    here, there = found.device.parameters + quantized_bytes, found.offloaded.parameters
    if train.offload_base:
        here, there = here - blocks + two_blocks, blocks
    return Placement(replace(found.device, parameters=here), replace(found.offloaded, parameters=there))


def _unrounded_memory(
    train: TrainConfig,
    whole: int,
    trained: int,
    workers: int,
    activations: int,
    together: int,
    moments: Mapping[str, float] | None,
) -> Placement:
    """Return the memory of a rank whose weights are all in `train.precision` and placed by its engine."""
    if train.flat:
        flat_memory = _flat_memory(train, whole, trained, workers, activations, together, moments)
        return Placement(flat_memory, Memory(*[0] * 7))
    stage, element = effective_stage(train, workers), PRECISIONS[train.precision].itemsize
    zero = train.deepspeed.get("zero_optimization", {})
    share = -(-trained // workers)  # of a sharded state
    # Stage 1 shards gradients after the backward pass, but accumulates several micro batches unsharded.
    sharded_gradients = stage >= 2 or (stage == 1 and pieces_a_step(train, workers) == 1)
    parameters = element * (whole if stage < 3 else -(-whole // workers))
    # Gradients of several micro batches are accumulated in fp32.
    of_gradient = element if pieces_a_step(train, workers) == 1 else 4
    num_buckets, bucket = gradient_buckets(train, workers, trained)
    gradients = of_gradient * (share if sharded_gradients else trained)
    masters = 4 * share if stage else 0
    kept = round(moment_bytes(train) * (share if stage else trained))
    buckets = (of_gradient if stage == 1 else element) * num_buckets * bucket if stage else 0
    if stage == 3:
        buckets += element * min(int(zero.get("stage3_max_live_parameters", LIVE_AT_ONCE)), whole)
    state = {"parameters": parameters, "gradients": gradients, "master_weights": masters}
    state |= {"moments": kept, "averages": 4 * share if train.ema_decay else 0}
    away = {"parameters"} if train.offload_parameters else set()
    if train.offload_optimizer:
        away |= {"gradients", "master_weights", "moments", "averages"}
    none = dict.fromkeys(state, 0) | {"buckets": 0, "activations": 0}
    here = {name: size for name, size in state.items() if name not in away}
    there = {name: size for name, size in state.items() if name in away}
    return Placement(
        Memory(**none | here | {"buckets": buckets, "activations": activations}), Memory(**none | there)
    )


def host_memory(
    train: TrainConfig,
    *,
    base: int,
    trained: int,
    workers: int,
    quantized: int = 0,
    quantized_bytes: int = 0,
    blocks: int = 0,
    moments: Mapping[str, float] | None = None,
) -> int:
    """Estimate the host memory of the first rank, which exports, without its device's and what is offloaded.

    The base is read, and what is trained of its layers is copied; a checkpoint then holds weights, moments
    and averages.

    Args:
        base: parameters of the base model, without adapters.
        quantized, quantized_bytes: how many of these are rounded while they are read, and to how many bytes.
            Their files are mapped, and no longer once they are read.
        blocks: bytes of the frozen weights of all blocks, which stay where they are read with `offload_base`.
        moments: see `moment_bytes`.
    """
    element = PRECISIONS[train.precision].itemsize if train.method == "lora" else 4
    copied = {"lora": 0, "full": 4 * base, "controlnet": 4 * trained}[train.method]
    a_weight = moment_bytes(train, moments) + (8 if train.ema_decay else 4)
    checkpoint = round(a_weight * -(-trained // workers))
    read = element * (base - quantized) + quantized_bytes - (blocks if train.offload_base else 0)
    return copied + max(read, checkpoint)


def _flat_memory(
    train: TrainConfig,
    whole: int,
    trained: int,
    workers: int,
    activations: int,
    together: int,
    moments: Mapping[str, float] | None,
) -> Memory:
    """Return the memory of a rank under the flat engine (`ray_jobs/training/flat.py`)."""
    stage, element = effective_stage(train, workers), PRECISIONS[train.precision].itemsize
    share = -(-trained // workers)
    updated = share if stage else trained
    summed = flat.summed_in(train, workers).itemsize
    chunk = min(trained, flat.CHUNK)
    waiting = trained if together > 1 else chunk  # autograd's own gradients, until they are packed
    buckets = element * waiting
    buckets += summed * {0: 0, 1: share, 2: chunk}[stage]  # what is on its way between ranks
    buckets += 4 * updated if summed < 4 else 0  # the fp32 gradient that the optimizer takes
    return Memory(
        parameters=element * whole,
        gradients=summed * (share if stage == 2 else trained),
        master_weights=4 * updated if element < 4 else 0,
        moments=round(moment_bytes(train, moments) * updated),
        averages=4 * share if train.ema_decay else 0,
        buckets=buckets,
        activations=activations,
    )
