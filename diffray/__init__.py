"""Distributed fine-tuning of text-to-image diffusion models, as the command `diffray` and in Python.

run = diffray.fit("photos/", base="stabilityai/stable-diffusion-xl-base-1.0", epochs=10, name="photos")
run.wait().winner
run.deploy().draw("a red apple")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffray.api import Endpoint, Run, defaults, fit, run, versions
    from diffray.jobs import JobFailed
    from ray_jobs.config import ConfigError
    from serving.client import EndpointError

__all__ = [
    "ConfigError",
    "Endpoint",
    "EndpointError",
    "JobFailed",
    "Run",
    "defaults",
    "fit",
    "run",
    "versions",
]


def __getattr__(name: str) -> Any:
    """Import the API with its first use: the command `diffray` does without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from diffray import api

    return getattr(api, name)
