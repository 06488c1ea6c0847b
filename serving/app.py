"""The endpoint: the registry's champion behind OpenAI's Images API, on Ray Serve.

    python -m serving.command --config configs/demo.yaml            # stays up until Ctrl-C
    python -m serving.command --config configs/demo.yaml --ask 4    # draws four pictures and stops

A thin ingress checks requests and takes them apart into orders, one a picture; the engine in the model's
replicas batches the orders of all requests, whatever versions they are for.
"""

import time
from functools import partial
from typing import Any

from ray import serve

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.console import say
from ray_jobs.registry.models import REFERENCE, RegisteredModel, champion
from serving.feedback.database import feedback_url, open_database
from serving.http.api_keys import KeyRing
from serving.http.ingress import Ingress
from serving.messages import base_of
from serving.replica.replica import Model
from serving.replica.safety import checker_factory
from serving.service.registry_watcher import current

APPLICATION = "diffray"
HEALTH_CHECK_S = 2  # so soon a replica that died is missed, and another is started


def check_access(config: Config) -> None:
    """Raise ConfigError unless it is said who may ask, and that can be read."""
    KeyRing.of(config.serve)


def check_parts(config: Config) -> None:
    """Raise ConfigError where something beside the model would keep the endpoint from starting: the database
    of feedback, the safety checker's function."""
    if config.serve.safety_checker:
        checker_factory(config.serve.safety_checker)
    open_database(feedback_url(config)).dispose()


def check_model(config: Config, registered: RegisteredModel) -> None:
    """Raise ConfigError where a switch of `serve` does not go with the champion."""
    if config.serve.compile and registered.method == "lora" and not config.serve.fuse_champion:
        raise ConfigError(
            f"serve.compile: {registered.name} version {registered.version} is a LoRA version, whose layers "
            "a compiled denoiser does not take; turn on serve.fuse_champion, or turn it off"
        )
    if config.serve.fuse_champion and registered.method != "lora":
        say("serve", f"serve.fuse_champion: {registered.name} is fully trained, so there is nothing to fuse")
    if config.serve.drift_pictures and not Storage.open(registered.source).exists(REFERENCE):
        raise ConfigError(
            f"serve.drift_pictures: {registered.source}/{REFERENCE}: is missing; publish the model again, or "
            "set it to 0"
        )


def build_application(config: Config, registered: RegisteredModel) -> serve.Application:
    """The Serve application, with `registered` as its first champion.

    Raises:
        ConfigError: neither keys nor anonymous requests are allowed, or a switch does not fit the champion.
    """
    check_access(config)
    check_parts(config)
    check_model(config, registered)
    settings, built = config.serve, time.time()
    # More than there ever are, because rows wait in the engine, which lets them in first come, first served.
    most = settings.max_queued_requests * settings.max_pictures + 64
    model = Model.options(  # type: ignore[attr-defined]
        **_scaling(config),
        max_ongoing_requests=most,
        health_check_period_s=HEALTH_CHECK_S,
        graceful_shutdown_timeout_s=settings.request_timeout_s,
        ray_actor_options={"num_cpus": 1, "num_gpus": settings.gpu_share if settings.use_gpu else 0},
    ).bind(
        settings,
        config.evaluate,
        *base_of(registered),
        registered,
        partial(current, config, registered, built),
    )
    ingress = Ingress.options(  # type: ignore[attr-defined]
        # Counts its open requests itself, and has room beyond them to say 503 and to answer probes.
        max_ongoing_requests=settings.max_queued_requests + 64,
        health_check_period_s=HEALTH_CHECK_S,
        graceful_shutdown_timeout_s=settings.request_timeout_s,
        ray_actor_options={"num_cpus": 0.1},
    )
    return ingress.bind(config, registered, built, model)


def _scaling(config: Config) -> dict[str, Any]:
    """How many replicas: a number, or as many as keep one full batch each."""
    settings = config.serve
    if isinstance(settings.replicas, int):
        return {"num_replicas": settings.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": settings.min_replicas,
            "initial_replicas": max(1, settings.min_replicas),  # so that a mistake is told at the start
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.max_batch_size,
            "upscale_delay_s": 10,
            "downscale_delay_s": 120,
        }
    }


def build(args: dict[str, Any]) -> serve.Application:
    """For `serve run serving.app:build config=configs/demo.yaml`, and for a RayService."""
    config = load_config(args["config"])
    return build_application(config, champion(config))
