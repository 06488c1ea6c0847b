"""Messages between the ingress and the replicas. No PyTorch, which the ingress does not import."""

from typing import Any, NamedTuple

from ray_jobs.config import resolve_path
from ray_jobs.registry.models import RegisteredModel
from serving.load import Drift, Load

BASE = "base"


class Order(NamedTuple):
    """One image to generate."""

    version: RegisteredModel | None  # None: the bare base
    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    negative_prompt: str | None = None
    height: int | None = None  # pixels; None: the model's own
    width: int | None = None
    previews: int = 0  # number of intermediate images
    image: bytes | None = None  # initial image: an image file
    strength: float = 1.0  # with an image, in (0, 1]: fraction of the steps that is run
    image_id: str = ""  # id of the generated image
    scored: bool = False  # True: counts for the version's drift scores, see `replica.drift`
    asked: float = 0.0  # time of the request, seconds since 1970
    fused: bool = False  # True: a LoRA version is served by its own engine, merged into the base

    def parameters(self, size: str) -> dict[str, Any]:
        """Return the parameters that are recorded for feedback and in the image's file.

        Args:
            size: width x height in pixels.
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
    """A replica's answer: a finished image or a preview."""

    png: bytes
    waited_s: float | None = None  # seconds from the order's arrival to its first step; None: a preview


class Traits(NamedTuple):
    """Properties of the replicas' base that the ingress needs."""

    height: int  # of the model's default image, in pixels
    width: int


class ReplicaLoad(NamedTuple):
    """Load of a replica's engines, and its drift scores."""

    replica: str  # unique name; a replacement replica has another one
    process: int  # process id on its node
    engines: dict[str, Load]  # by engine name
    drift: dict[tuple[str, int], Drift]  # by model name and version


class Place(NamedTuple):
    """Location of a version in a replica: the engine's name, and the adapter's name in it, if any."""

    engine: str
    adapter: str | None


def label(version: RegisteredModel | None) -> str:
    """Return the name by which a version is requested: `name@version`, or `base`."""
    return BASE if version is None else f"{version.name}@{version.version}"


def base_of(version: RegisteredModel) -> tuple[str, str | None]:
    """Return the base that a version was trained on (a folder or hub name) and its revision."""
    return resolve_path(version.base), version.base_revision


def adapter_name(version: RegisteredModel) -> str:
    """Return the version's label with the beginning of its weights' digest."""
    return f"{label(version)}#{version.digest[:12]}"


def place_of(version: RegisteredModel | None, *, fused: bool = False) -> Place:
    """Return the place of a version. LoRA versions are adapters in the base's engine, unless fused; a fully
    trained version has its own engine.

    Names include the digest, because a recreated registry counts versions from 1 again.
    """
    if version is None:
        return Place(BASE, None)
    name = adapter_name(version)
    if version.method != "lora":
        return Place(name, None)
    return Place(f"fused {name}", None) if fused else Place(BASE, name)
