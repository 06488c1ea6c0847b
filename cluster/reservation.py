"""Reserve room for a stage's other actors, which an elastic training would otherwise take.

An elastic worker group grows into all resources that nobody has requested from Ray's autoscaling coordinator.
In Ray 2.60 it knows nothing of running actors, such as evaluators, and serves Ray Data, which encodes a
stream, after all that training may use.
"""

from collections.abc import Sequence
from typing import Any

from cluster.capacity import Actors, actors_of
from ray_jobs.config import Config

EXPIRES_S = 180.0
"""Time after which a reservation ends that is not renewed, in seconds: its stage has died."""

RENEWED_S = 60.0
"""Interval at which a stage renews its reservation, in seconds."""


def beside_training(config: Config, stage: str) -> list[Actors]:
    """Return the actors that an elastic training must leave room for; none if no training is elastic."""
    actors = actors_of(config, stage)
    elastic = config.train.is_elastic and any(each.kind == "training worker" for each in actors)
    return [each for each in actors if elastic and each.kind != "training worker"]


def reserve(name: str, actors: Sequence[Actors]) -> None:
    """Reserve the resources of `actors`, or renew the reservation of that name. Ray must be initialised."""
    import ray
    from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority

    ray.get(
        _coordinator().request_resources.remote(
            requester_id=name,
            resources=[_bundle(each) for each in actors for _ in range(each.count)],
            expire_after_s=EXPIRES_S,
            priority=ResourceRequestPriority.HIGH,  # as training's own request, which comes later
        )
    )


def release(name: str) -> None:
    """End a reservation, if there is one."""
    import ray

    ray.get(_coordinator().cancel_request.remote(name))


def _coordinator() -> Any:
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator

    return get_or_create_autoscaling_coordinator()


def _bundle(actor: Actors) -> dict[str, float]:
    wanted = {"CPU": float(actor.cpus), "GPU": float(actor.gpus)}
    return {kind: amount for kind, amount in wanted.items() if amount}
