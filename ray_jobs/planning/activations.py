"""Activation memory of a denoiser's backward pass, estimated from the shapes of its layers.

Every convolution, linear layer and norm has an input of (positions) x (input channels) elements. Full
training keeps the sum of these times `FULL`. A frozen layer saves nothing for its own weights, so with LoRA
the factor is `FROZEN`, and each adapted layer also keeps its input and the adapter's `rank` elements per
position. The factors were fitted to the tensors that autograd saves for the demo's model and a small model of
each family (torch 2.13, peft 0.21); tests/unit/test_estimate.py checks them. With gradient checkpointing each
block keeps only its input, and one block at a time keeps everything.
"""

import re
from dataclasses import dataclass
from typing import Any

from ray_jobs.config import TrainConfig
from ray_jobs.planning.estimate import DENOISER_ATTENTION, ELEMENT, Shapes, adapted

# Keyed by is_unet.
FULL = {True: 1.5, False: 2.25}
FROZEN = {True: 1.08, False: 1.0}
DROPPED = 2.0  # times the input of an adapter with dropout: the input after dropout, and the mask
DORA = 2.6  # times the output of a layer with DoRA (arXiv 2402.09353)
SHARED = {"to_k": "to_q", "to_v": "to_q", "add_k_proj": "add_q_proj", "add_v_proj": "add_q_proj"}
REST = "rest"  # layers outside all blocks
ONE_POSITION = (
    "time_emb",
    "add_embedding",
    "time_embedding",
    "time_text_embed",
    ".linear.",
    "norm_out.linear",
)


def activation_bytes(
    train: TrainConfig, denoiser: Shapes, config: dict[str, Any], *, side: int, text_tokens: int, rows: int
) -> int:
    """Bytes of activations that a micro batch keeps between its forward and backward pass.

    Args:
        config: the denoiser's config.json.
        side: side of the latents.
        rows: number of pictures in the micro batch.
    """
    where = _Places(config, side, text_tokens)
    kept = _kept_by_block(train, denoiser, where)
    total = sum(kept.values())
    if train.gradient_checkpointing:
        blocks = kept.keys() - {REST}
        between = sum(_width(denoiser, block) * where.positions(f"{block}.") for block in blocks)
        total = kept[REST] + max((kept[block] for block in blocks), default=0) + between
    return int(rows * ELEMENT[train.precision] * total)


def _kept_by_block(train: TrainConfig, denoiser: Shapes, where: "_Places") -> dict[str, float]:
    """Number of elements kept per picture, by block."""
    lora, is_unet = train.lora, where.is_unet
    factor = FULL[is_unet] if train.method == "full" else FROZEN[is_unet]
    kept: dict[str, float] = {REST: 0.0}
    for name, shape in denoiser.items():
        if name.endswith(".weight"):
            channels = shape[1] if len(shape) > 1 else shape[0]
            block = _block(name)
            kept[block] = kept.get(block, 0.0) + factor * channels * where.positions(name)
    if train.method == "full":
        return kept
    inputs: dict[str, float] = {}  # by the input's name: several layers may share one
    for layer in adapted(denoiser, lora.target_modules or DENOISER_ATTENTION):
        name, block = f"{layer}.weight", _block(f"{layer}.weight")
        positions, shape = where.positions(name), denoiser[name]
        kept[block] += positions * (lora.rank + (DORA * shape[0] if lora.use_dora else 0))
        if lora.dropout:
            kept[block] += DROPPED * positions * shape[1]
        else:
            inputs[_source(layer)] = positions * shape[1]
    for source, numbers in inputs.items():
        kept[_block(source)] += numbers
    return kept


def _source(layer: str) -> str:
    """Name of a layer's input: the captions, or the common input of query, key and value projections."""
    *above, last = layer.split(".")
    if above and above[-1] == "attn2" and last in ("to_k", "to_v"):
        return "captions"
    return ".".join([*above, SHARED.get(last, last), "input"])


def _block(name: str) -> str:
    """Name of the unit of gradient checkpointing: a UNet's resnet or attention, a transformer's block."""
    found = re.match(
        r"((down|up)_blocks\.\d+\.\w+\.\d+|mid_block\.\w+\.\d+|(single_)?transformer_blocks\.\d+)\.", name
    )
    return found.group(1) if found else REST


def _width(denoiser: Shapes, block: str) -> int:
    """Channels of a block's input: those of its first norm, else the most of any of its layers."""
    shapes = [shape for name, shape in denoiser.items() if name.startswith(f"{block}.")]
    norms = [shape[0] for shape in shapes if len(shape) == 1]
    return norms[0] if norms else max((shape[1] for shape in shapes if len(shape) > 1), default=0)


@dataclass(frozen=True)
class _Places:
    """Number of positions at which each layer works, per picture.

    Attributes:
        config: the denoiser's configuration.
        side: side of the latents.
        text_tokens: tokens of a caption.
    """

    config: dict[str, Any]
    side: int
    text_tokens: int

    @property
    def is_unet(self) -> bool:
        return "block_out_channels" in self.config

    def positions(self, name: str) -> int:
        """Return the number of positions of a layer or block, by its name."""
        if any(part in name for part in ONE_POSITION):
            return 1
        return self._in_unet(name) if self.is_unet else self._in_transformer(name)

    def _in_transformer(self, name: str) -> int:
        patch = self.config.get("patch_size", 1) if self.config.get("pos_embed_max_size") else 2
        patches = (self.side // patch) ** 2
        if name.startswith("single_transformer_blocks"):
            return patches + self.text_tokens
        return self.text_tokens if "context" in name or "add_" in name else patches

    def _in_unet(self, name: str) -> int:
        if ".attn2.to_k" in name or ".attn2.to_v" in name:
            return self.text_tokens
        last = len(self.config["block_out_channels"]) - 1
        level = 0
        if found := re.match(r"(down|up)_blocks\.(\d+)\.", name):
            level = int(found.group(2)) if found.group(1) == "down" else last - int(found.group(2))
            level -= "upsamplers" in name
        elif name.startswith("mid_block"):
            level = last
        return (self.side // 2**level) ** 2
