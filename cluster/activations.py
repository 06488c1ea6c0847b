"""What a denoiser keeps for its backward pass, estimated from the shapes of its layers.

The rule: every convolution, linear layer and norm has an input, of (its positions) x (its input channels)
numbers; what is kept is the sum of these times `KEPT`, which was fitted to what autograd saves of a small
model of each family, and is held to it by tests/unit/test_estimate.py. With gradient checkpointing a block
keeps its input only, and one block at a time all of it.
"""

import re
from typing import Any

from cluster.estimate import ELEMENT, Shapes
from ray_jobs.config import TrainConfig

# By whether it is a UNet, and what is trained: a frozen layer keeps nothing for its own weights.
KEPT = {(True, "full"): 1.45, (True, "lora"): 1.28, (False, "full"): 2.25, (False, "lora"): 1.45}
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
    inputs: dict[str, int] = {}
    for name, shape in denoiser.items():
        if not name.endswith(".weight"):
            continue
        channels = shape[1] if len(shape) > 1 else shape[0]
        block = _block(name)
        inputs[block] = inputs.get(block, 0) + channels * _positions(name, config, side, text_tokens)
    factor = KEPT["block_out_channels" in config, train.method]
    kept = factor * sum(inputs.values())
    if train.gradient_checkpointing:
        between = {block: _width(denoiser, block) for block in inputs if block != REST}
        kept = factor * (inputs.get(REST, 0) + max(inputs[block] for block in between)) + sum(
            width * _positions(f"{block}.", config, side, text_tokens) for block, width in between.items()
        )
    return int(rows * ELEMENT[train.precision] * kept)


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


def _positions(name: str, config: dict[str, Any], side: int, text_tokens: int) -> int:
    """At how many places of a picture a layer works."""
    if any(part in name for part in ONE_POSITION):
        return 1
    if "block_out_channels" not in config:
        patches = (
            (side // config.get("patch_size", 1)) ** 2
            if config.get("pos_embed_max_size")
            else (side // 2) ** 2
        )
        if name.startswith("single_transformer_blocks"):
            return patches + text_tokens
        return text_tokens if "context" in name or "add_" in name else patches
    if ".attn2.to_k" in name or ".attn2.to_v" in name:
        return text_tokens
    last = len(config["block_out_channels"]) - 1
    level = 0
    if found := re.match(r"(down|up)_blocks\.(\d+)\.", name):
        level = int(found.group(2)) if found.group(1) == "down" else last - int(found.group(2))
        level -= "upsamplers" in name
    elif name.startswith("mid_block"):
        level = last
    return (side // 2**level) ** 2
