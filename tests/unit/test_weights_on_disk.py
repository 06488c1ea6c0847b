"""Weights as they lie on disk: variants of a base, names that all releases read, what identifies them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ray_jobs.config import ConfigError, load_config
from ray_jobs.diffusion.families import FAMILIES, family_of
from ray_jobs.registry.digests import are_weights, weights_digest
from ray_jobs.training.setup import build_model, check_settings
from ray_jobs.weights.encoders import Encoders
from ray_jobs.weights.loading import LORA_WEIGHTS, load_pipeline
from ray_jobs.weights.model_files import check_weights, encoders_digest, variant_name, variants
from ray_jobs.weights.saving import save_lora, save_pipeline, save_whole, use_old_names
from serving.engine.adapters import read_adapter
from tests.unit.test_finetuning import finetuning

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
STEM = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture(params=[name for name, family in FAMILIES.items() if family.trainable_encoders])
def base(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Path:
    return tiny(request.param)


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A model whose files a test may rename."""
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


def to_variant(folder: Path, name: str, variant: str = "fp16", *, keep: bool = False) -> None:
    """Give a component's weights the name of a variant, in half precision."""
    plain = folder / name / f"{STEM[name]}.safetensors"
    half = {key: tensor.half() for key, tensor in load_file(plain).items()}
    save_file(half, folder / name / f"{STEM[name]}.{variant}.safetensors", {"format": "pt"})
    if not keep:
        plain.unlink()


def weights_of(pipeline: Any) -> dict[str, torch.Tensor]:
    parts = {name: getattr(pipeline, name) for name in STEM}
    return {
        f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()
    }


def test_a_base_with_only_half_precision_files_is_read_as_diffusers_reads_it(
    tiny_xl: Path, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    plain = DiffusionPipeline.from_pretrained(tiny_xl, dtype=torch.float16)
    plain.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert list((tmp_path / "unet").glob("*.fp16-00001-of-*.safetensors")), "sharded too"
    check_settings(load_config(DEMO, [f"model.base={tmp_path}", "train.lora.target_modules=null"]))
    assert variant_name(str(tmp_path)) == "fp16" and len(encoders_digest(str(tmp_path))) == 64
    loaded, theirs = (
        load_pipeline(str(tmp_path)),
        DiffusionPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float32),
    )
    expected = weights_of(theirs)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(loaded).items())
    assert loaded.unet.dtype == loaded.text_encoder_2.dtype == torch.float32
    assert Encoders(str(tmp_path)).encode_captions(["a red circle"])["prompt_embeds"].dtype == torch.float32


def test_plain_files_are_taken_where_they_are_and_each_component_has_its_own_variant(copy: Path) -> None:
    before = weights_of(load_pipeline(str(copy)))
    to_variant(copy, "unet", keep=True)
    to_variant(copy, "vae", "non_ema", keep=True)
    to_variant(copy, "text_encoder")
    found = variants(copy)
    assert (found["unet"], found["vae"], found["text_encoder"]) == (None, None, "fp16")
    after = weights_of(load_pipeline(str(copy)))
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.half().float() if name.startswith("text") else tensor)


def test_of_several_variants_the_averaged_one_is_taken(copy: Path) -> None:
    to_variant(copy, "unet", "non_ema", keep=True)
    to_variant(copy, "unet", "bf16")
    assert variants(copy)["unet"] == "bf16"
    (copy / "unet" / "diffusion_pytorch_model.bf16.safetensors").unlink()
    assert variants(copy)["unet"] == "non_ema"
    load_pipeline(str(copy))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            "diffusion_pytorch_model.bin",
            r"unet has weights only as diffusion_pytorch_model\.bin, .* safe_ser",
        ),
        ("diffusion_flax_model.msgpack", r"unet has weights only as diffusion_flax_model\.msgpack"),
        (None, r"unet has no weights \(\*\.safetensors\)"),
    ],
)
def test_weights_that_are_not_read_are_named_before_anything_starts(
    copy: Path, other: str | None, said: str
) -> None:
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    if other:
        (copy / "unet" / other).write_bytes(b"never opened")
    settings = load_config(DEMO, [f"model.base={copy}", "train.lora.target_modules=null"])
    for work in (
        lambda: check_weights(str(copy)),
        lambda: check_settings(settings),
        lambda: load_pipeline(str(copy)),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            work()
        assert "\n" not in str(caught.value)


def test_a_whole_model_of_such_a_base_is_published_under_plain_names(copy: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    for name in STEM:
        to_variant(copy, name)
    (copy / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"never opened")
    pipeline, model = finetuning(copy, "full")
    components = {"unet": ("denoiser", load_pipeline(str(copy)).unet)}
    save_pipeline(copy, components, dict(model.trained()), tmp_path / "out")
    assert not [
        path for path in (tmp_path / "out").rglob("*") if "fp16" in path.name or path.suffix == ".bin"
    ]
    again = weights_of(DiffusionPipeline.from_pretrained(tmp_path / "out").to(torch.float32))
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights_of(pipeline).items())


def names_in(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def test_text_encoders_have_the_names_that_all_releases_read(base: Path, tmp_path: Path) -> None:
    """Those of transformers 4.57, which reads no others; 5.23 reads both. T5's never changed."""
    config = [f"model.base={base}", "train.lora.target_modules=null", "train.train_text_encoder=true"]
    _, model = build_model(load_config(DEMO, [*config, "train.method=full"]))
    whole = load_pipeline(str(base))
    components = {name: (prefix, getattr(whole, name)) for name, (prefix, _) in model.components.items()}
    save_pipeline(base, components, dict(model.trained()), tmp_path / "whole")
    save_whole(whole, tmp_path / "again")
    (tmp_path / "again" / "text_encoder" / "unrelated.json").write_text("{}")
    use_old_names(tmp_path / "again" / "text_encoder", "CLIPTextModel")  # once more changes nothing
    for folder in (tmp_path / "whole", tmp_path / "again"):
        for name in model.family.text.encoders:
            names = names_in(folder / name / "model.safetensors")
            if type(getattr(whole, name)).__name__ == "T5EncoderModel":
                assert all(key.startswith(("shared.", "encoder.")) for key in names)
            else:
                assert all(key.startswith("text_model.") or key == "text_projection.weight" for key in names)
        before, after = load_pipeline(str(base)), load_pipeline(str(folder))
        for name in model.family.text.encoders:
            old, new = getattr(before, name).state_dict(), getattr(after, name).state_dict()
            assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


def test_the_demos_base_has_them_too() -> None:
    folder = DEMO.parents[1] / "models" / "emoji-base"
    assert all(
        name.startswith("text_model.") for name in names_in(folder / "text_encoder" / "model.safetensors")
    )
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (folder / "tokenizer").iterdir()}


def test_adapters_of_text_encoders_have_the_classic_names(base: Path, tmp_path: Path) -> None:
    pipeline, model = finetuning(base, "lora", text_encoders=True)
    save_lora(pipeline, model, dict(model.trained()), tmp_path)
    names = [name for name in names_in(tmp_path / LORA_WEIGHTS) if name.startswith("text_encoder")]
    assert names
    assert all(name.split(".")[1:4] == ["text_model", "encoder", "layers"] for name in names)


@pytest.mark.parametrize("old_names", [True, False])
def test_every_tensor_of_an_adapter_arrives(base: Path, old_names: bool, tmp_path: Path) -> None:
    """Magnitudes of DoRA in text encoders too, and of files from before `text_model.` was written."""
    pipeline, model = finetuning(base, "dora", text_encoders=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.trained():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_lora(pipeline, model, dict(model.trained()), tmp_path)
    file = tmp_path / LORA_WEIGHTS
    if not old_names and not hasattr(pipeline.text_encoder, "text_model"):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        bare = {
            key.replace("text_encoder.text_model.", "text_encoder."): t for key, t in load_file(file).items()
        }
        save_file(bare, file, metadata)
    loaded = load_pipeline(str(base), tmp_path)
    compared = 0
    for name, (_, part) in model.components.items():
        there = dict(getattr(loaded, name).named_parameters())
        for key, parameter in part.named_parameters():
            if "lora_" in key:
                assert torch.equal(there[key.replace(".default.", ".default_0.")], parameter)
                compared += "magnitude" in key
    assert compared == sum("magnitude" in name for name in names_in(file)) > 0
    updates = read_adapter("a", tmp_path, family_of(pipeline).adaptable(load_pipeline(str(base)))).updates
    assert len(updates) == compared


def adapter(folder: Path, settings: dict[str, Any], key: str = "unet.conv_in.lora_A.weight") -> Path:
    folder.mkdir(exist_ok=True)
    save_file({key: torch.zeros(1)}, folder / LORA_WEIGHTS, {"lora_adapter_metadata": json.dumps(settings)})
    return folder


def test_a_base_that_is_stored_in_few_bits_is_refused(copy: Path) -> None:
    config = copy / "unet" / "config.json"
    stored = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    config.write_text(json.dumps(json.loads(config.read_text()) | stored))
    with pytest.raises(ValueError, match=r"unet is stored in few bits \(bitsandbytes\); .* model\.quantize"):
        check_weights(str(copy))


def test_a_component_that_was_saved_with_its_adapter_is_refused(copy: Path) -> None:
    pipeline = load_pipeline(str(copy))
    pipeline.unet.add_adapter(LoraConfig(target_modules=["to_q"]))
    pipeline.unet.save_pretrained(copy / "unet")
    for read in (check_weights, load_pipeline):
        with pytest.raises(ValueError, match=r"unet was saved with an adapter.*fuse_lora\(\)"):
            read(str(copy))


def test_a_file_that_is_not_whole_is_named_before_anything_starts(copy: Path) -> None:
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 7\n")
    with pytest.raises(
        ValueError, match=r"unet/diffusion_pytorch_model\.safetensors: cannot be read .*git lfs"
    ):
        check_weights(str(copy))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_adapter_that_changed_its_base_is_refused(tiny_model: Path, start: str, tmp_path: Path) -> None:
    adapter(tmp_path, {"unet.init_lora_weights": start})
    said = rf"unet\.init_lora_weights is '{start}', which changes the base's own weights, .*; convert it"
    with pytest.raises(ValueError, match=said):
        load_pipeline(str(tiny_model), tmp_path)
    with pytest.raises(ValueError, match=said):
        read_adapter("a", tmp_path, {"unet": torch.nn.Identity()})


@pytest.mark.parametrize(
    ("key", "method"),
    [
        ("unet.to_q.hada_w1_a", "LoHa"),
        ("unet.to_q.lokr_w1", "LoKr"),
        ("unet.to_q.oft_R.weight", "OFT"),
        ("unet.to_q.boft_R", "BOFT"),
        ("unet.to_q.hra_u", "HRA"),
        ("unet.to_q.ia3_l", "IA3"),
        ("unet.to_q.lora_E", "AdaLoRA"),
    ],
)
def test_other_kinds_of_adapters_are_named(tiny_model: Path, key: str, method: str, tmp_path: Path) -> None:
    adapter(tmp_path, {}, key)
    for read in (
        lambda: load_pipeline(str(tiny_model), tmp_path),
        lambda: read_adapter("a", tmp_path, {"unet": torch.nn.Identity()}),
    ):
        with pytest.raises(
            ValueError, match=rf"{key} belongs to {method}, but only LoRA, rsLoRA and DoRA are"
        ):
            read()


def test_the_same_tensors_are_the_same_weights_in_whatever_order_a_header_names_them(tmp_path: Path) -> None:
    tensors = {"b": torch.zeros(3), "a": torch.ones(4).half()}
    digests, files = set(), set()
    for number in range(40):  # each save draws its order
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(tensors, folder / "a.safetensors", {"format": "pt", "c": "{}"})
        digests.add(weights_digest(str(folder)))
        files.add((folder / "a.safetensors").read_bytes())
        if len(files) > 1:
            break
    raw = (tmp_path / "0" / "a.safetensors").read_bytes()
    assert len(digests) == 1
    [digest] = digests
    # A file whose header is in another order, whatever chance has made of the others.
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"] = dict(reversed(header["__metadata__"].items()))
    text = json.dumps(dict(reversed(header.items()))).encode()
    (tmp_path / "0" / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    assert weights_digest(str(tmp_path / "0")) == digest
    for changed, metadata in (
        (tensors | {"a": torch.zeros(4).half()}, {"format": "pt", "c": "{}"}),
        (tensors | {"a": torch.ones(2, 2).half()}, {"format": "pt", "c": "{}"}),
        (tensors | {"a": torch.ones(2)}, {"format": "pt", "c": "{}"}),
        ({"b": tensors["b"], "z": tensors["a"]}, {"format": "pt", "c": "{}"}),
        (tensors, {"format": "pt", "c": "[]"}),
    ):
        save_file(changed, tmp_path / "0" / "a.safetensors", metadata)
        assert weights_digest(str(tmp_path / "0")) != digest


def test_weights_that_an_older_release_registered_are_still_known(tmp_path: Path) -> None:
    import hashlib

    save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    old = hashlib.sha256(b"a.safetensors\0" + (tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert are_weights(str(tmp_path), old) and are_weights(str(tmp_path), weights_digest(str(tmp_path)))
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    assert not are_weights(str(tmp_path), old)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", "cut"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes | str) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(3)}, file)
    file.write_bytes(file.read_bytes()[:-4] if isinstance(content, str) else content)
    with pytest.raises(
        ConfigError, match=r"a\.safetensors: not a whole safetensors file; run the pipeline again"
    ):
        weights_digest(str(tmp_path))
