#!/usr/bin/env bash
# diffusers' group offload to a folder computes with the weights of the model that used the folder first.
# usage: findings/disk_offload_old_weights.sh     (needs python3 with pip and venv, and a network; some minutes,
#        most of them to install PyTorch)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0
FOLDER="$work" "$work/venv/bin/python" - <<'PYTHON'
import os
import sys

import diffusers
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.hooks import apply_group_offloading

print(f"diffusers {diffusers.__version__}, PyTorch {torch.__version__}")
print(
    "The guess: a model whose groups are offloaded to a folder computes as without that, whatever the folder held "
    "before, or the folder is refused; and weights that are loaded into the model later count."
)
CPU = torch.device("cpu")


def model(seed: int) -> PixArtTransformer2DModel:
    """A small transformer; models of other seeds differ in their weights only, as two checkpoints do."""
    torch.manual_seed(seed)
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
        use_additional_conditions=False,
    ).eval()


@torch.no_grad()
def output(of: PixArtTransformer2DModel) -> torch.Tensor:
    torch.manual_seed(0)
    latents, captions, none = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8), {"resolution": None, "aspect_ratio": None}
    return of(latents, captions, torch.tensor([500]), added_cond_kwargs=none, return_dict=False)[0]


def offloaded(of: PixArtTransformer2DModel, kind: str, folder: str) -> PixArtTransformer2DModel:
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(
        of, onload_device=CPU, offload_device=CPU, offload_type=kind, offload_to_disk_path=folder, **groups
    )
    return of


def nearest(found: torch.Tensor) -> str:
    """Which of the two checkpoints an output is of."""
    return next((name for name, each in plain.items() if torch.allclose(found, each, atol=1e-4)), "neither")


plain = {"first": output(model(1)), "second": output(model(2))}
print(f"the outputs of the two checkpoints differ by up to {(plain['first'] - plain['second']).abs().max():.2f}")
seen = {}
for kind in ("block_level", "leaf_level"):
    folder = os.path.join(os.environ["FOLDER"], kind)
    first = offloaded(model(1), kind, folder)
    seen[kind] = [nearest(output(first))]
    seen[kind].append(nearest(output(offloaded(model(2), kind, folder))))
    first.load_state_dict(model(2).state_dict())
    seen[kind].append(nearest(output(first)))
    alone, same, later = seen[kind]
    print(f"{kind}: the first checkpoint computes as the {alone}; the second one, in the same folder, as the {same};")
    print(f"    the first model after loading the second checkpoint's weights into it, as the {later}")
print(
    "The behaviour: files are named by the groups' names and kept if they are there, whatever wrote them. A second "
    "checkpoint of the same architecture therefore computes with the first one's weights, without a warning, and so "
    "does a model into which weights are loaded later."
)
sys.exit("the behaviour has changed" if any(each != ["first"] * 3 for each in seen.values()) else 0)
PYTHON
