"""Write docs/configuration.md: every field of a configuration, from the models that read it.

python -m scripts.configuration_page
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from ray_jobs.config import Config, Effect, Section
from ray_jobs.config.fields import by_device

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
INTRODUCTION = """\
# Every field of a configuration

`make configuration-page` writes this page from `ray_jobs/config/`. A configuration is one YAML file.
`--set section.field=value` on the command line overrides a field. `extends: other.yaml` starts from another
file and says only what differs: sections are merged, any other value is replaced. Unknown fields are errors.
A field without a default is required.

## What a field affects

The column `affects` says what changes with a field. What follows from that changes too: other encodings are
another data set, which gives other weights, which get other scores.

| affects | |
|---|---|
"""


def page() -> str:
    """Return the page: one table per section, in the order of the file."""
    schema = Config.model_json_schema()
    effects = [f"| {effect.word} | {effect.meaning} |" for effect in Effect]
    return "\n".join([INTRODUCTION + "\n".join(effects), "", *_section("", schema, schema["$defs"])])


def _section(name: str, schema: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """Return the lines of a section and of those inside it.

    Args:
        name: dotted, as `train.lora`; empty: the file itself.
        known: schemas of all sections by their name.
    """
    title = f"`{name}`" if name else "The run"
    lines = [f"## {title}", ""]
    if name:
        lines += [" ".join(schema["description"].split()), ""]
    lines += ["| field | value | default | affects | |", "|---|---|---|---|---|"]
    [section] = (each for each in _classes(Section) if each.__name__ == schema["title"])
    below: list[str] = []
    for field, of in schema["properties"].items():
        path = f"{name}.{field}" if name else field
        if inner := _inner(of, known):
            below += _section(path + "[]" * (of.get("type") == "array"), inner, known)
        if "$ref" not in of:  # a section has a table of its own
            required = field in schema.get("required", [])
            default = "" if required else _default(section.model_fields[field], of.get("default"))
            text = of.get("description", "").replace("|", "\\|")
            effects = ", ".join(effect.word for effect in section.effects(field))
            lines.append(f"| `{field}` | {_values(of)} | {default} | {effects} | {text} |")
    return [*lines, "", *below]


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


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
