"""Weights that were trained elsewhere become versions: they draw the same picture, or are refused by name."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.diffusion.families import FAMILIES
from ray_jobs.export_weights import export_version
from ray_jobs.import_weights import imported_adapter, imported_model, main
from ray_jobs.registry.aliases import promote, rollback, status
from ray_jobs.registry.local_weights import local_weights
from ray_jobs.registry.models import champion, entries, registered
from ray_jobs.registry.registration import register
from ray_jobs.weights.adapter_files import read_adapter_file
from ray_jobs.weights.kohya import kohya_file, kohya_tensors
from ray_jobs.weights.loading import LORA_WEIGHTS, empty_model, load_pipeline
from ray_jobs.weights.single_file import write_single_file
from serving.engine.engine import Engine
from serving.request import Request
from tests.serving import plain_diffusers
from tests.serving.test_registry import MEASURED
from tests.unit.test_comfyui import adapter, trained_updates
from tests.unit.test_export_weights import FLUX, SD, SD3, XL, encoders_of, picture, version_of

DEMO = "configs/demo.yaml"
UNET_LAYERS = ["to_q", "to_out.0", "proj_in", "conv1", "q_proj", "out_proj", "fc1", "fc2"]


@pytest.fixture(autouse=True)
def local_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def settings(base: Path, tmp_path: Path) -> list[str]:
    values = [f"model.base={base}", f"storage={tmp_path / 'imported'}", "publish.model_name=given"]
    return [each for value in values for each in ("--set", value)]


def configured(base: Path, tmp_path: Path) -> Config:
    return load_config(DEMO, settings(base, tmp_path)[1::2])


def imported(base: Path, tmp_path: Path, *arguments: str) -> Config:
    assert main(["--config", DEMO, *settings(base, tmp_path), *arguments]) == 0
    return configured(base, tmp_path)


def drawn(config: Config) -> torch.Tensor:
    """The champion's picture, by the endpoint's engine."""
    version = champion(config)
    with local_weights(version) as folder:
        whole = version.method == "full"
        pipeline = load_pipeline(version.base, folder if whole else None)
        engine = Engine(pipeline, device="cpu", adapter_folder=lambda _: folder)
        request = Request(
            "a small red circle",
            seed=7,
            steps=2,
            guidance_scale=2.0,
            height=64,
            width=64,
            adapter=None if whole else "given",
        )
        ticket = engine.submit(request)
        while not ticket.done():
            engine.step()
        return ticket.result().pixels.float()


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((SD, form) for form in ("diffusers", "kohya", "comfyui")),
        *((XL, form) for form in ("kohya", "comfyui")),
        *((SD3, form) for form in ("kohya", "comfyui")),
        *((FLUX, form) for form in ("kohya", "comfyui")),
        *(("ChromaPipeline", form) for form in ("kohya",)),
        *(("ZImagePipeline", form) for form in ("kohya",)),
        *(("QwenImagePipeline", form) for form in ("kohya",)),
    ],
)
def test_an_adapter_of_another_program_is_the_one_that_was_trained(
    tiny: Callable[[str], Path], tmp_path: Path, name: str, form: str
) -> None:
    base = tiny(name)
    layers: dict[str, Any] = {"use_rslora": True}
    if FAMILIES[name].is_unet:
        layers["target_modules"] = UNET_LAYERS
    adapter(base, tmp_path / "model", encoders_of(name), **layers)
    export_version(version_of(base, tmp_path / "model", tmp_path), form, tmp_path / "out")
    with imported_adapter(configured(base, tmp_path), [str(tmp_path / "out")]) as found:
        ours = picture(load_pipeline(str(base), found.folder))
    trained = picture(load_pipeline(str(base), tmp_path / "model"))
    assert (ours - trained).abs().max() < 0.55
    assert (picture(load_pipeline(str(base))) - trained).abs().max() > 2


def test_imported_adapters_are_served_promoted_and_rolled_back_without_scores(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny(SD)
    for number, rank in enumerate((2, 3)):
        adapter(base, tmp_path / str(number), rank=rank)
    first = tmp_path / "0" / LORA_WEIGHTS
    config = imported(base, tmp_path, "--adapter", str(first))
    assert (
        "version 1 of 'given': champion: the first version of its name, not measured"
        in capsys.readouterr().out
    )
    plain = plain_diffusers.load(base)
    plain.load_lora_weights(str(first.parent))
    assert (drawn(config) - picture(plain)).abs().max() < 1.01
    imported(base, tmp_path, "--adapter", str(tmp_path / "1"))
    assert "version 2 of 'given': stays candidate: it is not measured; to promote" in capsys.readouterr().out
    assert status(config).count("not measured") == 2
    promote(config, 2)
    assert champion(config).version == 2
    assert rollback(config) == 1 == champion(config).version
    found = entries(config, ["given"])["given"].versions[1]
    assert (found.base, found.method, found.guidance_scale, found.data) == (str(base), "lora", None, None)
    assert champion(config).params["imported_from"] == str(first)
    # A trained version does not take the place of one that nobody measured.
    adapter(base, tmp_path / "trained", rank=4)
    message = register(config, source=str(tmp_path / "trained"), measured=MEASURED, params={}).message
    assert "stays candidate: the champion has no record of how it was measured" in message


@pytest.mark.parametrize("name", [SD, XL, SD3])
def test_a_base_without_any_training_is_served(
    tiny: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    base = tiny(name)
    config = imported(tmp_path, tmp_path, "--model", str(base))
    found = champion(config)
    assert (found.method, found.base) == ("full", str(base))
    assert (drawn(config) - picture(plain_diffusers.load(base))).abs().max() < 1.01


@pytest.mark.parametrize("name", [SD, XL])
def test_a_checkpoint_in_one_file_is_served(tiny: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    base = tiny(name)
    pipeline = plain_diffusers.load(base)
    torch.manual_seed(1)
    for parameter in getattr(pipeline, "unet").parameters():  # noqa: B009
        parameter.data += 0.02 * torch.randn_like(parameter)
    pipeline.save_pretrained(tmp_path / "other")
    file = tmp_path / "checkpoint.safetensors"
    write_single_file(tmp_path / "other", file)
    config = imported(base, tmp_path, "--model", str(file))
    ours = drawn(config)
    assert (ours - picture(plain_diffusers.load(tmp_path / "other"))).abs().max() < 1.01
    assert (ours - picture(plain_diffusers.load(base))).abs().max() > 5
    found = registered(config, "1")
    assert (found.params["imported_from"], found.base) == (str(file), str(base))


def published_auraflow(name: str) -> str:
    """The first publication's name of a tensor of AuraFlow's transformer."""
    double = name.startswith("joint_")
    for ours, theirs in (
        ("joint_transformer_blocks.", "double_layers."),
        ("single_transformer_blocks.", "single_layers."),
        ("time_step_proj.linear_1.", "t_embedder.mlp.0."),
        ("time_step_proj.linear_2.", "t_embedder.mlp.2."),
        ("context_embedder.", "cond_seq_linear."),
        ("pos_embed.pos_embed", "positional_encoding"),
        ("pos_embed.proj.", "init_x_linear."),
        ("norm_out.linear.", "modF.1."),
        ("proj_out.", "final_linear."),
        (".norm1_context.linear.", ".modC.1."),
        (".norm1.linear.", ".modX.1." if double else ".modCX.1."),
        (".ff_context.", ".mlpC."),
        (".ff.", ".mlpX." if double else ".mlp."),
        (".linear_1.", ".c_fc1."),
        (".linear_2.", ".c_fc2."),
        (".out_projection.", ".c_proj."),
        *((f".add_{each}_proj.", f".w1{each}.") for each in "qkv"),
        (".to_add_out.", ".w1o."),
        *((f".to_{each}.", f".w{1 + double}{each}.") for each in "qkv"),
        (".to_out.0.", f".w{1 + double}o."),
    ):
        name = name.replace(ours, theirs)
    return name


def published(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A transformer's tensors as they were first published, or as ComfyUI has them."""
    if name == "AuraFlowPipeline":
        found = {published_auraflow(key): tensor for key, tensor in tensors.items()}
        found["modF.1.weight"] = torch.cat(found["modF.1.weight"].chunk(2)[::-1])  # shift before scale
        return found
    if name == "ZImagePipeline":
        found = {}
        for key, tensor in tensors.items():
            for ours, theirs in (
                ("all_final_layer.2-1.", "final_layer."),
                ("all_x_embedder.2-1.", "x_embedder."),
                (".attention.to_out.0.", ".attention.out."),
                (".attention.norm_k.", ".attention.k_norm."),
                (".attention.norm_q.", ".attention.q_norm."),
            ):
                key = key.replace(ours, theirs)
            if ".attention.to_q." in key:
                parts = [tensors[key.replace("to_q", f"to_{each}")] for each in "qkv"]
                key, tensor = key.replace("to_q", "qkv"), torch.cat(parts)
            if ".attention.to_" not in key:
                found[key] = tensor
        return found | {"norm_final.weight": torch.ones(8)}
    prefix = "" if name == FLUX else "model.diffusion_model."
    return {prefix + key: tensor for key, tensor in tensors.items()}


PIXART = "PixArtSigmaPipeline"
UNREAD = (PIXART, "Ideogram4Pipeline")  # diffusers 0.42.1 does not know how their checkpoints look
ALONE = tuple(name for name, family in FAMILIES.items() if not family.is_unet and name not in UNREAD)


@pytest.mark.parametrize("name", ALONE)
def test_a_transformer_alone_in_one_file_takes_the_rest_from_the_base(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    base = tiny(name)
    pipeline: Any = load_pipeline(str(base))
    torch.manual_seed(1)
    for parameter in pipeline.transformer.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    tensors = {key: each.contiguous() for key, each in pipeline.transformer.state_dict().items()}
    file = tmp_path / "transformer.safetensors"
    save_file({key: each.clone() for key, each in published(name, tensors).items()}, file)
    with imported_model(configured(base, tmp_path), str(file)) as found:
        read: Any = load_pipeline(str(base), found.folder)
    theirs = read.transformer.state_dict()
    assert theirs.keys() == tensors.keys()
    assert all(torch.equal(theirs[key], each) for key, each in tensors.items())
    encoder = FAMILIES[name].text.encoders[0]
    for ours, base_s in zip(
        getattr(read, encoder).parameters(), getattr(pipeline, encoder).parameters(), strict=True
    ):
        assert torch.equal(ours, base_s)
    save_file(load_file(file) | {"other.weight": torch.ones(3)}, tmp_path / "more.safetensors")
    line = refusal(capsys, base, tmp_path, "--model", str(tmp_path / "more.safetensors"))
    assert "more.safetensors: " in line and ("places; give the base" in line or "cannot read it" in line)
    if name == "AuraFlowPipeline":
        line = refusal(capsys, tiny(PIXART), tmp_path, "--model", str(file))
        assert f"diffusers reads no checkpoint of {PIXART} in one file; convert it" in line
        save_file(tensors | {"vae.decoder.bias": torch.ones(3)}, tmp_path / "whole.safetensors")
        line = refusal(capsys, base, tmp_path, "--model", str(tmp_path / "whole.safetensors"))
        assert "diffusers reads no such checkpoint of AuraFlowPipeline; give one of the transformer" in line


def kohya_dora(name: str, base: Path, trained: Path) -> dict[str, torch.Tensor]:
    """A DoRA as LyCORIS writes it: the tensors of a LoRA for kohya's programs, and `dora_scale`."""
    tensors, told = read_adapter_file(trained)
    norms = {key: tensors.pop(key) for key in list(tensors) if "magnitude" in key}
    family = FAMILIES[name]
    denoiser = getattr(empty_model(str(base), [family.denoiser]), family.denoiser)
    converted = kohya_tensors(family, denoiser, tensors, told)
    for key in norms:
        component, _, layer = key.removesuffix(".lora_magnitude_vector").partition(".")
        place = family.kohya_layer(component, layer, denoiser.config)
        assert place
        rows = torch.cat([norms[f"{component}.{part}.lora_magnitude_vector"].flatten() for part in place[1]])
        down = converted[f"{place[0]}.lora_down.weight"]
        converted[f"{place[0]}.dora_scale"] = rows.reshape(-1, *[1] * (down.dim() - 1))
    return converted


@pytest.mark.parametrize("name", [SD, XL, FLUX])
def test_dora_of_other_programs_draws_what_was_trained(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    base = tiny(name)
    fused = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "attn.to_out.0", "q_proj"]
    layers = UNET_LAYERS if FAMILIES[name].is_unet else fused
    adapter(base, tmp_path / "model", encoders_of(name), use_dora=True, target_modules=layers)
    ours = tmp_path / "model" / LORA_WEIGHTS
    with safe_open(ours, "pt") as opened:
        metadata = opened.metadata()
    torch.manual_seed(2)
    moved = {
        key: each * (1 + torch.rand_like(each)) if "magnitude" in key else each
        for key, each in load_file(ours).items()
    }
    save_file(moved, ours, metadata)
    theirs = kohya_dora(name, base, ours)
    file = tmp_path / "dora.safetensors"
    save_file(theirs, file)
    with imported_adapter(configured(base, tmp_path), [str(file)]) as found:
        drawn = picture(load_pipeline(str(base), found.folder))
    trained = picture(load_pipeline(str(base), tmp_path / "model"))
    assert (drawn - trained).abs().max() < 0.55
    assert (picture(load_pipeline(str(base))) - trained).abs().max() > 2
    # Norms of the inputs, and some layers without any.
    scale = next(key for key in theirs if key.endswith(("attn1_to_q.dora_scale", "img_attn_proj.dora_scale")))
    width = theirs[scale.replace("dora_scale", "lora_down.weight")].shape[1]
    save_file(theirs | {scale: torch.ones(1, width)}, file)
    line = refusal(capsys, base, tmp_path, "--adapter", str(file))
    assert f"{file}: {scale}: (1, {width}): DoRA is read with one norm for each" in line
    save_file({key: each for key, each in theirs.items() if key != scale}, file)
    line = refusal(capsys, base, tmp_path, "--adapter", str(file))
    assert "has no DoRA, and " in line and "in all layers or in none" in line


def lycoris(
    layers: dict[str, tuple[int, ...]], kind: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors of LyCORIS, and the update of each layer of a size (lycoris/functional/loha.py and lokr.py)."""
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    updates: dict[str, torch.Tensor] = {}
    for layer, (rows, columns) in layers.items():
        if kind == "loha":
            pairs = [(torch.randn(rows, 2), torch.randn(2, columns)) for _ in range(2)]
            own = dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), sum(pairs, ()), strict=True))
            update = (pairs[0][0] @ pairs[0][1]) * (pairs[1][0] @ pairs[1][1])
        else:
            sides = (2, 4) if kind == "lokr" else (4, 2)
            small = torch.randn(*sides)
            up, down = torch.randn(rows // sides[0], 2), torch.randn(2, columns // sides[1])
            own = {"lokr_w1": small, "lokr_w2_a": up, "lokr_w2_b": down}
            update = torch.kron(small, up @ down)
        own["alpha"] = torch.tensor(1.0)
        tensors |= {f"{layer}.{part}": tensor for part, tensor in own.items()}
        updates[layer] = update / 2
    return tensors, updates


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr of more rows than columns"])
@pytest.mark.parametrize("name", [SD, FLUX])
def test_loha_and_lokr_are_the_lora_that_they_are(
    tiny: Callable[[str], Path], tmp_path: Path, name: str, kind: str
) -> None:
    base = tiny(name)
    pipeline = load_pipeline(str(base))
    if name == SD:
        inside = "mid_block.attentions.0.transformer_blocks.0.attn1"
        layers = {
            f"{inside}.{each}": f"lora_unet_{inside.replace('.', '_')}_{each}" for each in ("to_q", "to_v")
        }
        layers["mid_block.resnets.0.conv1"] = "lora_unet_mid_block_resnets_0_conv1"
    else:
        inside = "transformer_blocks.0.attn"
        kohya, comfyui = (
            "lora_unet_double_blocks_0_img_attn_proj",
            "diffusion_model.double_blocks.0.img_attn.proj",
        )
        layers = {f"{inside}.to_out.0": comfyui if kind == "lokr" else kohya}
    denoiser = FAMILIES[name].denoiser
    part = getattr(pipeline, denoiser)
    sizes = {theirs: part.get_submodule(ours).weight.flatten(1).shape for ours, theirs in layers.items()}
    tensors, updates = lycoris(sizes, kind)
    file = tmp_path / "lycoris.safetensors"
    save_file(tensors, file)
    with imported_adapter(configured(base, tmp_path), [str(file)]) as found:
        trained = trained_updates(pipeline, found.folder, FAMILIES[name])
    assert {place for place in trained} == {(denoiser, layer) for layer in layers}
    for ours, theirs in layers.items():
        assert torch.allclose(trained[denoiser, ours], updates[theirs], atol=1e-4)


LINEAR = ["attn1.to_q", "attn2.to_v"]
PEFT_KINDS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=[*LINEAR, "conv1"], alpha_pattern={"attn1.to_q": 3}, use_rslora=True
    ),
    "dora": lambda: peft.LoraConfig(r=2, lora_alpha=6, target_modules=[*LINEAR, "conv1"], use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=6, target_modules=[*LINEAR, "conv1"]),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=[*LINEAR, "conv1"], decompose_both=True),
    "pissa": lambda: peft.LoraConfig(r=2, lora_alpha=2, target_modules=LINEAR, init_lora_weights="pissa"),
}


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_adapters_of_pefts_own_format_draw_what_was_trained(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    base = tiny(SD)
    pipeline: Any = load_pipeline(str(base))
    torch.manual_seed(0)
    model = peft.get_peft_model(pipeline.unet, PEFT_KINDS[kind]())
    folder, begun = tmp_path / kind, tmp_path / "begun"
    model.save_pretrained(str(begun))
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "hada_", "lokr_")):
            parameter.data = 1.1 * parameter + 0.1 * torch.randn_like(parameter)
    model.save_pretrained(str(folder))
    if kind == "pissa":
        line = refusal(capsys, base, tmp_path, "--adapter", str(folder))
        assert f"{folder}/adapter_model.safetensors: init_lora_weights is 'pissa', which changes" in line
        model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(begun))
    trained = picture(pipeline)
    with imported_adapter(configured(base, tmp_path), [str(folder)]) as found:
        assert (picture(load_pipeline(str(base), found.folder)) - trained).abs().max() < 0.55
    assert (picture(load_pipeline(str(base))) - trained).abs().max() > 2


@pytest.mark.parametrize("name", [SD, XL])
def test_adapters_of_text_encoders_in_pefts_own_format_join_that_of_the_denoiser(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    base = tiny(name)
    pipeline: Any = load_pipeline(str(base))
    given: list[str] = []
    torch.manual_seed(0)
    for component in ("unet", *FAMILIES[name].trainable_encoders):
        layers = ["to_q"] if component == "unet" else ["q_proj", "fc1"]
        config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=layers, init_lora_weights=False)
        model = peft.get_peft_model(getattr(pipeline, component), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(str(tmp_path / component))
        given.append(str(tmp_path / component))
    trained = picture(pipeline)
    with imported_adapter(configured(base, tmp_path), given) as found:
        assert (picture(load_pipeline(str(base), found.folder)) - trained).abs().max() < 0.55
        content = kohya_file(str(base), found.folder)
    te = b'"lora_te_text_model_' if name == SD else b'"lora_te2_text_model_'
    assert te in content[:100_000]
    if name == XL:
        (tmp_path / "text_encoder_2").rename(tmp_path / "style")
        line = refusal(capsys, base, tmp_path, "--adapter", str(tmp_path / "style"))
        assert "name its folder after the one: text_encoder or text_encoder_2" in line


def test_files_of_pefts_own_format_that_are_no_lora_are_refused(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny(SD)
    pipeline: Any = load_pipeline(str(base))
    for config, message in (
        (
            peft.LoKrConfig(r=8, target_modules=LINEAR),
            r"attn\d.to_\w: this LoKr has a second factor of full rank",
        ),
        (
            peft.LoraConfig(r=2, target_modules=["to_out.0"], bias="lora_only"),
            r"bias: no part of a LoRA; train without",
        ),
        (
            peft.HRAConfig(r=2, target_modules=LINEAR),
            "adapter_config.json: peft_type HRA: only LORA, LOHA, LOKR",
        ),
    ):
        folder = tmp_path / str(config.peft_type)
        model = peft.get_peft_model(pipeline.unet, config)
        model.save_pretrained(str(folder))
        model.unload()
        file = folder / "adapter_model.safetensors"
        line = refusal(capsys, base, tmp_path, "--adapter", str(folder))
        assert re.match(rf"error: --adapter: {re.escape(str(file))}: .*{message}", line), line
    (folder / "adapter_config.json").unlink()
    assert "no adapter_config.json is beside it" in refusal(capsys, base, tmp_path, "--adapter", str(folder))


def test_an_adapter_of_another_family_is_named(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On tensors of published sizes: 768 is the width of the captions of Stable Diffusion 1."""
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    for width, family in ((768, "StableDiffusionPipeline"), (2048, "StableDiffusionXLPipeline")):
        file = tmp_path / f"{width}.safetensors"
        pair = {"A": torch.ones(2, width), "B": torch.ones(1280, 2)}
        save_file({f"{name}.lora_{side}.weight": each for side, each in pair.items()}, file)
        line = refusal(capsys, tiny(XL), tmp_path, "--adapter", str(file))
        assert line.endswith(f"give an adapter of this model; it may be an adapter of {family}"), line
        line = refusal(capsys, tiny(FLUX), tmp_path, "--adapter", str(file))
        assert line.endswith(f"; it may be an adapter of {family}"), line


def test_several_adapters_are_imported_as_one(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their common update is what diffusers' `set_adapters` adds with these weights."""
    base = tiny(SD)
    for number, rank in enumerate((2, 3)):
        adapter(base, tmp_path / str(number), encoders_of(SD), rank=rank)
    names = [str(tmp_path / str(number) / LORA_WEIGHTS) for number in (0, 1)]
    both = ["--adapter", f"{names[0]}=0.8", "--adapter", f"{names[1]}=0.5"]
    config = imported(base, tmp_path, *both)
    plain = plain_diffusers.load(base)
    for number in (0, 1):
        plain.load_lora_weights(str(tmp_path / str(number)), adapter_name=f"a{number}")
    plain.set_adapters(["a0", "a1"], [0.8, 0.5])
    assert (drawn(config) - picture(plain)).abs().max() < 1.01
    found = champion(config)
    assert found.params["imported_from"] == f"{names[0]}=0.8, {names[1]}=0.5"
    capsys.readouterr()
    imported(base, tmp_path, *both, "--rank", "4")
    said = re.search(r"rank 4: (\d+\.\d+)% of the update's norm is left out", capsys.readouterr().out)
    assert said and 0 < float(said[1]) < 60
    tensors = load_file(Path(registered(config, "2").source) / LORA_WEIGHTS)
    assert {len(each) for name, each in tensors.items() if "lora_A" in name} == {4}


def with_names(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file({name: each.contiguous() for name, each in change(load_file(file)).items()}, file)


KOHYA = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
PAIR = {f"{KOHYA}.lora_down.weight": torch.ones(2, 64), f"{KOHYA}.lora_up.weight": torch.ones(64, 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | PAIR, r"names of two programs, kohya's \(lora_unet_mid.*\) and diffusers' \(unet\."),
        (
            lambda t: {name: each / 0 if "mid_block" in name else each for name, each in t.items()},
            r"unet\.mid_block.* has weights that are infinite or not a number",
        ),
        (
            lambda t: {name.replace("to_q", "to_x"): each for name, each in t.items()},
            r"no place .*to_x\.lora",
        ),
        (lambda t: t | {"unet.conv_in.diff_b": torch.ones(2)}, "diff_b: no part of a LoRA"),
        (lambda t: {"unet.conv_in.hada_w1_a": torch.ones(2, 2)}, "belongs to LoHa, but only"),
        (lambda t: {"unet.conv_in.lokr_w1": torch.ones(2, 2)}, "belongs to LoKr, but only"),
        (
            lambda t: {f"{KOHYA}.lokr_w{each}": torch.ones(8, 8) for each in (1, 2)},
            f"{KOHYA}: this LoKr has a second factor of full rank",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused_in_one_line(
    tiny: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    message: str,
) -> None:
    base = tiny(SD)
    adapter(base, tmp_path / "model")
    file = tmp_path / "model" / LORA_WEIGHTS
    with_names(file, change)
    capsys.readouterr()
    assert main(["--config", DEMO, *settings(base, tmp_path), "--adapter", str(file)]) == 2
    [line] = capsys.readouterr().out.splitlines()
    assert re.match(rf"error: --adapter: {re.escape(str(file))}: .*{message}", line), line
    assert not (tmp_path / "imported").exists(), "a registry was begun"


def refusal(capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["--config", DEMO, *settings(base, tmp_path), *arguments]) == 2
    [line] = capsys.readouterr().out.splitlines()
    return line


def test_files_that_are_none_are_refused_in_one_line(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny(SD)
    adapter(base, tmp_path / "model")
    file = tmp_path / "model" / LORA_WEIGHTS
    pickled, torn = tmp_path / "style.ckpt", tmp_path / "torn.safetensors"
    pickled.write_bytes(b"")
    torn.write_bytes(file.read_bytes()[:-100])
    line = refusal(capsys, base, tmp_path, "--adapter", str(pickled))
    assert "style.ckpt is pickled, and loading it could run any program" in line and "weights_only" in line
    assert f"{torn}: no safetensors file" in refusal(capsys, base, tmp_path, "--adapter", str(torn))
    assert f"{torn}: no whole safetensors" in refusal(capsys, base, tmp_path, "--model", str(torn))
    assert f"{pickled}: only safetensors are read" in refusal(capsys, base, tmp_path, "--model", str(pickled))
    assert "diffusers cannot read it as a checkpoint" in refusal(capsys, base, tmp_path, "--model", str(file))


def test_an_adapter_that_changed_its_base_is_refused(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny(SD)
    adapter(base, tmp_path / "model")
    file = tmp_path / "model" / LORA_WEIGHTS
    with safe_open(file, "pt") as opened:
        metadata: dict[str, Any] = opened.metadata()
    told = json.loads(metadata["lora_adapter_metadata"]) | {"unet.init_lora_weights": "pissa"}
    save_file(load_file(file), file, metadata | {"lora_adapter_metadata": json.dumps(told)})
    line = refusal(capsys, base, tmp_path, "--adapter", str(file))
    assert "unet.init_lora_weights is 'pissa', which changes the base's own weights" in line
    with pytest.raises(ConfigError, match="holds no champion"):
        champion(configured(base, tmp_path))
