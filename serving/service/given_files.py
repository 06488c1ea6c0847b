"""The files that come with a request for pictures."""

from typing import NamedTuple


class GivenFiles(NamedTuple):
    """Files as they were sent; none for a picture from text alone.

    Attributes:
        images: of an EditRequest: references, one to paint into, or one initial image.
        mask: of the image to paint into, transparent where it is to be painted.
    """

    images: tuple[bytes, ...] = ()
    mask: bytes | None = None


NO_FILES = GivenFiles()
