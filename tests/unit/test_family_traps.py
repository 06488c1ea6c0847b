"""What is easily got wrong in a family: each fact beside the family's own pipeline or worked out by hand."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError
from ray_jobs.data.encoding.cache_files import read_part
from ray_jobs.data.encoding.encoding import EncodePart
from ray_jobs.data.encoding.plan import PlannedPart
from ray_jobs.data.encoding.shapes import picture_shapes
from ray_jobs.data.encoding.tensors import as_torch, read_tensors
from ray_jobs.diffusion.families import FAMILIES, family_of, flux_2_dev, qwen_image_2_1
from ray_jobs.diffusion.precision import cast, to_precision
from ray_jobs.diffusion.sampling import encode_pictures, encode_prompts, null_captions
from ray_jobs.training.setup import build_engine, build_model
from ray_jobs.weights.loading import LORA_WEIGHTS, load_pipeline
from ray_jobs.weights.saving import save_lora
from serving.engine.engine import Engine
from serving.request import Request, RequestError
from tests.serving import plain_diffusers

Z_IMAGE, KLEIN, QWEN = "ZImagePipeline", "Flux2KleinPipeline", "QwenImagePipeline"
KREA, DEV, HIDREAM = "Krea2Pipeline", "Flux2Pipeline", "HiDreamImagePipeline"
QWEN_2_1, IDEOGRAM = "QwenImage21Pipeline", "Ideogram4Pipeline"
CAPTIONS = ["a small red circle", "a big blue cross and a very small purple square beside it"]


def loaded(tiny: Callable[[str], Path], name: str) -> Any:
    return load_pipeline(str(tiny(name)))


def latents(pipeline: Any, rows: int) -> torch.Tensor:
    shape = family_of(pipeline).codec.shape(pipeline.vae.config, 48, 64)
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def predict(pipeline: Any, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
    family, rows = family_of(pipeline), len(conditions["prompt_embeds"])
    timesteps = torch.full((rows,), 700.0)
    noisy = latents(pipeline, 1).expand(rows, -1, -1, -1)
    return family.denoise(family.model(pipeline), noisy, timesteps, conditions)


def test_a_network_that_predicts_without_a_caption_is_neither_loaded_nor_called_in_training(
    tiny: Callable[[str], Path],
) -> None:
    """Ideogram 4's: dropped captions are the empty one, and guidance leads away from none at all."""
    pipeline, model = build_model(
        Config.model_validate(
            {
                "name": "ideogram",
                "data": {"source": "pictures", "resolution": 64},
                "model": {"base": str(tiny(IDEOGRAM))},
                "train": {"num_workers": 1, "batch_size": 1},
                "search": {"learning_rates": [1e-3], "ladder": [1]},
            }
        )
    )
    assert pipeline.unconditional_transformer is None and [*model.model] == ["transformer"]
    whole = loaded(tiny, IDEOGRAM)
    empty, none = encode_prompts(whole, [""]), null_captions(whole)
    assert empty["prompt_mask"].sum() > 3 and not none["prompt_mask"].any()
    dropped = torch.tensor([True])
    noisy, told = latents(whole, 1), torch.tensor([700.0])
    with torch.no_grad():
        kept = model.predict(noisy, told, empty, dropped)
        assert torch.allclose(kept, predict(whole, empty), atol=1e-5)
    assert not torch.allclose(kept, predict(whole, none), atol=1e-2)
    mixed = {name: torch.cat([empty[name], none[name], empty[name]]) for name in empty}
    both = predict(whole, mixed)  # rows of the two networks in any order
    for row, alone in enumerate((empty, none, empty)):
        assert torch.allclose(both[row], predict(whole, alone)[0], atol=1e-5)


@pytest.mark.parametrize("name", [Z_IMAGE, QWEN, KREA, QWEN_2_1, IDEOGRAM])
def test_a_masked_caption_is_alone_what_it_is_beside_a_longer_one(
    tiny: Callable[[str], Path], name: str
) -> None:
    pipeline = loaded(tiny, name)
    both = encode_prompts(pipeline, CAPTIONS)
    spoilt = both["prompt_embeds"].clone()
    spoilt[~both["prompt_mask"]] = 7.0  # padding must not be read
    together = predict(pipeline, both | {"prompt_embeds": spoilt})
    for row in range(2):
        alone = {key: value[row : row + 1] for key, value in both.items()}
        assert torch.allclose(predict(pipeline, alone)[0], together[row], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("name", [Z_IMAGE, QWEN, KREA, QWEN_2_1])
def test_padding_that_is_not_read_is_stored_as_zeros(tiny: Callable[[str], Path], name: str) -> None:
    both = encode_prompts(loaded(tiny, name), CAPTIONS)
    assert both["prompt_embeds"][both["prompt_mask"]].abs().min() > 0
    assert not both["prompt_embeds"][~both["prompt_mask"]].any()


def test_flux_2_attends_to_the_padding_of_its_captions(tiny: Callable[[str], Path]) -> None:
    pipeline = loaded(tiny, KLEIN)
    embeds = encode_prompts(pipeline, CAPTIONS[:1])["prompt_embeds"]
    trimmed = predict(pipeline, {"prompt_embeds": embeds[:, :64]})
    assert not torch.allclose(trimmed, predict(pipeline, {"prompt_embeds": embeds}), atol=1e-3)


@pytest.mark.parametrize("size", [(64, 64), (1024, 1024), (1040, 1024), (2048, 1024)])
@pytest.mark.parametrize("steps", [4, 28, 50])
def test_flux_2_shifts_by_tokens_and_steps_as_its_pipeline(size: tuple[int, int], steps: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    height, width = size[0] // 16, size[1] // 16
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    FAMILIES[KLEIN].schedule.set_timesteps(scheduler, steps, (128, height, width), "cpu")
    mu = torch.tensor(compute_empirical_mu(height * width, steps))
    even = 1 - torch.arange(steps) / steps
    expected = mu.exp() / (mu.exp() + 1 / even - 1)
    assert torch.allclose(scheduler.sigmas[:-1], expected, atol=1e-6)


def test_flux_2_normalises_latents_by_its_autoencoders_batch_norm(tiny: Callable[[str], Path]) -> None:
    pipeline = loaded(tiny, KLEIN)
    pixels = torch.randint(0, 256, (1, 3, 48, 64), generator=torch.Generator().manual_seed(3))
    ours = encode_pictures(pipeline, pixels.to(torch.uint8), torch.zeros(1, 4, 6, 8))
    with torch.no_grad():
        theirs = pipeline._encode_vae_image(pixels / 127.5 - 1, generator=None)
    assert ours.shape == (1, 16, 3, 4)
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layer", "arrives"),
    [
        (KLEIN, "time_guidance_embed", 912.0),
        (DEV, "time_guidance_embed", 912.0),
        (QWEN, "time_text_embed.time_proj", 910.16),
        (KREA, "time_embed", 914.06),
        (QWEN_2_1, "time_text_embed", 910.16),
        (HIDREAM, "t_embedder.time_proj", 912.3),
    ],
)
def test_a_timestep_of_half_precision_is_rounded_in_the_pipelines_order(
    tiny: Callable[[str], Path], name: str, layer: str, arrives: float
) -> None:
    """In the other order FLUX.2 would be told 916, and Qwen-Image 914.06. HiDream does not round."""
    pipeline, family, told = loaded(tiny, name), FAMILIES[name], []
    embeds = encode_prompts(pipeline, CAPTIONS[:1])
    denoiser = pipeline.transformer.to(torch.bfloat16)
    denoiser.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: told.append(inputs[0]))
    embeds = {key: cast(value, torch.bfloat16) for key, value in embeds.items()}
    with torch.no_grad():
        noisy = latents(pipeline, 1).bfloat16()
        family.denoise({"transformer": denoiser}, noisy, torch.tensor([912.3]), embeds)
    factor = 1000 if name in (QWEN, KREA, QWEN_2_1) else 1  # these multiply by 1000 themselves, in float32
    assert factor * float(told[0].flatten()[0].float()) == pytest.approx(arrives, abs=0.01)


def model_config(base: Path, **train: Any) -> Config:
    config = {
        "name": "trained",
        "data": {"source": "pictures", "resolution": 64},
        "model": {"base": str(base)},
        "search": {"learning_rates": [1e-3], "ladder": [2]},
        "train": train,
    }
    return Config.model_validate(config)


def trained(base: Path, **train: Any) -> tuple[Any, Any]:
    return build_model(model_config(base, **train))


def loss(pipeline: Any, model: Any) -> torch.Tensor:
    conditions = encode_prompts(load_pipeline(pipeline.name_or_path), CAPTIONS)
    timesteps = torch.tensor([300.0, 800.0])
    return model.family.denoise(model.model, latents(pipeline, 2), timesteps, conditions).square().mean()


def test_what_does_not_reach_qwen_images_prediction_is_not_trained(tiny: Callable[[str], Path]) -> None:
    pipeline, model = trained(tiny(QWEN), method="full")
    loss(pipeline, model).backward()
    assert all(p.grad is not None and p.grad.any() for _, p in model.trained())
    frozen = {name for name, p in model.denoiser.named_parameters() if not p.requires_grad}
    model.denoiser.requires_grad_(True).zero_grad()
    loss(pipeline, model).backward()
    unused = {name for name, p in model.denoiser.named_parameters() if p.grad is None or not p.grad.any()}
    assert frozen == unused and len(unused) == 9


def test_an_adapter_of_qwen_images_captions_has_no_layer_that_is_never_trained(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    layers = ["to_q", "add_q_proj", "to_add_out", "net.2"]
    pipeline, model = trained(tiny(QWEN), lora={"target_modules": layers})
    for name, parameter in model.trained():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    loss(pipeline, model).backward()
    assert all(p.grad is not None and p.grad.any() for _, p in model.trained())
    save_lora(pipeline, model, dict(model.trained()), tmp_path)
    again = load_pipeline(str(tiny(QWEN)), tmp_path)
    assert (tmp_path / LORA_WEIGHTS).exists()
    conditions = encode_prompts(again, CAPTIONS)
    with torch.no_grad():
        timesteps = torch.tensor([300.0, 800.0])
        ours = model.family.denoise(model.model, latents(pipeline, 2), timesteps, conditions)
        theirs = model.family.denoise(model.family.model(again), latents(pipeline, 2), timesteps, conditions)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_one_step_of_qwen_image_is_refused(tiny: Callable[[str], Path]) -> None:
    """Its schedule is stretched to end at 0.02, and one step would have to be both ends: 0 / 0."""
    engine = Engine(loaded(tiny, QWEN))
    with pytest.raises(RequestError, match="cannot sample in 1 steps; choose another number"):
        engine.submit(Request("a small red circle", 0, 1, 1.0, None, 64, 64))


def test_norms_of_krea_2_stay_in_float32_as_diffusers_loads_them(tiny: Callable[[str], Path]) -> None:
    """Their weights are what is added to 1: rounded to bf16, they would change the prediction."""
    from diffusers import Krea2Transformer2DModel

    pipeline = loaded(tiny, KREA)
    denoiser = pipeline.transformer
    to_precision(denoiser, torch.bfloat16)
    kept = {name for name, p in denoiser.named_parameters() if p.dtype == torch.float32}
    assert kept == {name for name, _ in denoiser.named_parameters() if "norm" in name}
    conditions = {key: cast(each, torch.bfloat16) for key, each in encode_prompts(pipeline, CAPTIONS).items()}
    theirs = Krea2Transformer2DModel.from_pretrained(
        tiny(KREA), subfolder="transformer", dtype=torch.bfloat16
    )
    rounded = Krea2Transformer2DModel.from_pretrained(tiny(KREA), subfolder="transformer").bfloat16()
    family, noisy = FAMILIES[KREA], latents(pipeline, 2).bfloat16()
    with torch.no_grad():
        ours, expected, other = (
            family.denoise({"transformer": each}, noisy, torch.tensor([300.0, 800.0]), conditions)
            for each in (denoiser, theirs, rounded)
        )
    assert torch.equal(ours, expected) and not torch.equal(ours, other)


def test_norms_of_krea_2_that_are_trained_have_the_precision_of_what_is_trained(
    tiny: Callable[[str], Path],
) -> None:
    """The engines keep float32 copies of them, and flatten parameters of one dtype."""
    _, model = trained(tiny(KREA), method="full")
    assert {p.dtype for p in model.to(torch.bfloat16).parameters()} == {torch.bfloat16}


def test_krea_2_with_other_layers_of_its_text_encoder_is_refused(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    base = with_index(tiny(KREA), tmp_path / "base", text_encoder_select_layers=[1, 2])
    with pytest.raises(ValueError, match=r"model.base: text_encoder_select_layers .*1, 2.* only"):
        load_pipeline(str(base))


def with_index(folder: Path, copy: Path, **entries: Any) -> Path:
    """A copy of a model with other entries in its index."""
    shutil.copytree(folder, copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | entries))
    return copy


def test_flux_2_dev_needs_no_processor_of_images(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """It is published with one, which transformers only loads where torchvision is installed."""
    base = with_index(tiny(DEV), tmp_path / "base", tokenizer=["transformers", "PixtralProcessor"])
    ours, expected = (encode_prompts(load_pipeline(str(each)), CAPTIONS) for each in (base, tiny(DEV)))
    assert torch.equal(ours["prompt_embeds"], expected["prompt_embeds"])


def test_flux_2_dev_has_its_pipelines_system_message_and_no_images_in_captions(
    tiny: Callable[[str], Path],
) -> None:
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

    assert flux_2_dev.SYSTEM_MESSAGE == SYSTEM_MESSAGE
    caption = "a [IMG]small red circle"
    ours = encode_prompts(loaded(tiny, DEV), [caption])["prompt_embeds"]
    with torch.no_grad():
        theirs, _ = plain_diffusers.load(tiny(DEV)).encode_prompt([caption])
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(ours, encode_prompts(loaded(tiny, DEV), ["a small red circle"])["prompt_embeds"])


def test_qwen_image_2_1_keeps_its_captions_tokens_and_none_of_the_system_message(
    tiny: Callable[[str], Path],
) -> None:
    pipeline, theirs = loaded(tiny, QWEN_2_1), plain_diffusers.load(tiny(QWEN_2_1))
    assert theirs._drop_idx == len(theirs.processor.tokenizer(qwen_image_2_1.SYSTEM_MESSAGE).input_ids)
    for caption in (CAPTIONS[0], ""):
        ours = encode_prompts(pipeline, [caption])
        with torch.no_grad():
            expected, mask, _ = theirs.encode_prompt([caption])
        assert mask is None and int(ours["prompt_mask"].sum()) == expected.shape[1]
        assert torch.allclose(ours["prompt_embeds"][ours["prompt_mask"]], expected[0], atol=1e-5)


def test_an_image_of_qwen_image_2_1_stands_after_its_own_caption(tiny: Callable[[str], Path]) -> None:
    """diffusers places it after the longest caption of the batch, and so draws another one."""
    pipeline, theirs = loaded(tiny, QWEN_2_1), plain_diffusers.load(tiny(QWEN_2_1))
    with torch.no_grad():
        embeds, mask, _ = theirs.encode_prompt(CAPTIONS)
    noisy, sigma = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([0.7])
    tokens = noisy.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def of_diffusers(rows: slice, words: int, mask: torch.Tensor | None) -> torch.Tensor:
        places = torch.arange(words + 6) >= words
        predicted: torch.Tensor = theirs.transformer(
            tokens[rows],
            encoder_hidden_states=embeds[rows, :words],
            encoder_hidden_states_mask=mask,
            timestep=sigma.expand(len(tokens[rows])),
            img_shapes=[[(1, 4, 6)]] * 2,
            img_mask=places.expand(len(tokens[rows]), -1),
            return_dict=False,
        )[0]
        return predicted[:, -24:].transpose(1, 2).unflatten(2, (4, 6))

    timesteps = torch.full((2,), 700.0)
    with torch.no_grad():
        conditions = encode_prompts(pipeline, CAPTIONS)
        ours = family_of(pipeline).denoise(family_of(pipeline).model(pipeline), noisy, timesteps, conditions)
    for row, words in enumerate(mask.sum(dim=1).tolist()):
        alone = of_diffusers(slice(row, row + 1), words, None)
        assert torch.allclose(ours[row], alone[0], atol=1e-5)
    together = of_diffusers(slice(None), embeds.shape[1], mask)
    assert not torch.allclose(together[0], ours[0], atol=1e-4)
    assert torch.allclose(together[1], ours[1], atol=1e-5)


def test_qwen_image_2_1_trains_on_opaque_images(tiny: Callable[[str], Path]) -> None:
    pipeline, theirs = loaded(tiny, QWEN_2_1), plain_diffusers.load(tiny(QWEN_2_1))
    pixels = torch.randint(0, 256, (1, 3, 64, 96), generator=torch.Generator().manual_seed(3))
    ours = encode_pictures(pipeline, pixels.to(torch.uint8), torch.zeros(1, 4, 4, 6))
    opaque = torch.cat([pixels / 127.5 - 1, torch.ones(1, 1, 64, 96)], dim=1)
    with torch.no_grad():
        expected = theirs._encode_vae_image(opaque.unsqueeze(2), generator=None)
    assert torch.allclose(ours, expected.squeeze(2), atol=1e-5)


def test_images_of_qwen_image_2_1_are_drawn_on_white() -> None:
    black = -torch.ones(1, 3, 1, 1)
    for alpha, expected in ((1.0, -1.0), (2.0, -1.0), (0.0, 0.0), (-1.0, 1.0)):
        drawn = qwen_image_2_1.on_white(torch.cat([black, torch.full((1, 1, 1, 1), alpha)], dim=1))
        assert drawn.flatten().tolist() == [expected] * 3


def test_a_distilled_qwen_image_2_1_has_noise_levels_of_its_own(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    base = with_index(tiny(QWEN_2_1), tmp_path / "base", sample_sigmas=[1.0, 0.7, 0.2])
    request = Request("a small red circle", 3, 3, 1.0, None, 64, 64)
    engine, theirs = Engine(load_pipeline(str(base))), plain_diffusers.load(base)
    future = engine.submit(request)
    engine.drain()
    expected = plain_diffusers.draw(theirs, request)
    assert (future.result(0).pixels - expected).abs().max() < 0.55
    assert (expected - plain_diffusers.draw(plain_diffusers.load(tiny(QWEN_2_1)), request)).abs().max() > 1
    with pytest.raises(RequestError, match="steps: .* cannot sample in 4 steps"):
        engine.submit(replace(request, steps=4))


@pytest.mark.parametrize("forced", [False, True])
def test_every_expert_and_gate_of_hidream_is_trained(
    tiny: Callable[[str], Path], tmp_path: Path, forced: bool
) -> None:
    """With `force_inference_output`, which other trainers set, none is, and what lies before them wrongly."""
    base = tmp_path / "base"
    shutil.copytree(tiny(HIDREAM), base)
    file = base / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"force_inference_output": forced}))
    pipeline, model = trained(base, method="full")
    loss(pipeline, model).backward()
    gradients = {name: p.grad for name, p in model.denoiser.named_parameters()}
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    # The gradient is that of the prediction: along it the loss falls by its squared length.
    before = loss(pipeline, model)
    step, squared = 1e-5, sum(float(gradient.square().sum()) for gradient in gradients.values())
    with torch.no_grad():
        for name, parameter in model.denoiser.named_parameters():
            parameter -= step * gradients[name]
        assert float(before - loss(pipeline, model)) == pytest.approx(step * squared, rel=0.05)


@pytest.mark.parametrize("height", [48, 64])
def test_hidream_predicts_the_same_while_it_trains(tiny: Callable[[str], Path], height: int) -> None:
    """In training mode diffusers returns other tokens, also those that pad images that are not square."""
    pipeline, family = loaded(tiny, HIDREAM), FAMILIES[HIDREAM]
    conditions, timesteps = encode_prompts(pipeline, CAPTIONS), torch.tensor([300.0, 800.0])
    noisy = torch.randn(2, 4, height // 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = family.denoise(family.model(pipeline), noisy, timesteps, conditions)
        pipeline.transformer.train()
        assert torch.allclose(
            family.denoise(family.model(pipeline), noisy, timesteps, conditions), expected, atol=1e-5
        )


def test_images_that_hidream_cannot_pad_are_refused(tiny: Callable[[str], Path]) -> None:
    """It pads those that are not square to the patches of its greatest square, here 128 x 128 pixels."""
    engine = Engine(loaded(tiny, HIDREAM), max_side=1024)
    for size in ((64, 256), (144, 144)):
        engine.submit(Request("a small red circle", 0, 1, 1.0, None, *size))
    with pytest.raises(RequestError, match=r"height: 80 x 256; .* at most 16,384 pixels unless .* square"):
        engine.submit(Request("a small red circle", 0, 1, 1.0, None, 80, 256))
    engine.drain()
    config = {
        "name": "wide",
        "data": {"source": "pictures", "resolution": 256, "buckets": True},
        "model": {"base": str(tiny(HIDREAM))},
        "search": {"learning_rates": [1e-3], "ladder": [2]},
    }
    with pytest.raises(
        ConfigError, match=r"data.resolution: .* at most 16,384 pixels .* turn off data.buckets"
    ):
        picture_shapes(Config.model_validate(config))


def test_captions_of_krea_2_are_stored_without_their_padding(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """31 MB a caption in bf16 otherwise, whatever its length; what is read has all places again."""
    config = Config.model_validate(
        {
            "name": "stored",
            "data": {"source": "pictures", "resolution": 64, "encode_dtype": "bf16"},
            "model": {"base": str(tiny(KREA))},
            "search": {"learning_rates": [1e-3], "ladder": [2]},
        }
    )
    numbers, keys = np.arange(2, dtype=np.int32), [b"0" * 16, b"1" * 16]
    part = PlannedPart(
        "train", 0, 0, 0, (64, 64), numbers, numbers, numbers, numbers > 2, ["a", "b"], keys, "part.parquet"
    )
    cache = Storage.open(str(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8).tobytes()
    row = {
        "part": part,
        "text": CAPTIONS,
        "pixels": pixels,
        "image": [b"", b""],
        "conditioning": [[64] * 6] * 2,
        "references": b"",
        "controls": b"",
    }
    assert EncodePart(cache, config, {})(row) == {"rows": 2, "encoded": 2}
    table = read_part(cache, "part.parquet")
    found = {
        name: as_torch(each) for name, each in read_tensors(table, ["prompt_embeds", "prompt_mask"]).items()
    }
    expected = encode_prompts(loaded(tiny, KREA), CAPTIONS)
    assert torch.equal(found["prompt_mask"], expected["prompt_mask"])
    assert found["prompt_embeds"].shape == (2, 512, 12, 16)
    assert torch.allclose(found["prompt_embeds"].float(), expected["prompt_embeds"], atol=0.02, rtol=0.02)
    sizes = [len(each.as_py()) for each in table["prompt_embeds"]]
    assert sizes == [2 * 12 * 16 * int(count) for count in expected["prompt_mask"].sum(dim=1)]
    assert sizes[0] < sizes[1] < 512 * 2 * 12 * 16 / 10


def precisions(folder: Path, base: Path) -> dict[str, set[tuple[bool, torch.dtype]]]:
    """Whether Krea 2's weights are a norm's, and their dtype, by engine; in a process of its own."""
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it; Ray Train sets it
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=0, world_size=1)
    found = {}
    for engine, stage in (("flat", 0), ("deepspeed", 1), ("deepspeed", 2)):
        options = {"engine": engine, "zero_stage": stage, "precision": "bf16", "num_workers": 1}
        _, model = trained(base, method="lora", **options)
        build_engine(model, model_config(base, method="lora", **options).train, 1)
        found[f"{engine} {stage}"] = {("norm" in name, p.dtype) for name, p in model.named_parameters()}
    return found


def test_every_engine_keeps_krea_2s_norms_in_float32(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """DeepSpeed casts each parameter itself."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(precisions, tmp_path, tiny(KREA)).result()
    assert found == dict.fromkeys(found, {(True, torch.float32), (False, torch.bfloat16)}) and len(found) == 3
