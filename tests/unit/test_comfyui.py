"""LoRA files for ComfyUI: by its rules they are the adapter that was trained.

Its rules, of autumn 2026 (comfy/lora.py, comfy/utils.py, comfy/weight_adapter), in our own words: a tensor's
name is a layer's, and `lora_up.weight` or `lora_B.weight`; alpha / rank is 1 without `alpha`; the update is
added to the layer's weight. Layers of transformers are known as diffusers names them, after `transformer.`,
layers of UNets as kohya does, after `lora_unet_`, and all by the names of the first publication, after
`diffusion_model.`.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ray_jobs.diffusion.families import FAMILIES, family_of
from ray_jobs.diffusion.families.family import Family
from ray_jobs.diffusion.finetuning import FineTuning, add_lora
from ray_jobs.diffusion.objectives import LossSettings
from ray_jobs.diffusion.protocols import Pipeline
from ray_jobs.weights.comfyui import NotForComfyUI, comfyui_file, main
from ray_jobs.weights.loading import LORA_WEIGHTS, load_lora, load_pipeline
from ray_jobs.weights.saving import save_lora

PROMPT = "a small red circle"
WITHOUT = ("SanaPipeline", "Flux3ModularPipeline", "Flux3DistilledModularPipeline", "Ideogram4Pipeline")


def adapter(base: Path, folder: Path, components: tuple[str, ...] = (), **settings: Any) -> Family:
    """Write an adapter with random weights on the family's usual layers; return the family."""
    pipeline = load_pipeline(str(base))
    family = family_of(pipeline)
    torch.manual_seed(0)
    for name in (*family.denoisers, *components):
        usual: dict[str, Any] = {
            "rank": 2,
            "alpha": 6,
            "dropout": 0.0,
            "target_modules": list(family.trainable[name]),
        }
        add_lora(getattr(pipeline, name), **usual | settings)
        for parameter, weight in getattr(pipeline, name).named_parameters():
            if "lora_B" in parameter:
                torch.nn.init.normal_(weight, std=0.05)
    objective = family.schedule.objective(pipeline.scheduler.config)
    model = FineTuning(pipeline, family, objective, LossSettings(), text_encoders_trained=bool(components))
    folder.mkdir()
    save_lora(pipeline, model, dict(model.trained()), folder)
    return family


def updates(file: Path) -> dict[str, torch.Tensor]:
    """What ComfyUI adds to each layer's weight, by the name of the layer in the file."""
    tensors = load_file(file)
    found = {}
    for name in tensors:
        if end := re.search(r"\.(lora_up|lora_B)\.weight$", name):
            layer = name.removesuffix(end[0])
            up = tensors[name].flatten(1)
            down = tensors[f"{layer}.{'lora_down' if end[1] == 'lora_up' else 'lora_A'}.weight"].flatten(1)
            found[layer] = tensors[f"{layer}.alpha"].item() / len(down) * up @ down
    assert len(tensors) == 3 * len(found), "a tensor that belongs to no layer"
    return found


def trained_updates(pipeline: Pipeline, folder: Path, family: Family) -> dict[tuple[str, str], torch.Tensor]:
    """What peft adds to each layer's weight, by component and layer."""
    load_lora(pipeline, folder)
    return {
        (name, layer): module.get_delta_weight(next(iter(module.lora_A))).flatten(1)
        for name, part in family.adaptable(pipeline).items()
        for layer, module in part.named_modules()
        if hasattr(module, "lora_A")
    }


def layers_of_lumina(layer: str) -> list[str]:
    """diffusers' names of a layer of the first publication, in the order of its rows."""
    layer = layer.removeprefix("diffusion_model.")
    if layer.endswith(".attention.qkv"):
        return [layer.replace("attention.qkv", f"attn.to_{which}") for which in "qkv"]
    return [layer.replace("attention.out", "attn.to_out.0")]


def expected_names(family: Family, component: str, layer: str) -> str:
    """ComfyUI's name of one layer; Lumina 2's are in `layers_of_lumina`."""
    if not family.is_unet:
        return f"{component}.{layer}"
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[component]
    if len(family.trainable_encoders) == 1:
        prefix = prefix.replace("te1", "te")
    return prefix + layer.replace(".", "_")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in WITHOUT])
def test_comfyui_adds_to_each_layer_what_was_trained(
    tiny: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    base = tiny(name)
    rslora = FAMILIES[name].is_unet  # the scale is computed in one place for all families
    family = adapter(base, tmp_path / "model", use_rslora=rslora)
    file = tmp_path / "comfyui.safetensors"
    file.write_bytes(comfyui_file(str(base), tmp_path / "model"))
    found = updates(file)
    trained = trained_updates(load_pipeline(str(base)), tmp_path / "model", family)
    if name == "Lumina2Pipeline":
        found = {
            layer: rows
            for fused, update in found.items()
            for layer, rows in zip(
                layers_of_lumina(fused),
                update.split([len(trained["transformer", one]) for one in layers_of_lumina(fused)]),
                strict=True,
            )
        }
        trained_by_name = {layer: update for (_, layer), update in trained.items()}
    else:
        trained_by_name = {expected_names(family, *place): update for place, update in trained.items()}
    assert found.keys() == trained_by_name.keys()
    assert all(torch.allclose(found[layer], trained_by_name[layer], atol=1e-6) for layer in found)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_diffusers_reads_the_file_for_unets_and_their_text_encoders_again(
    tiny: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    from tests.serving import plain_diffusers

    base = tiny(name)
    encoders = tuple(each for each in FAMILIES[name].trainable if each != "unet")
    adapter(base, tmp_path / "model", encoders)
    file = tmp_path / "comfyui.safetensors"
    file.write_bytes(comfyui_file(str(base), tmp_path / "model"))
    pictures = []
    ours = tmp_path / "model" / LORA_WEIGHTS
    for each in (None, ours, file):
        pipeline = plain_diffusers.load(base)
        if each:
            pipeline.load_lora_weights(str(each.parent), weight_name=each.name)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        noise = torch.Generator().manual_seed(0)
        drawn = pipeline(
            prompt=PROMPT, height=64, width=64, num_inference_steps=2, generator=noise, output_type="np"
        )
        pictures.append(torch.from_numpy(drawn.images[0]))
    plain, peft, kohya = pictures
    assert (peft - kohya).abs().max() < 0.55 / 255
    assert (peft - plain).abs().max() > 5 / 255


def test_adapters_that_comfyui_would_draw_differently_are_refused(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny("StableDiffusionPipeline")
    adapter(base, tmp_path / "dora", use_dora=True)
    with pytest.raises(NotForComfyUI, match=r"dora/.*: DoRA: ComfyUI divides .* train LoRA or rsLoRA"):
        comfyui_file(str(base), tmp_path / "dora")
    base = tiny("SanaPipeline")
    adapter(base, tmp_path / "sana")
    with pytest.raises(NotForComfyUI, match="ComfyUI is not known to read LoRA of SanaPipeline"):
        comfyui_file(str(base), tmp_path / "sana")
    base = tiny("Lumina2Pipeline")
    adapter(base, tmp_path / "query", target_modules=["to_q"])
    with pytest.raises(ValueError, match="attention.qkv is 3 layers in diffusers, of which"):
        comfyui_file(str(base), tmp_path / "query")
    (tmp_path / "dora" / LORA_WEIGHTS).write_bytes(b"a pickle")
    command = ["comfyui", "--base", str(base), str(tmp_path / "dora"), str(tmp_path / "new.safetensors")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="^error: "):
        main()
    with pytest.raises(ValueError, match="contains no pytorch_lora_weights.safetensors"):
        comfyui_file(str(base), tmp_path)
