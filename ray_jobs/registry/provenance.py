"""Provenance: what a version's tags say of where it came from and of how it is called."""

import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from ray_jobs.config import home

PACKAGE = "diffray"


def code_version() -> str:
    """The commit of the checkout that runs, with `-dirty` if it was changed; else the package's version.

    A job on the embedded Ray runs in a copy of the checkout, without history; `home()` is the checkout then.
    """
    for checkout in (Path(__file__).resolve().parents[2], home()):
        ours = (checkout / ".git").exists() and (
            checkout / "ray_jobs" / "registry" / Path(__file__).name
        ).exists()
        if ours and shutil.which("git"):
            # --exclude leaves no tag to describe by, so that --always gives the commit.
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
            if done.returncode == 0:  # not so if git trusts no folder of another owner
                return done.stdout.strip()
    try:
        return f"{PACKAGE} {metadata.version(PACKAGE)}"
    except metadata.PackageNotFoundError:
        return "unknown: neither a checkout nor an installed package"


def signature(resolution: int) -> dict[str, Any]:
    """Inputs and outputs of a version: prompt, seed, steps, guidance scale -> pictures N x H x W x 3, uint8.

    In the form of MLflow's ModelSignature, whose `from_dict` reads it. MLflow itself keeps signatures in
    the MLmodel file of a pyfunc model and takes none for a version (`mlflow.models.set_signature`), and a
    folder in diffusers' format has no such file; so it travels as a tag.
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
