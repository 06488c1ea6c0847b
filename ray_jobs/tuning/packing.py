"""The worker group of a search whose trials are trained together."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_jobs.config import Config
from ray_jobs.training.pack_queue import PackQueue
from ray_jobs.training.packed import PackSettings
from ray_jobs.training.trainer import build_pack_trainer

END_S = 120.0  # seconds for the workers to end; what holds them longer is killed


@contextmanager
def packing(config: Config, board: ActorHandle, at_once: bool) -> Iterator[ActorHandle | None]:
    """Keep a queue for the trials of a search, and workers that train what it has; None without packs.

    The workers live until the block ends.

    Args:
        board: handle of a ProgressBoard.
        at_once: start the workers now, and not with the first trials.
    """
    if config.trials_together == 1:
        yield None
        return
    # On the driver's node: another one could be lost, and the search with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(num_cpus=0, scheduling_strategy=here)
    queue: Any = remote(PackQueue).remote(config.trials_together, at_once)
    settings = PackSettings(config, queue, board)
    keeper = remote(_keep_training).options(max_retries=-1).remote(settings)
    try:
        yield queue
    finally:
        with suppress(ray.exceptions.RayActorError):  # one that has died: its trials say so
            ray.get(queue.close.remote())
        ended, _ = ray.wait([keeper], timeout=END_S)
        if not ended:
            ray.cancel(keeper, force=True)
        ray.kill(queue)


def _keep_training(settings: PackSettings) -> None:
    """Run worker groups as long as the queue needs one; a failed one is followed by the next."""
    queue = settings.queue
    while ray.get(queue.wanted.remote()):
        try:
            build_pack_trainer(settings).fit()
        except Exception:  # of any kind: the trials that it concerns raise it, and Tune decides
            ray.get(queue.fail.remote(traceback.format_exc()))
