"""Make a folder that today's libraries have written look like one that was published years ago.

Only what a reader of the folder meets: names of files, entries, fields and tensors.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModularPipeline
from safetensors.torch import load_file, save_file

# What a UNet's and an autoencoder's configuration held before diffusers 0.8; the rest takes its defaults.
UNET_FIELDS = (
    *("_class_name", "act_fn", "attention_head_dim", "block_out_channels", "center_input_sample"),
    *("cross_attention_dim", "down_block_types", "downsample_padding", "flip_sin_to_cos", "freq_shift"),
    *("in_channels", "layers_per_block", "mid_block_scale_factor", "norm_eps", "norm_num_groups"),
    *("out_channels", "sample_size", "up_block_types"),
)
VAE_FIELDS = (
    *("_class_name", "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels"),
    *("layers_per_block", "norm_num_groups", "out_channels", "sample_size", "up_block_types"),
)


def save(pipeline: Any, folder: Path, variant: str | None = None, sharded: Sequence[str] = ()) -> None:
    """Write the pipeline; the components in `sharded` as several files with an index."""
    if variant == "fp16":
        pipeline.to(dtype=torch.float16)
    modular = {"overwrite_modular_index": True} if isinstance(pipeline, ModularPipeline) else {}
    pipeline.save_pretrained(str(folder), variant=variant, **modular)
    for name in sharded:
        [whole] = (folder / name).glob("*.safetensors")
        whole.unlink()
        getattr(pipeline, name).save_pretrained(folder / name, max_shard_size="40KB")
        assert len(list((folder / name).glob("*.safetensors"))) > 1


def complete_index(folder: Path, version: str, *, scheduler: str, **entries: Any) -> None:
    """Complete `model_index.json`."""
    file = folder / "model_index.json"
    index = json.loads(file.read_text()) | {"_diffusers_version": version, **entries}
    index["scheduler"] = ["diffusers", scheduler]
    file.write_text(json.dumps(dict(sorted(index.items())), indent=2))


def put_scheduler(folder: Path, config: dict[str, Any]) -> None:
    """Put the published file, word by word, in the place of the one that diffusers wrote."""
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=2))


def keep_fields(folder: Path, version: str, fields: tuple[str, ...], **given: Any) -> None:
    """Leave out of a configuration what the version that wrote it did not know, and set what is given."""
    config = json.loads((folder / "config.json").read_text()) | given
    kept = {name: config[name] for name in fields} | {"_diffusers_version": version}
    (folder / "config.json").write_text(json.dumps(kept, indent=2))


def old_text_encoder(folder: Path) -> None:
    """As transformers 4 wrote it: tensors under `text_model.`, the positions among them, and the special
    tokens of CLIP's first configuration, which are not those of the tokenizer."""
    for file in folder.glob("*.safetensors"):
        tensors = {
            name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": each
            for name, each in load_file(file).items()
        }
        positions = tensors["text_model.embeddings.position_embedding.weight"].shape[0]
        tensors["text_model.embeddings.position_ids"] = torch.arange(positions)[None]
        save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0, "transformers_version": "4.22.0.dev0"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def old_tokenizer(folder: Path, pad_token: str) -> None:
    """CLIP's vocabulary in two files, without `tokenizer.json`."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    for file in folder.iterdir():
        file.unlink()
    merges = [" ".join(each) if isinstance(each, list) else each for each in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    texts = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special = {name: {"content": text, **flags} for name, text in texts.items()}
    tokens = json.dumps({**special, "pad_token": pad_token}, indent=2)
    (folder / "special_tokens_map.json").write_text(tokens)
    added = {name: {"__type": "AddedToken", **each} for name, each in special.items()}
    settings = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": tokenizer.model_max_length,
        "name_or_path": "openai/clip-vit-large-patch14",
        "pad_token": "<|endoftext|>",
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
        **added,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def add_safety_checker(folder: Path, variant: str | None) -> None:
    """A tiny StableDiffusionSafetyChecker, which blocks nothing, with its feature extractor."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 28, "patch_size": 14}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=vision, text_config={**tower, "vocab_size": 8}, projection_dim=8)
    )
    for weights in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        weights.data.fill_(2)  # a cosine above which nothing lies
    checker.save_pretrained(folder / "safety_checker", variant=variant)
    add_feature_extractor(folder)


def add_feature_extractor(folder: Path) -> None:
    """The file of the safety checker's feature extractor."""
    (folder / "feature_extractor").mkdir()
    settings = {
        "crop_size": 28,
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 28,
    }
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))
