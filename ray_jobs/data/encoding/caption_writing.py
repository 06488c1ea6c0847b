"""Caption pictures: Ray Data reads, decodes on CPUs, and captions in actors that hold the model.

A caption is kept in `<storage>/written_captions/<digest>/`, by the digest of its picture, for all runs with
the same model and prompt; `settings.json` there holds the digest's content. A job that fails keeps what it
has.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cluster.storage import Storage
from ray_jobs.config import Config
from ray_jobs.data.curation.scan import FILES_AT_ONCE, Entry, RayRow
from ray_jobs.data.curation.splits import content_digest
from ray_jobs.data.encoding.cache_files import read_part, write_part
from ray_jobs.data.encoding.encoding import DECODING, GATHERING, ChangedFile, encoder_actors
from ray_jobs.data.sources.detection import Source
from ray_jobs.pictures.reading import read_picture
from ray_jobs.run.folder import SharedFolder

VERSION = 1  # version of a caption's dependencies; a change captions anew
SETTINGS = "settings.json"
CAPTIONS_A_FILE = 1024
SECONDS_A_FILE = 60  # a job that is killed has to write the captions of this time again

Place = tuple[int, int]  # number of an entry, and row in its piece


@dataclass(frozen=True)
class Caption:
    """A caption of a model as it is kept: see `captioner.Written`."""

    text: str
    is_cut: bool


def captions_folder(config: Config, model: str) -> Storage:
    """Folder of captions, named after all their dependencies but the pictures."""
    from ray_jobs.weights.captioner import captioner_folder, prompt_of

    settings = config.data.captioning
    depends = {
        "version": VERSION,
        "model": model,
        "prompt": prompt_of(settings, captioner_folder(settings)),
        "max_tokens": settings.max_tokens,
        "max_side": settings.max_side,
        "background": config.data.background,
        "precision": config.data.encode_precision,
    }
    text = json.dumps(depends, indent=2) + "\n"
    folder = SharedFolder.of(config).written_captions(hashlib.sha256(text.encode()).hexdigest()[:32])
    folder.write_text(SETTINGS, text)
    return folder


def kept_captions(cache: Storage, wanted: Mapping[str, Place]) -> dict[str, Caption]:
    """Read the captions of the wanted pictures, by their digests."""
    files = [file for file in cache.files() if file.endswith(".parquet")]
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        return {
            row["digest"]: Caption(row["text"], row["is_cut"])
            for table in pool.map(lambda file: read_part(cache, file), files)
            for row in table.to_pylist()
            if row["digest"] in wanted
        }


def keep_captions(cache: Storage, captions: Mapping[str, Caption]) -> None:
    """Write captions, by the digests of their pictures, to one file, whole or not at all."""
    if captions:
        name = hashlib.sha256("".join(sorted(captions)).encode()).hexdigest()[:32]
        rows = [{"digest": digest, **vars(caption)} for digest, caption in captions.items()]
        write_part(cache, f"{name}.parquet", pa.Table.from_pylist(rows))


@dataclass(frozen=True)
class ReadPictures:
    """Read wanted pictures of a piece.

    Input: one row with an entry and the digests of its wanted rows. Output: one row per picture, with its
    bytes.
    """

    readers: list[Source]

    def __call__(self, row: RayRow) -> Iterator[RayRow]:
        entry: Entry = row["entry"]
        digests: dict[int, str] = row["digests"]
        for sample in self.readers[entry.source].read(entry.piece, digests):
            if sample.problem:
                raise ChangedFile(f"{sample.name}: {sample.problem} (it was readable during the scan)")
            yield {"digest": digests[sample.row], "name": sample.name, "data": sample.data}


@dataclass(frozen=True)
class ShowPictures:
    """Decode a picture as for training, and reduce it to `data.captioning.max_side`."""

    config: Config

    def __call__(self, row: RayRow) -> RayRow:
        data, side = self.config.data, self.config.data.captioning.max_side
        if content_digest(row["data"]) != row["digest"]:
            raise ChangedFile(f"{row['name']}: changed during prepare; run it again")
        limit = data.cleaning.max_pixels
        # As for encoding: it keeps at least twice the size, so that the better filter does the last halving.
        image = read_picture(
            row["data"], background=data.background, max_pixels=limit, at_least=2 * side
        ).image
        image.thumbnail((side, side))
        return {
            "digest": row["digest"],
            "width": image.width,
            "height": image.height,
            "pixels": image.tobytes(),
        }


class CaptionPictures:
    """Captioning model in an actor: decoded pictures to captions."""

    def __init__(self, config: Config) -> None:
        import torch

        from ray_jobs.diffusion.memory import Chunks
        from ray_jobs.diffusion.precision import PRECISIONS
        from ray_jobs.weights.captioner import Captioner

        torch.set_num_threads(config.train.cpus_per_worker)
        self.captioner = Captioner(
            config.data.captioning,
            device="cuda" if config.train.use_gpu else "cpu",  # as `encoder_actors` reserves it
            dtype=PRECISIONS[config.data.encode_precision],
        )
        self.chunks = Chunks()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[object]]:
        from PIL import Image

        sizes = zip(batch["width"].tolist(), batch["height"].tolist(), strict=True)
        pictures = [
            Image.frombytes("RGB", size, pixels) for size, pixels in zip(sizes, batch["pixels"], strict=True)
        ]
        written = [each for part in self.chunks.run(pictures, self.captioner.write) for each in part]
        return {
            "digest": batch["digest"].tolist(),
            "text": [each.text for each in written],
            "is_cut": [each.is_cut for each in written],
        }


def caption_pictures(
    config: Config,
    sources: Sequence[Source],
    found: Sequence[Entry],
    missing: Mapping[str, Place],
    cache: Storage,
    progress: Callable[[int, int], None],
) -> dict[str, Caption]:
    """Caption the missing pictures, and keep the captions."""
    import ray.data

    items: dict[int, RayRow] = {}
    for digest, (number, row) in missing.items():
        items.setdefault(number, {"entry": found[number], "digests": {}})["digests"][row] = digest
    written = (
        ray.data.from_items([items[number] for number in sorted(items)], override_num_blocks=len(items))
        .flat_map(ReadPictures([source.reader() for source in sources]), **GATHERING)
        .map(ShowPictures(config), **DECODING)
        .map_batches(
            CaptionPictures,
            batch_size=config.data.encode_batch_size,
            fn_constructor_args=(config,),
            **encoder_actors(config),
        )
    )
    # Blocks of about a batch of decoded pictures, so that batches move on one by one.
    side = config.data.captioning.max_side
    written.context.target_max_block_size = 3 * side * side * config.data.encode_batch_size
    captions: dict[str, Caption] = {}
    new: dict[str, Caption] = {}
    kept_at = time.monotonic()
    try:
        for row in written.iter_rows():
            new[row["digest"]] = Caption(row["text"], row["is_cut"])
            progress(len(captions) + len(new), len(missing))
            if len(new) >= CAPTIONS_A_FILE or time.monotonic() - kept_at >= SECONDS_A_FILE:
                keep_captions(cache, new)
                captions |= new
                new, kept_at = {}, time.monotonic()
    finally:  # also of a job that fails
        keep_captions(cache, new)
    return captions | new
