"""What the page's form asks for, as the arguments of a run's stage."""

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from diffray.settings import config_of, stage_arguments
from diffray.ui.data_folders import DataFolders
from ray_jobs.config import ConfigError, load_config
from ray_jobs.config.fields import nearest
from ray_jobs.config.files import RECIPES, recipes

SECTIONS = ("model", "data", "train", "search", "evaluate", "publish")
"""Sections whose fields the page sets. Where results are written, and who may ask an endpoint, is not among
them: that is for whoever starts the page."""

PLACES = {
    "data.sources.0": "reference_columns",
    "data.sources: reference_columns": "reference_columns",
    "data.sources: mask_column": "mask_column",
    "data": "data",
    "data.source": "data",
    "name": "name",
    "settings": "settings",
    "recipe": "recipe",
    "--address": "address",
    "model.base": "base",
    "train.method": "method",
    "train.epochs": "epochs",
    "search.device_hour_price": "hour_price",
}
"""Inputs of the form by the field that a message begins with, behind the recipe's name or not."""


class Form(BaseModel):
    """A run that a person asks for.

    Attributes:
        data: folder or address of the pictures.
        reference_columns: of pairs, the names of the columns of references, with commas between them.
        mask_column: name of the column of masks.
        instance_prompt, class_prompt: of a subject (DreamBooth), whose pictures need no captions.
        recipe: name of a recipe; None: the one made for `base` and `method`.
        hour_price: price of a worker's hour.
        settings: further settings, one `section.field=value` each.
        images_per_second: speed of one trial, for the plan's hours.
    """

    model_config = ConfigDict(extra="forbid")

    data: str
    reference_columns: str | None = None
    mask_column: str | None = None
    instance_prompt: str | None = None
    class_prompt: str | None = None
    recipe: str | None = None
    base: str | None = None
    method: Literal["lora", "full"] | None = None
    epochs: float | None = None
    name: str | None = None
    address: str | None = Field(None, pattern=r"^https?://[^\s]+$")
    hour_price: float | None = None
    settings: list[str] = []
    images_per_second: float | None = Field(None, gt=0)


class Recipe(BaseModel):
    """A recipe to choose."""

    name: str
    text: str
    base: str
    method: str
    resolution: int


def all_recipes() -> list[Recipe]:
    """Return every recipe that fine-tunes, with the first line of its file."""
    found = []
    for name in recipes():
        config = load_config(name)
        if config.pretrain is None:
            first = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
            found.append(
                Recipe(
                    name=name,
                    text=first.lstrip("# "),
                    base=config.model.base,
                    method=config.train.method,
                    resolution=config.data.resolution,
                )
            )
    return found


def arguments_of(form: Form, folders: DataFolders) -> list[str]:
    """Return the arguments of a run's stage, `--config` and `--set`.

    Raises:
        ConfigError: a setting is wrong, or the page may not read a folder.
    """
    path = folders.existing(form.data)
    prompts = {"instance_prompt": form.instance_prompt, "class_prompt": form.class_prompt}
    subject = {name: text for name, text in prompts.items() if text}
    source: dict[str, object] = {"path": path, **subject}
    if names := [name for each in (form.reference_columns or "").split(",") if (name := each.strip())]:
        source["reference_columns"] = names
    if form.mask_column:
        source["mask_column"] = form.mask_column
    if "class_prompt" in subject and "instance_prompt" not in subject:
        raise ConfigError("data: a class prompt needs the subject's own prompt beside it")
    if form.recipe and form.recipe not in recipes():
        fix = nearest(form.recipe, recipes(), "choose one of the list")
        raise ConfigError(f"recipe: {form.recipe}: no such recipe; {fix}")
    arguments = stage_arguments(
        [source] if len(source) > 1 else path,
        base=form.base,
        method=form.method,
        epochs=form.epochs,
        recipe=form.recipe,
        name=form.name,
        fields={} if form.hour_price is None else {"search.device_hour_price": form.hour_price},
    )
    for setting in form.settings:
        section = setting.split(".")[0]
        if section not in SECTIONS or re.match(r"data\.sources?\b", setting):
            raise ConfigError(
                f"settings: {setting}: the page sets fields of {', '.join(SECTIONS)}, as "
                "train.batch_size=4, and the pictures above"
            )
        arguments += ["--set", setting]
    config_of(arguments)
    return arguments


def place_of(message: str) -> str | None:
    """Return the input of the form that a message is about; None if it is not clear."""
    for start, place in PLACES.items():
        if re.match(rf"(?:[\w-]+: )?{re.escape(start)}[: ]", message):
            return place
    return "settings" if re.match(rf"(?:[\w-]+: )?(?:{'|'.join(SECTIONS)})\.", message) else None
