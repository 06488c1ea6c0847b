"""What the tests share: one embedded Ray, one tiny model, one small folder of pictures."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster.connect import joined
from cluster.local import LocalCluster, local_cluster
from ray_jobs.config import LocalConfig

if TYPE_CHECKING:
    from PIL import Image

# Before torch is imported: threads that wait for a core of a busy machine make small models slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

COLOURS = ["red", "green", "blue", "orange", "purple"]
SHAPES = ["circle", "square", "triangle", "cross"]
BROKEN = "broken.png"
LONGEST = ("test_search.py", "test_training.py", "test_pipeline.py")  # of the files that need Ray


def wants_gpus(markers: str) -> bool:
    """Whether the expression of `pytest -m` asks for what is marked `gpu`."""
    return re.search(r"(?<!not )\bgpu\b", markers) is not None


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all other tests, and from what they start: they are about CPUs on every machine."""
    if not wants_gpus(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs Ray, what draws with a model, and what takes machines away, which takes long.

    The longest files come first, so that no core waits for one of them at the end.
    """
    for item in items:
        if item.path.parent.name == "faults":
            item.add_marker("faults")
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        used = [*getattr(item, "fixturenames", ()), *map(str, parameters)]
        if any(name == "tiny" or name.startswith("tiny_") for name in used):  # the models
            item.add_marker("slow")
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[LocalCluster]:
    """An embedded Ray of 10 logical CPUs that this process has joined as a driver."""
    with local_cluster(LocalConfig(num_cpus=10, object_store_mb=256)) as cluster, joined(cluster.gcs_address):
        yield cluster


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of one of `tiny_models.MODELS`, written once."""
    from tests import tiny_models

    written: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in written:
            written[name] = tiny_models.write(name, tmp_path_factory.mktemp("tiny") / name)
        return written[name]

    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny: Callable[[str], Path]) -> Path:
    """A StableDiffusionPipeline of 64x64 pixels with random weights, in diffusers' format."""
    return tiny("StableDiffusionPipeline")


@pytest.fixture(scope="session")
def tiny_xl(tiny: Callable[[str], Path]) -> Path:
    return tiny("StableDiffusionXLPipeline")


@pytest.fixture(scope="session")
def tiny_sd3(tiny: Callable[[str], Path]) -> Path:
    return tiny("StableDiffusion3Pipeline")


@pytest.fixture(scope="session")
def tiny_flux(tiny: Callable[[str], Path]) -> Path:
    return tiny("FluxPipeline")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel of pictures of 28 x 28 pixels."""
    from tests.tiny_models import clip_model

    return clip_model(tmp_path_factory.mktemp("clip"), side=28)


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 drawn pictures with their captions in metadata.jsonl, and one file that is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for number, caption in enumerate(captions()):
        name = f"{number:02d}.png"
        draw(caption, number).save(folder / name)
        rows.append({"file_name": name, "text": caption})
    (folder / BROKEN).write_bytes(b"no picture")
    rows.append({"file_name": BROKEN, "text": "a broken file"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def captions() -> list[str]:
    """40 of them, in a fixed order: two sizes of each shape in each colour."""
    return [f"a {size} {c} {shape}" for size in ("small", "big") for c in COLOURS for shape in SHAPES]


def draw(caption: str, number: int) -> "Image.Image":
    """The picture of a caption, 80 x 72 pixels; `number` moves it a little, so that no two are alike."""
    from PIL import Image, ImageDraw

    _, size, colour, shape = caption.split()
    picture = Image.new("RGB", (80, 72), "white")
    pen = ImageDraw.Draw(picture)
    radius = 12 if size == "small" else 26
    x, y = 36 + number % 9, 34 + number % 5
    left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "square":
        pen.rectangle((left, top, right, bottom), fill=colour)
    elif shape == "triangle":
        pen.polygon([(left, bottom), (x, top), (right, bottom)], fill=colour)
    else:
        pen.line((left, top, right, bottom), fill=colour, width=6)
        pen.line((left, bottom, right, top), fill=colour, width=6)
    return picture
