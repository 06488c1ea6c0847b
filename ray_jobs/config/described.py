"""Every field of a configuration in words, from the models that read it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic.fields import FieldInfo

from ray_jobs.config import Config, ConfigError, Effect, Section
from ray_jobs.config.fields import by_device

BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class DescribedField:
    """One field.

    Attributes:
        name: dotted, from the top of the file, as `train.lora.rank`; in a list, `data.sources[].path`.
        values: what it takes, in words and symbols; texts as they are written in a file stand in backticks.
        default: likewise; empty: a required field.
        text: its description, with its unit.
    """

    name: str
    values: str
    default: str
    effects: tuple[Effect, ...]
    text: str

    @property
    def own_name(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class DescribedSection:
    """A section with its own fields, without those of sections in it.

    Attributes:
        name: dotted, as `train.lora`; empty: the file itself.
    """

    name: str
    text: str
    fields: tuple[DescribedField, ...]


@cache
def described() -> tuple[DescribedSection, ...]:
    """Return all sections, in the order of the file; what lies in one comes after it."""
    schema = Config.model_json_schema()
    return tuple(_sections("", schema, schema["$defs"]))


def find(name: str) -> DescribedField | DescribedSection:
    """Return the field or section of a name; of a field, the last part is enough where only one has it.

    Raises:
        ConfigError: there is none, or more than one; names the nearest.
    """
    sections = {each.name: each for each in described() if each.name}
    fields = {each.name: each for section in described() for each in section.fields}
    plain = {each.replace("[]", ""): found for each, found in (sections | fields).items()}
    if found := plain.get(name.replace("[]", "")):
        return found
    alike = [each for each in fields if each.endswith(f".{name}")]
    if len(alike) == 1:
        return fields[alike[0]]
    if not alike:
        parts = {each.own_name: each.name for each in fields.values()}
        near = get_close_matches(name, plain, n=1) or get_close_matches(name, parts, n=1)
        alike = [parts.get(each, each) for each in near]
    fix = f"did you mean {' or '.join(alike)}?" if alike else "docs/configuration.md lists them all"
    raise ConfigError(f"{name}: no such field; {fix}")


def _sections(name: str, schema: dict[str, Any], known: dict[str, Any]) -> Iterator[DescribedSection]:
    """Yield a section and those inside it.

    Args:
        known: schemas of all sections by their name.
    """
    [section] = (each for each in _classes(Section) if each.__name__ == schema["title"])
    below: list[DescribedSection] = []
    fields = []
    for field, of in schema["properties"].items():
        path = f"{name}.{field}" if name else field
        if inner := _inner(of, known):
            below += _sections(path + "[]" * (of.get("type") == "array"), inner, known)
        if "$ref" not in of:  # a section is described by itself
            required = field in schema.get("required", [])
            default = "" if required else _default(section.model_fields[field], of.get("default"))
            text = of.get("description", "")
            fields.append(DescribedField(path, _values(of), default, section.effects(field), text))
    yield DescribedSection(name, " ".join(schema.get("description", "").split()), tuple(fields))
    yield from below


def _classes(of: type[Section]) -> Iterator[type[Section]]:
    """Yield all classes of sections."""
    for each in of.__subclasses__():
        yield each
        yield from _classes(each)


def _inner(of: dict[str, Any], known: dict[str, Any]) -> dict[str, Any] | None:
    """Return the schema of the section that a field, or each entry of its list, is."""
    for each in (of, of.get("items", {}), *of.get("anyOf", []), *of.get("oneOf", [])):
        if "$ref" in each:
            return dict(known[each["$ref"].rsplit("/", 1)[-1]])
    return None


def _default(field: FieldInfo, value: Any) -> str:
    """Return a default as it is written in a file; an empty one, or one that depends on others, in words."""
    if field.default_factory is by_device:
        return "`bf16` with `use_gpu`, else `fp32`"
    if value in (None, [], {}):
        return "empty"
    if isinstance(value, dict):
        value = {name: each for name, each in value.items() if each is not None}
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _values(of: dict[str, Any]) -> str:
    """Return what a field takes, in words and symbols."""
    if "anyOf" in of or "oneOf" in of:
        kinds = [_values(each) for each in of.get("anyOf", of.get("oneOf", []))]
        return " or ".join(dict.fromkeys(kinds))
    if "$ref" in of:
        return "section"
    if "const" in of:
        return f"`{of['const']}`"
    if "enum" in of:
        return ", ".join(f"`{each}`" for each in of["enum"])
    if of.get("type") == "array":
        if "prefixItems" in of:
            return f"[{', '.join(_values(each) for each in of['prefixItems'])}]"
        return f"list of {_values(of.get('items', {}))}"
    kind = {"null": "empty", "boolean": "true or false", "object": "mapping"}.get(of.get("type", ""), "")
    bounds = [f"{sign} {of[name]:g}" for name, sign in BOUNDS.items() if name in of]
    return " ".join([kind or of.get("type", "any"), ", ".join(bounds)]).strip()
