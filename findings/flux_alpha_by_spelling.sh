#!/usr/bin/env bash
# diffusers' FLUX.1 loader obeys or forgets a LoRA's alpha, by how its two matrices are called.
# usage: findings/flux_alpha_by_spelling.sh     (needs python3 with pip and venv, and a network; some minutes, most of
#        them to install PyTorch)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
"$work/venv/bin/python" - <<'PYTHON'
import inspect
import sys

import diffusers
import peft
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

diffusers.utils.logging.set_verbosity_error()
print(f"diffusers {diffusers.__version__}, peft {peft.__version__}, PyTorch {torch.__version__}")
print(
    "The guess: a file's alpha scales an adapter by alpha / rank, whether its matrices are called lora_A and lora_B or "
    "lora_down and lora_up; a name that the loader does not obey would be refused, or warned about."
)
LAYER, RANK, ALPHA, WIDTH = "transformer.transformer_blocks.0.attn.to_q", 4, 1.0, 32


def loaded(tensors: dict[str, torch.Tensor]) -> FluxTransformer2DModel:
    """Return a small transformer, the same each time, with an adapter."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    parts = dict.fromkeys(list(inspect.signature(FluxPipeline.__init__).parameters)[1:])
    pipeline = FluxPipeline(**parts | {"transformer": transformer})
    pipeline.load_lora_weights({f"{LAYER}.{name}": tensor.clone() for name, tensor in tensors.items()})
    return transformer.eval()


@torch.no_grad()
def update(transformer: FluxTransformer2DModel) -> torch.Tensor:
    """Return what the adapter adds to its layer's outputs."""
    layer = transformer.transformer_blocks[0].attn.to_q
    given = torch.eye(WIDTH)
    return layer(given) - layer.base_layer(given)


torch.manual_seed(1)
down, up = torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK)
alpha = {"alpha": torch.tensor(ALPHA)}
expected = (ALPHA / RANK) * (up @ down).T
spellings = {
    "lora_A, lora_B": {"lora_A.weight": down, "lora_B.weight": up} | alpha,
    "lora_down, lora_up": {"lora_down.weight": down, "lora_up.weight": up} | alpha,
}
strengths = {}
for name, tensors in spellings.items():
    found = update(loaded(tensors))
    strengths[name] = float((found * expected).sum() / expected.square().sum())
    print(f"{name}, with alpha {ALPHA:g} and rank {RANK}: {strengths[name]:.3f} times what the file says")
if abs(strengths["lora_A, lora_B"] - 1) > 1e-4 or abs(strengths["lora_down, lora_up"] - RANK / ALPHA) > 1e-4:
    sys.exit("The behaviour has changed.")
print(
    "The behaviour: the same adapter is obeyed under the one pair of names and is rank / alpha times too strong under "
    "the other, without an error. The loader renames the matrices and leaves the alphas among the tensors, where "
    "nothing looks for them."
)
PYTHON
