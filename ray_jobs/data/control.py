"""Control images, and what follows from them for the other settings."""

from typing import TYPE_CHECKING

from cluster.fetched import local_path
from ray_jobs.config import Config, ConfigError
from ray_jobs.console import say
from ray_jobs.run.records import CONTROL
from ray_jobs.weights.model_files import family_in

if TYPE_CHECKING:
    from ray_jobs.diffusion.families import Family


def suited_to_control(config: Config) -> Config:
    """Return the configuration with `search.rank_by: control` if scores can tell it, unless given.

    Raises:
        ConfigError: as for `_check_ranking`.
    """
    search = config.search
    if "rank_by" in search.model_fields_set or not config.data.control.kind:
        _check_ranking(config)
        return config
    say("control", "ranks by FID and by how images follow control images (search.rank_by: control)")
    return config.model_copy(update={"search": search.model_copy(update={"rank_by": CONTROL})})


def _check_ranking(config: Config) -> None:
    """Raise ConfigError if control images are to rank, and nothing says how they are computed."""
    if config.search.rank_by == CONTROL and not config.data.control.kind:
        raise ConfigError(
            "search.rank_by: control compares the control images of drawn images with those that they were "
            "given; say by data.control.kind how they are computed, or choose another score"
        )


def check_control(config: Config) -> None:
    """Check that what is trained follows the rows' control images, and what computes these.

    Raises:
        ConfigError: naming the field, if nothing follows them, a model of `data.control` cannot be used, or
            scores cannot tell what ranks.
    """
    from ray_jobs.weights.conditioner import check_conditioner

    data, base = config.data, config.model.base
    _check_ranking(config)
    if not data.has_control:
        return
    family = family_in(local_path(base), revision=config.model.revision)
    if reason := _follows_none(family, config.train.method):
        field = "data.sources: control_column" if data.brings_control else "data.control.kind"
        raise ConfigError(f"{field}: {base} ({family.pipeline_class}) {reason}; or remove it")
    try:
        check_conditioner(data.control)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _follows_none(family: "Family", method: str) -> str:
    """Return why what a method trains follows no control images, and what to choose; "" if it does."""
    from ray_jobs.diffusion.families import pipelines_with

    if method == "controlnet":
        return "" if family.control else f"has no ControlNets; choose one of {pipelines_with('control')}"
    if method == "lora" and family.control_channels:
        return ""
    if family.control:
        return f"follows no control images with train.method: {method}; set that to controlnet"
    others = pipelines_with("control_channels")
    return f"follows no control images with train.method: {method}; choose one whose adapters do, {others}"


def control_digest(config: Config) -> str:
    """Return the digest of the models that compute control images of rows; "" if none do.

    Raises:
        ConfigError: a model is missing, or has no safetensors file.
    """
    from ray_jobs.weights.conditioner import conditioner_digest

    try:
        return conditioner_digest(config.data.control) if config.data.computes_control_by_model else ""
    except ValueError as error:
        raise ConfigError(str(error)) from None
