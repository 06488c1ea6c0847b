"""What a denoiser keeps for its backward pass, estimated from the shapes of its layers.

Every convolution, linear layer and norm has an input, of (its positions) x (its input channels) numbers. In
full training what is kept is the sum of these times `FULL`. A frozen layer keeps nothing for its own weights,
so with LoRA the sum counts `FROZEN` times, and each layer with an adapter keeps its input too and the
adapter's `rank` numbers at each position. The factors were fitted to what autograd saves of the demo's model
and of a small model of each family (torch 2.13, peft 0.21) and are held to it by tests/unit/test_estimate.py.
With gradient checkpointing a block keeps its input only, and one block at a time all of it.
"""

import re
from dataclasses import dataclass
from typing import Any

from ray_jobs.config import TrainConfig
from ray_jobs.planning.estimate import DENOISER_ATTENTION, ELEMENT, Shapes, adapted

# By whether it is a UNet.
FULL = {True: 1.5, False: 2.25}
FROZEN = {True: 1.08, False: 1.0}
DROPPED = 2.0  # times the input of an adapter with dropout: what is left of it and the mask
DORA = 2.6  # times the output of a layer with DoRA (arXiv 2402.09353)
SHARED = {"to_k": "to_q", "to_v": "to_q", "add_k_proj": "add_q_proj", "add_v_proj": "add_q_proj"}
REST = "rest"  # what lies in no block
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
    """Bytes that a micro batch keeps between its forward and backward pass.

    Args:
        config: the denoiser's, as in its config.json.
        side: of the latents.
        rows: pictures of the micro batch.
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
    """Numbers of one picture by the block that keeps them."""
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
    inputs: dict[str, float] = {}  # by what they are the input of: several layers may share one
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
    """A name of a layer's input: the captions, or what is projected to queries, keys and values."""
    *above, last = layer.split(".")
    if above and above[-1] == "attn2" and last in ("to_k", "to_v"):
        return "captions"
    return ".".join([*above, SHARED.get(last, last), "input"])


def _block(name: str) -> str:
    """What gradient checkpointing runs twice: a UNet's resnet or attention, a transformer's block."""
    found = re.match(
        r"((down|up)_blocks\.\d+\.\w+\.\d+|mid_block\.\w+\.\d+|(single_)?transformer_blocks\.\d+)\.", name
    )
    return found.group(1) if found else REST


def _width(denoiser: Shapes, block: str) -> int:
    """Channels of a block's input: those of its first norm, else of its first layer."""
    shapes = [shape for name, shape in denoiser.items() if name.startswith(f"{block}.")]
    norms = [shape[0] for shape in shapes if len(shape) == 1]
    return norms[0] if norms else max((shape[1] for shape in shapes if len(shape) > 1), default=0)


@dataclass(frozen=True)
class _Places:
    """At how many places of a picture each layer works.

    Attributes:
        config: the denoiser's.
        side: of the latents.
    """

    config: dict[str, Any]
    side: int
    text_tokens: int

    @property
    def is_unet(self) -> bool:
        return "block_out_channels" in self.config

    def positions(self, name: str) -> int:
        """Of a layer or block, by its name."""
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
