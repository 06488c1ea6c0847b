"""Versions in the forms of other programs: the names these read, and the picture that was trained.

kohya's names, of spring 2026 (sd-scripts: networks/lora.py, lora_sd3.py, lora_flux.py, lora_lumina.py;
musubi-tuner: networks/lora.py), in our own words: `lora_unet_` or `lora_te<number>_`, the layer's name in the
first publication with `_` for its dots, then `lora_down.weight`, `lora_up.weight` and `alpha`; the scale is
alpha / rank. Stable Diffusion 1's UNet has diffusers' names, and its text encoder no number.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ray_jobs.config import Config, ConfigError
from ray_jobs.diffusion.families import FAMILIES
from ray_jobs.export_weights import FORMATS, export_version, main
from ray_jobs.registry.models import RegisteredModel, registered
from ray_jobs.registry.registration import register
from ray_jobs.weights.adapter_files import file_name
from ray_jobs.weights.loading import LORA_WEIGHTS, empty_model, load_pipeline
from ray_jobs.weights.schedulers import SCHEDULER
from serving.request import Request
from tests.serving import plain_diffusers
from tests.serving.test_registry import MEASURED
from tests.unit.test_comfyui import adapter, trained_updates

SD, XL, SD3, FLUX = (
    f"{name}Pipeline" for name in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux")
)
REQUEST = Request("a small red circle", seed=7, steps=2, guidance_scale=2.0, height=64, width=64)
KOHYA = tuple(name for name, family in FAMILIES.items() if family.kohya)
# A layer of each family as kohya's programs name it, and diffusers' layers that it is made of.
NAMES = {
    SD: ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0", 1),
    XL: ("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0", 1),
    SD3: ("lora_unet_joint_blocks_0_x_block_attn_qkv", 3),
    FLUX: ("lora_unet_single_blocks_0_linear1", 3),
    "FluxFillPipeline": ("lora_unet_double_blocks_0_img_attn_proj", 1),
    "FluxKontextPipeline": ("lora_unet_double_blocks_0_txt_attn_qkv", 3),
    "ChromaPipeline": ("lora_unet_double_blocks_0_txt_attn_proj", 1),
    "Lumina2Pipeline": ("lora_unet_layers_0_attention_qkv", 3),
    "QwenImageEditPlusPipeline": ("lora_unet_transformer_blocks_0_attn_to_out_0", 1),
    "QwenImagePipeline": ("lora_unet_transformer_blocks_0_attn_to_out_0", 1),
    "ZImagePipeline": ("lora_unet_layers_0_attention_to_out_0", 1),
    "Flux2KleinPipeline": ("lora_unet_single_blocks_0_linear2", 1),
    "Flux2Pipeline": ("lora_unet_double_blocks_0_img_attn_qkv", 3),
}


def version_of(base: Path, weights: Path, tmp_path: Path, method: str = "lora") -> RegisteredModel:
    """Register weights as the first version of a name."""
    config = Config.model_validate(
        {
            "name": "run",
            "storage": str(tmp_path / "runs"),
            "data": {"source": "unused"},
            "model": {"base": str(base)},
            "train": {"method": method},
            "search": {"learning_rates": [1e-3], "ladder": [2]},
            "publish": {"model_name": "my model"},
        }
    )
    register(config, source=str(weights), measured=MEASURED, params={})
    return registered(config, "1")


def picture(pipeline: Any) -> torch.Tensor:
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return plain_diffusers.draw(pipeline, REQUEST)


def with_adapter(base: Path, file: Path) -> Any:
    pipeline = plain_diffusers.load(base)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    return pipeline


def encoders_of(name: str) -> tuple[str, ...]:
    return FAMILIES[name].trainable_encoders


@pytest.fixture(autouse=True)
def local_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.parametrize("name", KOHYA)
def test_kohyas_programs_add_to_each_layer_what_was_trained(
    tiny: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    base = tiny(name)
    family = adapter(base, tmp_path / "model", encoders_of(name), use_rslora=True)
    version = version_of(base, tmp_path / "model", tmp_path)
    notes = export_version(version, "kohya", tmp_path / "out")
    [file] = (tmp_path / "out").iterdir()
    assert (notes, file.name) == ([], "my-model-1.safetensors")
    tensors = load_file(file)
    pipeline = load_pipeline(str(base))
    trained = {
        (component, file_name(getattr(pipeline, component), layer)): update
        for (component, layer), update in trained_updates(pipeline, tmp_path / "model", family).items()
    }
    denoiser = getattr(empty_model(str(base), [family.denoiser]), family.denoiser)
    expected_layer, count = NAMES[name]
    rows_of = dict[str, int]()
    for (component, layer), update in trained.items():
        place = family.kohya_layer(component, layer, denoiser.config)
        assert place is not None
        target, parts = place
        down, up = (tensors[f"{target}.lora_{side}.weight"].flatten(1) for side in ("down", "up"))
        scale = float(tensors[f"{target}.alpha"]) / len(down)
        sizes = [len(trained.get((component, part), torch.empty(0))) for part in parts]
        start = sum(sizes[: parts.index(layer)])
        got = scale * (up @ down)[start : start + len(update)]
        assert torch.allclose(got, update, atol=1e-6)
        rows_of[target] = rows_of.get(target, 0) + 1
    assert rows_of[expected_layer] == count
    assert len(tensors) == 3 * len(rows_of), "a tensor that belongs to no layer"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert family.kohya is not None
    assert metadata["ss_network_module"] == family.kohya.module
    assert metadata["ss_base_model_version"] == family.kohya.version
    ranks = {len(each) for key, each in tensors.items() if key.endswith("lora_down.weight")}
    assert metadata["ss_network_dim"] == str(max(ranks))


def test_a_layer_that_has_no_update_gets_rows_of_zeros_in_the_one_that_it_is_part_of(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny(FLUX)
    adapter(base, tmp_path / "model", target_modules=["attn.to_k"])
    export_version(version_of(base, tmp_path / "model", tmp_path), "kohya", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "my-model-1.safetensors")
    linear = empty_model(str(base), ["transformer"]).transformer.single_transformer_blocks[0]
    width, mlp = linear.attn.to_q.out_features, linear.proj_mlp.out_features
    up = tensors["lora_unet_single_blocks_0_linear1.lora_up.weight"]
    assert up.shape == (3 * width + mlp, 2)
    assert up[width : 2 * width].all() and not up[:width].any() and not up[2 * width :].any()


def test_diffusers_reads_a_flux_file_for_kohya_into_the_trained_layers(tmp_path: Path) -> None:
    """On tensors of the published sizes, which diffusers' converter has built in."""
    from ray_jobs.weights.kohya import kohya_tensors

    with torch.device("meta"):
        denoiser = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    layers = [
        *(f"transformer_blocks.0.attn.{each}" for each in ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj")),
        *("transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.attn.to_v"),
        *("single_transformer_blocks.0.proj_out", "transformer_blocks.0.norm1.linear"),
    ]
    tensors = {}
    for layer in layers:
        module = denoiser.get_submodule(layer)
        tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(2, module.in_features)
        tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(module.out_features, 2)
    settings = {"transformer.r": 2, "transformer.lora_alpha": 6}
    file = tmp_path / "kohya.safetensors"
    save_file(kohya_tensors(FAMILIES[FLUX], denoiser, tensors, settings), file)
    found = diffusers.FluxPipeline.lora_state_dict(str(tmp_path), weight_name=file.name)
    for layer in layers:
        up, down = (found[f"transformer.{layer}.lora_{side}.weight"] for side in "BA")
        ours = [tensors[f"transformer.{layer}.lora_{side}.weight"] for side in "BA"]
        assert torch.allclose(up @ down, 3 * ours[0] @ ours[1], rtol=1e-4, atol=1e-4)
    others = {name for name in found if name.rpartition(".lora_")[0].partition(".")[2] not in layers}
    assert not any((found[name] != 0).any() for name in others if "lora_B" in name)


CONVOLUTIONS = ["to_q", "conv1", "conv2", "time_emb_proj", "proj_in", "ff.net.0.proj", "conv_shortcut"]


@pytest.mark.parametrize(
    ("name", "form", "settings"),
    [
        (SD, "diffusers", {"use_dora": True}),
        (SD, "kohya", {"target_modules": CONVOLUTIONS}),
        (XL, "kohya", {"target_modules": [*CONVOLUTIONS, "downsamplers.0.conv", "upsamplers.0.conv"]}),
        (XL, "comfyui", {}),
        (SD3, "diffusers", {"use_rslora": True}),
        (FLUX, "diffusers", {}),
        ("ZImagePipeline", "kohya", {}),
        ("QwenImagePipeline", "kohya", {}),
    ],
)
def test_plain_diffusers_draws_with_an_exported_adapter_what_was_trained(
    tiny: Callable[[str], Path], tmp_path: Path, name: str, form: str, settings: dict[str, Any]
) -> None:
    base = tiny(name)
    encoders = () if "target_modules" in settings else encoders_of(name)
    adapter(base, tmp_path / "model", encoders, **settings)
    export_version(version_of(base, tmp_path / "model", tmp_path), form, tmp_path / "out")
    [file] = (tmp_path / "out").iterdir()
    trained = picture(load_pipeline(str(base), tmp_path / "model"))
    assert (picture(with_adapter(base, file)) - trained).abs().max() < 0.55
    assert (picture(plain_diffusers.load(base)) - trained).abs().max() > 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "lora") for name in (SD, XL, SD3, FLUX, "PixArtSigmaPipeline", "ZImagePipeline")),
        *((name, "dora") for name in (SD, FLUX)),
    ],
)
def test_plain_diffusers_draws_with_merged_weights_what_was_trained(
    tiny: Callable[[str], Path], tmp_path: Path, name: str, kind: str
) -> None:
    base = tiny(name)
    settings: dict[str, Any] = {"use_dora": True} if kind == "dora" else {"use_rslora": True}
    if name == SD:
        settings["target_modules"] = [*CONVOLUTIONS, "q_proj"]
    adapter(base, tmp_path / "model", encoders_of(name), **settings)
    notes = export_version(version_of(base, tmp_path / "model", tmp_path), "merged", tmp_path / "out")
    assert [note.split(":")[0] for note in notes] == ["stored as float32"]
    merged = picture(plain_diffusers.load(tmp_path / "out"))
    trained = picture(load_pipeline(str(base), tmp_path / "model"))
    assert (merged - trained).abs().max() < 0.55
    assert (merged - picture(plain_diffusers.load(base))).abs().max() > 5


def test_merged_weights_keep_the_bases_precision_and_say_what_rounding_took_away(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    half = tmp_path / "half"
    plain_diffusers.load(tiny(SD)).to(torch.bfloat16).save_pretrained(half)
    adapter(half, tmp_path / "model")
    [note] = export_version(version_of(half, tmp_path / "model", tmp_path), "merged", tmp_path / "out")
    file = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(half / file), load_file(tmp_path / "out" / file)
    assert {each.dtype for each in after.values()} == {torch.bfloat16}
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    trained = trained_updates(load_pipeline(str(half)), tmp_path / "model", FAMILIES[SD])
    update = lost = 0.0
    for (_, layer), own in trained.items():
        wanted = before[f"{layer}.weight"].float() + own
        assert torch.equal(after[f"{layer}.weight"], wanted.bfloat16())
        update += float(own.square().sum())
        lost += float((after[f"{layer}.weight"].float() - wanted).square().sum())
    share = 100 * (lost / update) ** 0.5
    assert note == f"stored as bfloat16: rounding changed {share:.2f}% of the update (by its norm)"
    assert share > 0.1 and not torch.equal(before[name], after[name])


@pytest.mark.parametrize("name", [SD, XL])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_diffusers_draws_with_a_single_file_what_was_trained(
    tiny: Callable[[str], Path], tmp_path: Path, name: str, method: str
) -> None:
    base = tiny(name)
    if method == "lora":
        adapter(base, tmp_path / "model", encoders_of(name))
    weights = tmp_path / "model" if method == "lora" else base
    export_version(version_of(base, weights, tmp_path, method), "single-file", tmp_path / "out")
    [file] = (tmp_path / "out").iterdir()
    kind = getattr(diffusers, name)
    # The sizes of its layers are not in a checkpoint, and those of the small model are not published ones.
    loaded = kind.from_single_file(str(file), config=str(base), local_files_only=True, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    trained = load_pipeline(str(base), tmp_path / "model" if method == "lora" else None)
    for component in FAMILIES[name].in_checkpoint:
        assert sum(1 for _ in getattr(loaded, component).parameters()) == sum(
            1 for _ in getattr(plain_diffusers.load(base), component).parameters()
        )
    loaded.scheduler = trained.scheduler  # which a checkpoint does not have
    assert (picture(loaded) - picture(trained)).abs().max() < 0.55


def test_a_version_trained_whole_and_one_with_a_scheduler_are_exported_as_they_are(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny(SD)
    export_version(version_of(base, base, tmp_path, "full"), "diffusers", tmp_path / "whole")
    assert torch.equal(picture(plain_diffusers.load(tmp_path / "whole")), picture(plain_diffusers.load(base)))
    adapter(base, tmp_path / "model")
    diffusers.DDIMScheduler(rescale_betas_zero_snr=True).save_pretrained(tmp_path / "model" / SCHEDULER)
    version = version_of(base, tmp_path / "model", tmp_path / "other")
    export_version(version, "merged", tmp_path / "merged")
    assert plain_diffusers.load(tmp_path / "merged").scheduler.config.rescale_betas_zero_snr
    export_version(version, "diffusers", tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {LORA_WEIGHTS, SCHEDULER}
    notes = export_version(version, "kohya", tmp_path / "kohya")
    assert notes == ["it was trained with a scheduler of its own, which such a file cannot hold"]


@pytest.mark.parametrize(
    ("name", "method", "settings", "form", "reason"),
    [
        (
            SD,
            "lora",
            {"use_dora": True},
            "kohya",
            "DoRA: sd-scripts leaves magnitudes out.*or merged",
        ),
        (SD, "lora", {"use_dora": True}, "comfyui", "DoRA: ComfyUI divides its magnitudes"),
        (SD, "full", {}, "kohya", "it is a whole model, not an adapter; take --format diffusers or single"),
        (SD, "full", {}, "merged", "it is a whole model.*take --format diffusers"),
        (
            SD3,
            "lora",
            {},
            "single-file",
            "StableDiffusion3Pipeline are not written.*--format merged",
        ),
        ("SanaPipeline", "lora", {}, "kohya", "kohya's programs are not known to train SanaPipeline; take"),
        (
            SD3,
            "lora",
            {"target_modules": ["norm_out.linear"]},
            "kohya",
            "no place for transformer.norm_out",
        ),
    ],
)
def test_a_form_that_a_version_cannot_have_is_refused_with_what_can_be_had(
    tiny: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    method: str,
    settings: dict[str, Any],
    form: str,
    reason: str,
) -> None:
    base = tiny(name)
    if method == "lora":
        adapter(base, tmp_path / "model", **settings)
    version = version_of(base, tmp_path / "model" if method == "lora" else base, tmp_path, method)
    with pytest.raises(ConfigError, match=f"^--format: {form}: version 1: .*{reason}") as refused:
        export_version(version, form, tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "runs"}, "something was left behind"


def test_the_command_writes_into_new_folders_alone(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny(SD)
    adapter(base, tmp_path / "model")
    version_of(base, tmp_path / "model", tmp_path)
    command = ["--config", "configs/demo.yaml", "--set", f"storage={tmp_path / 'runs'}"]
    command += ["--set", "publish.model_name=my model"]
    out = tmp_path / "exports" / "one"
    arguments = [*command, "--format", "kohya", "--out", str(out)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith(f"export: version 1 of 'my model' for kohya in {out}\n")
    before = (out / "my-model-1.safetensors").read_bytes()
    assert main(arguments) == 2
    assert f"error: --out: {out} is not empty; name a new folder" in capsys.readouterr().out
    assert (out / "my-model-1.safetensors").read_bytes() == before
    assert main([*command, "--version", "9", "--format", FORMATS[0], "--out", str(out / "new")]) == 2
    assert "9: no version or alias of 'my model'" in capsys.readouterr().out
