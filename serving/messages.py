"""Messages between the ingress and the replicas. No PyTorch, which the ingress does not import."""

import re
from pathlib import Path
from typing import NamedTuple, TypedDict

from ray_jobs.config import resolve_path
from ray_jobs.registry.models import RegisteredModel
from serving.encoding import Output
from serving.load import DriftScores, EngineLoad
from serving.request import ALL_STEPS, Request

BASE = "base"
FOLLOWING_BASE = "base with control images"  # engine of adapters that bring input channels for them
PLACE = re.compile(r"""(?<![\w:/.])/(?:[^\s:'"/]+/)+(?P<last>[^\s:'"/]+)""")
"""An absolute path, and the name at its end."""


class ImageParameters(TypedDict):
    """Parameters of a generated image that are recorded for feedback and in its file."""

    image_id: str
    model: str
    version: int
    adapter: str | None
    adapters: list[dict[str, str | float]] | None  # each a name, as `adapter`'s, and a scale
    prompt: str
    negative_prompt: str | None
    seed: int
    steps: int
    guidance_scale: float
    size: str
    strength: float | None
    num_references: int | None
    guidance_interval: list[float] | None  # None: in all steps
    control_scale: float | None  # of a picture that a ControlNet has steered


class RoutedRequest(NamedTuple):
    """A request with the version that it goes to.

    `request` is complete but for what only the replica knows: the name of the version's adapter in the
    engine, the pixels of the files, and a size that is the first reference's or the control image's.
    """

    version: RegisteredModel | None  # None: the bare base, to which `adapters` are applied
    request: Request
    image: bytes | None = None  # file of the initial image, as it was sent
    references: tuple[bytes, ...] = ()  # files of the reference pictures, as they were sent
    mask: bytes | None = None  # file with transparent pixels where the one picture is to be painted
    control: bytes | None = None  # file of the image that a ControlNet follows, as it was sent
    image_id: str = ""  # id of the generated image
    scored: bool = False  # True: counts for the version's drift scores, see `replica.drift`
    asked: float = 0.0  # time of the request, seconds since 1970
    fused: bool = False  # True: a LoRA version is served by its own engine, merged into the base
    adapters: tuple[RegisteredModel, ...] = ()  # LoRA versions of the request's `adapters`, in their order
    output: Output = Output()  # the file that the client wants

    def parameters(self, size: str) -> ImageParameters:
        """Return the image's parameters.

        Args:
            size: width x height in pixels.
        """
        interval = self.request.guidance_interval
        return {
            "image_id": self.image_id,
            "model": self.version.name if self.version else BASE,
            "version": self.version.version if self.version else 0,
            "adapter": adapter_name(self.version) if self.version and self.version.method == "lora" else None,
            "adapters": [each._asdict() for each in self.request.adapters] or None,
            "prompt": self.request.prompt,
            "negative_prompt": self.request.negative_prompt,
            "seed": self.request.seed,
            "steps": self.request.steps,
            "guidance_scale": self.request.guidance_scale,
            "size": size,
            "strength": None if self.image is None else self.request.strength,
            "num_references": len(self.references) or None,
            "guidance_interval": None if interval == ALL_STEPS else list(interval),
            "control_scale": None if self.control is None else self.request.control_scale,
        }


class Picture(NamedTuple):
    """A replica's answer: a finished image or a preview."""

    file: bytes  # of the request's `output`
    size: str  # width x height in pixels
    waited_s: float | None = None  # seconds from the request's arrival to its first step; None: a preview


class BaseTraits(NamedTuple):
    """Properties of the replicas' base that the ingress needs."""

    height: int  # of the model's default image, in pixels
    width: int
    max_references: int  # pictures that an edit may be drawn from; 0: the model takes no references
    paints_masks: bool = False  # True: an edit paints into the mask of one picture


class ReplicaLoad(NamedTuple):
    """Load of a replica's engines, and its drift scores."""

    replica: str  # unique name; a replacement replica has another one
    process: int  # process id on its node
    engines: dict[str, EngineLoad]  # by engine name
    drift: dict[tuple[str, int], DriftScores]  # by model name and version


class Base(NamedTuple):
    """A model, and how it was stored when the versions were trained on it."""

    model: str  # folder or hub name
    revision: str | None = None
    quantization: str | None = None  # of the denoiser
    text_quantization: str | None = None  # of the text encoders

    def __str__(self) -> str:
        of_text = f", text encoders {self.text_quantization}" if self.text_quantization else ""
        return f"{public_name(self.model)} ({self.quantization or 'plain'}{of_text})"


class Placement(NamedTuple):
    """Location of a version in a replica: the engine's name, and the adapter's name in it, if any."""

    engine: str
    adapter: str | None


def label(version: RegisteredModel | None) -> str:
    """Return the name by which a version is requested: `name@version`, or `base`."""
    return BASE if version is None else f"{version.name}@{version.version}"


def base_of(version: RegisteredModel) -> Base:
    """Return the base that a version was trained on."""
    stored = version.quantization, version.text_quantization
    return Base(resolve_path(version.base), version.base_revision, *stored)


def public_name(model: str) -> str:
    """Return the name of a model or folder that clients may see.

    Of an address, which may contain keys, and of an absolute path it is the last part. Hub names stay.
    """
    if "://" in model:
        return model.partition("?")[0].rstrip("/").rpartition("/")[2]
    return Path(model).name if Path(model).is_absolute() else model


def refusal(version: RegisteredModel | None, base: Base, error: Exception) -> str:
    """Return why a version cannot be served, for clients: with the names of its folders, not their places."""
    reason = str(error)
    for place in (version.source if version else base.model, base.model):
        reason = reason.replace(place, public_name(place))
    reason = PLACE.sub(lambda found: found["last"], reason)  # of copies on this machine
    return f"{label(version)} cannot be served: {reason}"


def adapter_name(version: RegisteredModel) -> str:
    """Return the version's label with the beginning of its weights' digest."""
    return f"{label(version)}#{version.digest[:12]}"


def placement_of(version: RegisteredModel | None, *, fused: bool = False) -> Placement:
    """Return the place of a version. LoRA versions are adapters in the base's engine, unless fused; those
    that follow control images share another engine of the base. A fully trained version has its own engine,
    and so has a ControlNet with its base.

    Names include the digest, because a recreated registry counts versions from 1 again.
    """
    if version is None:
        return Placement(BASE, None)
    name = adapter_name(version)
    if version.method != "lora":
        return Placement(name, None)
    if fused:
        return Placement(f"fused {name}", None)
    return Placement(FOLLOWING_BASE if version.control else BASE, name)
