"""The sheet of a rung's pictures: all that are kept, small, in the order of their captions."""

import io
from pathlib import Path

import pytest
from PIL import Image

from cluster.storage import Storage
from ray_jobs.run.samples import SHEET_PICTURE, SHEET_PICTURES, sheet


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    return Storage.open(str(tmp_path))


def keep(folder: Storage, number: int, size: int = 8) -> None:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (number, 0, 0)).save(file, format="PNG")
    folder.write_bytes(f"{number}-a-caption.png", file.getvalue())


def test_a_sheet_has_the_pictures_line_by_line_in_the_order_of_their_numbers(folder: Storage) -> None:
    for number in (10, 2, 9, 0, 1):  # as text, 10 comes before 2
        keep(folder, number)
    found = sheet(folder)
    assert found is not None and found.size == (3 * 8, 2 * 8)
    middles = [(x, y) for y in (4, 12) for x in (4, 12, 20)]
    reds = [found.getpixel(middle) for middle in middles]
    assert reds == [(0, 0, 0), (1, 0, 0), (2, 0, 0), (9, 0, 0), (10, 0, 0), (255, 255, 255)]


def test_a_sheet_is_bounded_however_many_and_large_the_pictures_are(folder: Storage) -> None:
    for number in range(SHEET_PICTURES + 10):
        keep(folder, number, size=SHEET_PICTURE + 2)
    found = sheet(folder)
    side = SHEET_PICTURE * round(SHEET_PICTURES**0.5)
    assert found is not None and found.size == (side, side)


def test_a_folder_without_pictures_has_no_sheet(folder: Storage) -> None:
    assert sheet(folder) is None
