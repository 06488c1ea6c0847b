"""Detect drift between published and served images, by scoring a window of served images in the background.

Three scores of the last N images: FID against the validation images, CLIP score against their prompts, and
the fraction of near copies of training images. They are reported once the window is full, because each
depends on N.
"""

import logging
import os
import queue
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from cluster.storage import Storage
from ray_jobs.config import ConfigError
from ray_jobs.metrics.copies import FALSE_ALARMS, CopyDetector
from ray_jobs.metrics.feature_network import FeatureNetwork
from ray_jobs.metrics.frechet import Moments, frechet_distance
from ray_jobs.metrics.similarity import clip_score
from ray_jobs.metrics.vision_model import Clip
from ray_jobs.registry.models import REFERENCE
from serving.load import DriftScores

CAPACITY = 64  # maximum queued images; more are skipped
FEWEST = 2  # minimum window, in images: a single one has no covariance
SCORES_A_WINDOW = 4  # number of scores while all images of the window are replaced once

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Reference:
    """Reference features of a version: float32, images x D each.

    Attributes:
        validation: features of the validation images, for FID.
        detector: of near copies of training images; None if publish did not measure them.
        published: features of the images generated when the version was evaluated, for the expected FID.
        feature_network: identity of the network that computed the features.
    """

    validation: torch.Tensor
    detector: CopyDetector | None
    published: torch.Tensor | None
    feature_network: str

    @classmethod
    def read(cls, folder: Storage, feature_network: str) -> "Reference":
        """Read the tensors `<network>/<kind>` from a version's weights folder.

        The kinds are `validation`, `published`, and those of `CopyDetector.tensors`. Versions of an earlier
        release have none of the detector; for them a warning is logged.

        Raises:
            ConfigError: there is no reference by this network, or it is damaged; names serve.drift_pictures.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        where = f"serve.drift_pictures: {folder.uri}/{REFERENCE}"
        again = "publish the model again, or set it to 0"
        try:
            tensors = load(folder.read_bytes(REFERENCE))
        except FileNotFoundError:
            raise ConfigError(f"{where}: is missing; {again}") from None
        except SafetensorError as error:
            raise ConfigError(f"{where}: is damaged ({error}); {again}") from None
        of_network = {
            name.removeprefix(f"{feature_network}/"): each
            for name, each in tensors.items()
            if name.startswith(f"{feature_network}/")
        }
        if (validation := of_network.get("validation")) is None:
            raise ConfigError(f"{where}: has no validation features by {feature_network}; {again}")
        detector = CopyDetector.read(of_network)
        if detector is None and "training" in of_network:
            log.warning(
                "drift: %s/%s is of an earlier release: near copies are not measured until the model is "
                "published again",
                *(folder.uri, REFERENCE),
            )
        return cls(validation, detector, of_network.get("published"), feature_network)


class Features(NamedTuple):
    """Features of one served image, float32: D, and D_clip for CLIP."""

    picture: torch.Tensor
    clip: tuple[torch.Tensor, torch.Tensor] | None  # CLIP features of the image and of its caption


def score_window(window: list[Features], reference: Reference, clip: str | None) -> DriftScores:
    """Score a window of at least two images.

    Args:
        clip: identity of the network behind `Features.clip`; None: no CLIP score.
    """
    network = reference.feature_network
    features = torch.stack([each.picture for each in window])
    real = Moments.of(reference.validation, network)
    expected = None
    if reference.published is not None and len(reference.published) >= len(window):
        expected = frechet_distance(Moments.of(reference.published[: len(window)], network), real)
    similarity = None
    if clip:
        pictures, captions = zip(*(each.clip for each in window if each.clip), strict=True)
        similarity = clip_score(torch.stack(pictures), torch.stack(captions), clip).value
    copies = None
    if reference.detector is not None:
        copies = reference.detector.share(reference.detector.nearness(features)[0])
    return DriftScores(
        num_pictures=len(window),
        fid=frechet_distance(Moments.of(features, network), real),
        expected_fid=expected,
        clip_score=similarity,
        near_copies=copies,
        expected_near_copies=None if copies is None else FALSE_ALARMS,
        feature_network=network,
        scored_at=time.time(),
    )


class DriftMonitor:
    """A thread of the lowest priority that scores served images. One monitor per served version.

    Args:
        network: the feature network of `reference`.
        window: size of the window in images, `serve.drift_pictures`.
        clip: network for the CLIP score; None: no CLIP score.

    Raises:
        ValueError: the window is too small, or the networks differ.
    """

    def __init__(
        self, network: FeatureNetwork, reference: Reference, window: int, clip: Clip | None = None
    ) -> None:
        if window < FEWEST:
            raise ValueError(f"serve.drift_pictures: {window}; FID needs {FEWEST} pictures, better hundreds")
        if network.identity != reference.feature_network:
            raise ValueError(f"the reference is by {reference.feature_network}, not by {network.identity}")
        self._network, self._reference, self._clip = network, reference, clip
        self._window: deque[Features] = deque(maxlen=window)
        self._queue: queue.Queue[tuple[np.ndarray, str] | None] = queue.Queue(CAPACITY)
        self.latest: DriftScores | None = None
        """None until the window is full."""
        self.num_measured = 0
        self.num_skipped = 0
        """Images skipped because the queue was full: the window is then a sample."""
        self.num_failed = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="drift", daemon=True)
        self._thread.start()

    def add(self, pixels: np.ndarray, caption: str) -> None:
        """Queue a served image, or skip it if the queue is full. Never blocks.

        Args:
            pixels: uint8, height x width x 3; must not be changed afterwards.
        """
        try:
            self._queue.put_nowait((pixels, caption))
        except queue.Full:
            self.num_skipped += 1

    def scores(self) -> DriftScores | None:
        """Return the latest scores, with the number of images skipped or failed so far."""
        if self.latest is None:
            return None
        return replace(self.latest, num_passed_over=self.num_skipped + self.num_failed)

    def stop(self) -> None:
        """Stop the thread after the image that is being measured."""
        self._stopping = True
        if self._queue.empty():
            self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        if sys.platform == "linux":  # where priority is per thread, and its workers inherit it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        stride = max(1, (self._window.maxlen or 0) // SCORES_A_WINDOW)
        while (taken := self._queue.get()) is not None and not self._stopping:
            try:
                self._window.append(self._measure(*taken))
                measured = self.num_measured + 1
                full = len(self._window) == self._window.maxlen
                if full and (self.latest is None or measured % stride == 0):
                    clip = self._clip.identity if self._clip else None
                    self.latest = score_window(list(self._window), self._reference, clip)
                self.num_measured = measured
            except Exception:  # one bad image must affect neither serving nor later scores
                self.num_failed += 1
                log.exception("drift: a picture was not measured")

    def _measure(self, pixels: np.ndarray, caption: str) -> Features:
        # One image at a time: a batch would be no faster on few cores, and would occupy them for longer.
        batch = torch.tensor(pixels).permute(2, 0, 1)[None]
        clip = None
        if self._clip:
            clip = (self._clip.features(batch)[0], self._clip.text_features([caption])[0])
        return Features(self._network.features(batch)[0], clip)
