"""Run the configured safety checker (`serving.safety`) on every image before it is sent."""

import importlib
import logging
import threading
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ray_jobs.config import ConfigError
from serving.safety import Checker, CheckerFactory, Verdict
from serving.schemas import APIError

log = logging.getLogger(__name__)


class SafetyChecker:
    """Apply a checker, one call at a time, and turn its verdicts into answers."""

    def __init__(self, check: Checker) -> None:
        self._check = check
        self._lock = threading.Lock()

    def judge(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray | APIError]:
        """Return the answer for each image: the image itself, its replacement, or an error.

        Errors are returned, not raised, since one call may check images of several requests.

        Args:
            pictures: images, uint8, height x width x 3, of any sizes.

        Returns:
            The answers in the same order. Errors: 400 `content_policy_violation` as in OpenAI's API; 500
            `safety_check_failed` for all images if the checker failed.
        """
        if not pictures:
            return []
        try:
            with self._lock:
                verdicts = list(self._check([Image.fromarray(pixels) for pixels in pictures]))
            return [_answer(pixels, verdict) for pixels, verdict in zip(pictures, verdicts, strict=True)]
        except Exception as error:  # user code may raise anything; no unchecked image is sent
            log.exception("the safety checker failed")
            message = f"the safety check failed ({type(error).__name__}), so no image is sent"
            return [APIError(500, message, code="safety_check_failed") for _ in pictures]


def _answer(pixels: np.ndarray, verdict: object) -> np.ndarray | APIError:
    if not isinstance(verdict, Verdict):
        raise TypeError(f"the checker gave {verdict!r}, not a Verdict")
    if verdict.allowed:
        return pixels
    if verdict.replacement is None:
        reason = f": {verdict.reason}" if verdict.reason else ""
        return APIError(
            400,
            f"the image was blocked by this server's safety checker{reason}",
            param="prompt",
            code="content_policy_violation",
        )
    replacement = np.asarray(verdict.replacement.convert("RGB"))
    if replacement.shape != pixels.shape:
        raise ValueError(f"the replacement is {replacement.shape}, not {pixels.shape}")
    return replacement


def checker_factory(name: str) -> CheckerFactory:
    """Import the function that `serve.safety_checker` names, without calling it.

    Args:
        name: `module:function`.

    Raises:
        ConfigError: there is no such function; names the field and the reason.
    """
    where = f"serve.safety_checker: {name}"
    module_name, colon, function = name.partition(":")
    if not (module_name and colon and function.isidentifier()):
        raise ConfigError(f"{where}: write it as module:function, for example my_checks.safety:make_checker")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module's own code may raise anything
        raise ConfigError(f"{where}: the module cannot be imported ({_summary(error)})") from error
    factory: object = getattr(module, function, None)
    if not callable(factory):
        raise ConfigError(f"{where}: {module_name} has no function {function}; correct the name")
    return factory


def load_checker(name: str) -> SafetyChecker:
    """Make the checker that `serve.safety_checker` names.

    Raises:
        ConfigError: the checker cannot be made; names the field and the reason.
    """
    where, factory = f"serve.safety_checker: {name}", checker_factory(name)
    try:
        checker: object = factory()
    except Exception as error:
        raise ConfigError(f"{where}: it made no checker ({_summary(error)})") from error
    if not callable(checker):
        raise ConfigError(
            f"{where}: it returned {type(checker).__name__}, not a checker; return a function that takes "
            "pictures and gives a Verdict for each"
        )
    return SafetyChecker(checker)


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
