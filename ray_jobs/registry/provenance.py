"""Provenance: tags that record the code a version came from and its call signature."""

import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from ray_jobs.config import home

PACKAGE = "diffray"


def code_version() -> str:
    """Return the commit of the running checkout, with `-dirty` if it has changes; else the package's version.

    A job on the embedded Ray runs in a copy of the checkout without history; `home()` is then the checkout.
    """
    for checkout in (Path(__file__).resolve().parents[2], home()):
        ours = (checkout / ".git").exists() and (
            checkout / "ray_jobs" / "registry" / Path(__file__).name
        ).exists()
        if ours and shutil.which("git"):
            # --exclude removes all tags, so that --always gives the commit.
            describe = [
                "git",
                "-C",
                str(checkout),
                "describe",
                "--always",
                "--dirty",
                "--abbrev=40",
                "--exclude=*",
            ]
            done = subprocess.run(describe, capture_output=True, text=True)
            if done.returncode == 0:  # it fails if git does not trust a folder of another owner
                return done.stdout.strip()
    try:
        return f"{PACKAGE} {metadata.version(PACKAGE)}"
    except metadata.PackageNotFoundError:
        return "unknown: neither a checkout nor an installed package"


def signature(resolution: int) -> dict[str, object]:
    """Signature of a version: prompt, seed, steps, guidance scale -> pictures N x H x W x 3, uint8.

    The format is that of MLflow's `ModelSignature.from_dict`. MLflow itself keeps signatures in the MLmodel
    file of a pyfunc model and accepts none for a version (`mlflow.models.set_signature`). A folder in
    diffusers format has no such file, so the signature is stored as a tag.
    """
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema, TensorSpec

    inputs = {"prompt": "string", "seed": "long", "steps": "integer", "guidance_scale": "float"}
    pictures = TensorSpec(np.dtype("uint8"), (-1, resolution, resolution, 3))
    found = ModelSignature(
        inputs=Schema([ColSpec(kind, name) for name, kind in inputs.items()]), outputs=Schema([pictures])
    )
    return dict(found.to_dict())
