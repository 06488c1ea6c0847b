"""Outlines of all parts, and the digest of all rows, collected from where chunks are planned."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ray_jobs.data.curation.workers import Workers
from ray_jobs.data.encoding.plan import Chunk, PartOutline, PlannedPart, Planner

CHUNKS_A_TASK = 32  # about 65,000 rows
ROWS_A_PARTITION = 1 << 19
SPLITS = ("class", "floor", "test", "train", "validation")  # as sorted


@dataclass(frozen=True)
class Outlines:
    """Parts of a dataset without their rows.

    Attributes:
        parts: all parts, chunk by chunk in source order.
        digest: SHA-256 of the sorted lines of split, digest and key of every row.
    """

    parts: list[PartOutline]
    digest: str


def outline(planner: Planner, chunks: Iterator[Chunk], num_rows: int, workers: Workers) -> Outlines:
    """Plan all chunks, and keep the outlines of their parts."""
    runs = [list(run) for run in iter(lambda: tuple(itertools.islice(chunks, CHUNKS_A_TASK)), ())]
    deal = _Deal(planner, -(-max(num_rows, 1) // ROWS_A_PARTITION))
    # Lines take a hundred bytes a row, which would stay in the driver's mapping of Ray's objects.
    found, digest = workers.fold(deal, runs, _sorted_lines, deal.num_partitions, digest_of_lines)
    return Outlines([part for parts in found for part in parts], digest)


def digest_of_lines(lines: Iterator[bytes]) -> str:
    """Return the SHA-256 of runs of lines, each with its line end before it, in hexadecimal."""
    digest, at_start = hashlib.sha256(), True
    for some in lines:
        digest.update(some[1:] if at_start else some)
        at_start = at_start and not some
    return digest.hexdigest()


_Block = tuple[str, np.ndarray]  # a split, and digests and keys of rows: N of 48 bytes


@dataclass(frozen=True)
class _Deal:
    """Plan chunks; deal the digests and keys of their rows by split and by the beginning of the digest.

    So all lines of a partition come before those of the next one.
    """

    planner: Planner
    of_split: int  # partitions

    @property
    def num_partitions(self) -> int:
        return len(SPLITS) * self.of_split

    def __call__(self, chunks: Sequence[Chunk]) -> tuple[list[PartOutline], list[_Block]]:
        parts = [part for chunk in chunks for part in self.planner.parts(chunk)]
        blocks = []
        for split in SPLITS:
            rows = _digests_and_keys([part for part in parts if part.split == split])
            receivers = rows[:, :2].copy().view(">u2")[:, 0].astype(np.int64) * self.of_split >> 16
            blocks += [(split, _as_values(rows[receivers == n])) for n in range(self.of_split)]
        return [part.outline() for part in parts], blocks


def _digests_and_keys(parts: Sequence[PlannedPart]) -> np.ndarray:
    """Return the digest and the key of every row: uint8, N x 48."""
    digests = bytes.fromhex("".join(digest for part in parts for digest in part.digests))
    keys = b"".join(key for part in parts for key in part.keys)
    columns = (np.frombuffer(digests, np.uint8), 32), (np.frombuffer(keys, np.uint8), 16)
    return np.hstack([values.reshape(-1, width) for values, width in columns])


def _as_values(rows: np.ndarray) -> np.ndarray:
    """Return rows of 48 bytes as values that sort as these do."""
    return np.ascontiguousarray(rows).view("V48")[:, 0] if len(rows) else np.empty(0, "V48")


def _sorted_lines(blocks: Sequence[_Block]) -> bytes:
    """Return the sorted lines of a partition, each with its line end before it."""
    split = blocks[0][0] if blocks else ""
    rows = np.concatenate([np.empty(0, "V48"), *(values for _, values in blocks)])
    words = rows.view(">u8").reshape(-1, 6)
    ordered = rows[np.lexsort(words.T[::-1])].view(np.uint8).reshape(-1, 48)
    text = np.frombuffer(ordered.tobytes().hex().encode(), np.uint8).reshape(-1, 96)
    start = np.frombuffer(f"\n{split} ".encode(), np.uint8)
    columns = np.tile(start, (len(rows), 1)), text[:, :64], np.full((len(rows), 1), ord(" ")), text[:, 64:]
    return np.hstack(columns).astype(np.uint8).tobytes()
