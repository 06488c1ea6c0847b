"""Drift: is what is served still what was published? A window of served pictures, scored in the background.

Three numbers of the last N pictures: FID against the validation pictures, CLIP score against their prompts,
and the share of near copies of training pictures. They are told once the window is full, because each
depends on N.
"""

import logging
import os
import queue
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from cluster.storage import Storage
from ray_jobs.config import ConfigError
from ray_jobs.metrics.feature_network import FeatureNetwork
from ray_jobs.metrics.frechet import Moments, frechet_distance
from ray_jobs.metrics.neighbours import memorisation
from ray_jobs.metrics.similarity import clip_score
from ray_jobs.metrics.vision_model import Clip
from ray_jobs.registry.models import REFERENCE
from serving.load import Drift

CAPACITY = 64  # pictures that may wait; more are passed over
FEWEST = 2  # pictures of a window: of one there is no covariance
SCORES_A_WINDOW = 4  # so often while its pictures are replaced once

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Reference:
    """Features of what a version was measured against: float32, pictures x D each.

    Attributes:
        training: of the pictures that near copies are looked for among.
        published: of the pictures that the version drew when it was measured, for what is to be expected.
    """

    validation: torch.Tensor
    training: torch.Tensor | None
    published: torch.Tensor | None
    feature_network: str

    @classmethod
    def read(cls, folder: Storage, feature_network: str) -> "Reference":
        """From the folder of a version's weights: tensors named `<network>/<validation|training|published>`.

        Raises:
            ConfigError: naming serve.drift_pictures, if there is none, or only of another network.
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
        kinds = ("validation", "training", "published")
        validation, training, published = (tensors.get(f"{feature_network}/{kind}") for kind in kinds)
        if validation is None:
            raise ConfigError(f"{where}: has no validation features by {feature_network}; {again}")
        return cls(validation, training, published, feature_network)


class Features(NamedTuple):
    """Of one served picture, D or D_clip each, float32."""

    picture: torch.Tensor
    clip: tuple[torch.Tensor, torch.Tensor] | None  # of the picture and of its caption


def score_window(window: list[Features], reference: Reference, clip: str | None) -> Drift:
    """The scores of a window of at least two pictures.

    Args:
        clip: identity of the network behind `Features.clip`.
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
    if reference.training is not None:
        copies = memorisation(features, reference.training, reference.validation, network)
    return Drift(
        num_pictures=len(window),
        fid=frechet_distance(Moments.of(features, network), real),
        expected_fid=expected,
        clip_score=similarity,
        near_copies=copies.share if copies else None,
        expected_near_copies=copies.expected_share if copies else None,
        feature_network=network,
        scored_at=time.time(),
    )


class DriftMonitor:
    """A thread of the lowest priority that scores served pictures. One a served version.

    Args:
        network: the feature network of `reference`.
        window: pictures; `serve.drift_pictures`.
        clip: None: no CLIP score.

    Raises:
        ValueError: if the window is too small, or the networks differ.
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
        self.latest: Drift | None = None
        """None until the window is full."""
        self.num_measured = 0
        self.num_skipped = 0
        """Pictures that came faster than they could be measured: the window is then a sample."""
        self.num_failed = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="drift", daemon=True)
        self._thread.start()

    def add(self, pixels: np.ndarray, caption: str) -> None:
        """Hand over a served picture; returns at once, and passes it over if too many are waiting.

        Args:
            pixels: uint8, height x width x 3; not to be changed afterwards.
        """
        try:
            self._queue.put_nowait((pixels, caption))
        except queue.Full:
            self.num_skipped += 1

    def scores(self) -> Drift | None:
        """The latest, and how many pictures are not in any up to now."""
        if self.latest is None:
            return None
        return self.latest._replace(num_passed_over=self.num_skipped + self.num_failed)

    def stop(self) -> None:
        """End after the picture that is being measured."""
        self._stopping = True
        if self._queue.empty():
            self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        if sys.platform == "linux":  # where every thread has a priority of its own, and so its workers
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
            except Exception:  # of one picture; those that are served are not to suffer, nor the next scores
                self.num_failed += 1
                log.exception("drift: a picture was not measured")

    def _measure(self, pixels: np.ndarray, caption: str) -> Features:
        # One at a time: a batch would be no faster on few cores, and hold them for longer.
        batch = torch.tensor(pixels).permute(2, 0, 1)[None]
        clip = None
        if self._clip:
            clip = (self._clip.features(batch)[0], self._clip.text_features([caption])[0])
        return Features(self._network.features(batch)[0], clip)
