"""Resources that a run needs and a machine offers, and the check that a cluster suffices for a run."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
        cpus, gpus: logical CPUs and GPUs that each process reserves; below 1, a share of one GPU.
    """

    kind: str
    field: str
    count: int
    cpus: float
    gpus: float


PACKED_CPUS = 0.01
"""Logical CPUs that a trial's driver reserves where trials are trained together: it only waits."""

TASKS = Actors("driver and Ray Data task", "fixed", RESERVED_CPUS, 1, 0)


def trials_at_once(config: Config) -> int:
    """Return the number of worker groups that a search has at a time."""
    if config.trials_together > 1:
        return 1
    return min(config.search.max_concurrent_trials, config.search.grid_size)


def encoders(config: Config, trials: int | None = None) -> list[Actors]:
    """Return the encoder actors and their picture decoders: those of `prepare`, or with data.encode=stream
    those of `trials` concurrent trainings (None: all concurrent trials of a search)."""
    train, each = config.train, config.data.encode_workers
    if config.data.encode == "stream":
        each *= trials_at_once(config) if trials is None else trials
    return [
        Actors("encoder", "data.encode_workers", each, train.cpus_per_worker, float(train.use_gpu)),
        Actors("picture decoder", "data.encode_workers", each, 1, 0),
    ]


def _training(config: Config, trials: int) -> list[Actors]:
    """Return the minimum of training workers that the configuration allows, and what feeds them."""
    train = config.train
    share = train.gpu_share if train.use_gpu else 0.0
    workers = Actors(
        "training worker", "train.num_workers", train.min_workers * trials, train.cpus_per_worker, share
    )
    return [workers, TASKS, *(encoders(config, trials) if config.data.encode == "stream" else [])]


def _evaluators(config: Config) -> Actors:
    evaluate = config.evaluate
    share = evaluate.gpu_share if evaluate.use_gpu else 0.0
    return Actors("evaluator", "evaluate.num_actors", evaluate.num_actors, 1, share)


def prepare_actors(config: Config) -> list[Actors]:
    """Return the least that `prepare` needs: where more encoders do not fit, Ray Data continues with one."""
    return [*(replace(each, count=1) for each in encoders(config)), TASKS]


def training_actors(config: Config) -> list[Actors]:
    """Return the actors alive while a single training runs, with an evaluator for `search.patience`."""
    evaluator = replace(_evaluators(config), field="search.patience", count=1)
    return [*_training(config, 1), *([evaluator] if config.search.patience else [])]


def evaluation_actors(config: Config) -> list[Actors]:
    """Return the actors alive while checkpoints are scored and nothing is trained."""
    return [_evaluators(config), TASKS]


def search_actors(config: Config) -> list[Actors]:
    """Return the actors alive while a search trains, with the minimum of workers that the configuration
    allows."""
    trials = trials_at_once(config)
    workers, *others = _training(config, trials)
    # A trial's driver reserves one CPU; the controller of its workers reserves none.
    drivers = Actors("trial driver", "search.max_concurrent_trials", trials, 1, 0)
    if config.trials_together > 1:
        drivers = Actors("trial driver", "search.pack", config.trials_together, PACKED_CPUS, 0)
    return [drivers, workers, _evaluators(config), *others]


def serving_actors(config: Config) -> list[Actors]:
    """Return the maximum of actors that the endpoint starts."""
    return _serving(config, config.serve.max_replicas)


def endpoint_actors(config: Config) -> list[Actors]:
    """Return the actors without which the endpoint does not start: the replicas that are always kept."""
    return _serving(config, max(1, config.serve.min_replicas))


def _serving(config: Config, replicas: int) -> list[Actors]:
    share = config.serve.gpu_share if config.serve.use_gpu else 0.0
    return [
        Actors("serving replica", "serve.replicas", replicas, 1, share),
        Actors("HTTP ingress", "fixed", 1, 0.1, 0),
    ]


STARTS: Mapping[str, Callable[[Config], list[Actors]]] = {
    "prepare": prepare_actors,
    "train": training_actors,
    "pretrain": training_actors,
    "evaluate": evaluation_actors,
    "compare": evaluation_actors,
    "publish": evaluation_actors,
    "serve": endpoint_actors,
}
"""What the commands start that start less than a search does, by name."""


def actors_of(config: Config, stage: str) -> list[Actors]:
    """Return the actors that a stage keeps alive at the same time."""
    return STARTS.get(stage, search_actors)(config)


def check_resources(config: Config, resources: Mapping[str, float], stage: str = "search") -> None:
    """Raise ConfigError unless the cluster holds all that a stage starts, with one full search.

    A run that does not fit would wait forever instead of failing.

    Args:
        resources: logical totals, as in `ray.cluster_resources()`.
    """
    wanted = actors_of(config, stage)
    nodes = max(1, sum(name.startswith("node:") and "__" not in name for name in resources))
    needs = {
        "CPU": sum(each.count * each.cpus for each in wanted),
        "GPU": round(sum(each.count * each.gpus for each in wanted), 4),
    }
    for kind, needed in needs.items():
        present = resources.get(kind, 0)
        if needed <= present:
            continue
        if kind == "GPU" and not present:
            raise ConfigError(
                f"{_gpu_fields(wanted)}: the run needs {needed:g} GPUs, but the cluster has none; set "
                "use_gpu: false, or use a cluster with GPUs (--address)"
            )
        missing = math.ceil(needed - present)
        add = f"or add {missing} {kind}s to the cluster"
        if present:
            add += f" ({math.ceil(missing / (present / nodes))} more nodes of the present size)"
        if kind == "CPU":
            add += "; on the embedded cluster raise local.num_cpus"
        largest = max(wanted, key=lambda each: each.count * (each.gpus if kind == "GPU" else each.cpus))
        raise ConfigError(
            f"{largest.field}: the run needs {needed:g} logical {kind}s, but the cluster has "
            f"{present:g}; {_lower(config, wanted, kind)}, {add}"
        )


def _gpu_fields(wanted: Sequence[Actors]) -> str:
    sections = {"data": "train"}  # encoders use GPUs where training does
    used = [each.field.partition(".")[0] for each in wanted if each.gpus]
    return ", ".join(dict.fromkeys(f"{sections.get(each, each)}.use_gpu" for each in used))


def _lower(config: Config, wanted: Sequence[Actors], kind: str) -> str:
    """Return advice that names the settings that make a run smaller."""
    values = {
        "train.num_workers": config.train.min_workers,
        "search.max_concurrent_trials": trials_at_once(config),
        "data.encode_workers": config.data.encode_workers,
        "evaluate.num_actors": config.evaluate.num_actors,
        "serve.replicas": config.serve.min_replicas,
    }
    used = {each.field for each in wanted}
    if trials_at_once(config) == 1:
        used -= {"search.max_concurrent_trials"}
    named = [f"{field} ({value})" for field, value in values.items() if field in used]
    lower = "lower " + " or ".join([", ".join(named[:-1]), named[-1]] if named[1:] else named)
    if kind == "GPU" and {each.kind for each in wanted if each.gpus == 1} >= {"training worker", "evaluator"}:
        lower += ", let them share GPUs (train.gpu_share: 0.7, evaluate.gpu_share: 0.3)"
    return lower


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
