"""Links from what a run says to the section of docs/troubleshooting.md that says more."""

from enum import StrEnum

PAGE = "docs/troubleshooting.md"


class Help(StrEnum):
    """Sections of the page, by the anchors of their headings."""

    OUT_OF_MEMORY = "out-of-memory"
    NOT_A_NUMBER = "the-loss-is-not-a-number"
    DIVERGENCE = "the-loss-rises"
    NO_CHANGE = "the-loss-does-not-move"
    BLACK_PICTURES = "black-pictures"
    SLOW_DATA = "slow-data"
    VERSIONS = "version-conflicts"
    REFUSALS = "refusals"


def help_link(section: Help) -> str:
    """Return where a section is, as a file of the repository with an anchor."""
    return f"{PAGE}#{section}"
