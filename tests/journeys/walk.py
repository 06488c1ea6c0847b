"""One journey: a base and pictures in, a run of all stages, its version behind an endpoint, and a picture
over HTTP beside that of the model card's program, which is plain diffusers.
"""

import base64
import contextlib
import io
import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cluster.shape import embedded
from ray_jobs.config import Config
from ray_jobs.pipeline import pipeline
from ray_jobs.planning.plan import plan
from ray_jobs.planning.settled import settled
from ray_jobs.registry.models import RegisteredModel, registered
from serving.client import call
from serving.command import endpoint
from tests.cards import levels, program, without_torchvision
from tests.conftest import captions, draw
from tests.journeys.bases import BASES
from tests.tiny_models import clip_model
from tests.unit.test_assistant import assistant_of

SIDE = 64  # pixels

# Small, and quick to start: the networks, workers and actors that a journey needs, each once.
SETTINGS: dict[str, Any] = {
    "data": {"resolution": SIDE, "validation": 0.25, "test": 0.25, "cleaning": {"duplicates": "ignore"}},
    "train": {
        "num_workers": 1,
        "batch_size": 4,
        "schedule": "constant",
        "lora": {"rank": 4, "alpha": 8},
        "ema_decay": 0,
    },
    "search": {"learning_rates": [0.05, 0.02], "ladder": [1, 2], "max_concurrent_trials": 2},
    "evaluate": {
        "num_actors": 1,
        "inference_steps": 3,
        "num_samples": 6,
        "feature_network": {"kind": "efficientnet-lite0"},
        "second_network": None,
        "bootstrap": 2,
        "memorisation_pictures": 0,
    },
    "serve": {"allow_anonymous": True},
    "local": {"num_cpus": 10},
}


@dataclass(frozen=True)
class Journey:
    """What a user brings, and what of the configuration is not as in `SETTINGS`.

    Attributes:
        base: a name in `BASES`.
        pictures: how many there are.
        trainings: folders of checkpoints that its search leaves.
        judged: whether a reward model judges the pictures and ranks.
        assistant: whether its base has an assistant adapter while it is trained.
        tolerance: of 255 levels, between the endpoint's picture and that of the card's program.
    """

    name: str
    base: str
    source: Callable[[Path], dict[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    pictures: int = 24
    trainings: int = 2
    judged: bool = False
    assistant: bool = False
    tolerance: int = 2


def configuration(journey: Journey, folder: Path, storage: Path) -> Config:
    """The configuration of a journey, its base and pictures written into `folder`."""
    given: dict[str, Any] = {
        "name": journey.name,
        "storage": str(storage),
        "model": {"base": str(BASES[journey.base](folder / "base"))},
        "data": {"sources": [journey.source(folder / "pictures")]},
        "publish": {"model_name": journey.name},
    }
    if journey.assistant:
        assistant = assistant_of(Path(given["model"]["base"]), folder / "assistant")
        given["model"]["assistant"] = str(assistant)
    settings = merged(merged(SETTINGS, journey.settings), given)
    if journey.judged:
        preference = {"model": str(clip_model(folder / "judge", side=28))}
        judged = {"search": {"rank_by": "preference"}, "evaluate": {"preference": preference}}
        settings = merged(settings, judged)
    return Config.model_validate(settings)


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Both, section by section; the other's values where both have one."""
    both = {name: merged(one[name], other[name]) for name in one if isinstance(other.get(name), Mapping)}
    return {**one, **other, **both}


def walk(journey: Journey, config: Config, port: int) -> None:
    """Walk the whole way.

    Args:
        port: that the running Serve listens on.
    """
    page, fits = plan(config, embedded(config.local), None)
    assert fits, page
    pipeline(config, Namespace(fresh=False))
    config = settled(config)
    run = Path(config.storage) / config.name
    manifest = json.loads((run / "dataset" / "manifest.json").read_text())
    assert sum(manifest[split] for split in ("train", "validation", "test")) == journey.pictures
    assert sum(each.is_dir() for each in (run / "train").iterdir()) == journey.trainings
    version = registered(config, "1")
    card = (run / "model" / "README.md").read_text(encoding="utf-8")
    plain = plain_picture(card, config, version)
    if journey.judged:
        winner = json.loads((run / "winner.json").read_text())
        assert winner["ranked_by"] == "preference" and winner["preference_model"].startswith("judge@")
        assert "What the reward model prefers" in (run / "report.html").read_text()
    given = files_of(config)
    if "control" in given:
        winner = json.loads((run / "winner.json").read_text())
        assert version.has_controlnet and "controlnet" in card and "control.png" in card
        assert (winner["ranked_by"] == "control") == bool(config.data.control.kind)
    elif given:
        winner = json.loads((run / "winner.json").read_text())
        assert winner["ranked_by"] == "target" and 0 < winner["unedited_test_target"] < 1
        report = (run / "report.html").read_text(encoding="utf-8")
        assert "their targets on the test split" in report
        assert (">before<" in report) == (len(given) == 1 or "mask" in given)
        assert all(f"{name}.png" in card for name in given)
    with endpoint(config, version, port) as url:
        served = served_picture(url, config, prompt_of(card), f"{version.name}@1")
        base = served_picture(url, config, prompt_of(card), "base")
    assert np.abs(served - plain).max() <= journey.tolerance
    assert np.abs(served - base).max() > 5, "the fine-tuning changes nothing"


def served_picture(url: str, config: Config, prompt: str, model: str) -> Any:
    """What the endpoint draws with the settings of the card's program: int, height x width x 3."""
    body: dict[str, object] = {
        "prompt": prompt,
        "model": model,
        "seed": 0,
        "steps": config.evaluate.inference_steps,
        "guidance_scale": config.evaluate.guidance_scale,
        "size": f"{SIDE}x{SIDE}",
    }
    given = files_of(config)
    mask, control = given.pop("mask", None), given.pop("control", None)
    if control is not None and model != "base":
        body["control_image"] = base64.b64encode(_file(control)).decode()
    if mask is not None:  # OpenAI's form: transparent where it is to be painted
        mask.putalpha(mask.convert("L").point(lambda level: 255 * (level < 128)))
    images = [_file(picture) for picture in given.values()]
    route = "edits" if images else "generations"
    hole = None if mask is None else _file(mask)
    answer: Any = call(f"{url}/v1/images/{route}", body, 120, images=images, mask=hole)
    data = base64.b64decode(answer["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def files_of(config: Config) -> dict[str, Image.Image]:
    """What the card's program opens: a picture for each column of references, or one and its mask, or what a
    ControlNet follows."""
    source = config.data.sources[0]
    if config.data.has_control:
        return {"control": draw(captions()[0], 0).convert("L").convert("RGB").resize((SIDE, SIDE))}
    if source.mask_column and not source.reference_columns:
        before = draw(captions()[0], 0).resize((SIDE, SIDE))
        return {"before": before, "mask": before.convert("L").point(lambda level: 255 * (level < 250))}
    found = {name: draw(captions()[number], number) for number, name in enumerate(source.reference_columns)}
    if config.data.reference_resolution:
        return found
    return {name: picture.resize((SIDE, SIDE)) for name, picture in found.items()}


def _file(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()


def plain_picture(card: str, config: Config, version: RegisteredModel) -> Any:
    """What the card's program draws, unchanged, in the folder of the weights: int, height x width x 3."""
    folder, base = Path(version.source), Path(config.model.base)
    beside, picture = folder / base.name, folder / "picture.png"
    beside.symlink_to(base)
    for name, given in files_of(config).items():
        given.save(folder / f"{name}.png")
    try:
        with contextlib.chdir(folder), without_torchvision():
            exec(program(card), {})
        return levels(picture)
    finally:
        beside.unlink()
        picture.unlink(missing_ok=True)


def prompt_of(card: str) -> str:
    """The prompt of the card's program."""
    [line] = [each.strip() for each in program(card).splitlines() if each.startswith("    prompt=")]
    return str(eval(line.removeprefix("prompt=").rstrip(",")))
