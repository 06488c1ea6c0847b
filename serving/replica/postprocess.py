"""Postprocess each image of a replica: safety check, drift monitoring, provenance, encoding."""

import numpy as np

from ray_jobs.config import EvaluateConfig, ServeConfig
from serving.encoding import Output, encode
from serving.load import DriftScores
from serving.messages import RoutedRequest, public_name
from serving.provenance import facts_of
from serving.replica.drift_watch import DriftWatch
from serving.replica.safety import load_checker
from serving.schemas import APIError


class Postprocessor:
    """The postprocessing that `serve` configures. Methods may be called from any thread.

    Args:
        base: folder, address or hub name of the model that was fine-tuned.

    Raises:
        ConfigError: the safety checker cannot be made; names serve.safety_checker.
    """

    def __init__(self, settings: ServeConfig, evaluate: EvaluateConfig, base: str) -> None:
        self._base = public_name(base)
        self._provenance = settings.provenance
        self._checker = load_checker(settings.safety_checker) if settings.safety_checker else None
        self._drift = DriftWatch(evaluate, settings.drift_pictures) if settings.drift_pictures else None

    def picture(self, pixels: np.ndarray, routed: RoutedRequest) -> bytes:
        """Encode a finished image, uint8, height x width x 3, as the client wants it.

        Raises:
            APIError: the safety checker blocks the image, or failed.
        """
        sent = self._judged(pixels)
        if self._drift and routed.scored and routed.version:
            self._drift.add(routed.version, pixels, routed.request.prompt)
        return encode(sent, self._facts(routed, sent) if self._provenance else None, routed.output)

    def preview(self, pixels: np.ndarray, output: Output) -> bytes | None:
        """Encode a preview; return None if the safety checker blocks it or fails."""
        try:
            return encode(self._judged(pixels), None, output)
        except APIError:
            return None

    def drift(self) -> dict[tuple[str, int], DriftScores]:
        """Return the drift scores by name and version."""
        return self._drift.scores() if self._drift else {}

    def _judged(self, pixels: np.ndarray) -> np.ndarray:
        if self._checker is None:
            return pixels
        (answer,) = self._checker.judge([pixels])
        if isinstance(answer, APIError):
            raise answer
        return answer

    def _facts(self, routed: RoutedRequest, pixels: np.ndarray) -> dict[str, object]:
        version = routed.version
        digest = version.digest if version and version.method == "lora" else None
        height, width = pixels.shape[:2]
        return facts_of(routed.parameters(f"{width}x{height}"), base=self._base, adapter_digest=digest)
