"""Messages between the ingress and the replicas. No PyTorch: the ingress takes none."""

from typing import Any, NamedTuple

from ray_jobs.config import resolve_path
from ray_jobs.registry.models import RegisteredModel
from serving.load import Drift, Load

BASE = "base"


class Order(NamedTuple):
    """One picture to draw."""

    version: RegisteredModel | None  # None: the base alone
    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    negative_prompt: str | None = None
    height: int | None = None  # pixels; None: the model's own
    width: int | None = None
    previews: int = 0  # unfinished pictures on the way
    image: bytes | None = None  # to begin with: a file of a picture
    strength: float = 1.0  # with an image, in (0, 1]: the share of the steps that is made
    image_id: str = ""  # what the picture is called
    scored: bool = False  # whether its version is judged by it too, see `replica.drift`
    asked: float = 0.0  # seconds since 1970
    fused: bool = False  # whether a LoRA version is drawn by an engine of its own, merged into the base

    def parameters(self, size: str) -> dict[str, Any]:
        """What its feedback and its file say of the picture.

        Args:
            size: width x height, pixels.
        """
        return {
            "image_id": self.image_id,
            "model": self.version.name if self.version else BASE,
            "version": self.version.version if self.version else 0,
            "adapter": adapter_name(self.version) if self.version and self.version.method == "lora" else None,
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "size": size,
            "strength": None if self.image is None else self.strength,
        }


class Picture(NamedTuple):
    """What a replica answers."""

    png: bytes
    waited_s: float | None = None  # from the order's arrival to its first step; None: it is unfinished


class Traits(NamedTuple):
    """What the ingress must know of the base that the replicas draw with."""

    height: int  # of the model's own pictures, pixels
    width: int


class ReplicaLoad(NamedTuple):
    """What a replica is doing."""

    replica: str  # its name; another one in its place has another
    process: int  # its id on its node
    engines: dict[str, Load]  # by what they draw
    drift: dict[tuple[str, int], Drift]  # by name and version


class Place(NamedTuple):
    """Where a version is drawn: the engine's name, and the adapter's in it."""

    engine: str
    adapter: str | None


def label(version: RegisteredModel | None) -> str:
    """How a version is asked for: `name@version`, or `base`."""
    return BASE if version is None else f"{version.name}@{version.version}"


def base_of(version: RegisteredModel) -> tuple[str, str | None]:
    """The base that a version was trained on, a folder or hub name, and its revision."""
    return resolve_path(version.base), version.base_revision


def adapter_name(version: RegisteredModel) -> str:
    """The version and the beginning of its weights' digest."""
    return f"{label(version)}#{version.digest[:12]}"


def place_of(version: RegisteredModel | None, *, fused: bool = False) -> Place:
    """LoRA versions are adapters of the base's engine, unless fused; a fully trained version has an engine of
    its own.

    The digest is part of the names, because a registry that was made anew counts from 1 again.
    """
    if version is None:
        return Place(BASE, None)
    name = adapter_name(version)
    if version.method != "lora":
        return Place(name, None)
    return Place(f"fused {name}", None) if fused else Place(BASE, name)
