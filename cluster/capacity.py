"""Resources that a run needs and a machine offers, and the check that a cluster suffices for a run."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from ray_jobs.config import Config, ConfigError, LocalConfig

RESERVED_CPUS = 2
"""Logical CPUs reserved for drivers and Ray Data's tasks; without them a training run can deadlock."""

OBJECT_STORE_SHARE = 0.1
"""Maximum size of the embedded Ray's object store, as a fraction of memory; Ray's own default is 0.3."""


@dataclass(frozen=True)
class Actors:
    """Processes of one kind that are alive at the same time.

    Attributes:
        kind: readable name of their task.
        field: the setting that determines `count`.
        cpus, gpus: logical CPUs and GPUs that each process reserves.
    """

    kind: str
    field: str
    count: int
    cpus: float
    gpus: float


def trials_at_once(config: Config) -> int:
    return min(config.search.max_concurrent_trials, config.search.grid_size)


def encoders(config: Config) -> list[Actors]:
    """Return the encoder actors and their picture decoders: those of `prepare`, or with data.encode=stream
    those of all concurrent trials."""
    train, each = config.train, config.data.encode_workers
    each *= trials_at_once(config) if config.data.encode == "stream" else 1
    return [
        Actors("encoder", "data.encode_workers", each, train.cpus_per_worker, float(train.use_gpu)),
        Actors("picture decoder", "data.encode_workers", each, 1, 0),
    ]


def search_actors(config: Config) -> list[Actors]:
    """Return the actors alive while the search trains, with the minimum of workers that the configuration
    allows."""
    train, trials, evaluate = config.train, trials_at_once(config), config.evaluate
    found = [
        # A trial's driver reserves one CPU; the controller of its workers reserves none.
        Actors("trial driver", "search.max_concurrent_trials", trials, 1, 0),
        Actors(
            "training worker",
            "train.num_workers",
            train.min_workers * trials,
            train.cpus_per_worker,
            float(train.use_gpu),
        ),
        Actors("evaluator", "evaluate.num_actors", evaluate.num_actors, 1, float(evaluate.use_gpu)),
        Actors("driver and Ray Data task", "fixed", RESERVED_CPUS, 1, 0),
    ]
    return found + (encoders(config) if config.data.encode == "stream" else [])


def serving_actors(config: Config) -> list[Actors]:
    """Return the maximum of actors that the endpoint starts."""
    serve = config.serve
    share = serve.gpu_share if serve.use_gpu else 0.0
    return [
        Actors("serving replica", "serve.replicas", serve.max_replicas, 1, share),
        Actors("HTTP ingress", "fixed", 1, 0.1, 0),
    ]


def check_resources(config: Config, resources: Mapping[str, float]) -> None:
    """Raise ConfigError unless the cluster holds one full search: its trials, workers and evaluators.

    A run that does not fit would wait forever instead of failing.

    Args:
        resources: logical totals, as in `ray.cluster_resources()`.
    """
    wanted = search_actors(config)
    nodes = max(1, sum(name.startswith("node:") and "__" not in name for name in resources))
    needs = {
        "CPU": sum(each.count * each.cpus for each in wanted),
        "GPU": sum(each.count * each.gpus for each in wanted),
    }
    for kind, needed in needs.items():
        present = resources.get(kind, 0)
        if needed <= present:
            continue
        if kind == "GPU" and not present:
            raise ConfigError(
                f"{_gpu_fields(config)}: the run needs {needed:g} GPUs, but the cluster has none; set "
                "use_gpu: false, or use a cluster with GPUs (--address)"
            )
        missing = math.ceil(needed - present)
        add = f"or add {missing} {kind}s to the cluster"
        if present:
            add += f" ({math.ceil(missing / (present / nodes))} more nodes of the present size)"
        if kind == "CPU":
            add += "; on the embedded cluster raise local.num_cpus"
        raise ConfigError(
            f"train.num_workers: the run needs {needed:g} logical {kind}s, but the cluster has "
            f"{present:g}; {_lower(config)}, {add}"
        )


def _gpu_fields(config: Config) -> str:
    fields = {"train.use_gpu": config.train.use_gpu, "evaluate.use_gpu": config.evaluate.use_gpu}
    return ", ".join(name for name, used in fields.items() if used)


def _lower(config: Config) -> str:
    """Return advice that names the settings that make a run smaller."""
    trials = trials_at_once(config)
    lower = f"lower train.num_workers ({config.train.min_workers})"
    if trials > 1:
        lower += f", search.max_concurrent_trials ({trials})"
    if config.data.encode == "stream":
        lower += f", data.encode_workers ({config.data.encode_workers})"
    return lower + f" or evaluate.num_actors ({config.evaluate.num_actors})"


def sized(local: LocalConfig) -> LocalConfig:
    """Fill in the unset sizes of the embedded Ray from the machine, at least the defaults.

    CPUs: one per core, plus `RESERVED_CPUS`. Object store: a tenth of the memory, and at most 80% of shared
    memory.
    """
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_num_cpus, get_shared_memory_bytes

    given, found = local.model_fields_set, {}
    if "num_cpus" not in given:
        found["num_cpus"] = max(local.num_cpus, int(get_num_cpus()) + RESERVED_CPUS)
    if "object_store_mb" not in given:
        room = OBJECT_STORE_SHARE * get_system_memory()
        if os.path.isdir("/dev/shm"):
            room = min(room, 0.8 * get_shared_memory_bytes())
        found["object_store_mb"] = max(local.object_store_mb, int(room / 2**20))
    return local.model_copy(update=found)
