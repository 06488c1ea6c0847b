"""Load a feature network of any kind from its specification."""

import hashlib
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from ray_jobs.metrics.efficientnet import load_efficientnet, read_efficientnet
from ray_jobs.metrics.feature_network import (
    FeatureNetwork,
    Preprocessing,
    freeze,
    read_checked,
    require_digest,
)
from ray_jobs.metrics.inception import load_inception, read_inception
from ray_jobs.metrics.vision_model import check_vision_model, load_vision_model


@dataclass(frozen=True)
class NetworkSpec:
    """Kind and location of a network. `ray_jobs/config/search.py` checks that the settings fit the kind.

    Attributes:
        kind: `inception`: the standard FID network; `efficientnet-lite0`; `transformers`: a vision model of
            that library (DINOv2, CLIP); `torchscript`: any file that maps float pictures to N x D features.
        path: path of the file; for `transformers`, a folder or hub name.
        sha256: expected digest of the network. `torchscript` requires it, since such a file is code.
        name: name of a `torchscript` network, recorded with its scores.
        preprocessing: preprocessing of a `torchscript` network, as in its training.
        revision: hub revision of a `transformers` model.
        field: setting that names the path.
    """

    kind: Literal["inception", "efficientnet-lite0", "transformers", "torchscript"]
    path: str
    sha256: str | None = None
    name: str | None = None
    preprocessing: Preprocessing | None = None
    revision: str | None = None
    field: str = "evaluate.second_network.path"


def check_network(spec: NetworkSpec) -> None:
    """Check that a network's files exist and have the expected digests, without loading the network.

    Raises:
        ValueError: as for `load_network`, as far as the files show it.
    """
    match spec.kind:
        case "inception":
            _, digest = read_inception(spec.path, spec.field)
        case "efficientnet-lite0":
            _, digest = read_efficientnet(spec.path, spec.field)
        case "transformers":
            check_vision_model(spec.path, revision=spec.revision, sha256=spec.sha256, field=spec.field)
            return
        case "torchscript":
            _read_torchscript(spec)
            return
    require_digest(spec.path, digest, spec.sha256, spec.field)


def load_network(spec: NetworkSpec, device: str | torch.device = "cpu") -> FeatureNetwork:
    """Load the network that `spec` describes, frozen.

    Args:
        device: on the meta device it tells what memory it takes; a model of transformers is then built from
            its configuration, and its weights are not read.

    Raises:
        ValueError: the file is missing, or does not match the digest.
    """
    network: FeatureNetwork
    match spec.kind:
        case "inception":
            network = load_inception(spec.path, device, field=spec.field)
        case "efficientnet-lite0":
            network = load_efficientnet(spec.path, device, field=spec.field)
        case "transformers":
            network = load_vision_model(spec.path, device, revision=spec.revision, field=spec.field)
        case "torchscript":
            return _load_torchscript(spec, torch.device(device))
    if torch.device(device).type == "meta":
        return network  # its weights may be elsewhere
    require_digest(spec.path, network.digest, spec.sha256, spec.field)
    return network


@dataclass(frozen=True, eq=False)
class TorchScript(FeatureNetwork):
    """Network from a TorchScript file that the user trusts by giving its digest."""

    module: torch.jit.ScriptModule
    preprocessing: Preprocessing
    field: str  # setting that names it

    @property
    def resizing(self) -> str:
        return self.preprocessing.resizing

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        features = self.module(self.preprocessing(images))
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(images):
            found = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise ValueError(f"{self.field}: {self.name} must give N x D features, not {found}")
        return features


def _read_torchscript(spec: NetworkSpec) -> tuple[bytes, str]:
    assert spec.sha256
    section = spec.field.removesuffix(".path")
    mend = f"take the file whose digest {section}.sha256 is, or correct that"
    return read_checked(Path(spec.path), field=spec.field, mend=mend, allowed={spec.sha256.lower()})


def _load_torchscript(spec: NetworkSpec, device: torch.device) -> TorchScript:
    assert spec.name and spec.preprocessing
    content, digest = _read_torchscript(spec)
    module = torch.jit.load(io.BytesIO(content), map_location=device)
    freeze(module, device)
    # The preprocessing is not in the file, but changes the features.
    whole = hashlib.sha256(f"{digest} {spec.preprocessing!r}".encode()).hexdigest()
    black = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    network = TorchScript(spec.name, whole, device, 0, module, spec.preprocessing, spec.field)
    return replace(network, num_features=network.on_device(black).shape[1])
