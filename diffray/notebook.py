"""Outputs of a notebook's cell that are replaced as they change."""

import sys
from collections.abc import Callable, Sequence


def is_notebook() -> bool:
    """Return whether this process is a notebook's kernel, whose outputs can be replaced."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


class Live:
    """Outputs below each other. One is replaced only if it has changed, so that a reader who scrolls in it is
    not disturbed by the others.

    Args:
        look: returns the HTML of each.
    """

    def __init__(self, look: Callable[[], Sequence[str]]) -> None:
        from IPython.display import display

        self.look, self.shown = look, list(look())
        self.handles = [display(_bundle(html), raw=True, display_id=True) for html in self.shown]

    def update(self) -> None:
        """Look again, and show what has changed."""
        for place, html in enumerate(self.look()):
            if html != self.shown[place]:
                self.shown[place] = html
                self.handles[place].update(_bundle(html), raw=True)


def _bundle(html: str) -> dict[str, str]:
    return {"text/html": html, "text/plain": ""}
