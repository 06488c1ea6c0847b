"""Checks that every stage can carry out the configuration with the base model."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache

from cluster.fetched import local_path
from cluster.nodes import living_nodes
from cluster.preflight import equipment
from cluster.shape import machines_of
from cluster.watch import require_room
from ray_jobs.config import Config, ConfigError
from ray_jobs.console import say
from ray_jobs.data.control import check_control
from ray_jobs.data.encoding.captioning import check_captioning
from ray_jobs.data.encoding.shapes import picture_shapes
from ray_jobs.data.references import check_references
from ray_jobs.diffusion.families import Family
from ray_jobs.diffusion.protocols import Denoiser, Scheduler, Settings
from ray_jobs.diffusion.sampling import UNGUIDED
from ray_jobs.weights.model_files import latent_shapes

DISTILLED = (
    "looks distilled for a few steps. Training undoes that: its images then need many steps and guidance, "
    "and are blurred in a few. Train the model that it was distilled from instead, or give model.assistant, "
    "an adapter that undoes the distillation while it trains"
)
CONTINUED = "is trained further; scores and pictures of the base are those of the base with it"
ASSISTED = (
    "is on while training and off after: samples, scores, validation loss and the published version are the "
    "base's with what was trained"
)


def check_stages(config: Config) -> list[str]:
    """Check that every stage can carry out the configuration with the base model.

    Returns:
        Warnings about what the stages can do but hardly anyone wants.

    Raises:
        ConfigError: a setting does not fit; the message names the field and the fix.
    """
    from ray_jobs.training.setup import check_settings

    try:
        shapes = picture_shapes(config)
        check_captioning(config)
        check_references(config)
        check_control(config)
        family, model = check_settings(config)
        denoiser = getattr(model, family.denoiser)
        base, revision = local_path(config.model.base), config.model.revision
        latents = latent_shapes(base, shapes, revision=revision)
        _check_guidance(config, family, model.config)
        _check_scores(config, family, model.scheduler, latents)
        _check_serving(config, family, denoiser, model.scheduler, latents)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    lines = [f"model.adapter: {config.model.adapter} {CONTINUED}"] if config.model.adapter else []
    if config.model.assistant:
        return [*lines, f"model.assistant: {config.model.assistant} {ASSISTED}"]
    warning = [f"warning: model.base: {config.model.base} {DISTILLED}"]
    return lines + (warning if family.is_distilled(model) else [])


def _check_guidance(config: Config, family: Family, settings: Settings) -> None:
    """Raise ValueError if guidance is configured for a model that samples without it."""
    scales = {
        "evaluate.guidance_scale": config.evaluate.guidance_scale,
        "search.guidance_scales": max(config.search.guidance_scales, default=1),
        "serve.default_guidance_scale": config.serve.default_guidance_scale or 1,
    }
    for field, scale in scales.items():
        if scale > 1 and not family.has_guidance(settings):
            raise ValueError(f"{field}: {scale:g}; {UNGUIDED}; set it to 1")


def _check_scores(
    config: Config, family: Family, scheduler: Scheduler, latents: Sequence[tuple[int, ...]]
) -> None:
    """Raise ValueError unless the model's own scheduler can sample in `evaluate.inference_steps` steps."""
    from ray_jobs.diffusion.schedulers import trained_scheduler
    from ray_jobs.diffusion.solvers import is_tabulated, tabulate

    if config.train.loss.zero_terminal_snr:
        scheduler = trained_scheduler(scheduler)
    steps, name = config.evaluate.inference_steps, type(scheduler).__name__
    for shape in latents:
        try:
            if is_tabulated(scheduler):  # stricter: also checks that no step is infinite
                tabulate(scheduler, family, steps, shape)
            else:
                family.schedule.set_timesteps(deepcopy(scheduler), steps, shape, "cpu")
        except (ValueError, IndexError, ZeroDivisionError):
            raise ValueError(
                f"evaluate.inference_steps: {name} of {config.model.base} cannot sample in {steps} steps; "
                "choose another number"
            ) from None


def _check_serving(
    config: Config,
    family: Family,
    denoiser: Denoiser,
    scheduler: Scheduler,
    latents: Sequence[tuple[int, ...]],
) -> None:
    """Raise ValueError if the winner could not be served as configured."""
    from ray_jobs.diffusion.schedulers import trained_scheduler
    from ray_jobs.diffusion.solvers import tabulate
    from ray_jobs.diffusion.switches import check_serving

    serve = config.serve
    if serve.compile and config.train.makes_adapter and not serve.fuse_champion:
        raise ValueError(
            "serve.compile: train.method lora makes LoRA versions, which a compiled denoiser cannot "
            "load; turn on serve.fuse_champion, or turn it off"
        )
    field = "serve."
    try:
        solver = check_serving(
            family,
            denoiser,
            scheduler,
            solver=serve.solver,
            channels_last=serve.channels_last,
            cache_features=serve.cache_features,
        )
        if config.train.loss.zero_terminal_snr:
            solver = trained_scheduler(solver)
        field = "serve.default_steps: "
        for shape in latents:
            tabulate(solver, family, serve.default_steps, shape)
    except ValueError as error:
        raise ValueError(f"{field}{error}") from None


def checked(config: Config, stage: str = "search") -> Callable[[], Config]:
    """Start the checks as a Ray task on a CPU, and return a function that waits for them and warns.

    The function returns the configuration with what only the base and the cluster's GPUs decide
    (`with_pack`), if a search is to be run.

    Raises:
        ConfigError: raised by the returned function; the message names the setting.
    """
    import ray

    found = ray.remote(num_cpus=1)(_checked).remote(config, stage)

    @cache
    def wait() -> Config:
        try:
            decided, lines = ray.get(found)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise ConfigError(str(error.cause)) from None
            raise
        for line in lines:
            say("checks", line)
        if decided.trials_together < config.trials_together:
            require_room(decided, living_nodes(), stage)
        return decided

    return wait


def _checked(config: Config, stage: str) -> tuple[Config, list[str]]:
    """Return the configuration as the cluster decides it, and lines about it and from `check_stages`."""
    from ray_jobs.planning.packs import checked_pack

    lines = check_stages(config)
    if stage != "search" or config.trials_together == 1:
        return config, lines
    nodes = living_nodes() if config.train.use_gpu else []
    decided, line = checked_pack(config, machines_of(nodes, equipment(nodes)))
    return decided, [*lines, line] if line else lines
