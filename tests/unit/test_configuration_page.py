"""docs/configuration.md: the page of every field, written from the models that read a configuration."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest

from ray_jobs.config import Config, Section
from scripts.configuration_page import PAGE, page


def sections(model: type[Section]) -> Iterator[type[Section]]:
    """A section and all that lie in it."""
    yield model
    for field in model.model_fields.values():
        for each in types(field.annotation):
            yield from sections(each)


def types(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for each in get_args(annotation):
        yield from types(each)


def test_the_page_is_of_the_present_fields() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "make configuration-page"


@pytest.mark.parametrize("section", dict.fromkeys(sections(Config)))
def test_every_field_has_a_description_and_a_line(section: type[Section]) -> None:
    for name, field in section.model_fields.items():
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        if not is_section:
            assert field.description, name
            assert f"| `{name}` |" in page()
