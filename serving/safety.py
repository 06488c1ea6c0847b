"""The interface of safety checkers, which check every image before it is sent.

`serve.safety_checker: module:function` names a factory. It is called without arguments once per replica,
loads its models and returns the checker. A checker takes images and returns one `Verdict` each, in the same
order. It is called from one thread at a time. If it fails, no unchecked image is sent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Verdict:
    """A checker's verdict on one image.

    Attributes:
        allowed: True if the image may be sent unchanged.
        reason: reason for blocking, shown to the client.
        replacement: image of the same size to send instead of a blocked one; None: the request is answered
            with an error.
    """

    allowed: bool
    reason: str = ""
    replacement: Image.Image | None = None


Checker = Callable[[Sequence[Image.Image]], Sequence[Verdict]]
CheckerFactory = Callable[[], Checker]
