#!/usr/bin/env bash
# PyTorch's GroupNorm on a CPU loses digits in channels-last memory format, where values vary less than their mean.
# usage: findings/channels_last_group_norm.sh     (needs python3 with pip and venv, and a network; some minutes, most of
#        them to install PyTorch)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.nn.functional import group_norm

print(f"PyTorch {torch.__version__}")
print(
    "The guess: the memory format changes in which order GroupNorm sums, and so the last digits of float32: errors of "
    "about 1e-5 at most for values of size 1, in both formats."
)
GROUPS = 8


def errors(values: torch.Tensor) -> dict[str, float]:
    """Return the largest error of each format, by that of float64."""
    exact = group_norm(values.double(), GROUPS)
    formats = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    return {
        name: float((group_norm(values.to(memory_format=each), GROUPS) - exact).abs().max())
        for name, each in formats.items()
    }


torch.manual_seed(0)
noise = torch.randn(1, 32, 64, 64)
found = {}
for spread in (1.0, 0.1, 0.01, 0.001):
    found[spread] = errors(1 + spread * noise)
    told = ", ".join(f"{name} {error:.1e}" for name, error in found[spread].items())
    print(f"values of mean 1 and deviation {spread:g}: largest error of the normalised values: {told}")
flat = torch.full((1, 32, 128, 128), 0.7)
of_flat = {
    "contiguous": float(group_norm(flat, GROUPS).abs().max()),
    "channels last": float(group_norm(flat.to(memory_format=torch.channels_last), GROUPS).abs().max()),
}
told = ", ".join(f"{name} {value:.1e}" for name, value in of_flat.items())
print(f"a constant of 0.7, which normalises to 0: {told}")
exact = max(each["contiguous"] for each in found.values()) < 1e-3 and of_flat["contiguous"] < 1e-4
rough = found[0.01]["channels last"] > 3e-3 and of_flat["channels last"] > 1e-3
if not (exact and rough and found[1.0]["channels last"] < 1e-4):
    sys.exit("The behaviour has changed.")
print(
    "The behaviour: contiguous values are normalised to five digits or more whatever their mean. Channels last is as "
    "exact only where values vary as much as their mean is large; at a hundredth of it errors reach some per cent of "
    "the result, and a constant does not become 0. Flat pictures in a convolutional network with random weights are "
    "such values, so that two programs that agree otherwise differ by their memory format."
)
PYTHON
