"""Every row of a batch steps as its own diffusers scheduler would, whatever the others are at."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.solvers import (
    BY_NAME,
    advance,
    check_scheduler,
    clip_range,
    coefficients,
    num_earlier,
    scheduler_of,
    tabulate,
)

STEPS = [2, 1, 5, 14, 15, 30]
SHAPE = (4, 6, 10)  # of a picture's latents
FAMILY = family_of("StableDiffusionPipeline")
FLOW = family_of("StableDiffusion3Pipeline")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

TABULATED: dict[str, dict[str, Any]] = {"PNDMScheduler": {"skip_prk_steps": True}}
CONFIGURATIONS: list[tuple[str, dict[str, Any]]] = [
    *[("DDIMScheduler", {"timestep_spacing": s}) for s in ("leading", "trailing", "linspace")],
    *[("DDIMScheduler", {"prediction_type": p}) for p in ("sample", "v_prediction")],
    ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    (
        "DDIMScheduler",
        {
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "clip_sample_range": 0.5,
        },
    ),
    *[("EulerDiscreteScheduler", {"timestep_spacing": s}) for s in ("leading", "trailing", "linspace")],
    *[("EulerDiscreteScheduler", {"prediction_type": p}) for p in ("sample", "v_prediction")],
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    *[("DPMSolverMultistepScheduler", {"timestep_spacing": s}) for s in ("leading", "trailing", "linspace")],
    *[("DPMSolverMultistepScheduler", {"prediction_type": p}) for p in ("sample", "v_prediction")],
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun", "lower_order_final": False}),
    ("DPMSolverMultistepScheduler", {"solver_order": 1, "euler_at_final": True}),
    *[
        ("PNDMScheduler", {"skip_prk_steps": True, "timestep_spacing": s})
        for s in ("leading", "trailing", "linspace")
    ],
    (
        "PNDMScheduler",
        {"skip_prk_steps": True, "steps_offset": 1, "prediction_type": "v_prediction"},
    ),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "shift_terminal": 0.1}),
    (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    ),
]


def build(name: str, options: dict[str, Any]) -> Any:
    betas = {} if name.startswith("Flow") else BETAS
    return getattr(diffusers, name)(**betas, **options)


def output_of(inputs: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A denoiser for these tests: bounded, and neither linear in the latents nor blind to the timestep."""
    return torch.tanh(inputs * 0.7 + 0.3) + 0.2 * torch.sin(timestep / 100)


def drawn_by_diffusers(scheduler: Any, noise: torch.Tensor, num_steps: int) -> torch.Tensor:
    family = FLOW if type(scheduler).__name__.startswith("Flow") else FAMILY
    family.schedule.set_timesteps(scheduler, num_steps, noise.shape, "cpu")
    latents = noise[None] * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        inputs = latents
        if hasattr(scheduler, "scale_model_input"):
            inputs = scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(output_of(inputs, timestep), timestep, latents, return_dict=False)[0]
    return latents[0]


@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS)
def test_rows_with_different_step_counts_step_together(name: str, options: dict[str, Any]) -> None:
    scheduler = build(name, options)
    check_scheduler(scheduler)
    family = FLOW if name.startswith("Flow") else FAMILY
    noise = torch.randn((len(STEPS), *SHAPE), generator=torch.Generator().manual_seed(0))
    counts = [max(2, count) for count in STEPS] if options.get("shift_terminal") else STEPS  # 0 / 0 there
    schedules = [tabulate(scheduler, family, num_steps, SHAPE) for num_steps in counts]
    latents = {row: noise[row] * schedule.noise_scale for row, schedule in enumerate(schedules)}
    clean = {row: torch.zeros(SHAPE) for row in latents}
    memory = num_earlier(scheduler)
    kept = {row: torch.zeros(memory, *SHAPE) for row in latents}
    finished = {}
    for call in range(max(STEPS) + len(STEPS) + 1):
        # Row r joins at call r, so that all are at different steps; each leaves with its last one.
        present = [row for row in latents if row <= call and row not in finished]
        if not present:
            break
        step = coefficients([(schedules[row], call - row) for row in present], "cpu")
        stacked = torch.stack([latents[row] for row in present])
        output = output_of(stacked * step.input_scale, step.timestep)
        previous = torch.stack([clean[row] for row in present])
        earlier = torch.stack([kept[row] for row in present]) if memory else None
        following, predicted, earlier = advance(
            step, stacked, output, previous, clip_range(scheduler), earlier
        )
        for place, row in enumerate(present):
            latents[row], clean[row] = following[place], predicted[place]
            kept[row] = kept[row] if earlier is None else earlier[place]
            if call - row + 1 == len(schedules[row]):
                finished[row] = latents[row]
    for row, count in enumerate(counts):
        expected = drawn_by_diffusers(build(name, options), noise[row], count)
        assert torch.allclose(finished[row], expected, rtol=1e-4, atol=1e-4), f"{count} steps"


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_the_clean_latents_of_the_last_step_are_the_picture(name: str) -> None:
    scheduler = build(name, {"prediction_type": "v_prediction"})
    schedule = tabulate(scheduler, FAMILY, 4, SHAPE)
    noise = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(0))
    latents, clean = noise * schedule.noise_scale, torch.zeros_like(noise)
    for done in range(4):
        step = coefficients([(schedule, done)], "cpu")
        output = output_of(latents * step.input_scale, step.timestep)
        latents, clean, _ = advance(step, latents, output, clean, clip_range(scheduler))
    assert torch.allclose(latents, clean, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("DDPMScheduler", {}, "DDPMScheduler cannot be served, only DDIMScheduler"),
        ("EulerAncestralDiscreteScheduler", {}, "DPMSolverMultistepScheduler"),
        ("UniPCMultistepScheduler", {}, "UniPCMultistepScheduler cannot be served"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "set serve.solver to euler"),
        ("FlowMatchLCMScheduler", {}, "set serve.solver to euler"),
        ("LCMScheduler", {}, "set serve.solver, for example to dpm"),
        ("PNDMScheduler", {}, "set skip_prk_steps=True"),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++"},
            "set algorithm_type='dpm",
        ),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "set solver_order=1 or 2"),
        ("DDIMScheduler", {"thresholding": True}, "set thresholding=False"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "set stochastic_sampling=False"),
    ],
)
def test_a_scheduler_that_is_not_tabulated_is_refused(name: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=f"^solver: .*{told}"):
        check_scheduler(build(name, options))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"]
)
def test_a_schedule_has_as_many_steps_as_were_asked_for(name: str, spacing: str) -> None:
    """In diffusers 0.42 trailing spacing adds a timestep -1 for 12 of these counts."""
    scheduler = build(name, {"timestep_spacing": spacing} | TABULATED.get(name, {}))
    for count in range(1, 301):
        FAMILY.schedule.set_timesteps(scheduler, count, SHAPE, "cpu")
        repeated = name == "PNDMScheduler" and count > 1  # its first step is made of two calls
        assert len(scheduler.timesteps) == count + repeated
        assert scheduler.timesteps[-1] >= 0
        assert len(getattr(scheduler, "sigmas", [0] * (count + 1))) == count + 1


def test_no_step_of_a_trailing_schedule_blows_the_latents_up() -> None:
    scheduler = build("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False})
    schedule = tabulate(scheduler, FAMILY, 61, SHAPE)
    assert len(schedule) == 61
    assert schedule.table[-1, 4] < 1.1  # of the latents; from the timestep -1 it was 14.65


@pytest.mark.parametrize("solver", BY_NAME)
def test_another_solver_keeps_the_spacing_that_the_models_file_leaves_to_its_class(
    tmp_path: Path, solver: Any
) -> None:
    """The scheduler file of Stable Diffusion 1.5 names none; PNDM's default is leading, Euler's linspace."""
    file = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1, **BETAS}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(file))
    own = diffusers.PNDMScheduler.from_pretrained(tmp_path)
    found = scheduler_of(own, solver)
    explicit, options = {"timestep_spacing": "leading", **own.config}, BY_NAME[solver][1]
    expected = getattr(diffusers, BY_NAME[solver][0])(
        **{name: explicit[name] for name in ("timestep_spacing", "steps_offset", *BETAS)}, **options
    )
    for scheduler in (own, found, expected):
        scheduler.set_timesteps(20)
    assert found.timesteps.tolist() == expected.timesteps.tolist()
    # diffusers' DPM-Solver++ spaces its steps as if there were one more.
    assert (own.timesteps[0], found.timesteps[0]) == (951, 941 if solver == "dpm++" else 951)


@pytest.mark.parametrize("solver", BY_NAME)
def test_another_solver_keeps_the_models_diffusion(solver: Any) -> None:
    """PNDM is what Stable Diffusion 1.5 is published with."""
    own = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "steps_offset": 1}
    found = scheduler_of(build("PNDMScheduler", own), solver)
    check_scheduler(found)
    assert clip_range(found) is None
    assert {name: found.config[name] for name in {**own, **BETAS}} == {**own, **BETAS}
    assert scheduler_of(found, "model") is found


def test_another_solver_is_not_random() -> None:
    sde = build("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3})
    check_scheduler(scheduler_of(sde, "dpm++"))


FLOWS = [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchLCMScheduler", {"shift": 3.0}),  # of HiDream-I1 Dev
    *(
        (name, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0})
        for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")  # Sana's, HiDream-I1 Full's
    ),
]


@pytest.mark.parametrize(("name", "options"), FLOWS)
def test_flow_matching_has_eulers_solver_with_the_models_shift(name: str, options: dict[str, Any]) -> None:
    found = scheduler_of(build(name, options), "euler")
    check_scheduler(found)
    euler = build("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
    assert torch.equal(tabulate(found, FLOW, 4, SHAPE).table, tabulate(euler, FLOW, 4, SHAPE).table)


@pytest.mark.parametrize(("name", "options"), FLOWS)
def test_flow_matching_has_no_other_solver(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^solver: {name} is for flow matching, which has no dpm.* here"):
        scheduler_of(build(name, options), "dpm++")


def test_a_step_count_that_the_scheduler_cannot_do_is_refused() -> None:
    scheduler = build("DDIMScheduler", {})
    tabulate(scheduler, FAMILY, 1000, SHAPE)
    with pytest.raises(ValueError, match="DDIMScheduler cannot sample in 1001 steps"):
        tabulate(scheduler, FAMILY, 1001, SHAPE)
    stretched = build("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1})
    with pytest.raises(ValueError, match="cannot sample in 1 steps"), np.errstate(invalid="ignore"):
        tabulate(stretched, FLOW, 1, SHAPE)


def test_the_pipelines_scheduler_stays_as_it_is() -> None:
    scheduler = build("DDIMScheduler", {})
    before = (dict(scheduler.config), scheduler.timesteps.tolist())
    tabulate(scheduler, FAMILY, 3, SHAPE)
    assert (dict(scheduler.config), scheduler.timesteps.tolist()) == before
