"""The memory that planning tells of encoders, evaluators and replicas is that of the real modules."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.shape import Machine
from ray_jobs.config import Config, ConfigError
from ray_jobs.console import GIB, human_size
from ray_jobs.diffusion.families import family_of
from ray_jobs.diffusion.precision import cast
from ray_jobs.diffusion.sampling import decode_latents, whole_pictures
from ray_jobs.metrics.feature_network import FeatureNetwork
from ray_jobs.metrics.vision_model import load_vision_model
from ray_jobs.planning.estimate import host_memory
from ray_jobs.planning.inference import MANY_WORDS, LiveBytes, Need, engines_of, needs
from ray_jobs.planning.plan import drawing_lines, plan
from ray_jobs.weights.conditioner import conditioner_bytes
from ray_jobs.weights.feature_networks import load_networks
from ray_jobs.weights.loading import load_pipeline
from ray_jobs.weights.model_files import latent_shapes
from tests.tiny_conditioners import depth_model
from tests.tiny_models import FAMILY_MODELS

SIDE = 64
BF16 = torch.bfloat16


def a_config(base: Path, **sections: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "name": "planned",
            "data": {"source": "pictures", "resolution": SIDE},
            "model": {"base": str(base)},
            "search": {"learning_rates": [1e-3], "ladder": [2]},
            **sections,
        }
    )


def test_tensors_are_counted_while_they_live_and_once_a_storage() -> None:
    layer = torch.nn.Linear(256, 256, bias=False)
    with torch.no_grad(), LiveBytes([layer]) as live:
        first = torch.ones(10, 256)  # 10 KiB
        second = first.t().contiguous()  # as much again; the view is none
        del second
        assert live.now == 10 << 10
        layer(first)  # and another 10 KiB
    assert (live.most, live.now) == (20 << 10, 10 << 10)


@pytest.mark.parametrize("model", FAMILY_MODELS)
def test_the_peak_without_data_is_that_of_the_real_modules(tiny: Callable[[str], Path], model: str) -> None:
    base = tiny(model)
    encoder, evaluator, replica = needs(a_config(base, serve={"precision": "bf16"}))
    assert encoder.picture["embedding"] == evaluator.picture["embedding"]
    for need, dtype in ((evaluator, torch.float32), (replica, BF16)):
        pipeline = load_pipeline(str(base), dtype=dtype)
        modules = [each for each in pipeline.components.values() if isinstance(each, torch.nn.Module)]
        weights = sum(weight.nbytes for part in modules for weight in part.parameters())
        assert need.weights == pytest.approx(weights, rel=0.01)  # norms that stay in fp32 are not counted
        [shape] = latent_shapes(str(base), [(SIDE, SIDE)])
        with LiveBytes(modules) as live:
            decode_latents(pipeline, torch.zeros(1, *shape))
        assert need.picture["decoding"] == pytest.approx(live.most, rel=0.02)
        text = family_of(pipeline).text
        tokens = text.tokenize(pipeline, [text.as_prompt("a " * MANY_WORDS)])
        for mask in (each for each in tokens.values() if each.dtype == torch.bool):
            mask[:, -1] = False  # a place of padding
        with torch.no_grad(), LiveBytes(modules) as live:
            text.embed(text.present(pipeline), tokens)
        assert need.picture["embedding"] == pytest.approx(live.most, rel=0.15)


def test_feature_networks_of_an_evaluator_are_counted_as_they_are_on_the_cpu(
    tiny_model: Path, dino_folder: Path, tmp_path: Path
) -> None:
    picture = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)

    def live_in(network: FeatureNetwork) -> int:
        with LiveBytes(network.modules) as live:
            network.features(picture)
        return live.most

    plain = a_config(tiny_model)
    encoder, evaluator, replica = needs(plain)
    inception, efficientnet = networks = load_networks(plain.evaluate, "cpu").all
    weights = sum(
        each.nbytes for network in networks for part in network.modules for each in part.state_dict().values()
    )
    assert evaluator.networks == weights > 0 == encoder.networks == replica.networks
    most = max(live_in(inception), live_in(efficientnet))
    assert evaluator.picture["measuring"] == pytest.approx(most, rel=0.02)

    # From its configuration alone; the meta device fuses no attention.
    bare = shutil.copytree(dino_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    first = {"kind": "transformers", "path": str(bare), "sha256": "00"}  # neither is read
    dino = a_config(tiny_model, evaluate={"feature_network": first, "second_network": None})
    most = live_in(load_vision_model(str(dino_folder)))
    assert most <= needs(dino)[1].picture["measuring"] < 2 * most


def test_a_feature_network_that_is_missing_is_told_with_its_field(tiny_model: Path) -> None:
    config = a_config(tiny_model, evaluate={"feature_network": "nowhere.pt"})
    with pytest.raises(ConfigError, match=r"^evaluate\.feature_network: nowhere\.pt: no such file; `make"):
        drawing_lines(config, [Machine("one", 8)])


@pytest.mark.parametrize("model", ["StableDiffusionXLPipeline", "FluxPipeline", "QwenImagePipeline"])
def test_drawing_takes_what_the_denoiser_takes(tiny: Callable[[str], Path], model: str) -> None:
    base = tiny(model)
    pipeline = load_pipeline(str(base))
    family, [shape] = family_of(pipeline), latent_shapes(str(base), [(SIDE, SIDE)])
    denoiser = getattr(pipeline, family.denoiser)
    rows = 1 if family.guidance_embedded(denoiser) else 2
    conditions = {
        name: torch.ones((1, *size), dtype=dtype)
        for name, (size, dtype) in family.text.shapes(denoiser.config).items()
    }
    conditions |= whole_pictures(family, 1, SIDE, SIDE)
    conditions = {name: cast(each, torch.float32) for name, each in conditions.items()}
    with torch.no_grad(), LiveBytes([denoiser]) as live:
        family.denoise(family.model(pipeline), torch.zeros(1, *shape), torch.full((1,), 500.0), conditions)
    _, evaluator, _ = needs(a_config(base))
    # What the conditions take is counted by the plan only.
    assert evaluator.picture["drawing"] == pytest.approx(rows * live.most, rel=0.2)


def test_bf16_takes_about_half(tiny_flux: Path) -> None:
    single, half = (needs(a_config(tiny_flux, evaluate={"precision": name}))[1] for name in ("fp32", "bf16"))
    assert 0.5 <= half.weights / single.weights < 0.75  # the autoencoder stays as it is
    assert 0.5 <= half.picture["drawing"] / single.picture["drawing"] < 0.65


def test_what_is_offloaded_is_on_the_host_but_for_its_largest_layer(tiny_flux: Path) -> None:
    def replica(offload: str) -> Need:
        serve = {"use_gpu": True, "offload": offload}
        return needs(a_config(tiny_flux, serve=serve))[2]

    none, encoders, model = map(replica, ("none", "encoders", "model"))
    pipeline = load_pipeline(str(tiny_flux), dtype=torch.bfloat16)
    largest = {
        name: max(sum(each.nbytes for each in layer.parameters(recurse=False)) for layer in part.modules())
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }
    assert model.weights == max(largest.values())
    assert none.host == 0 < encoders.host < model.host == none.weights
    of_encoders = max(size for name, size in largest.items() if name != "transformer")
    assert none.weights == encoders.weights - of_encoders + encoders.host


def test_denoiser_and_text_encoders_of_an_evaluator_take_turns_on_a_gpu(tiny_flux: Path) -> None:
    here, on_gpu = (
        needs(a_config(tiny_flux, evaluate={"precision": "fp32", "use_gpu": use_gpu}))[1]
        for use_gpu in (False, True)
    )
    pipeline = load_pipeline(str(tiny_flux))
    bytes_of = {
        name: sum(weight.nbytes for weight in part.parameters())
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }
    text = bytes_of["text_encoder"] + bytes_of["text_encoder_2"]
    assert on_gpu.weights == bytes_of["transformer"] + bytes_of["vae"] == here.weights - text
    assert on_gpu.captions == text + bytes_of["vae"] and on_gpu.host == max(text, bytes_of["transformer"])
    sizes = dict(on_gpu.picture)
    embedding = on_gpu.captions + sizes.pop("embedding")
    most = on_gpu.networks + max(embedding, on_gpu.weights + max(sizes.values()))
    assert on_gpu.least == most < here.least
    assert on_gpu.at_once(most)["embedding"] > 0 == on_gpu.at_once(embedding)["embedding"]


def test_the_plan_tells_how_many_pictures_fit_at_once_and_what_to_do_where_none_does(tiny_flux: Path) -> None:
    config = a_config(tiny_flux, evaluate={"use_gpu": True, "precision": "fp32"}, serve={"use_gpu": True})
    _, evaluator, _ = needs(config)

    def told(pictures: float) -> tuple[list[str], list[str]]:
        room = evaluator.networks + evaluator.weights + pictures * evaluator.picture["measuring"]
        return drawing_lines(config, [Machine("one", 8, 1, gpu_gib=room / GIB / 0.9)])

    lines, problems = told(3.01)
    assert not problems and " 3 of 16 measuring at once" in lines[1]
    lines, problems = told(0.5)
    assert problems[0].startswith("an evaluator needs ") and problems[0].endswith(
        ": evaluate.precision: bf16"
    )
    assert not plan(config, [Machine("one", 8, 1, gpu_gib=evaluator.weights / GIB)], None)[1]


def test_a_training_on_a_gpu_needs_host_memory_for_the_base_and_for_checkpoints(tiny_flux: Path) -> None:
    def bytes_of(**train: Any) -> int:
        config = a_config(tiny_flux, train={"use_gpu": True, **train})
        return host_memory(config.train, base=1000, trained=100, workers=2)

    assert bytes_of() == 2 * 1000
    assert bytes_of(precision="fp32") == 4 * 1000
    assert host_memory(a_config(tiny_flux).train, base=10, trained=100, workers=2) == 16 * 50
    assert bytes_of(method="full") == 4 * 1000 + 4 * 1000
    # Rounded while it is read: 900 weights to 450 bytes.
    train = a_config(tiny_flux, train={"use_gpu": True}).train
    rounded = host_memory(train, base=1000, trained=1, workers=1, quantized=900, quantized_bytes=450)
    assert rounded == 2 * 100 + 450


@pytest.mark.parametrize("settings", [{"model": {"quantize": "nf4"}}, {"serve": {"int8_weights": True}}])
def test_a_quantized_denoiser_is_counted_as_it_is_stored(tiny_flux: Path, settings: dict[str, Any]) -> None:
    config = a_config(tiny_flux)
    model = config.model.model_copy(update=settings.get("model", {}))
    serve = config.serve.model_copy(update=settings.get("serve", {}))
    plain, found = needs(config), needs(config.model_copy(update={"model": model, "serve": serve}))
    format_name = model.quantize or "int8"
    pipeline = load_pipeline(str(tiny_flux), quantization=format_name)
    modules = [each for each in pipeline.components.values() if isinstance(each, torch.nn.Module)]
    stored = sum(weight.nbytes for part in modules for weight in part.parameters())
    assert found[2].weights == stored < plain[2].weights
    assert found[1].weights == (stored if model.quantize else plain[1].weights)
    assert found[0].weights == plain[0].weights


def test_a_replica_holds_the_next_champion_beside_the_one_that_answers(tiny_flux: Path) -> None:
    def config(**sections: Any) -> Config:
        return a_config(tiny_flux, **sections)

    full, candidate = {"method": "full"}, {"candidate_share": 0.5}
    assert engines_of(config(serve=candidate)) == 1
    assert engines_of(config(train=full)) == 2
    assert engines_of(config(train=full, serve=candidate)) == 3

    fused = config(serve={"use_gpu": True, "fuse_champion": True})
    one, two = needs(config(serve={"use_gpu": True}))[2], needs(fused)[2]
    assert (two.engines, two.weights, two.picture) == (2, 2 * one.weights, one.picture)
    lines, problems = drawing_lines(fused, [Machine("one", 8, 1, gpu_gib=two.weights / GIB / 0.9)])
    assert " of 2 models, while a new champion is loaded" in lines[2]
    assert problems[-1].endswith("serve.offload: encoders or model, or serve.fuse_champion: false")


def test_a_model_of_control_images_is_counted_beside_the_encoders(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    control = {"kind": "depth", "model": str(depth_model(tmp_path))}
    data = {"source": "x", "resolution": SIDE, "control": control}
    config = a_config(tiny("StableDiffusionPipeline"), data=data, train={"method": "controlnet"})
    size = human_size(conditioner_bytes(config.data.control)).strip()
    (encoder, evaluator, replica), _ = drawing_lines(config, [Machine("large", 4, 1, 24.0)])
    assert f" and {size} of data.control; " in encoder and "data.control" not in replica
    assert " of feature networks; " in evaluator
