#!/usr/bin/env bash
# A ControlNet made from an SD3 transformer by diffusers changes the configuration of that transformer.
# usage: findings/controlnet_changes_base.sh     (needs python3 with pip and venv, and a network; some minutes, most of
#        them to install PyTorch)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
"$work/venv/bin/python" - <<'PYTHON'
import sys
import tempfile

import diffusers
import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    FluxTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

diffusers.utils.logging.set_verbosity_error()
print(f"diffusers {diffusers.__version__}, PyTorch {torch.__version__}")
print(
    "The guess: from_unet and from_transformer read the base and leave it as it is, so that it can be saved and read "
    "again afterwards; its configuration is a FrozenDict, which refuses assignments."
)
torch.manual_seed(0)
bases = {
    "SD3": SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    ),
    "FLUX.1": FluxTransformer2DModel(
        in_channels=16,
        num_layers=4,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    ),
    "Stable Diffusion": UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    ),
}
make = {
    "SD3": lambda base: SD3ControlNetModel.from_transformer(base, num_layers=2, num_extra_conditioning_channels=0),
    "FLUX.1": lambda base: FluxControlNetModel.from_transformer(
        base, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2
    ),
    "Stable Diffusion": ControlNetModel.from_unet,
}
found = {}
for name, base in bases.items():
    before, blocks = dict(base.config), len(getattr(base, "transformer_blocks", ()))
    make[name](base)
    changed = {key: (before.get(key), value) for key, value in base.config.items() if before.get(key) != value}
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        try:
            type(base).from_pretrained(folder)
            again = "is read again"
        except ValueError as error:
            again = f"cannot be read: {str(error).split('. ')[0]}"
    found[name] = (changed, again)
    told = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in sorted(changed.items())) or "nothing"
    print(f"{name}: changed in the base's configuration: {told}; saved afterwards, the base {again}")
changed, again = found["SD3"]
as_told = changed.get("num_layers") == (4, 2) and again.startswith("cannot be read")
others = [found[name] for name in ("FLUX.1", "Stable Diffusion")]
as_told &= all(not changed and again == "is read again" for changed, again in others)
print(
    "The behaviour: SD3's transformer has four blocks and a configuration that says two, and what save_pretrained then "
    "writes is refused. FLUX.1 and Stable Diffusion are left as they are."
)
sys.exit(0 if as_told else "the behaviour has changed")
PYTHON
