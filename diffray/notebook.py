"""Progress of a run in the output of a notebook's cell, which is replaced as it changes."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffray.api import Run


def is_notebook() -> bool:
    """Return whether this process is a notebook's kernel, whose outputs can be replaced."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


class LiveRun:
    """State of a run, and below it its curves, pictures and rungs.

    The curves are drawn anew only when there are more of them: a reader who scrolls there is not disturbed
    by each line that the run prints.
    """

    def __init__(self, run: "Run") -> None:
        from IPython.display import display

        self.run = run
        self._shown = ["", ""]
        self._handles = [display(_bundle(""), raw=True, display_id=True) for _ in self._shown]

    def update(self) -> None:
        """Show what is known of the run now."""
        for place, html in enumerate(self.run.shown()):
            if html != self._shown[place]:
                self._shown[place] = html
                self._handles[place].update(_bundle(html), raw=True)


def _bundle(html: str) -> dict[str, str]:
    return {"text/html": html, "text/plain": ""}
