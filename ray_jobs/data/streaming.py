"""Stream encoded rows to the training workers: shuffled, repeated, reproducible."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.dataset

from cluster.storage import Storage

if TYPE_CHECKING:
    import ray.data

# Up to this many rows one task reads the split and repeats it in memory, a fresh permutation an epoch.
# Starting a Ray Data execution for every epoch would cost a second or two each, and Ray's Parquet reader
# starts actors to look at the files first: for a few hundred pictures, longer than training on them.
ROWS_HELD_BY_ONE_TASK = 65_536
# What that task yields in one pass. It has to fit into the executor's output budget: an executor that
# waits for its consumers polls without a pause, which costs the better part of a core (Ray 2.60).
BYTES_A_PASS = 64 << 20


def training_stream(
    dataset: Storage, *, num_rows: int, rows_needed: int, columns: list[str], seed: int
) -> "ray.data.Dataset":
    """One pass over the training split as a stream; the loop asks for another pass at its end.

    A small split arrives as many times as `rows_needed` asks for and `BYTES_A_PASS` allows, each time
    in another order; a large one once, file by file in shuffled order.

    Args:
        dataset: the folder that prepare wrote.
        num_rows: of the training split.
        rows_needed: that all workers together will consume.
        columns: to read, tensors; the others are never touched.
        seed: of the order.
    """
    import ray.data

    folder = f"{dataset.path}/split=train"
    if num_rows > ROWS_HELD_BY_ONE_TASK:
        order = ray.data.FileShuffleConfig(seed=seed)
        return ray.data.read_parquet(folder, filesystem=dataset.filesystem, columns=columns, shuffle=order)
    # One more epoch covers what equal splitting drops.
    epochs = math.ceil(rows_needed / num_rows) + 1

    def repeat(_: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        rows = read_tensors(dataset, "train", columns)
        fitting = BYTES_A_PASS // sum(values.nbytes for values in rows.values())
        return permuted_epochs(rows, epochs=max(1, min(epochs, fitting)), seed=seed)

    return ray.data.range(1, override_num_blocks=1).map_batches(repeat, batch_size=None)


def stored_split(dataset: Storage, split: str) -> pyarrow.dataset.Dataset:
    """The Parquet files that prepare wrote for a split; nothing is read yet."""
    return pyarrow.dataset.dataset(
        f"{dataset.path}/split={split}", filesystem=dataset.filesystem, format="parquet"
    )


def read_tensors(dataset: Storage, split: str, columns: list[str]) -> dict[str, np.ndarray]:
    """Tensor columns of a whole split, in the order of the rows' digests, not of the files."""
    import ray.data  # noqa: F401  registers the type of tensor columns with Arrow

    table = stored_split(dataset, split).to_table(columns=[*columns, "digest", "text"])
    order = np.lexsort((table["text"].to_numpy(), table["digest"].to_numpy()))
    return {
        name: np.concatenate(
            [np.asarray(chunk.to_numpy(zero_copy_only=False)) for chunk in table[name].chunks]
        )[order]
        for name in columns
    }


def permuted_epochs(
    rows: dict[str, np.ndarray], *, epochs: int, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yield `rows` `epochs` times, each time in another order."""
    generator = np.random.default_rng(seed)
    count = len(next(iter(rows.values())))
    for _ in range(epochs):
        order = generator.permutation(count)
        yield {name: values[order] for name, values in rows.items()}
