"""The endpoint: the registry's champion behind OpenAI's Images API, on Ray Serve.

    python -m serving.command --config configs/demo.yaml            # runs until Ctrl-C
    python -m serving.command --config configs/demo.yaml --ask 4    # generates four images and stops

A thin ingress checks requests and splits them into orders, one per image. The engines in the model's replicas
batch the orders of all requests, across LoRA versions.
"""

import time
from functools import partial

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
HEALTH_CHECK_S = 2  # interval in seconds after which a dead replica is noticed and replaced


def check_access(config: Config) -> None:
    """Raise ConfigError unless keys or anonymous requests are configured, and the keys are readable."""
    KeyRing.of(config.serve)


def check_parts(config: Config) -> None:
    """Raise ConfigError if the feedback database or the safety checker's function would prevent the start."""
    if config.serve.safety_checker:
        checker_factory(config.serve.safety_checker)
    open_database(feedback_url(config)).dispose()


def check_model(config: Config, registered: RegisteredModel) -> None:
    """Raise ConfigError if a switch of `serve` is incompatible with the champion."""
    named = f"{registered.name} version {registered.version}"
    if config.serve.compile and registered.method == "lora" and not config.serve.fuse_champion:
        raise ConfigError(
            f"serve.compile: {named} is a LoRA version, whose layers "
            "a compiled denoiser does not take; turn on serve.fuse_champion, or turn it off"
        )
    stored = registered.quantization
    if stored and config.serve.fuse_champion:
        raise ConfigError(
            f"serve.fuse_champion: {named} was trained on a base stored as {stored}, which would round away "
            "what is merged; turn it off: adapters are served beside the base"
        )
    if stored and config.serve.int8_weights:
        raise ConfigError(
            f"serve.int8_weights: {named} is served on a base stored as {stored} already; turn it off"
        )
    if config.serve.fuse_champion and registered.method != "lora":
        say("serve", f"serve.fuse_champion: {registered.name} is no adapter, so there is nothing to fuse")
    if registered.has_controlnet and config.serve.cache_features:
        raise ConfigError(
            f"serve.cache_features: {named} is a ControlNet, which changes the features of each step; turn "
            "it off"
        )
    if config.serve.drift_pictures and not Storage.open(registered.source).exists(REFERENCE):
        raise ConfigError(
            f"serve.drift_pictures: {registered.source}/{REFERENCE}: is missing; publish the model again, or "
            "set it to 0"
        )


def check_base(config: Config, registered: RegisteredModel) -> None:
    """Raise ConfigError if a switch of `serve` does not suit the champion's model.

    Reads only its configurations; imports PyTorch and diffusers. A model that is not on this machine passes:
    a replica, which has it, refuses then.
    """
    from ray_jobs.diffusion.families import family_of
    from ray_jobs.diffusion.switches import check_serving
    from ray_jobs.weights.loading import empty_model, read_index

    settings, base, weights = config.serve, base_of(registered), Storage.open(registered.source)
    whole = registered.method == "full" and weights.is_local
    model, revision = (weights.path, None) if whole else (base.model, base.revision)
    try:
        family = family_of(read_index(model, revision)["_class_name"])
    except ValueError:
        return
    empty = empty_model(model, [family.denoiser], revision=revision)
    try:
        check_serving(
            family,
            getattr(empty, family.denoiser),
            empty.scheduler,
            solver=settings.solver,
            channels_last=settings.channels_last,
            cache_features=settings.cache_features,
        )
    except ValueError as error:
        raise ConfigError(f"serve.{error}") from None


def build_application(config: Config, registered: RegisteredModel) -> serve.Application:
    """Build the Serve application, with `registered` as its first champion.

    Raises:
        ConfigError: neither keys nor anonymous requests are configured, the feedback database or the safety
            checker is unusable, or a switch is incompatible with the champion.
    """
    check_access(config)
    check_parts(config)
    check_model(config, registered)
    settings, built = config.serve, time.time()
    # Never reached, because rows wait in the engine, which admits them first come, first served.
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
        base_of(registered),
        registered,
        partial(current, config, registered, built),
    )
    ingress = Ingress.options(  # type: ignore[attr-defined]
        # The ingress counts open requests itself; the extra capacity serves 503 answers and probes.
        max_ongoing_requests=settings.max_queued_requests + 64,
        health_check_period_s=HEALTH_CHECK_S,
        graceful_shutdown_timeout_s=settings.request_timeout_s,
        ray_actor_options={"num_cpus": 0.1},
    )
    return ingress.bind(config, registered, built, model)


def _scaling(config: Config) -> dict[str, object]:
    """Return Serve's scaling options: a fixed number of replicas, or autoscaling to one full batch each."""
    settings = config.serve
    if isinstance(settings.replicas, int):
        return {"num_replicas": settings.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": settings.min_replicas,
            "initial_replicas": max(1, settings.min_replicas),  # so that errors show at the start
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.max_batch_size,
            "upscale_delay_s": 10,
            "downscale_delay_s": 120,
        }
    }


def build(args: dict[str, str]) -> serve.Application:
    """Build the application for `serve run serving.app:build config=configs/demo.yaml`, or a RayService."""
    config = load_config(args["config"])
    registered = champion(config)
    check_base(config, registered)
    return build_application(config, registered)
