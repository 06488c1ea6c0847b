"""Drift monitors of a replica's versions: the most recently served ones are kept.

These are the champion, the candidate, and the previous version while it still serves.
"""

import logging
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from cluster.fetched import local_path
from cluster.storage import Storage
from ray_jobs.config import ConfigError, EvaluateConfig
from ray_jobs.registry.models import RegisteredModel
from serving.load import DriftScores
from serving.messages import label
from serving.replica.engine_cache import LOADING

if TYPE_CHECKING:  # importing them takes PyTorch
    from ray_jobs.metrics.feature_network import FeatureNetwork
    from ray_jobs.metrics.vision_model import Clip
    from serving.replica.drift import DriftMonitor

KEPT = 3  # monitored versions
RETRY_S = 60.0  # delay after a monitor could not be opened, in seconds

log = logging.getLogger("ray.serve")


class DriftWatch:
    """One drift monitor per version, opened in the background; images served meanwhile are skipped.

    Methods may be called from any thread.

    Args:
        evaluate: configuration of the networks that scored the published images.
        window: size of the window in images, `serve.drift_pictures`.
    """

    def __init__(self, evaluate: EvaluateConfig, window: int) -> None:
        self._evaluate, self._window = evaluate, window
        self._lock = threading.Lock()
        # None: the monitor is being opened, or failed to open.
        self._monitors: OrderedDict[tuple[str, int, str], DriftMonitor | None] = OrderedDict()
        self._networks: tuple[FeatureNetwork, Clip | None] | None = None

    def add(self, version: RegisteredModel, pixels: np.ndarray, caption: str) -> None:
        """Queue a served image, uint8, height x width x 3. Never blocks."""
        gone, name = None, _identity(version)
        with self._lock:
            if name not in self._monitors:
                self._monitors[name] = None
                threading.Thread(target=self._open, args=(version,), daemon=True).start()
                if len(self._monitors) > KEPT:
                    _, gone = self._monitors.popitem(last=False)
            self._monitors.move_to_end(name)
            monitor = self._monitors[name]
        if gone is not None:
            gone.stop()
        if monitor is not None:
            monitor.add(pixels, caption)

    def scores(self) -> dict[tuple[str, int], DriftScores]:
        """Return the scores by name and version, for versions whose window is full."""
        with self._lock:
            scores = [(name[:2], each.scores()) for name, each in self._monitors.items() if each is not None]
        return {name: drift for name, drift in scores if drift is not None}

    def _open(self, version: RegisteredModel) -> None:
        from serving.replica.drift import DriftMonitor, Reference

        try:
            network, clip = self._load_networks()
            reference = Reference.read(Storage.open(version.source), network.identity)
            monitor = DriftMonitor(network, reference, self._window, clip)
        except (ConfigError, ValueError, OSError) as error:
            log.warning("%s is not watched for drift: %s", label(version), error)
            time.sleep(RETRY_S)
            with self._lock:
                if self._monitors.get(_identity(version)) is None:
                    self._monitors.pop(_identity(version), None)  # the version's next image tries again
            return
        with self._lock:
            if wanted := _identity(version) in self._monitors:
                self._monitors[_identity(version)] = monitor
        if not wanted:
            monitor.stop()

    def _load_networks(self) -> "tuple[FeatureNetwork, Clip | None]":
        from ray_jobs.metrics.vision_model import load_clip
        from ray_jobs.weights.feature_networks import load_first

        with LOADING:
            if self._networks is None:
                evaluate, clip = self._evaluate, None
                network = load_first(evaluate)
                if evaluate.clip:
                    clip = load_clip(
                        local_path(evaluate.clip, "evaluate.clip"), revision=evaluate.clip_revision
                    )
                self._networks = network, clip
            return self._networks


def _identity(version: RegisteredModel) -> tuple[str, int, str]:
    return version.name, version.version, version.digest
