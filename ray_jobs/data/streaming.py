"""Stream encoded rows to the training workers: shuffled, repeated, reproducible."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from cluster.storage import Storage

if TYPE_CHECKING:
    import ray.data

# Up to this many rows one task holds the data set and repeats it in memory, a fresh permutation an
# epoch. Starting a Ray Data execution for every epoch would cost a second or two each, which for a
# few hundred pictures is longer than training on them.
ROWS_HELD_BY_ONE_TASK = 65_536


def training_stream(
    dataset: Storage, *, num_rows: int, rows_needed: int, columns: list[str], seed: int
) -> "ray.data.Dataset":
    """The training split as a stream.

    A small split arrives as one stream of as many permuted epochs as `rows_needed` asks for. A large
    one is one pass over files in shuffled order, and the loop asks for another pass at its end.

    Args:
        dataset: the folder that prepare wrote.
        num_rows: of the training split.
        rows_needed: that all workers together will consume.
        columns: to read; the others are never touched.
        seed: of the order.
    """
    import ray.data

    filesystem, path = dataset.filesystem, f"{dataset.path}/split=train"
    if num_rows > ROWS_HELD_BY_ONE_TASK:
        order = ray.data.FileShuffleConfig(seed=seed)
        return ray.data.read_parquet(path, filesystem=filesystem, columns=columns, shuffle=order)
    rows = ray.data.read_parquet(path, filesystem=filesystem, columns=columns)
    # One more epoch covers what equal splitting drops.
    epochs = math.ceil(rows_needed / num_rows) + 1
    return rows.repartition(1).map_batches(
        permuted_epochs, batch_size=None, fn_kwargs={"epochs": epochs, "seed": seed}
    )


def permuted_epochs(
    rows: dict[str, np.ndarray], *, epochs: int, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yield `rows` `epochs` times, each time in another order."""
    generator = np.random.default_rng(seed)
    count = len(next(iter(rows.values())))
    for _ in range(epochs):
        order = generator.permutation(count)
        yield {name: values[order] for name, values in rows.items()}
