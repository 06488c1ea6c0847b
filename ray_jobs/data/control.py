"""Control images, and what follows from them for the other settings."""

from cluster.fetched import local_path
from ray_jobs.config import Config, ConfigError
from ray_jobs.weights.model_files import family_in


def check_control(config: Config) -> None:
    """Check that the model's family has ControlNets, if rows have control images, and what computes these.

    Raises:
        ConfigError: naming the field, if it has none, or a model of `data.control` cannot be used.
    """
    from ray_jobs.weights.conditioner import check_conditioner

    data, base = config.data, config.model.base
    if not data.has_control:
        return
    family = family_in(local_path(base), revision=config.model.revision)
    if family.control is None:
        field = "data.sources: control_column" if data.brings_control else "data.control.kind"
        raise ConfigError(
            f"{field}: {base} ({family.pipeline_class}) has no ControlNets; remove it, or choose a Stable "
            "Diffusion, Stable Diffusion XL, Stable Diffusion 3 or FLUX.1"
        )
    try:
        check_conditioner(data.control)
    except ValueError as error:
        raise ConfigError(str(error)) from None


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
