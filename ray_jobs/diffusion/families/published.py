"""Names of layers in the first publications of models, which other programs use in their files.

A first publication may have several of diffusers' layers in one: its rows are theirs, one after another.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ray_jobs.diffusion.protocols import Settings

Published = tuple[str, tuple[str, ...]]  # a layer's name, and diffusers' layers that it is made of, in order


class KohyaFiles(NamedTuple):
    """Metadata of LoRA files that kohya's programs (sd-scripts, musubi-tuner) write for a family.

    Attributes:
        module: `ss_network_module`.
        version: `ss_base_model_version`.
        architecture: `modelspec.architecture`, before `/lora`.
    """

    module: str
    version: str
    architecture: str


def renamed(layer: str, names: Mapping[str, Sequence[str]], prefixes: Mapping[str, str]) -> Published | None:
    """Return the published name of a layer in a numbered block; None if the tables lack it.

    Args:
        layer: diffusers' name: `<blocks>.<number>.<inside>`.
        names: published names in a block, each with diffusers' layers that it is made of.
        prefixes: published names of diffusers' lists of blocks.
    """
    blocks, number, inside = (*layer.split(".", 2), "", "")[:3]
    if blocks not in prefixes:
        return None
    for name, parts in names.items():
        if inside in parts:
            own = tuple(f"{blocks}.{number}.{part}" for part in parts)
            return f"{prefixes[blocks]}.{number}.{name}", own
    return None


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_MIDDLE = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}


def published_unet_layer(layer: str, unet: Settings) -> str:
    """Return the name of a UNet's layer in the latent diffusion models that Stable Diffusion began with.

    Args:
        layer: diffusers' name.
        unet: the UNet's configuration.

    Raises:
        ValueError: the layer has no name there.
    """
    if layer in _OUTER:
        return _OUTER[layer]
    # In a block of diffusers are as many inputs (or one more) and one change of size.
    in_block = int(unet["layers_per_block"]) + 1
    side, *parts = layer.split(".")
    try:
        if side == "mid_block":
            block = f"middle_block.{_MIDDLE['.'.join(parts[:2])]}"
            kind, inside = parts[0], ".".join(parts[2:])
        else:
            number, kind, place, inside = int(parts[0]), parts[1], int(parts[2]), ".".join(parts[3:])
            if side == "down_blocks":
                if kind == "downsamplers":
                    return f"input_blocks.{(number + 1) * in_block}.0.op"
                block = f"input_blocks.{number * in_block + place + 1}"
            elif side == "up_blocks":
                attention = "Attn" in unet["up_block_types"][number]
                if kind == "upsamplers":
                    last = number * in_block + in_block - 1
                    return f"output_blocks.{last}.{2 if attention else 1}.{inside}"
                block = f"output_blocks.{number * in_block + place}"
            else:
                raise KeyError(side)
            block = f"{block}.{('resnets', 'attentions').index(kind)}"
        return f"{block}.{_RESNET[inside] if kind == 'resnets' else inside}"
    except (KeyError, ValueError, IndexError):
        raise ValueError(f"{layer} has no name in the first publication of Stable Diffusion") from None
