"""Stream training rows to the workers: shuffled, endless, in one order for any number of workers.

Rank 0 starts one Ray Data execution at the step from which training resumes, and gives every rank its
iterator. Each task produces a window of `order.Order`. The blocks it yields are for ranks 0, 1, ... in turn,
and with `preserve_order` Ray distributes them in that order. Each block carries its step and rank; a rank
that receives another rank's block fails instead of training on it.
"""

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from cluster.storage import Storage
from ray_jobs.config import Config
from ray_jobs.data.curation.scan import FILES_AT_ONCE, Entry, RayRow
from ray_jobs.data.curation.splits import content_digest
from ray_jobs.data.encoding.cache_files import read_part, read_schema
from ray_jobs.data.encoding.encoding import (
    DECODING,
    GATHERING,
    Beside,
    ChangedFile,
    Decode,
    EncodeRows,
    encoder_actors,
    joined,
)
from ray_jobs.data.encoding.plan import PartRecord, PlannedPart
from ray_jobs.data.encoding.tensors import as_numpy, as_torch, read_tensors, row_bytes
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.data.feeding.mixture import mixture
from ray_jobs.data.feeding.order import JoinedOrder, Order, Part, Step, Window, rows_of_rank
from ray_jobs.data.sources.detection import Sample, Source

if TYPE_CHECKING:
    import ray.data
    import torch
    from ray import ObjectRef

# Steps are sent together up to this many bytes per rank: a block costs a millisecond or two, regardless of
# its size.
BYTES_A_BLOCK = 4 << 20
PREFETCHED_BLOCKS = 4
SOURCE = "source"  # column that no file has: the number of each row's source, int32
STEPS_A_TASK = 64  # a task costs milliseconds even if it reads little


@dataclass(frozen=True)
class Live:
    """Sources and plan for encoding training rows while they are streamed (`data.encode: stream`)."""

    readers: list[Source]
    entries: Sequence[Entry]
    parts: Sequence[PlannedPart]

    @staticmethod
    def share(
        readers: list[Source], entries: Sequence[Entry], parts: Sequence[PlannedPart]
    ) -> "ObjectRef[Live]":
        """Return an object reference that every node can resolve."""
        import ray

        return ray.put(Live(readers, entries, parts))


@dataclass(frozen=True)
class StreamSettings:
    """Settings of the order and of its division among ranks.

    Attributes:
        rows_a_step: rows per step, over all ranks.
        world_size: number of ranks; each gets a consecutive, equal part of a step's rows, the first ranks one
            row more if uneven.
        columns: tensors that training needs.
        class_rows: number of class pictures in a step, which are its last rows.
    """

    config: Config
    rows_a_step: int
    world_size: int
    columns: tuple[str, ...]
    class_rows: int = 0

    def order(self, records: Sequence[PartRecord], row_bytes: int) -> Order:
        """Order of the training rows of the given parts."""
        parts, weights = mixture(self.config.data, records)
        return Order(
            parts,
            batch_size=self.rows_a_step - self.class_rows,
            window_rows=self._window_rows(row_bytes),
            seed=self.config.seed,
            weights=weights,
        )

    def joined_order(
        self, records: Sequence[PartRecord], of_class: Sequence[PartRecord], row_bytes: int
    ) -> JoinedOrder:
        """Order of training rows followed, in each step, by class rows, which have an order of their own."""
        window_rows = self._window_rows(row_bytes)
        seed = int(np.random.SeedSequence((self.config.seed, 1)).generate_state(1)[0])
        pictures = [Part(part["rows"], part["bucket"], part["source"]) for part in of_class]
        regular = Order(pictures, batch_size=self.class_rows, window_rows=window_rows, seed=seed)
        return JoinedOrder(self.order(records, row_bytes), regular, window_rows=window_rows)

    def _window_rows(self, row_bytes: int) -> int:
        return (self.config.data.shuffle_mb << 20) // row_bytes


def split_stream(
    dataset: Dataset, settings: StreamSettings, *, first_step: int, last_step: int
) -> "list[ray.data.DataIterator]":
    """Start the stream of the steps `first_step` to `last_step`; return one Ray Data iterator per rank."""
    import ray

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    source = _cached if dataset.live is None else _live
    stream = source(dataset, settings, first_step, last_step)
    # A block ends at this many bytes, that is after each row, which holds the data of one rank.
    stream.context.target_max_block_size = 1
    return list(stream.streaming_split(settings.world_size, equal=True))


def batches(
    iterator: "ray.data.DataIterator", *, rank: int, first_step: int
) -> Iterator[dict[str, "torch.Tensor"]]:
    """Yield this rank's rows of each step from `first_step`: tensors by column, N x ..."""
    step = first_step
    for block in iterator.iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=PREFETCHED_BLOCKS
    ):
        for number, of, arrays in unpack(block):
            if (number, of) != (step, rank):
                raise RuntimeError(
                    f"the stream is out of order: rank {rank} at step {step} got rank {of}'s rows of step "
                    f"{number}"
                )
            yield {name: as_torch(values) for name, values in arrays.items()}
            step += 1


def pack(rank: int, steps: Sequence[int], batches: Sequence[dict[str, np.ndarray]]) -> pa.Table:
    """Pack a rank's batches of some steps into one row of the stream, each column as one bytes value.

    The row is a table, which Ray Data passes on unchanged; it would copy a dict several times.
    """
    names = list(batches[0])
    layout = {
        "rank": rank,
        "steps": list(steps),
        "dtypes": {name: batches[0][name].dtype.str for name in names},
        "shapes": {name: [batch[name].shape for batch in batches] for name in names},
    }
    columns = {"layout": pa.array([json.dumps(layout)])}
    for name in names:
        content = b"".join(batch[name].data for batch in batches)
        ends = pa.py_buffer(np.array([0, len(content)]))
        columns[name] = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(content)])
    return pa.table(columns)


def unpack(block: pa.Table) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
    """Yield step, rank and arrays of every batch in a block of the stream."""
    for row in range(len(block)):
        layout = json.loads(block["layout"][row].as_py())
        ends = dict.fromkeys(layout["dtypes"], 0)
        contents = {name: block[name][row].as_buffer() for name in ends}
        for number, step in enumerate(layout["steps"]):
            arrays = {}
            for name, dtype in layout["dtypes"].items():
                shape = layout["shapes"][name][number]
                count, kind = math.prod(shape), np.dtype(dtype)
                values = np.frombuffer(contents[name], kind, count, ends[name])
                ends[name] += count * kind.itemsize
                arrays[name] = values.reshape(shape).copy()  # frees the block, and is writable
            yield step, layout["rank"], arrays


def _windows(order: Order | JoinedOrder, first_step: int, last_step: int) -> "ray.data.Dataset":
    """Ray dataset of the windows to produce, grouped in runs: a small dataset's window has few steps."""
    import ray

    runs: list[list[tuple[int, ...]]] = []
    steps = STEPS_A_TASK
    for window in order.windows(first_step, last_step):
        if steps >= STEPS_A_TASK:
            runs.append([])
            steps = 0
        runs[-1].append(astuple(window))
        steps += window.last - window.first + 1
    return ray.data.from_items([{"windows": run} for run in runs], override_num_blocks=len(runs))


def _steps(order: Order | JoinedOrder, run: Sequence[Sequence[int]]) -> list[Step]:
    """Steps of a run of windows, in the format of `_windows`."""
    return [step for window in run for step in order.steps(Window(*map(int, window)))]


def _cached(
    dataset: Dataset, settings: StreamSettings, first_step: int, last_step: int
) -> "ray.data.Dataset":
    records = dataset.parts("train")
    schema = read_schema(dataset.cache, records[0]["file"])
    needed = sum(row_bytes(schema.field(name)) for name in settings.columns if name != SOURCE)
    order: Order | JoinedOrder = settings.order(records, needed)
    if settings.class_rows:
        of_class = dataset.parts("class")
        order = settings.joined_order(records, of_class, needed)
        records = [*records, *of_class]
    read = ReadWindow(dataset.cache, records, order, settings.columns, settings.world_size, needed)
    return _windows(order, first_step, last_step).map_batches(read, batch_size=1)


@dataclass(frozen=True)
class ReadWindow:
    """Read the parts of a run of windows; yield one table per rank and run of steps."""

    cache: Storage
    parts: list[PartRecord]
    order: Order | JoinedOrder
    columns: tuple[str, ...]
    world_size: int
    row_bytes: int

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        [windows] = batch["windows"]
        steps = _steps(self.order, windows)
        numbers = np.unique(np.concatenate([step.rows[:, 0] for step in steps]))
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            read = dict(zip(numbers.tolist(), pool.map(self._read, numbers), strict=True))
        shares = [
            rows_of_rank(self.order.batch_size, self.world_size, rank) for rank in range(self.world_size)
        ]
        together = max(1, BYTES_A_BLOCK // (len(shares[0]) * self.row_bytes))
        for start in range(0, len(steps), together):
            run = steps[start : start + together]
            for rank, mine in enumerate(shares):
                taken = [self._take(read, step.rows[mine]) for step in run]
                yield pack(rank, [step.step for step in run], taken)

    def _read(self, part: int) -> dict[str, np.ndarray]:
        return read_rows(self.cache, self.parts[part], self.columns)

    def _take(self, read: dict[int, dict[str, np.ndarray]], rows: np.ndarray) -> dict[str, np.ndarray]:
        return {
            name: np.stack([read[part][name][row] for part, row in rows.tolist()]) for name in self.columns
        }


def read_rows(cache: Storage, part: PartRecord, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Read tensors of all rows of a part, by column: N x ..."""
    stored = [name for name in columns if name != SOURCE]
    found = read_tensors(read_part(cache, part["file"], stored), stored)
    if SOURCE in columns:
        found[SOURCE] = np.full(part["rows"], part["source"], np.int32)
    return found


def _live(dataset: Dataset, settings: StreamSettings, first_step: int, last_step: int) -> "ray.data.Dataset":
    import ray

    live: Live = ray.get(dataset.live)
    config = settings.config
    # A window holds files; a picture's decoded size is a safe estimate of its file size.
    order = settings.order([part.record() for part in live.parts], 3 * config.data.resolution**2)
    return (
        _windows(order, first_step, last_step)
        .flat_map(GatherWindow(live, order, settings.world_size), **GATHERING)
        .map(DecodeBatch(config), **DECODING)
        .map_batches(
            EncodeBatch,
            batch_size=1,
            fn_constructor_args=(config, settings.columns),
            **encoder_actors(config),
        )
    )


@dataclass(frozen=True)
class GatherWindow:
    """Read the picture files of a run of windows; yield one row per step and rank."""

    live: Live
    order: Order
    world_size: int

    def __call__(self, row: RayRow) -> Iterator[RayRow]:
        steps = _steps(self.order, row["windows"])
        wanted: dict[int, set[int]] = {}
        for number, index in np.unique(np.concatenate([step.rows for step in steps]), axis=0).tolist():
            part = self.live.parts[number]
            wanted.setdefault(int(part.entries[index]), set()).add(int(part.rows[index]))
        samples = {}
        for number, rows in sorted(wanted.items()):
            entry = self.live.entries[number]
            for sample in self.live.readers[entry.source].read(entry.piece, rows):
                if sample.problem:
                    raise ChangedFile(f"{sample.name}: {sample.problem} (it was readable during the scan)")
                samples[number, sample.row] = sample
        for step in steps:
            for rank in range(self.world_size):
                mine = rows_of_rank(self.order.batch_size, self.world_size, rank)
                yield self._dealt(step, rank, step.rows[mine], samples)

    def _dealt(
        self, step: Step, rank: int, rows: np.ndarray, samples: dict[tuple[int, int], Sample]
    ) -> RayRow:
        found, digests, texts, expected = [], [], [], []
        for number, index in rows.tolist():
            part = self.live.parts[number]
            found.append(samples[int(part.entries[index]), int(part.rows[index])])
            digests.append(part.digests[index])
            texts.append(found[-1].text if part.texts is None else part.texts[index])
            expected.append(list(part.further[index]) if part.further else [])
        return {
            "rank": rank,
            "step": step.step,
            "epoch": step.epoch,
            "bucket": step.bucket,
            "data": [sample.data for sample in found],
            "text": texts,
            "name": [sample.name for sample in found],
            "digest": digests,
            "source": [self.live.parts[number].source for number in rows[:, 0].tolist()],
            "further": [list(sample.further) for sample in found],
            "further_digests": expected,
            "reference_size": self.live.parts[int(rows[0][0])].reference_size,
        }


class DecodeBatch(Decode):
    """Add pixels to a gathered batch, augmented anew in each epoch."""

    def __call__(self, row: RayRow) -> RayRow:
        width, height = (int(side) for side in row["bucket"].split("x"))
        pixels, sizes, fitted_beside = [], [], list[Beside]()
        looked_at = tuple(row["reference_size"]) if row["reference_size"] else None
        further = zip(row.pop("further"), row.pop("further_digests"), strict=True)
        for data, digest, name, beside in zip(
            row.pop("data"), row["digest"], row["name"], further, strict=True
        ):
            if content_digest(data) != digest:
                raise ChangedFile(f"{name}: changed since prepare; run it again")
            picture = self.open(data, (width, height))
            fitted = self.fit(picture, "train", (width, height), digest, row["epoch"])
            pixels.append(fitted.pixels)
            sizes.append(fitted.sizes)
            self.require_unchanged(list(zip(*beside, strict=True)), name)
            given = list(beside[0]), picture, "train", (width, height), looked_at, digest, row["epoch"]
            fitted_beside.append(self.beside(*given))
        references = [each.references for each in fitted_beside if each.references is not None]
        row["masks"] = joined([each.mask for each in fitted_beside])
        row["controls"] = joined([each.control for each in fitted_beside])
        row["references"] = joined(references)
        row["reference_shape"] = [len(references), *references[0].shape] if references else []
        return row | {"pixels": np.stack(pixels).tobytes(), "conditioning": sizes}


class EncodeBatch(EncodeRows):
    """Actor that encodes decoded batches into the format of `ReadWindow`."""

    def __init__(self, config: Config, columns: tuple[str, ...]) -> None:
        super().__init__(config)
        self.columns = columns

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        row = {name: values[0] for name, values in batch.items()}
        width, height = (int(side) for side in row["bucket"].split("x"))
        pixels = np.frombuffer(row["pixels"], np.uint8).reshape(-1, height, width, 3)
        references = None
        if len(shape := row["reference_shape"]):
            references = np.frombuffer(row["references"], np.uint8).reshape([int(side) for side in shape])
        masks = None
        if row["masks"]:
            masks = np.frombuffer(row["masks"], np.uint8).reshape(pixels.shape[:3])
        controls = None
        if row["controls"]:
            fitted = np.frombuffer(row["controls"], np.uint8).reshape(pixels.shape)
            controls = self.control_images(fitted)
        tensors = self.encode(pixels, [str(text) for text in row["text"]], references, masks, controls)
        arrays = {name: as_numpy(tensor) for name, tensor in tensors.items()}
        arrays[SOURCE] = np.array(row["source"], np.int32)
        arrays["conditioning"] = np.array([list(sizes) for sizes in row["conditioning"]], np.int32)
        plain = {name: arrays[name] for name in self.columns}
        return pack(int(row["rank"]), [int(row["step"])], [plain])
