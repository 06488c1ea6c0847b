"""Write docs/configuration.md: every field of a configuration, from the models that read it.

python -m scripts.configuration_page
"""

from pathlib import Path

from ray_jobs.config import Effect
from ray_jobs.config.described import DescribedSection, described

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
INTRODUCTION = """\
# Every field of a configuration

`make configuration-page` writes this page from `ray_jobs/config/`. A configuration is one YAML file.
`--set section.field=value` on the command line overrides a field. `extends: other.yaml` starts from another
file and says only what differs: sections are merged, any other value is replaced. A bare name, as in
`extends: sdxl-lora` or `--config sdxl-lora`, is a recipe's, of `configs/`. Unknown fields are errors. A field
without a default is required. `diffray config explain train.lora.rank` says here what the tables say.

## What a field affects

The column `affects` says what changes with a field. What follows from that changes too: other encodings are
another data set, which gives other weights, which get other scores.

| affects | |
|---|---|
"""


def page() -> str:
    """Return the page: one table per section, in the order of the file."""
    effects = [f"| {effect.word} | {effect.meaning} |" for effect in Effect]
    tables = [line for section in described() for line in _table(section)]
    return "\n".join([INTRODUCTION + "\n".join(effects), "", *tables])


def _table(section: DescribedSection) -> list[str]:
    title = f"`{section.name}`" if section.name else "The run"
    lines = [f"## {title}", "", *([section.text, ""] if section.name else [])]
    lines += ["| field | value | default | affects | |", "|---|---|---|---|---|"]
    for field in section.fields:
        effects = ", ".join(effect.word for effect in field.effects)
        text = field.text.replace("|", "\\|")
        lines.append(f"| `{field.own_name}` | {field.values} | {field.default} | {effects} | {text} |")
    return [*lines, ""]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
