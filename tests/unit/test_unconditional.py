"""What stands for no caption is what plain diffusers takes without a negative prompt, on every way."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.config import load_config
from ray_jobs.diffusion.families import Captions, family_of
from ray_jobs.diffusion.randomness import draw
from ray_jobs.diffusion.sampling import encode_prompts, null_captions
from ray_jobs.training.batch import InputMaker, Piece
from ray_jobs.training.setup import build_model
from ray_jobs.weights.encoders import Encoders
from ray_jobs.weights.loading import load_pipeline
from serving.engine.batched_lora import BatchedLoRA
from serving.engine.prompts import PromptEmbeddings, Text
from tests.serving import plain_diffusers

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
CPU = torch.device("cpu")
PROMPT, ROWS = "a small red circle", 8


NEITHER = ["SanaPipeline", "Lumina2Pipeline"]  # without the instructions that stand before a caption


@pytest.fixture(params=["sd", "sd3", "xl", "xl that says nothing", "xl without zeros", *NEITHER])
def base(request: pytest.FixtureRequest, tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A model; those of Stable Diffusion XL differ in `force_zeros_for_empty_prompt`, by default true."""
    if request.param in NEITHER:
        return tiny(request.param)
    kind, _, which = request.param.partition(" ")
    folder = request.getfixturevalue({"sd": "tiny_model", "sd3": "tiny_sd3", "xl": "tiny_xl"}[kind])
    if not which:
        return folder
    shutil.copytree(folder, tmp_path / "base")
    path = tmp_path / "base" / "model_index.json"
    index = json.loads(path.read_text())
    del index["force_zeros_for_empty_prompt"]
    path.write_text(json.dumps(index | ({"force_zeros_for_empty_prompt": False} if "zeros" in which else {})))
    return tmp_path / "base"


@torch.no_grad()
def negative(base: Path, prompt: str | None) -> Captions:
    """What diffusers' own pipeline takes beside a prompt, for a negative prompt or none."""
    pipeline = plain_diffusers.load(base)
    if type(pipeline).__name__ == "StableDiffusionPipeline":
        return {"prompt_embeds": pipeline.encode_prompt(PROMPT, "cpu", 1, True, prompt)[1]}
    if type(pipeline).__name__ in NEITHER:
        asked = {} if prompt is None else {"negative_prompt": prompt}
        _, _, embeds, mask = pipeline.encode_prompt(PROMPT, True, **asked)
        return {"prompt_embeds": embeds * mask[..., None], "prompt_mask": mask.bool()}
    more = (None, None) if type(pipeline).__name__ == "StableDiffusion3Pipeline" else ()
    _, embeds, _, pooled = pipeline.encode_prompt(
        PROMPT, *more, do_classifier_free_guidance=True, negative_prompt=prompt
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def same(ours: Captions, theirs: Captions) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.allclose(ours[name].float(), theirs[name].float(), atol=1e-5) for name in theirs)


def test_sampling_takes_none_and_the_empty_prompt_as_diffusers_does(base: Path) -> None:
    pipeline = load_pipeline(str(base))
    assert same(null_captions(pipeline), negative(base, None))
    assert same(encode_prompts(pipeline, [""], negative=True), negative(base, ""))
    zeros = pipeline.config.get("force_zeros_for_empty_prompt", False)
    assert same(negative(base, None), negative(base, "")) is not zeros


def test_serving_takes_none_and_the_empty_prompt_as_diffusers_does(base: Path) -> None:
    pipeline = load_pipeline(str(base))
    low_rank = BatchedLoRA(family_of(pipeline).adaptable(pipeline))
    as_negative = family_of(pipeline).text.as_negative
    prompts = PromptEmbeddings(pipeline, low_rank, device="cpu", max_bytes=1 << 20)
    for _ in range(2):  # encoded, then kept
        none, empty, shouted = prompts.embed(
            [Text(None, None), Text("", None), Text(as_negative("Blur "), None)]
        )
        assert same({name: each[None] for name, each in none.items()}, negative(base, None))
        assert same({name: each[None] for name, each in empty.items()}, negative(base, ""))
        assert same({name: each[None] for name, each in shouted.items()}, negative(base, "Blur "))


@pytest.mark.parametrize("text_encoders", ["false", "true"])
def test_dropped_captions_reach_the_denoiser_as_diffusers_has_none(base: Path, text_encoders: str) -> None:
    """Rows as they are cached and streamed; class rows of prior preservation are among them."""
    config = load_config(
        DEMO,
        [
            f"model.base={base}",
            "train.lora.target_modules=null",
            "train.batch_size=8",
            "train.caption_dropout=0.5",
            "train.prior_loss_weight=1",
            "data.num_class_images=1",
            f"train.train_text_encoder={text_encoders}",
        ],
    )
    encoders = Encoders(str(base))
    family, shape = encoders.family, encoders.family.codec.shape(encoders.pipeline.vae.config, 64, 64)
    if text_encoders == "true" and not family.trainable_encoders:
        with pytest.raises(ValueError, match="has no text encoder that can be trained; turn it off"):
            build_model(config)
        return
    rows = encoders.encode_captions([PROMPT] * ROWS)
    rows |= {name: torch.zeros(ROWS, *shape) for name in ("latents_mean", "latents_logvar")}
    rows |= {"conditioning": torch.tensor([[64, 64, 0, 0, 64, 64]] * ROWS)}
    pipeline, model = build_model(config)
    model.eval()
    inputs = InputMaker(
        pipeline.vae,
        model,
        encoders.encode_captions([""], negative=True),
        CPU,
        seed=config.seed,
        caption_dropout=config.train.caption_dropout,
    )
    made, _ = inputs.make(Piece(rows, list(range(ROWS)), [1 / ROWS] * ROWS), 1)
    seen: dict[str, torch.Tensor] = {}

    def look(_: Any, __: Any, named: dict[str, Any]) -> None:
        seen["prompt_embeds"] = named["encoder_hidden_states"]
        pooled = named.get("pooled_projections", (named.get("added_cond_kwargs") or {}).get("text_embeds"))
        if pooled is not None:
            seen["pooled_prompt_embeds"] = pooled
        if "encoder_attention_mask" in named:
            seen["prompt_mask"] = named["encoder_attention_mask"]

    model.denoiser.register_forward_pre_hook(look, with_kwargs=True)
    model(**made).sum().backward()
    dropped = draw((config.seed,), 1, range(ROWS), shape, model.settings).caption < 0.5
    assert 0 < dropped.sum() < ROWS
    none, prompt = negative(base, None), encode_prompts(load_pipeline(str(base)), [PROMPT])
    for row in range(ROWS):
        assert same({name: each[row, None] for name, each in seen.items()}, none if dropped[row] else prompt)


def test_a_picture_is_drawn_again_without_a_negative_prompt_or_with_the_empty_one(tiny_xl: Path) -> None:
    from serving.engine.engine import Engine
    from serving.engine.thread import EngineThread
    from serving.feedback.replay import Replayer
    from serving.provenance import facts_of, read_provenance
    from serving.replica.image_input import read_picture
    from tests.serving.drawing_server import drawing_server, pixels_of
    from tests.serving.feedback_server import FEEDBACK_KEY
    from tests.serving.generations import generation

    thread = EngineThread(Engine(load_pipeline(str(tiny_xl))))
    thread.start()
    drawn = []
    try:
        with drawing_server(thread) as url:
            for text in (None, ""):
                asked = generation(steps=2, guidance_scale=9.0, negative_prompt=text)
                facts = facts_of(asked.model_dump(), base="xl")
                assert facts.get("negative_prompt", "none") == ("none" if text is None else "")
                png = Replayer(url, FEEDBACK_KEY).draw(asked)
                again = read_provenance(png)
                assert again is not None and again.get("negative_prompt") == text
                pixels = read_picture(png, 64, 64)
                assert torch.equal(pixels, torch.from_numpy(pixels_of(thread, asked)))
                drawn.append(pixels)
    finally:
        thread.stop()
    assert not torch.equal(*drawn)
