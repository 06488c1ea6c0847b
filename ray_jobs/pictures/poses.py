"""Skeletons of people as OpenPose draws them (Cao et al., arXiv 1812.08008): 18 key points and 17 limbs.

A key point is a disk of a colour of its own, and a limb a darker line. The 18 colours are a circle of hues.
"""

import colorsys
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

NUM_POINTS = 18
# Key points of COCO (nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles; left ones first) in
# the order of OpenPose's. Its second one, the neck, is halfway between the shoulders.
LEFT_SHOULDER, RIGHT_SHOULDER = 5, 6
NUM_COCO, NECK = 17, 1
FROM_COCO = (0, RIGHT_SHOULDER, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),
    *((1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
)
COLOURS = np.array(
    [[round(255 * each) for each in colorsys.hsv_to_rgb(n / NUM_POINTS, 1, 1)] for n in range(NUM_POINTS)]
)
"""Of key points, and of as many limbs: int, 18 x 3."""
DARKER = 0.6  # limbs
RADIUS = 4 / 512  # of a key point, and half the width of a limb, for 1 of the picture's longer side
BRIGHT = 0.8  # least brightness of a key point, for 1 of white; limbs are darker


class Person(NamedTuple):
    """Key points of one person.

    Attributes:
        places: x and y of each, in pixels: float, 18 x 2.
        is_seen: bool, 18.
    """

    places: np.ndarray
    is_seen: np.ndarray


def person_of_coco(places: np.ndarray, is_seen: np.ndarray) -> Person:
    """Return OpenPose's key points from COCO's, which lack the neck.

    Args:
        places: float, 17 x 2.
        is_seen: bool, 17.
    """
    order = list(FROM_COCO)
    found, seen = places[order].copy(), is_seen[order].copy()
    shoulders = [LEFT_SHOULDER, RIGHT_SHOULDER]
    found[NECK], seen[NECK] = places[shoulders].mean(axis=0), is_seen[shoulders].all()
    return Person(found, seen)


def draw_poses(people: Iterable[Person], height: int, width: int) -> np.ndarray:
    """Draw skeletons on black: uint8, height x width x 3."""
    picture = Image.new("RGB", (width, height))
    draw, people = ImageDraw.Draw(picture), list(people)
    radius = max(1.0, RADIUS * max(height, width))
    for places, is_seen in people:
        for number, limb in enumerate(LIMBS):
            if is_seen[list(limb)].all():
                colour = tuple(int(DARKER * each) for each in COLOURS[number])
                draw.line([tuple(places[end]) for end in limb], colour, max(1, round(2 * radius)))
    for places, is_seen in people:
        for (x, y), colour in zip(places[is_seen], COLOURS[is_seen], strict=True):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), tuple(map(int, colour)))
    return np.array(picture)


def key_points(pixels: np.ndarray) -> np.ndarray:
    """Return where a picture of skeletons shows each key point: bool, 18 x height x width.

    The nearest hue decides, of pixels that are as bright and colourful as key points are.

    Args:
        pixels: uint8, height x width x 3.
    """
    most, least = pixels.max(axis=2), pixels.min(axis=2)
    is_point = (most >= BRIGHT * 255) & (least <= (1 - BRIGHT) * 255)
    distances = np.square(pixels[..., None, :].astype(np.int32) - COLOURS).sum(axis=3)
    nearest = distances.argmin(axis=2)
    return is_point & (nearest == np.arange(NUM_POINTS)[:, None, None])
