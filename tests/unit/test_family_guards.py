"""What is refused or told about a model's family before anything starts."""

import json
import shutil
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError
from ray_jobs.data.curation.rows import gather_rows
from ray_jobs.data.encoding.long_captions import count
from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.sampling import sample_pictures
from ray_jobs.planning.checks import check_stages
from ray_jobs.weights.loading import load_pipeline, load_tokenizers
from serving.engine.engine import Engine
from serving.request import Request, RequestError
from tests.indexed import indexed, write_rows
from tests.serving import plain_diffusers
from tests.tiny_models import MODELS


@pytest.mark.parametrize(
    ("other", "nearest"),
    [
        ("FluxControlPipeline", "FluxPipeline"),
        ("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLPipeline"),
        ("StableDiffusionUpscalePipeline", "StableDiffusionPipeline"),
        ("HunyuanDiTPipeline", None),
    ],
)
def test_a_family_that_only_diffusers_has_is_named_with_the_nearest_and_the_page_that_adds_one(
    other: str, nearest: str | None
) -> None:
    with pytest.raises(ValueError) as refused:
        family_of(other)
    said = str(refused.value)
    assert said.startswith(f"model.base: {other} is not supported, only AuraFlowPipeline, ")
    assert (f"(the nearest is {nearest})" in said) if nearest else ("nearest" not in said)
    page = said.rpartition(": ")[2]
    assert (Path(__file__).parents[2] / page).is_file() and page == "docs/add-a-family.md"


def reconfigured(folder: Path, copy: Path, file: str, **settings: Any) -> Path:
    """A copy of a model with other settings in one of its files."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(config | settings))
    return copy


INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("name", "file", "settings", "distilled"),
    [
        ("Flux2KleinPipeline", INDEX, {"is_distilled": False}, False),
        ("Flux2KleinPipeline", INDEX, {"is_distilled": True}, True),
        ("ZImagePipeline", SCHEDULER, {"shift": 6.0}, False),  # Z-Image
        ("ZImagePipeline", SCHEDULER, {"shift": 3.0}, True),  # Z-Image-Turbo
        ("FluxPipeline", SCHEDULER, {}, False),
        ("FluxPipeline-schnell", SCHEDULER, {}, True),
        ("FluxPipeline-schnell", SCHEDULER, {"use_dynamic_shifting": True}, False),
        ("StableDiffusionPipeline-consistency", SCHEDULER, {}, True),
        ("StableDiffusionPipeline", SCHEDULER, {}, False),
        ("QwenImagePipeline", SCHEDULER, {}, False),
        ("QwenImage21Pipeline", INDEX, {}, False),
    ],
)
def test_who_trains_a_distilled_model_is_told_what_happens_before_it_starts(
    tiny: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    file: str,
    settings: dict[str, Any],
    distilled: bool,
) -> None:
    base = reconfigured(tiny(name), tmp_path / "base", file, **settings)
    warnings = check_stages(configured(base, evaluate={"guidance_scale": 1.0}))
    assert len(warnings) == distilled
    if distilled:
        assert warnings[0].startswith(f"warning: model.base: {base} looks distilled for a few steps. ")
        assert "blurred" in warnings[0] and "Train the model that it was distilled from" in warnings[0]
    assert family_of(name.partition("-")[0]).is_distilled(load_pipeline(str(base))) == distilled


def test_a_distilled_qwen_image_2_1_that_would_draw_in_other_steps_than_its_own_is_refused(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its pipeline takes its own steps, whatever number is asked for."""
    base = reconfigured(tiny("QwenImage21Pipeline"), tmp_path / "base", INDEX, sample_sigmas=[1.0, 0.7, 0.2])
    steps: dict[str, Any] = {"evaluate": {"inference_steps": 3}, "serve": {"default_steps": 3}}
    [warning] = check_stages(configured(base, **steps))
    assert "looks distilled for a few steps" in warning
    with pytest.raises(ConfigError, match=r"evaluate.inference_steps: .* cannot sample in 4 steps"):
        check_stages(configured(base, **steps | {"evaluate": {"inference_steps": 4}}))
    with pytest.raises(ConfigError, match=r"serve.default_steps: .* cannot sample in 4 steps"):
        check_stages(configured(base, **steps | {"serve": {"default_steps": 4}}))


ANCESTRAL, LCM = "EulerAncestralDiscreteScheduler", "FlowMatchLCMScheduler"


@pytest.mark.parametrize(
    ("name", "scheduler", "settings", "distilled"),
    [
        ("StableDiffusionXLPipeline", ANCESTRAL, {"timestep_spacing": "trailing"}, True),  # SDXL-Turbo
        ("StableDiffusionXLPipeline", ANCESTRAL, {"timestep_spacing": "leading"}, False),
        ("StableDiffusionXLPipeline", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, False),
        ("HiDreamImagePipeline", LCM, {"shift": 6.0}, True),  # HiDream-I1-Dev
        ("HiDreamImagePipeline", LCM, {"shift": 3.0}, True),  # HiDream-I1-Fast
        ("HiDreamImagePipeline", "UniPCMultistepScheduler", {"flow_shift": 3.0}, False),  # HiDream-I1-Full
        # Stable Diffusion 3.5 Large, and Large Turbo, which nothing in its configuration tells from it.
        ("StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, False),
    ],
)
def test_a_distilled_model_is_recognised_by_its_published_scheduler(
    name: str, scheduler: str, settings: dict[str, Any], distilled: bool
) -> None:
    found = getattr(diffusers, scheduler)(**settings)
    # What `is_distilled` reads of a model: its configuration, its scheduler and its denoiser's configuration.
    model: Any = SimpleNamespace(config={}, scheduler=found, unet=SimpleNamespace(config={}))
    assert family_of(name).is_distilled(model) == distilled


def configured(base: Path, **sections: Any) -> Config:
    given = {
        "name": "guarded",
        "data": {"source": "pictures", "resolution": 64},
        "model": {"base": str(base)},
        "search": {"learning_rates": [1e-3], "ladder": [2]},
    }
    return Config.model_validate(given | sections)


UNGUIDED = {"evaluate": {"guidance_scale": 1.0}}


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({}, "evaluate.guidance_scale: 3;"),
        (
            UNGUIDED | {"search": {"learning_rates": [1e-3], "ladder": [2], "guidance_scales": [1.0, 2.5]}},
            "search.guidance_scales: 2.5;",
        ),
        (UNGUIDED | {"serve": {"default_guidance_scale": 4.0}}, "serve.default_guidance_scale: 4;"),
    ],
)
def test_guidance_that_a_distilled_flux_2_would_ignore_is_refused_before_anything_starts(
    tiny: Callable[[str], Path], tmp_path: Path, sections: dict[str, Any], field: str
) -> None:
    base = reconfigured(tiny("Flux2KleinPipeline"), tmp_path / "base", INDEX, is_distilled=True)
    with pytest.raises(ConfigError, match=f"{field} this model is distilled .* set it to 1"):
        check_stages(configured(base, **sections))


def test_a_distilled_flux_2_is_drawn_without_guidance_as_its_pipeline_draws_it(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """The pipeline ignores the scale; ours used to apply it."""
    base = reconfigured(tiny("Flux2KleinPipeline"), tmp_path / "base", INDEX, is_distilled=True)
    request = Request("a small red circle", 3, 2, 1.0, None, 64, 64)
    pipeline, theirs = load_pipeline(str(base)), plain_diffusers.load(base)
    expected = plain_diffusers.draw(theirs, replace(request, guidance_scale=4.0))
    assert torch.equal(expected, plain_diffusers.draw(theirs, request))
    engine = Engine(pipeline)
    with pytest.raises(RequestError, match=r"guidance_scale: 4.0; this model is distilled .*, which is 1"):
        engine.submit(replace(request, guidance_scale=4.0))
    future = engine.submit(request)
    engine.drain()
    assert (future.result(0).pixels - expected).abs().max() < 0.55
    options: dict[str, Any] = {"shapes": [(64, 64)], "num_steps": 2, "batch_size": 1}
    [ours] = sample_pictures(pipeline, [request.prompt], [3], guidance_scale=1.0, **options)
    assert (ours[0].permute(1, 2, 0) - expected).abs().max() < 0.55
    with pytest.raises(ValueError, match="evaluate.guidance_scale: 4; this model is distilled"):
        list(sample_pictures(pipeline, [request.prompt], [3], guidance_scale=4.0, **options))


@pytest.mark.parametrize("name", MODELS)
def test_a_caption_is_cut_where_its_end_no_longer_changes_what_is_read(
    tiny: Callable[[str], Path], name: str
) -> None:
    folder = tiny(name)
    pipeline, tokenizers = load_pipeline(str(folder)), load_tokenizers(str(folder))
    text = family_of(pipeline).text

    def changed(words: int) -> bool:
        """Whether the last word reaches any tokenizer's output."""
        prompts = [text.as_prompt(" ".join(["red"] * (words - 1) + [last])) for last in ("red", "blue")]
        tokens = text.tokenize(pipeline, prompts)
        return any(not torch.equal(*column) for column in tokens.values())

    def cut(words: int) -> bool:
        return text.cut(tokenizers, ["red " * words])[0]

    longest = bisect_left(range(2048), True, lo=1, key=cut) - 1
    assert not cut(longest) and cut(longest + 1)
    assert changed(longest)
    # A template's end is cut before a caption's: the thoughts of FLUX.2 klein that are none, for example.
    assert not changed(longest + 64)
    assert text.cut(tokenizers, ["red", "red " * 2048, ""]) == [False, True, False]


def test_prepare_says_how_many_captions_of_the_set_are_cut(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    base, index = tiny("StableDiffusionPipeline"), Storage.open(str(tmp_path))
    long = "a small red circle " * 9
    for file, captions in {"a": ["red", long], "b": [long, long, "blue"]}.items():
        write_rows(index, file, [{"text": text} for text in captions])
    rows = gather_rows([indexed("a"), indexed("b")], index, index.child("set"))
    config = configured(base)
    kept = np.array([True, True, False, True, True])
    line = f"2 of 4 captions are longer than {base} reads, and are cut"
    assert count(config, rows, kept) == line
    assert count(config, rows, kept & [True, False, True, False, True]) is None
