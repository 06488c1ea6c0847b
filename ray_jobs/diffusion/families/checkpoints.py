"""Tensors of Stable Diffusion's components under the names of its single-file checkpoints.

The names are those of the first publications (latent diffusion, OpenCLIP), which `from_single_file` of
diffusers and other programs read.
"""

import re
from collections.abc import Mapping

import torch

from ray_jobs.diffusion.families.published import published_unet_layer
from ray_jobs.diffusion.protocols import Settings

Tensors = Mapping[str, torch.Tensor]
CLIP = "text_model."  # begins the names of CLIP's tensors in files, but not in all

_AUTOENCODER_INSIDE = (
    (".mid_block.resnets.0.", ".mid.block_1."),
    (".mid_block.resnets.1.", ".mid.block_2."),
    (".mid_block.attentions.0.", ".mid.attn_1."),
    (".conv_shortcut.", ".nin_shortcut."),
    (".conv_norm_out.", ".norm_out."),
)
# The second name of each is that of older files in diffusers' format.
_ATTENTION = {
    "group_norm": "norm",
    **dict.fromkeys(("to_q", "query"), "q"),
    **dict.fromkeys(("to_k", "key"), "k"),
    **dict.fromkeys(("to_v", "value"), "v"),
    **dict.fromkeys(("to_out.0", "proj_attn"), "proj_out"),
}
_OPEN_CLIP = (
    ("layer_norm1.", "ln_1."),
    ("layer_norm2.", "ln_2."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
    ("self_attn.out_proj.", "attn.out_proj."),
)
_OPEN_CLIP_OUTER = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}


def unet_checkpoint(tensors: Tensors, settings: Settings) -> dict[str, torch.Tensor]:
    """Return a UNet's tensors, `model.diffusion_model.*`.

    Raises:
        ValueError: a tensor has no name there.
    """
    found = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        found[f"model.diffusion_model.{published_unet_layer(layer, settings)}.{kind}"] = tensor
    return found


def autoencoder_checkpoint(tensors: Tensors, settings: Settings) -> dict[str, torch.Tensor]:
    """Return an autoencoder's tensors, `first_stage_model.*`; its attention is one of convolutions there."""
    last = len(settings["block_out_channels"]) - 1
    found = {}
    for name, tensor in tensors.items():
        name = re.sub(r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block.", name)
        name = re.sub(r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample.", name)
        name = re.sub(
            r"\.up_blocks\.(\d+)\.resnets\.", lambda number: f".up.{last - int(number[1])}.block.", name
        )
        name = re.sub(
            r"\.up_blocks\.(\d+)\.upsamplers\.0\.",
            lambda number: f".up.{last - int(number[1])}.upsample.",
            name,
        )
        for ours, theirs in _AUTOENCODER_INSIDE:
            name = name.replace(ours, theirs)
        block, mark, inside = name.partition(".attn_1.")
        if mark:
            layer, _, kind = inside.rpartition(".")
            name = f"{block}{mark}{_ATTENTION[layer]}.{kind}"
            if tensor.dim() == 2:
                tensor = tensor[:, :, None, None]
        found[f"first_stage_model.{name}"] = tensor
    return found


def clip_checkpoint(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    """Return a CLIP text encoder's tensors, `<prefix>text_model.*`."""
    return {
        f"{prefix}{CLIP}{name.removeprefix(CLIP)}": tensor
        for name, tensor in tensors.items()
        if not name.endswith("position_ids")
    }


def open_clip_checkpoint(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a CLIP text encoder with a projection as OpenCLIP has them.

    Queries, keys and values are one layer there, and the projection is transposed.
    """
    found, joined = {}, dict[str, dict[str, torch.Tensor]]()
    for name, tensor in tensors.items():
        if name == "text_projection.weight":
            found[f"{prefix}text_projection"] = tensor.T.contiguous()
        elif name in _OPEN_CLIP_OUTER:
            found[prefix + _OPEN_CLIP_OUTER[name]] = tensor
        elif part := re.fullmatch(
            r"text_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)", name
        ):
            target = f"{prefix}transformer.resblocks.{part[1]}.attn.in_proj_{part[3]}"
            joined.setdefault(target, {})[part[2]] = tensor
        elif not name.endswith("position_ids"):
            name = name.replace("text_model.encoder.layers.", "transformer.resblocks.")
            for ours, theirs in _OPEN_CLIP:
                name = name.replace(ours, theirs)
            found[prefix + name] = tensor
    return found | {target: torch.cat([parts[part] for part in "qkv"]) for target, parts in joined.items()}
