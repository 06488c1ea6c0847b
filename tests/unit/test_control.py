"""A ControlNet begins as a copy that changes nothing, and draws the picture of diffusers' pipeline."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from ray_jobs.diffusion.families import CONTROLLED, FAMILIES, Family, family_of
from ray_jobs.diffusion.families.control import CONTROL, CONTROL_ROWS, CONTROL_SCALE
from ray_jobs.diffusion.families.flux import from_tokens
from ray_jobs.diffusion.finetuning import FineTuning, train_all
from ray_jobs.diffusion.objectives import Draws, FlowMatching, LossSettings
from ray_jobs.diffusion.protocols import Component, Pipeline
from ray_jobs.diffusion.sampling import control_conditions, encode_prompts, whole_pictures
from ray_jobs.weights.controlnets import controlled as read_controlled
from ray_jobs.weights.controlnets import save_controlnet
from tests.controlled import PROMPT, SIDE, as_tensor, control_image, drawn, plain_drawn, pointed

FAMILIES_WITH_CONTROL = [pytest.param(each, id=each.pipeline_class) for each in CONTROLLED.values()]


def changing(network: Component) -> Component:
    """Give the layers that begin at 0 some weights, so that a ControlNet has an effect."""
    generator = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        if not parameter.detach().any():
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def small_base(family: Family) -> Pipeline:
    """A small model whose autoencoder has a point for a posterior: SD3's pipeline draws from it unseeded."""
    pipeline = family.tiny([PROMPT])
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pointed(pipeline)


def controlled(family: Family, base: Pipeline) -> Pipeline:
    """Return diffusers' pipeline of a base and a ControlNet that has an effect."""
    assert family.control
    torch.manual_seed(0)
    return family.control.pipeline(base, changing(family.control.network(getattr(base, family.denoiser))))


@pytest.mark.parametrize("family", FAMILIES_WITH_CONTROL)
def test_the_picture_is_the_one_that_diffusers_draws(family: Family) -> None:
    base = small_base(family)
    before = dict(getattr(base, family.denoiser).config)
    pipeline = controlled(family, base)
    assert dict(getattr(base, family.denoiser).config) == before  # which diffusers' own way changes for SD3
    assert family_of(pipeline) is family and list(family.model(pipeline)) == [family.denoiser, "controlnet"]
    assert family.control
    theirs = plain_drawn(pipeline, family.control.image_argument)
    ours = drawn(pipeline, control_image())
    difference = ours.permute(1, 2, 0).float() - 255 * torch.from_numpy(theirs)
    assert difference.abs().max() < 0.55
    free = drawn(pipeline, None)
    assert (free.float() - ours.float()).abs().mean() > 5  # without a control image it draws as the base
    assert torch.equal(free, drawn(base, None))


@pytest.mark.parametrize("family", FAMILIES_WITH_CONTROL)
def test_the_loss_is_that_of_the_pipelines_own_pieces(family: Family) -> None:
    """At a step of the pipeline's own: what its denoiser predicts there is compared with the target."""
    pipeline = controlled(family, small_base(family))
    calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def record(_: object, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        latents = given[0] if given else named["hidden_states"]
        timestep = given[1] if len(given) > 1 else named["timestep"]
        calls.append((latents, torch.as_tensor(timestep).reshape(1), output[0]))

    getattr(pipeline, family.denoiser).register_forward_hook(record, with_kwargs=True)
    assert family.control
    plain_drawn(pipeline, family.control.image_argument, guidance_scale=1.0)
    noisy, timestep, predicted = calls[1]
    if family.pipeline_class == "FluxPipeline":  # which takes tokens and the share of the schedule
        side = SIDE // 16
        noisy, predicted = from_tokens(noisy, (side, side)), from_tokens(predicted, (side, side))
        timestep = 1000 * timestep
    objective = family.schedule.objective(pipeline.scheduler.config)
    noise = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(1))
    if isinstance(objective, FlowMatching):
        sigma = timestep / 1000
        clean = (noisy - sigma * noise) / (1 - sigma)
        position, target = sigma / (objective.shift - (objective.shift - 1) * sigma), noise - clean
    else:
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        kept = scheduler.alphas_cumprod[timestep.long()].reshape(1, 1, 1, 1)
        clean = (noisy - (1 - kept).sqrt() * noise) / kept.sqrt()
        position = (timestep.long() + 0.5) / 1000
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(clean, noise, timestep.long()) if velocity else noise
    expected = (predicted - target).square().mean()
    model = FineTuning(pipeline, family, objective, LossSettings(timestep_sampling="uniform")).eval()
    conditions = encode_prompts(pipeline, [PROMPT]) | whole_pictures(family, 1, SIDE, SIDE)
    with torch.no_grad():
        given = control_conditions(pipeline, as_tensor(control_image())[None])
        loss = model(clean, conditions | given, Draws(position, noise))
        without = model(clean, conditions, Draws(position, noise))
    assert torch.allclose(loss[0], expected, rtol=1e-4)
    assert not torch.allclose(loss, without, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES_WITH_CONTROL)
def test_every_layer_that_is_trained_learns_and_the_base_does_not(family: Family) -> None:
    pipeline = controlled(family, small_base(family))
    for part in family.model(pipeline).values():
        part.requires_grad_(False)
    assert family.control
    network = pipeline.controlnet
    train_all(network, family.control.unused_layers(network))
    objective = family.schedule.objective(pipeline.scheduler.config)
    model = FineTuning(pipeline, family, objective, LossSettings()).train()
    latents = torch.randn(2, *family.codec.shape(pipeline.vae.config, SIDE, SIDE))
    conditions = encode_prompts(pipeline, 2 * [PROMPT]) | whole_pictures(family, 2, SIDE, SIDE)
    conditions |= control_conditions(pipeline, as_tensor(control_image()).expand(2, -1, -1, -1))
    model(latents, conditions, Draws(torch.tensor([0.3, 0.7]), torch.randn_like(latents))).sum().backward()
    learning = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}
    assert learning == {name for name, _ in model.trained()}
    assert all(name.startswith("further_denoisers.controlnet.") for name in learning)


@pytest.mark.parametrize("family", FAMILIES_WITH_CONTROL)
def test_a_control_net_is_written_and_read_alone(family: Family, tmp_path: Path) -> None:
    base = small_base(family)
    pipeline = controlled(family, base)
    network = pipeline.controlnet
    weights = {f"net.{name}": 0.5 * each.detach() for name, each in network.named_parameters()}
    save_controlnet(deepcopy(network), "net", weights, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"controlnet"}
    again = read_controlled(base, tmp_path / "controlnet")
    assert type(again) is type(pipeline) and again.vae is base.vae
    read = dict(again.controlnet.named_parameters())
    assert all(torch.equal(read[name.removeprefix("net.")], each) for name, each in weights.items())


def test_a_control_net_of_another_base_is_refused(tmp_path: Path) -> None:
    family = FAMILIES["StableDiffusionPipeline"]
    pipeline = controlled(family, small_base(family))
    save_controlnet(pipeline.controlnet, "net", {}, tmp_path)
    other = family.tiny([PROMPT])
    settings = dict(other.unet.config) | {"cross_attention_dim": 40}
    settings.pop("_use_default_values", None)
    other.unet = type(other.unet).from_config(settings)
    with pytest.raises(ValueError, match=r"controlnet: .* there and .* it was trained for another base"):
        read_controlled(other, tmp_path / "controlnet")
    flux = FAMILIES["FluxPipeline"].tiny([PROMPT])
    with pytest.raises(ValueError, match="a ControlNetModel, where the base needs a FluxControlNetModel"):
        read_controlled(flux, tmp_path / "controlnet")
    chroma = FAMILIES["ChromaPipeline"].tiny([PROMPT])
    with pytest.raises(ValueError, match="ChromaPipeline has no ControlNets here"):
        read_controlled(chroma, tmp_path / "controlnet")


@pytest.mark.parametrize("family", FAMILIES_WITH_CONTROL)
def test_a_control_scale_counts_for_its_row_alone(family: Family) -> None:
    assert family.control
    base = small_base(family)
    torch.manual_seed(0)
    fresh = family.control.pipeline(base, family.control.network(getattr(base, family.denoiser)))
    latents = torch.randn(3, *family.codec.shape(base.vae.config, SIDE, SIDE))
    timesteps = torch.full((3,), 500.0 if family.denoiser == "transformer" else 500)
    conditions = {
        name: each.expand(3, *each.shape[1:]) for name, each in encode_prompts(base, [PROMPT]).items()
    }
    conditions |= whole_pictures(family, 3, SIDE, SIDE)
    controlled = conditions | control_conditions(fresh, as_tensor(control_image()).expand(3, -1, -1, -1))
    with torch.no_grad():
        plain = family.denoise(family.model(base), latents, timesteps, conditions)
        assert torch.equal(plain, family.denoise(family.model(fresh), latents, timesteps, controlled))
        changing(fresh.controlnet)
        whole = family.denoise(family.model(fresh), latents, timesteps, controlled)
        scales = {CONTROL_SCALE: torch.tensor([0.0, 0.5, 1.0])}
        mixed = family.denoise(family.model(fresh), latents, timesteps, controlled | scales)
        rows = torch.tensor([2, 1])
        some = {
            CONTROL: controlled[CONTROL][rows],
            CONTROL_SCALE: torch.tensor([1.0, 0.5]),
            CONTROL_ROWS: rows,
        }
        of_some = family.denoise(family.model(fresh), latents, timesteps, conditions | some)
    assert torch.equal(mixed[0], plain[0]) and torch.equal(mixed[2], whole[2])
    assert not torch.allclose(mixed[1], plain[1], atol=1e-3)
    assert not torch.allclose(mixed[1], whole[1], atol=1e-3)
    assert torch.equal(of_some[0], plain[0]) and torch.allclose(of_some, mixed, atol=1e-5)


def test_a_base_with_a_control_net_in_it_is_refused_with_what_to_give() -> None:
    with pytest.raises(ValueError, match=r"has a ControlNet in it; give a StableDiffusionPipe.*controlnet"):
        family_of("StableDiffusionControlNetPipeline")


def test_a_control_net_copies_at_most_the_blocks_that_there_are() -> None:
    flux, unet = FAMILIES["FluxPipeline"], FAMILIES["StableDiffusionPipeline"]
    assert flux.control and unet.control
    with pytest.raises(ValueError, match="2; this model has 1 blocks"):
        flux.control.network(flux.tiny([PROMPT]).transformer, 2)
    with pytest.raises(ValueError, match="2; a ControlNetModel has all blocks"):
        unet.control.network(unet.tiny([PROMPT]).unet, 2)


def test_a_control_net_of_another_kind_is_refused() -> None:
    from diffusers import ControlNetModel

    family = FAMILIES["StableDiffusionPipeline"]
    assert family.control
    network = ControlNetModel.from_unet(family.tiny([PROMPT]).unet, "bgr")
    with pytest.raises(ValueError, match="channel_order is bgr; only rgb is supported"):
        family.control.check(network)
    flux = FAMILIES["FluxPipeline"]
    assert flux.control
    with pytest.raises(ValueError, match="a ControlNetModel, where FluxControlNetModel is needed"):
        flux.control.check(network)
