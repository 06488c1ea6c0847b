"""What every section is made of: the base class, its field types, paths, and the error of a bad setting."""

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ray_jobs.config.effects import Added, Effect, Formerly


class ConfigError(ValueError):
    """An error that the user must fix before the job can start; it names the field or file and the fix."""


def home() -> Path:
    """The folder that relative paths start from: DIFFRAY_HOME, else the current one.

    A job on the embedded local Ray runs in Ray's copy of the checkout; `cluster/submit.py` sets
    DIFFRAY_HOME there, so that what it reads and writes is the user's own.
    """
    return Path(os.environ.get("DIFFRAY_HOME") or Path.cwd())


def resolve_path(path: str) -> str:
    """A relative path that exists under `home()` becomes absolute; all else is left as it is.

    So s3:// and gs:// addresses and hub names pass through, and a missing file keeps the name that
    the user wrote.
    """
    if "://" in path:
        return path
    found = home() / Path(path).expanduser()
    return str(found) if found.exists() else path


class Section(BaseModel):
    """Unknown keys are errors, every number is finite, and values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    affects: ClassVar[Effect]
    """Effect of the fields whose annotation names no other."""

    @classmethod
    def effects(cls, field: str) -> tuple[Effect, ...]:
        """Return what a field affects; AttributeError if neither it nor its section says so."""
        own = tuple(each for each in cls.model_fields[field].metadata if isinstance(each, Effect))
        return own or (cls.affects,)

    @classmethod
    def _formerly(cls, field: str) -> set[Effect]:
        return {each.effect for each in cls.model_fields[field].metadata if isinstance(each, Formerly)}

    @classmethod
    def _is_as_before(cls, field: str, value: object) -> bool:
        """Return True if a field that came later has the value that stands for how it was before."""
        added = [each for each in cls.model_fields[field].metadata if isinstance(each, Added)]
        return any(each.before == value for each in added)

    def affecting(self, *effects: Effect, as_before: bool = False) -> dict[str, Any]:
        """Return the fields that affect one of `effects`, as JSON has them.

        In sections, and lists of them, their own fields decide; without any the section is left out.

        Args:
            as_before: with the values of fields that affected it in earlier releases, not their defaults.
        """
        found: dict[str, Any] = {}
        for name, plain in self.model_dump(mode="json").items():
            value = getattr(self, name)
            if isinstance(value, Section):
                plain = value.affecting(*effects, as_before=as_before)
                is_selected = bool(plain)
            elif isinstance(value, list) and value and isinstance(value[0], Section):
                plain = [each.affecting(*effects, as_before=as_before) for each in value]
                is_selected = any(plain)
            elif self._formerly(name).intersection(effects):
                is_selected = True
                plain = plain if as_before else type(self).model_fields[name].default
            else:
                affects = not set(effects).isdisjoint(self.effects(name))
                is_selected = affects and not self._is_as_before(name, value)
            if is_selected:
                found[name] = plain
        return found


def require_unset(section: Section, where: str, *fields: str) -> None:
    """Raise ValueError if a field that changes nothing has another value than its default."""
    for field in fields:
        if getattr(section, field) != type(section).model_fields[field].default:
            raise ValueError(f"{field}: {getattr(section, field)} changes nothing {where}; remove it")


def explain(error: ValidationError, where: str, model: type[BaseModel] | None = None) -> str:
    """One line for the first problem of `error`: file, field, what is wrong.

    Args:
        model: the model that was validated, if the nearest right name of an unknown key is to be given.
    """
    first = error.errors()[0]
    # In brackets: which kind of several a value is.
    parts = [str(part) for part in first["loc"] if not str(part).startswith("[")]
    field = ".".join(parts) or "configuration"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1]) if model else ()
        fix = nearest(parts[-1], known, "remove it or correct its name")
        message = f"unknown key; {fix} (docs/configuration.md lists them all)"
    else:
        message += "; write it in quotes" if first["type"] == "string_type" else ""
        message += f" (it is {first['input']!r})" if not isinstance(first["input"], dict) else ""
    more = len(error.errors()) - 1
    return f"{where}: {field}: {message}" + (f" (and {more} more)" if more else "")


def nearest(given: str, known: Iterable[str], otherwise: str) -> str:
    """Return the end of an error about an unknown name: the nearest known one, or what else to do."""
    near = get_close_matches(given, known, n=1)
    return f"did you mean {near[0]}?" if near else otherwise


def _fields_at(model: type[BaseModel], place: tuple[int | str, ...]) -> set[str]:
    """Return the names of the fields of the section at a place in `model`, as pydantic's errors give it."""
    models = [model]
    for part in place:
        if isinstance(part, str) and not part.startswith("["):
            fields = [each.model_fields[part] for each in models if part in each.model_fields]
            models = [each for field in fields for each in _models_in(field.annotation)]
    return {name for each in models for name in each.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that an annotation names, also inside a list or a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for each in get_args(annotation) for found in _models_in(each)]


NAME = "[A-Za-z0-9](?:[A-Za-z0-9 ._+-]{0,98}[A-Za-z0-9])?"
NAMES = "at most 100 letters, digits, spaces or . _ - +, with a letter or digit at both ends"


def _model_name(name: str) -> str:
    """A registered model's name, as it can stand in folders, addresses, MLflow's filters and `name@3`."""
    if not re.fullmatch(NAME, name):
        raise ValueError(f"a model's name has {NAMES}, for example fluent-emoji")
    if name == "base":
        raise ValueError("base is reserved: requests use it for the base model; choose another name")
    return name


def named_version(given: str | None) -> tuple[str, str] | None:
    """Return a registered model's name and its version's number or alias; None if `given` names no version.

    The form is that of requests to the endpoint: `name@3` or `name:champion`.
    """
    found = re.fullmatch(rf"({NAME})(?:@([0-9]+)|:([A-Za-z][\w-]*))", given or "")
    return (found[1], found[2] or found[3]) if found else None


def by_device(settings: dict[str, Any]) -> "Precision":
    """Return the default precision of a section: bf16 with `use_gpu`, else fp32."""
    return "bf16" if settings.get("use_gpu") else "fp32"


Precision = Literal["fp32", "bf16", "fp16"]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
ModelName = Annotated[str, AfterValidator(_model_name)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
RunName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Prompt = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
