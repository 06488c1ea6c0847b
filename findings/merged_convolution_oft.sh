#!/usr/bin/env bash
# An OFT adapter of a 3 x 3 convolution, once merged, is another layer than before in peft.
# usage: findings/merged_convolution_oft.sh     (needs python3 with pip and venv, and a network; some minutes, most of
#        them to install PyTorch)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
"$work/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import peft
import torch
from peft import OFTConfig, get_peft_model
from torch import nn

warnings.filterwarnings("ignore")
print(f"peft {peft.__version__}, PyTorch {torch.__version__}")
print(
    "The guess: OFT multiplies a layer's weights by a rotation, so merge_adapter() changes nothing but rounding, for "
    "linear layers and for convolutions of any kernel; at most where patches of a convolution overlap might the "
    "layer before merging do something else."
)


@torch.no_grad()
def gap(layer: nn.Module, given: torch.Tensor) -> tuple[float, float]:
    """Return the largest change of outputs by merging, and the outputs' mean size."""
    torch.manual_seed(0)
    settings = OFTConfig(r=0, oft_block_size=4, target_modules=["0"], use_cayley_neumann=False)
    model = get_peft_model(nn.Sequential(layer), settings)
    for name, parameter in model.named_parameters():
        if "oft_" in name:
            parameter.normal_(std=0.3)
    model.eval()
    before = model(given)
    model.merge_adapter()
    return float((before - model(given)).abs().max()), float(before.abs().mean())


torch.manual_seed(1)
picture = torch.randn(2, 8, 15, 15)
cases = {
    "linear": (nn.Linear(8, 8), torch.randn(4, 8)),
    "convolution, 1 x 1": (nn.Conv2d(8, 8, 1), picture),
    "convolution, 3 x 3, patches that overlap": (nn.Conv2d(8, 8, 3), picture),
    "convolution, 3 x 3, patches apart (stride 3)": (nn.Conv2d(8, 8, 3, stride=3), picture),
}
found = {name: gap(*case) for name, case in cases.items()}
for name, (change, size) in found.items():
    print(f"{name}: merging changes outputs by up to {change:.2g}; their mean size is {size:.2g}")
plain = [found[name][0] < 1e-4 for name in ("linear", "convolution, 1 x 1")]
wide = [change > 1 for name, (change, _) in found.items() if "3 x 3" in name]
if not (all(plain) and all(wide)):
    sys.exit("The behaviour has changed.")
print(
    "The behaviour: linear layers and 1 x 1 convolutions are the same after merging. A 3 x 3 convolution is another "
    "layer, by more than the size of its outputs, also where its patches lie apart. An adapter that was trained "
    "unmerged and is then merged for serving draws other pictures."
)
PYTHON
