"""The interface of safety checkers, which look at every picture before it is sent.

`serve.safety_checker: module:function` names a factory: called once a replica without arguments, it loads
what it needs and returns the checker. A checker takes pictures and returns one `Verdict` each, in their
order. It is called from one thread at a time. One that fails blocks: a picture that nobody has looked at is
not sent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Verdict:
    """What a checker says of one picture.

    Attributes:
        allowed: whether it may be sent as it is.
        reason: why not, for the person who asked.
        replacement: sent instead of a picture that is not allowed, of the same size; None: the request is
            answered with an error.
    """

    allowed: bool
    reason: str = ""
    replacement: Image.Image | None = None


Checker = Callable[[Sequence[Image.Image]], Sequence[Verdict]]
CheckerFactory = Callable[[], Checker]
