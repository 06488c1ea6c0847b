"""Reference pictures and masks: families that take them draw with them as their pipelines in diffusers do."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from ray_jobs.data.encoding.encoding import with_masks
from ray_jobs.diffusion.families import FAMILIES, family_of
from ray_jobs.diffusion.families.family import NEXT_TIMESTEP, reference
from ray_jobs.diffusion.finetuning import FineTuning
from ray_jobs.diffusion.objectives import Draws, FlowMatching, LossSettings
from ray_jobs.diffusion.sampling import (
    Prompts,
    decode_latents,
    encode_prompts,
    encode_references,
    initial_noise,
    null_captions,
    sample_latents,
    sample_pictures,
    seeded,
    whole_pictures,
)
from ray_jobs.weights.loading import load_pipeline
from tests.serving import plain_diffusers
from tests.tiny_models import BY_NAME, MODELS, guidance
from tests.unit.test_families import in_steps, of_steps
from tests.unit.test_family_guards import reconfigured

QWEN_2509 = "QwenImageEditPlusPipeline-2509"  # the same but for a switch
EDITORS = [name for name in MODELS if BY_NAME[name][0].max_references]
PAINTERS = [name for name in MODELS if BY_NAME[name][0].paints_masks]
PROMPT, HEIGHT, WIDTH = "a small red circle", 64, 96


def picture(seed: int, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """A picture of broad bands: uint8, 3 x height x width."""
    colours = torch.rand((3, height // 16, width // 16), generator=torch.Generator().manual_seed(seed))
    return (255 * colours).to(torch.uint8).repeat_interleave(16, 1).repeat_interleave(16, 2)


def pillow(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def drawn(pipeline: Any, references: list[torch.Tensor], guidance_scale: float = 4.0) -> torch.Tensor:
    family = family_of(pipeline)
    noise = initial_noise(seeded([3]), family.codec.shape(pipeline.vae.config, HEIGHT, WIDTH))
    shown = [pixels[None] for pixels in references]
    looked_at = {
        reference(n): encode_references(pipeline, pixels[None]) for n, pixels in enumerate(references)
    }
    latents = sample_latents(
        family,
        family.model(pipeline),
        pipeline.scheduler,
        noise,
        encode_prompts(pipeline, [PROMPT], pictures=shown)
        | whole_pictures(family, 1, HEIGHT, WIDTH)
        | looked_at,
        null_captions(pipeline, pictures=shown),
        num_steps=3,
        guidance_scale=guidance(pipeline, guidance_scale),
    )
    return latents


def test_families_that_edit_are_these() -> None:
    editors = {name for name, family in FAMILIES.items() if family.max_references}
    assert editors == {
        *("FluxKontextPipeline", "Flux2Pipeline", "Flux2KleinPipeline", "Flux3ModularPipeline"),
        *("Flux3DistilledModularPipeline", "QwenImageEditPlusPipeline"),
    }


@pytest.mark.parametrize("name", [*EDITORS, QWEN_2509])
@pytest.mark.parametrize("count", [1, 2])
def test_an_edit_is_that_of_the_plain_pipeline(
    tiny: Callable[[str], Path], tmp_path: Path, name: str, count: int
) -> None:
    folder = tiny(name.removesuffix("-2509"))
    if name == QWEN_2509:
        folder = reconfigured(folder, tmp_path / "base", "transformer/config.json", zero_cond_t=False)
    pipeline, theirs = (
        plain_diffusers.attentive(each) for each in (load_pipeline(str(folder)), plain_diffusers.load(folder))
    )
    family = family_of(pipeline)
    if count > family.max_references:
        pytest.skip(f"{name} takes {family.max_references}")
    references = [picture(1), picture(2, 64, 64)][:count]
    options: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 3}
    options |= family.guidance_arguments(getattr(pipeline, family.denoiser).config, 4.0)
    plain_diffusers.keep_size(theirs, HEIGHT, WIDTH)
    images = [pillow(pixels) for pixels in references]
    expected = theirs(
        prompt=PROMPT,
        image=images if count > 1 else images[0],
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        **plain_diffusers.known(theirs, deepcopy(options)),
    ).images[0]
    ours = drawn(pipeline, references)
    assert (decode_latents(pipeline, ours)[0] - 255 * expected).abs().max() < 0.5 + 255e-4
    assert (ours - drawn(pipeline, [])).abs().max() > 1e-3  # the references matter
    if count == 2:
        assert (ours - drawn(pipeline, references[::-1])).abs().max() > 1e-3  # and their order


@pytest.mark.parametrize("name", EDITORS)
def test_the_loss_with_a_reference_is_that_of_the_pipelines_own_pieces(
    tiny: Callable[[str], Path], name: str
) -> None:
    """Of a step of the pipeline's own edit: what its scheduler receives is the target's."""
    pipeline, theirs = (
        plain_diffusers.attentive(each)
        for each in (load_pipeline(str(tiny(name))), plain_diffusers.load(tiny(name)))
    )
    family, steps = family_of(pipeline), plain_diffusers.recorded_steps(theirs)
    plain_diffusers.keep_size(theirs, HEIGHT, WIDTH)
    options: dict[str, Any] = {"num_inference_steps": 4, "height": HEIGHT, "width": WIDTH}
    options |= family.guidance_arguments(getattr(pipeline, family.denoiser).config, 1.0)
    options |= {"image": pillow(picture(1)), "generator": torch.Generator().manual_seed(3)}
    theirs(prompt=PROMPT, output_type="latent", **plain_diffusers.known(theirs, options))
    output, timestep, sample = steps[2]
    sigma = timestep.reshape(1).float() / 1000

    shape = (1, *family.codec.shape(pipeline.vae.config, HEIGHT, WIDTH))
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(3))  # the pipeline's own
    straight = in_steps(theirs, drawn, rows=1)
    clean = (sample - sigma * straight) / (1 - sigma)
    expected = (output - (straight - clean)).square().flatten(1).mean(dim=1)

    objective = family.schedule.objective(pipeline.scheduler.config)
    assert isinstance(objective, FlowMatching)
    model = FineTuning(pipeline, family, objective, LossSettings(timestep_sampling="uniform"))
    draws = Draws(sigma / (objective.shift - (objective.shift - 1) * sigma), drawn)
    sizes = whole_pictures(family, 1, HEIGHT, WIDTH)
    if family.takes_next_timestep(getattr(pipeline, family.denoiser)):
        sizes[NEXT_TIMESTEP] = steps[3][1].reshape(1)
    captions = encode_prompts(pipeline, [PROMPT]) | sizes
    latents = of_steps(theirs, clean, drawn.shape)
    with torch.no_grad():
        looked_at = {reference(0): encode_references(pipeline, picture(1)[None])}
        looked_at |= encode_prompts(pipeline, [PROMPT], pictures=[picture(1)[None]]) | sizes
        loss = model(latents, captions | looked_at, draws)
        without = model(latents, captions, draws)
    assert torch.allclose(loss, expected, rtol=1e-4)
    assert not torch.allclose(loss, without, rtol=1e-3)


@pytest.mark.parametrize("name", PAINTERS)
def test_what_is_painted_into_a_mask_is_that_of_the_plain_pipeline(
    tiny: Callable[[str], Path], name: str
) -> None:
    """Also the masked pictures' sample of the posterior, by the seed."""
    folder = tiny(name)
    pipeline, theirs = load_pipeline(str(folder)), plain_diffusers.load(folder)
    masks = [Image.new("L", (WIDTH, HEIGHT)) for _ in range(3)]
    ImageDraw.Draw(masks[0]).ellipse((10, 5, 60, 50), fill=255)
    ImageDraw.Draw(masks[1]).rectangle((3, 3, 40, 60), fill=255)  # within patches too
    masked = []
    for seed, mask in enumerate(masks):
        pixels = with_masks(picture(seed).permute(1, 2, 0).numpy()[None], np.array(mask)[None])
        masked.append(torch.from_numpy(pixels)[0].permute(2, 0, 1))

    def drawn(of_each: list[torch.Tensor] | None) -> torch.Tensor:
        batches = sample_pictures(
            pipeline,
            [PROMPT] * 3,
            range(3),
            shapes=[(HEIGHT, WIDTH)] * 3,
            num_steps=3,
            guidance_scale=30.0,
            batch_size=2,
            references=None if of_each is None else lambda number: [of_each[number]],
        )
        return torch.cat(list(batches)).float()

    ours = drawn(masked)
    for number, mask in enumerate(masks):
        expected = theirs(
            prompt=PROMPT,
            image=pillow(picture(number)),
            mask_image=mask,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=3,
            guidance_scale=30.0,
            generator=torch.Generator().manual_seed(number),
            output_type="pt",
        ).images[0]
        assert (ours[number] - 255 * expected).abs().max() < 0.5 + 255e-4
    assert (ours - drawn(None)).abs().max() > 1, "the picture and its mask matter"
    assert (ours - drawn([masked[0], masked[0], masked[2]]))[1].abs().max() > 1


SEEING = [name for name in MODELS if BY_NAME[name][0].text.sees_references]


@pytest.mark.parametrize("name", SEEING)
def test_a_text_encoder_sees_where_in_the_pictures_things_are(tiny: Callable[[str], Path], name: str) -> None:
    """Captions of a batch are as each alone, in every order of sizes, and without captions too."""
    pipeline = load_pipeline(str(tiny(name)))
    with torch.no_grad():
        for weight in pipeline.text_encoder.parameters():
            weight *= 4 if weight.ndim == 2 else 1
    several = [torch.stack([picture(n) for n in seeds]) for seeds in ((1, 2, 3), (4, 5, 6))]
    together = encode_prompts(pipeline, [PROMPT, "a blue cross", ""], pictures=several)
    null = null_captions(pipeline, pictures=several)
    for row, caption in enumerate([PROMPT, "a blue cross", ""]):
        own = [each[[row]] for each in several]
        alone, empty = (
            encode_prompts(pipeline, [caption], pictures=own),
            null_captions(pipeline, pictures=own),
        )
        assert all(torch.allclose(together[key][row], alone[key][0], atol=1e-5) for key in alone)
        assert all(torch.allclose(null[key][row], empty[key][0], atol=1e-5) for key in empty)
    embeds = together["prompt_embeds"]
    turned = [each.flip(-1) for each in several]
    other = encode_prompts(pipeline, [PROMPT, "a blue cross", ""], pictures=turned)["prompt_embeds"]
    assert (embeds - other).abs().max() > 0.1
    assert family_of(pipeline).text.as_prompt("a<|image_pad|>b") == "ab"


@pytest.mark.parametrize("name", SEEING)
def test_batches_of_edits_are_each_drawn_with_their_own_pictures(
    tiny: Callable[[str], Path], name: str
) -> None:
    """Also by embeddings that wait, which are of the pictures that a caption came with."""
    pipeline = plain_diffusers.attentive(load_pipeline(str(tiny(name))))
    prompts = Prompts(pipeline, "cpu")

    def drawn(seeds: list[int], of: Prompts | None = None) -> list[torch.Tensor]:
        batches = sample_pictures(
            pipeline,
            [PROMPT] * len(seeds),
            [7] * len(seeds),
            shapes=[(HEIGHT, WIDTH)] * len(seeds),
            num_steps=2,
            guidance_scale=3.0,
            batch_size=2,
            encoded=of,
            references=lambda number: [picture(seeds[number])],
        )
        return [each.float() for batch in batches for each in batch]

    together, again = drawn([1, 2, 3], prompts), drawn([3, 1], prompts)
    alone = [drawn([seed])[0] for seed in (1, 2, 3)]
    for ours, expected in zip([*together, *again], [*alone, alone[2], alone[0]], strict=True):
        assert (ours - expected).abs().max() <= 1
    assert (together[0] - together[1]).abs().max() > 3
