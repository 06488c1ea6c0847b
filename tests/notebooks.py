"""Notebooks executed by a real kernel, cell by cell."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient


class Executed:
    """A notebook whose kernel runs.

    Args:
        notebook: as nbformat reads it.
    """

    def __init__(self, notebook: Any) -> None:
        self.cells = {cell["id"]: (index, cell) for index, cell in enumerate(notebook.cells)}
        self.client = NotebookClient(notebook, timeout=600, kernel_name="python3")

    def run(self, cell: str, source: str | None = None) -> list[dict[str, Any]]:
        """Execute a cell, or another source in its place, and return its outputs; an error is raised."""
        index, found = self.cells[cell]
        found["source"] = found["source"] if source is None else source
        return list(self.client.execute_cell(found, index)["outputs"])


@contextmanager
def kernel(notebook: Path | str, folder: Path) -> Iterator[Executed]:
    """A kernel for a notebook's file, or for one cell named `cell` with a source.

    Args:
        folder: where the kernel starts, and has its own files.
    """
    if isinstance(notebook, Path):
        read = nbformat.read(notebook, as_version=4)
    else:
        read = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(notebook, id="cell")])
    executed = Executed(read)
    with executed.client.setup_kernel(cwd=str(folder)):
        yield executed
