"""Solvers for batches whose rows are at different steps. Pure PyTorch.

A step of each of these solvers is linear in the row's latents, the denoiser's output and the values kept from
earlier steps. So a diffusers scheduler is run once per step count with unit vectors in place of images. Its
results are the coefficients of every step, for its own spacing, prediction type, sigmas, shift and order. A
batch then takes a step with one gather and a few products, at whatever steps its rows are.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch

from ray_jobs.diffusion.families import Family
from ray_jobs.diffusion.protocols import Scheduler
from ray_jobs.diffusion.schedulers import flow_shift, rebuilt

FLOW_SOLVER = "FlowMatchEulerDiscreteScheduler"

# Per class, the option values with which the scheduler is deterministic and can be tabulated here.
SOLVERS: dict[str, dict[str, tuple[Any, ...]]] = {
    "DDIMScheduler": {"thresholding": (False,)},
    "EulerDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++",),
        "solver_order": (1, 2),
        "thresholding": (False,),
    },
    "PNDMScheduler": {"skip_prk_steps": (True,)},
    FLOW_SOLVER: {"stochastic_sampling": (False,), "invert_sigmas": (False,)},
}

PLMS_OUTPUTS = 3  # number of earlier denoiser outputs that a step of PNDM uses

BY_NAME: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
}


class NoStepsLeft(ValueError):
    """Image-to-image would run no step."""


class Coefficients(NamedTuple):
    """Coefficients of one step for N rows: the factors of the terms of `advance`, each N x 1 x ..."""

    timestep: torch.Tensor
    next_timestep: torch.Tensor  # 0 in the last step
    input_scale: torch.Tensor  # factor on the latents before they enter the denoiser
    clean_latents: torch.Tensor  # predicted clean latents: factor on the noisy latents
    clean_output: torch.Tensor  # predicted clean latents: factor on the denoiser's output
    next_latents: torch.Tensor  # next latents: factor on the current ones
    next_output: torch.Tensor  # next latents: factor on the denoiser's output
    next_previous: torch.Tensor  # next latents: factor on the clean latents predicted one step earlier
    next_clipped: torch.Tensor  # next latents: factor on the change that clipping makes to the prediction
    next_earlier: torch.Tensor  # next latents, N x 3 x 1 x ...: factors on earlier outputs, newest first
    remembers: torch.Tensor  # 1 where this output is kept as an earlier one, else 0


class Schedule(NamedTuple):
    """All steps for one step count.

    Attributes:
        table: float32, denoiser calls x 13, on the CPU; columns in the order of `Coefficients`. All solvers
            call the denoiser once per step; PNDM makes one call more.
        noise_scale: factor on standard normal noise in the first latents.
        image_scale: factor on the input image's latents in the first latents; 0 without an input image.
        levels: float32, denoiser calls x 2, on the CPU: the factors on an image's latents and on noise that
            make latents of the level after each call; empty unless asked for.
    """

    table: torch.Tensor
    noise_scale: float
    image_scale: float = 0.0
    levels: torch.Tensor = torch.empty(0, 2)

    def __len__(self) -> int:
        return len(self.table)


def scheduler_of(scheduler: Scheduler, solver: str) -> Scheduler:
    """Return a model's scheduler, or another solver for the same diffusion.

    Noise schedule, prediction type and timestep spacing stay the same, even if the model's file omits them
    and the other class has different defaults (diffusers 0.42: with 20 steps, PNDM and DDIM begin at 951 of
    1,000 timesteps, Euler at 999).

    Args:
        solver: `model`, or a name in `BY_NAME`.

    Raises:
        ValueError: the model's scheduler is for flow matching, which has only `euler` here.
    """
    if solver == "model":
        return scheduler
    import diffusers

    if _is_flow(scheduler):
        if solver != "euler":
            raise ValueError(
                f"solver: {type(scheduler).__name__} is for flow matching, which has no {solver} here; leave "
                "this out, or set it to euler"
            )
        return rebuilt(scheduler, getattr(diffusers, FLOW_SOLVER), shift=flow_shift(scheduler.config))
    name, options = BY_NAME[solver]
    return rebuilt(scheduler, getattr(diffusers, name), **options)


def _is_flow(scheduler: Scheduler) -> bool:
    """Return whether a scheduler is for flow matching, which solvers for both have as an option."""
    return "beta_schedule" not in scheduler.config or bool(scheduler.config.get("use_flow_sigmas"))


def check_scheduler(scheduler: Scheduler) -> None:
    """Raise ValueError for a scheduler that is not in `SOLVERS`, or has an option that is not supported."""
    name, config = type(scheduler).__name__, scheduler.config
    if name not in SOLVERS:
        other = " to euler" if _is_flow(scheduler) else ", for example to dpm++"
        raise ValueError(
            f"solver: {name} cannot be served, only {', '.join(SOLVERS)}; set serve.solver{other}, or save "
            "the model with one of these schedulers"
        )
    for option, allowed in SOLVERS[name].items():
        if config.get(option, allowed[0]) not in allowed:
            choice = " or ".join(map(repr, allowed))
            raise ValueError(
                f"solver: {name} with {option}={config[option]!r} cannot be served; set {option}={choice}"
            )


def is_tabulated(scheduler: Scheduler) -> bool:
    """Return whether `check_scheduler` accepts a scheduler."""
    try:
        check_scheduler(scheduler)
    except ValueError:
        return False
    return True


def clip_range(scheduler: Scheduler) -> float | None:
    """Return the bound that predicted clean latents are clamped to, minus to plus; None for no clamping."""
    clips = type(scheduler).__name__ == "DDIMScheduler" and scheduler.config.clip_sample
    return float(scheduler.config.clip_sample_range) if clips else None


def num_earlier(scheduler: Scheduler) -> int:
    """Return the number of earlier denoiser outputs that a scheduler's steps use."""
    return PLMS_OUTPUTS if type(scheduler).__name__ == "PNDMScheduler" else 0


def tabulate(
    scheduler: Scheduler,
    family: Family,
    num_steps: int,
    latent_shape: Sequence[int],
    strength: float | None = None,
    *,
    levels: bool = False,
) -> Schedule:
    """Return the coefficients of a diffusers scheduler for a step count.

    Args:
        scheduler: scheduler that `check_scheduler` accepts; it is not changed.
        latent_shape: (..., h, w), by which some families shift their noise levels.
        strength: in (0, 1], the share of the steps that image-to-image runs: the last ones, starting from the
            input image noised to their level (SDEdit, arXiv 2108.01073). None to start from noise alone.
        levels: also return `Schedule.levels`.

    Raises:
        NoStepsLeft: `strength` leaves no step to run.
        ValueError: the scheduler does not support this number of steps.
    """
    scheduler = deepcopy(scheduler)
    first = 0 if strength is None else family.schedule.first_step(num_steps, strength)
    if first >= num_steps > 0:
        raise NoStepsLeft(f"{strength} of {num_steps} steps leaves no step to run; increase one of them")
    try:
        family.schedule.set_timesteps(scheduler, num_steps, latent_shape, "cpu")
        calls = num_steps + (num_earlier(scheduler) > 0 and num_steps > 1)
        if len(scheduler.timesteps) != calls:
            raise ValueError(f"it makes {len(scheduler.timesteps)} steps of them")
        image_scale, noise_scale = 0.0, float(getattr(scheduler, "init_noise_sigma", 1.0))
        if strength is not None:
            image_scale, noise_scale = _noise_levels(scheduler, first)
        reached = []
        if levels:
            later = range(first + 1, len(scheduler.timesteps))
            reached = [*(_noise_levels(deepcopy(scheduler), call) for call in later), (1.0, 0.0)]
        walk = _walk_plms if num_earlier(scheduler) else _walk
        rows = walk(scheduler, scheduler.timesteps[first:])
        ends = [*(row[0] for row in rows[1:]), 0.0]
        rows = [[row[0], end, *row[1:]] for row, end in zip(rows, ends, strict=True)]
        table = torch.tensor(rows, dtype=torch.float32)
        if not len(table) or not table.isfinite().all():
            raise ValueError("its coefficients are not finite, or there are none")
    except (ValueError, IndexError, ZeroDivisionError) as error:
        name = type(scheduler).__name__
        raise ValueError(f"{name} cannot sample in {num_steps} steps; choose another number") from error
    return Schedule(table, noise_scale, image_scale, torch.tensor(reached).reshape(-1, 2))


def _noise_levels(scheduler: Scheduler, first: int) -> tuple[float, float]:
    """Return the factors on an image's latents and on the noise before step `first`.

    The scheduler continues from that step.
    """
    if hasattr(scheduler, "set_begin_index"):  # DDIM has none
        scheduler.set_begin_index(first)
    picture, noise = torch.eye(2)
    timestep = scheduler.timesteps[first : first + 1]
    if hasattr(scheduler, "scale_noise"):  # flow matching's name for it
        levels = scheduler.scale_noise(picture, timestep, noise)
    else:
        levels = scheduler.add_noise(picture, noise, timestep)
    image_scale, noise_scale = levels.tolist()
    return image_scale, noise_scale


def _walk(scheduler: Scheduler, timesteps: torch.Tensor) -> list[list[float]]:
    """Return the table's rows, without `next_timestep`, for a scheduler that uses no earlier outputs."""
    return [[*_probe(scheduler, timestep), *[0.0] * (PLMS_OUTPUTS + 1)] for timestep in timesteps]


def _walk_plms(scheduler: Scheduler, timesteps: torch.Tensor) -> list[list[float]]:
    """Return the same for PNDM without Runge-Kutta steps (Liu et al., arXiv 2202.09778, eq. 12).

    Its second call repeats the first step with the mean of both outputs.
    """
    rows: list[list[float]] = []
    # Five unit vectors: the latents, the denoiser's output and the three earlier ones, newest first.
    latents, output, *earlier = torch.eye(2 + PLMS_OUTPUTS, dtype=torch.float64)
    for call, timestep in enumerate(timesteps):
        known = min(max(call - 1, 1), PLMS_OUTPUTS) if call else 0
        scheduler.ets = earlier[:known][::-1]
        if call == 1:  # recover the first step's start from its result
            scheduler.cur_sample = (latents - rows[0][5] * earlier[0]) / rows[0][4]
        signal = scheduler.alphas_cumprod[timestep].double()
        clean = (latents - (1 - signal).sqrt() * output) / signal.sqrt()
        if scheduler.config.prediction_type == "v_prediction":
            clean = signal.sqrt() * latents - (1 - signal).sqrt() * output
        stepped = scheduler.step(output, timestep, latents, return_dict=False)[0].tolist()
        remembers = float(call != 1)
        rows.append(
            [float(timestep), 1.0, *clean.tolist()[:2], *stepped[:2], 0.0, 0.0, *stepped[2:], remembers]
        )
    return rows


def _probe(scheduler: Scheduler, timestep: torch.Tensor) -> list[float]:
    """Return the first columns of one step's row in the table, measured on a step of the scheduler."""
    # Three unit vectors: the latents, the denoiser's output and the previous prediction.
    latents, output, previous = torch.eye(3)
    input_scale = 1.0
    if hasattr(scheduler, "scale_model_input"):  # flow matching has none
        input_scale = float(scheduler.scale_model_input(torch.ones(()), timestep))
    kind, clipped = type(scheduler).__name__, 0.0
    if kind == "DPMSolverMultistepScheduler":
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        clean = scheduler.convert_model_output(output, sample=latents)
        scheduler.model_outputs[-1] = previous
    elif kind == "FlowMatchEulerDiscreteScheduler":
        clean = latents - timestep / scheduler.config.num_train_timesteps * output
    elif kind == "DDIMScheduler":
        scheduler.register_to_config(clip_sample=False)
        stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        before = int(timestep) - stride
        alpha = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
        clipped = float(alpha.sqrt())  # the weight of the clean latents in equation 12 of arXiv 2010.02502
    stepped = scheduler.step(output, timestep, latents, return_dict=False)
    if kind in ("DDIMScheduler", "EulerDiscreteScheduler"):
        clean = stepped[1]
    return [float(timestep), input_scale, *clean.tolist()[:2], *stepped[0].tolist(), clipped]


def coefficients(
    rows: Sequence[tuple[Schedule, int]], device: str | torch.device, latent_dims: int = 3
) -> Coefficients:
    """Gather the next step of each of N rows, given its schedule and the number of steps already done.

    Args:
        latent_dims: number of dimensions of a row's latents, C x ...
    """
    ones = (1,) * latent_dims
    table = torch.stack([schedule.table[done] for schedule, done in rows]).to(device)
    single, earlier, remembers = table.split([table.shape[1] - PLMS_OUTPUTS - 1, PLMS_OUTPUTS, 1], dim=1)
    columns = single.T.reshape(single.shape[1], -1, *ones).unbind()
    weights = earlier.reshape(-1, PLMS_OUTPUTS, *ones), remembers.reshape(-1, *ones)
    return Coefficients._make([*columns, *weights])


def advance(
    step: Coefficients,
    latents: torch.Tensor,
    output: torch.Tensor,
    previous: torch.Tensor,
    clip: float | None = None,
    earlier: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Advance N rows by one step each.

    The solver is DDIM (arXiv 2010.02502, eq. 12), Euler (arXiv 2206.00364, algorithm 1 without churn),
    DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2), PNDM's linear multistep (arXiv 2202.09778, eq. 12) or
    flow-matching Euler (arXiv 2403.03206).

    Args:
        latents: float32, N x C x ..., noisy.
        output: the denoiser's output with guidance applied, of the same shape.
        previous: clean latents that the row's last step predicted; zeros before the first.
        clip: the bound from `clip_range`.
        earlier: N x 3 x C x ..., outputs of earlier calls, newest first; zeros before the first. None if no
            row's scheduler uses them, see `num_earlier`.

    Returns:
        The next latents and the predicted clean latents, each of the shape of `latents`, and `earlier` for
        the next call.
    """
    clean = step.clean_latents * latents + step.clean_output * output
    following = step.next_latents * latents + step.next_output * output + step.next_previous * previous
    if earlier is not None:
        following = following + (step.next_earlier * earlier).sum(dim=1)
        shifted = torch.cat([output[:, None], earlier[:, :-1]], dim=1)
        earlier = torch.where(step.remembers[:, None] > 0, shifted, earlier)
    if clip is None:
        return following, clean, earlier
    clamped = clean.clamp(-clip, clip)
    return following + step.next_clipped * (clamped - clean), clamped, earlier
