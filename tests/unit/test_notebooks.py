"""The example notebooks: nothing in them is stale. `tests/ray/test_api.py` executes them."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import diffray
from diffray.settings import stage_arguments
from ray_jobs.config import load_config

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))


def cells(notebook: Path) -> list[dict[str, Any]]:
    found = json.loads(notebook.read_text(encoding="utf-8"))
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    return list(found["cells"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_starts_from_a_recipe_and_holds_no_results(notebook: Path) -> None:
    code = [each for each in cells(notebook) if each["cell_type"] == "code"]
    assert all(each["outputs"] == [] and each["execution_count"] is None for each in code)
    [parameters] = [each for each in code if "parameters" in each["metadata"].get("tags", [])]
    given: dict[str, Any] = {}
    exec("".join(parameters["source"]), given)
    arguments = stage_arguments(
        given["data"], recipe=given["recipe"], name=given["name"], fields=given["settings"]
    )
    config = load_config(arguments[1], arguments[3::2])
    assert config.name == f"notebook-{notebook.stem}"
    assert all((notebook.parents[2] / str(each.path)).is_dir() for each in config.data.all_sources)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_names_what_the_api_has(notebook: Path) -> None:
    kinds = {"diffray": diffray, "run": diffray.Run, "endpoint": diffray.Endpoint}
    asked = []
    for each in cells(notebook):
        if each["cell_type"] == "code":
            for node in ast.walk(ast.parse("".join(each["source"]))):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    asked.append((node.value.id, node.attr))
    assert ("diffray", "fit") in asked and ("endpoint", "draw") in asked
    assert [each for each in asked if each[0] in kinds and not hasattr(kinds[each[0]], each[1])] == []
