"""Edges of a picture (Canny, PAMI 8, 1986), by OpenCV: those that published ControlNets were trained on."""

import numpy as np


def edges(pixels: np.ndarray, low_threshold: float, high_threshold: float) -> np.ndarray:
    """Return white edges on black: uint8, height x width x 3, the channels equal.

    Args:
        pixels: uint8, height x width x 3. Of the three channels the strongest gradient counts.
        low_threshold: gradient, the sum of both absolute derivatives, from which an edge continues.
        high_threshold: gradient from which an edge begins.
    """
    import cv2

    cv2.setNumThreads(1)  # callers have a CPU each
    found = cv2.Canny(np.ascontiguousarray(pixels), low_threshold, high_threshold)
    return np.repeat(found[..., None], 3, axis=2)
