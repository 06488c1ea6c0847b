"""Preflight: can every GPU node run what a stage is about to reserve its GPUs for?

A short task on each GPU node looks at its driver, PyTorch and GPUs. It reserves nothing, so that it also runs
on a busy cluster.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.capacity import actors_of
from cluster.gpus import memory_fraction
from cluster.nodes import ANSWER_S, Node, on_each
from ray_jobs.config import Config, ConfigError, EvaluateConfig, ServeConfig, TrainConfig
from ray_jobs.console import say
from ray_jobs.console.troubleshooting import Help, help_link

OLDEST_DRIVER = {12: 525, 13: 580}
"""The oldest major version of NVIDIA's driver by that of CUDA (docs.nvidia.com, CUDA Compatibility)."""

BF16 = (8, 0)
"""Compute capability from which GPUs calculate in bf16; older ones emulate it."""

FREE = 0.8
"""Share of a GPU's memory below which something else is using it."""

SEES_ALL = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
"""Environment of a task that sees a node's GPUs although it reserves none."""


@dataclass(frozen=True)
class GPU:
    """A GPU: its model, compute capability, and memory in bytes."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int


@dataclass(frozen=True)
class Equipment:
    """What a node has for calculating on GPUs.

    Attributes:
        driver: version of NVIDIA's driver, as 580.65.06; empty if none answers.
        cuda: version of CUDA that PyTorch is built for; empty for a build without.
        cudnn: number of the version of cuDNN that is loaded, as 92000; 0 for none.
        nccl: version of NCCL; empty without CUDA.
        gpus: the GPUs that PyTorch can use.
        error: why it can use none; empty if it can.
    """

    torch: str
    cuda: str
    nccl: str
    driver: str = ""
    gpus: tuple[GPU, ...] = ()
    error: str = ""
    cudnn: int = 0

    @property
    def gpu_gib(self) -> float | None:
        """Memory of the smallest GPU, in GiB; None if PyTorch can use none."""
        return min((gpu.total for gpu in self.gpus), default=0) / 2**30 or None


def probe() -> Equipment:
    """Return what this node has. It takes GPU memory until the process ends."""
    import torch

    cuda, driver = torch.version.cuda or "", _driver()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda else ""
    try:
        torch.cuda.init()
        # PyTorch refuses a cuDNN older than its own, as LD_LIBRARY_PATH may bring it, only when it is asked.
        cudnn = torch.backends.cudnn.version() or 0
        gpus = tuple(map(_gpu, range(torch.cuda.device_count())))
    except (AssertionError, RuntimeError) as error:
        told = " ".join(str(error).split())[:500]
        return Equipment(torch.__version__, cuda, nccl, driver, error=told or type(error).__name__)
    return Equipment(torch.__version__, cuda, nccl, driver, gpus, cudnn=cudnn)


def _gpu(number: int) -> GPU:
    import torch

    free, total = torch.cuda.mem_get_info(number)
    return GPU(torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number), total, free)


def _driver() -> str:
    from ray._private.thirdparty import pynvml

    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return ""
    return version.decode() if isinstance(version, bytes) else str(version)


def equipment(nodes: Sequence[Node]) -> dict[str, Equipment]:
    """Return what each of the nodes that have GPUs has, by name.

    Raises:
        NoAnswer: a node does not answer.
    """
    on_gpus = [node for node in nodes if node.resources.get("GPU", 0)]
    if not on_gpus:
        return {}
    return on_each(
        on_gpus,
        probe,
        lambda _: (),
        f"use_gpu: no answer within {ANSWER_S} s from {{}}; check whether nvidia-smi answers there",
        max_calls=1,  # its process, and with it CUDA's memory, goes at once
        runtime_env={"env_vars": SEES_ALL},
    )


def check_gpus(config: Config, nodes: Sequence[Node], stage: str) -> None:
    """Look at every GPU node, if the stage uses GPUs, and print what will make it slow.

    Raises:
        NoAnswer: a node does not answer.
        ConfigError: a node cannot run the stage; the message names it, its driver or GPU, and the fix.
    """
    if not any(actor.gpus for actor in actors_of(config, stage)):
        return
    found = equipment(nodes)
    expected = {node.name: int(node.resources["GPU"]) for node in nodes if node.name in found}
    if problems := list(faults(config, stage, found, expected)):
        raise ConfigError(problems[0])
    for line in remarks(found):
        say("cluster", line)


def faults(
    config: Config, stage: str, found: Mapping[str, Equipment], expected: Mapping[str, int]
) -> Iterator[str]:
    """Yield what prevents a stage from running on these nodes, as messages with the fix.

    Args:
        expected: GPUs that Ray counts, by node.
    """
    for name, node in found.items():
        if not node.cuda:
            yield (
                f"use_gpu: PyTorch {node.torch} on {name} is built without CUDA; install the packages of "
                "requirements.lock from PyPI there"
            )
        elif node.error:
            yield f"use_gpu: {name}: {_unusable(node)}"
        elif len(node.gpus) < expected[name]:
            yield (
                f"use_gpu: PyTorch sees {len(node.gpus)} GPUs on {name}, but Ray counts {expected[name]}; "
                "start Ray there with --num-gpus, or repair the missing ones (nvidia-smi)"
            )
        yield from _too_small(config, stage, name, node)
    if len({(node.torch, node.cuda, node.cudnn, node.nccl) for node in found.values()}) > 1:
        versions = "; ".join(
            f"{name}: PyTorch {node.torch}, CUDA {node.cuda}, cuDNN {node.cudnn}, NCCL {node.nccl}"
            for name, node in found.items()
        )
        yield (
            f"use_gpu: the nodes have different packages ({versions}); use one image or lock on all nodes; "
            f"{help_link(Help.VERSIONS)}"
        )


def _unusable(node: Equipment) -> str:
    needed = OLDEST_DRIVER.get(int(node.cuda.partition(".")[0]), 0)
    if node.driver and int(node.driver.partition(".")[0]) < needed:
        return (
            f"its NVIDIA driver {node.driver} is too old for PyTorch's CUDA {node.cuda}; update it to "
            f"{needed} or newer; {help_link(Help.VERSIONS)}"
        )
    driver = f"driver {node.driver}" if node.driver else "no NVIDIA driver answers"
    return f"PyTorch cannot use its GPUs ({driver}): {node.error}; check nvidia-smi in the container"


def _too_small(config: Config, stage: str, name: str, node: Equipment) -> Iterator[str]:
    """Yield what a node's GPUs do not offer and the stage's sections ask for."""
    sections: dict[str, TrainConfig | EvaluateConfig | ServeConfig] = {
        "train": config.train,
        "evaluate": config.evaluate,
        "serve": config.serve,
    }
    precisions = {f"{section}.precision": each.precision for section, each in sections.items()}
    precisions["data.encode_precision"] = config.data.encode_precision
    used = {actor.field.partition(".")[0] for actor in actors_of(config, stage) if actor.gpus}
    for gpu in node.gpus:
        for field, precision in precisions.items():
            if field.partition(".")[0] in used and precision == "bf16" and gpu.capability < BF16:
                capability = ".".join(map(str, gpu.capability))
                other = "fp32" if field.startswith("data") else "fp16 or fp32"
                yield (
                    f"{field}: bf16 needs GPUs of compute capability 8.0 or more (Ampere), but {name} has "
                    f"{gpu.name} ({capability}); use {other}, or newer GPUs"
                )
        for section in [each for each in sections if each in used]:
            try:
                memory_fraction(sections[section].gpu_share, gpu.total)
            except ValueError as error:
                yield f"{section}.{error}"


def remarks(found: Mapping[str, Equipment]) -> Iterator[str]:
    """Yield what does not prevent a run, but makes it slow or fail later."""
    for name, node in found.items():
        for number, gpu in enumerate(node.gpus):
            if gpu.free < FREE * gpu.total:
                yield (
                    f"{name}: GPU {number} ({gpu.name}) has only {gpu.free / 2**30:.1f} of "
                    f"{gpu.total / 2**30:.0f} GiB free: another program uses it"
                )
    models = {name: ", ".join(dict.fromkeys(gpu.name for gpu in node.gpus)) for name, node in found.items()}
    if len(set(models.values())) > 1:
        told = "; ".join(f"{name}: {model}" for name, model in models.items())
        yield f"different GPUs ({told}): a training step takes as long as on the slowest"
