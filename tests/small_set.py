"""A prepared set of drawn pictures, made in a moment: all that scores read of it, and no encodings."""

import io
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from cluster.storage import Storage
from ray_jobs.data.curation.splits import content_digest
from ray_jobs.data.encoding.cache_files import write_part
from ray_jobs.data.encoding.encoding import reference_image
from ray_jobs.data.feeding.dataset import PARTS, Dataset
from ray_jobs.run.manifest import Manifest
from tests.conftest import captions, draw

FOLDS = 2
PICTURES = {"train": range(16), "validation": range(16, 27), "test": range(27, 38)}


def small_set(
    storage: Storage,
    side: int = 64,
    shapes: Sequence[tuple[int, int]] | None = None,
    references: int = 0,
) -> Dataset:
    """Pictures of `side` pixels, or of shapes (height, width) in turns, in three splits, and in folds of
    training and validation in turns. Those before an edit are the pictures, moved."""
    shapes = shapes or [(side, side)]
    parts: list[dict[str, Any]] = []
    texts = captions()
    for split, numbers in PICTURES.items():
        for fold in range(FOLDS if split != "test" else 1):
            chosen = [number for number in numbers if split == "test" or number % FOLDS == fold]
            file = f"{split}-{fold}.parquet"
            columns = {
                "text": [texts[number] for number in chosen],
                "image": [png(texts[number], number, shapes[number % len(shapes)]) for number in chosen],
                "digest": [content_digest(texts[number].encode()) for number in chosen],
            }
            for place in range(references):
                moved = [png(texts[n], n + 1 + place, shapes[n % len(shapes)]) for n in chosen]
                columns[reference_image(place)] = moved
            write_part(storage, file, pa.table(columns))
            parts.append({"split": split, "fold": fold, "rows": len(chosen), "file": file})
    storage.write_bytes(PARTS, json.dumps(parts).encode())
    manifest = {
        **{"held_out": True, "encode": "cache", "digest": "d", "content": "d", "class": 0},
        **{
            "rejected": {},
            "left_out": {},
            "no_pictures": {},
            "measures": {},
            "buckets": {},
            "captions": {"different": len(texts), "repaired": 0, "of_lines": 0},
        },
        "duplicates": {"mode": "keep", "groups": 0, "pictures": 0},
        "references": references,
        "source": [{"name": "drawn", "rows": len(texts), "share": 1.0}],
    }
    counts = {split: len(numbers) for split, numbers in PICTURES.items()}
    folds = [
        sum(part["rows"] for part in parts if part["fold"] == n and part["split"] != "test") for n in (0, 1)
    ]
    return Dataset(storage, storage, Manifest.model_validate({**manifest, **counts, "folds": folds}))


def png(caption: str, number: int, shape: tuple[int, int]) -> bytes:
    file, (height, width) = io.BytesIO(), shape
    draw(caption, number).resize((width, height)).save(file, format="PNG")
    return file.getvalue()
