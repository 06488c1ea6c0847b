"""Encode the planned parts: Ray Data reads, decodes on CPUs, and encodes in actors that hold the model.

Parts are files of the encoding cache, `<storage>/encoded/<encoders>/<part>.parquet`, named after their rows'
keys. A row's key is the hash of everything that its encoding depends on. Existing parts are kept. For a
missing part, rows stored in other files of the cache are copied, and only the others are encoded. Each part
is encoded separately and written atomically, so that a restarted run writes the same bytes as an
uninterrupted one. The encoding of the empty caption, which training uses for dropped captions, is stored with
the parts.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from cluster.fetched import local_path
from cluster.storage import Storage
from ray_jobs.config import AugmentationConfig, Config
from ray_jobs.data.curation.scan import FILES_AT_ONCE, Entry, RayRow
from ray_jobs.data.curation.splits import content_digest
from ray_jobs.data.encoding.augmentation import augment, row_generator
from ray_jobs.data.encoding.cache_files import read_part, write_part
from ray_jobs.data.encoding.geometry import Fitted, Size, fit
from ray_jobs.data.encoding.plan import PIXELS_A_PART, Chunk, PartOutline, PlannedPart, Planner
from ray_jobs.data.encoding.tensors import tensor_column
from ray_jobs.data.sources.detection import Sample, Source
from ray_jobs.pictures.edges import edges
from ray_jobs.pictures.reading import WHITE, Picture, encode_png, read_picture

if TYPE_CHECKING:
    import torch

# Resources of the steps. Ray Data would fuse steps with equal resources and run them in sequence for each
# part, so the three differ: decoding needs memory for pixels. A whole CPU for reading keeps the number of its
# processes, and their memory, from growing with the dataset while the encoders start.
GATHERING = {"num_cpus": 1}
DECODING = {"num_cpus": 1, "memory": 3 * PIXELS_A_PART}

EMPTY_CAPTION = "empty_caption.safetensors"
CONDITIONING = ("original_height", "original_width", "top", "left", "target_height", "target_width")


class ChangedFile(RuntimeError):
    """Error for a picture that has changed since the scan."""


@dataclass(frozen=True)
class Gather:
    """Plan the missing parts of a chunk, and read their pictures from its pieces, each piece once.

    Input: one row with a chunk, the entries of its pieces, and the files of its missing parts. Output: one
    row per part, with its pictures' bytes and captions.
    """

    readers: list[Source]
    planner: Planner

    def __call__(self, row: RayRow) -> Iterator[RayRow]:
        chunk: Chunk = row["chunk"]
        parts = [part for part in self.planner.parts(chunk) if part.file in row["files"]]
        entries: dict[int, Entry] = dict(enumerate(row["entries"], chunk.entry))
        wanted: dict[int, set[int]] = {number: set() for number in entries}
        waiting: dict[tuple[int, int], list[int]] = {}  # (entry, row) -> the parts that need it
        missing = []
        for index, part in enumerate(parts):
            needed = set(zip(part.entries.tolist(), part.rows.tolist(), strict=True))
            missing.append(len(needed))
            for entry, number in needed:
                wanted[entry].add(number)
                waiting.setdefault((entry, number), []).append(index)
        collected: list[dict[tuple[int, int], Sample]] = [{} for _ in parts]
        for entry, found in entries.items():
            for sample in self.readers[found.source].read(found.piece, wanted[entry]):
                if sample.problem:
                    raise ChangedFile(f"{sample.name}: {sample.problem} (it was readable during the scan)")
                for index in waiting[entry, sample.row]:
                    collected[index][entry, sample.row] = sample
                    if len(collected[index]) == missing[index]:
                        yield _gathered(parts[index], collected[index])
                        collected[index] = {}


def _gathered(part: PlannedPart, samples: dict[tuple[int, int], Sample]) -> RayRow:
    """Combine a part with the bytes and captions of its rows; variants of a picture share its bytes."""
    places = list(zip(part.entries.tolist(), part.rows.tolist(), strict=True))
    different = {place: number for number, place in enumerate(dict.fromkeys(places))}
    texts = {place: samples[place].text for place in different}
    if part.texts is not None:
        texts = dict(zip(places, part.texts, strict=True))
    return {
        "part": part,
        "data": [samples[place].data for place in different],
        "text": [texts[place] for place in different],
        "name": [samples[place].name for place in different],
        "further": [list(samples[place].further) for place in different],
        "picture": [different[place] for place in places],
    }


class Beside(NamedTuple):
    """What a row has beside its picture, fitted as that; None for what it does not have.

    Attributes:
        references: uint8, R x h x w x 3.
        mask: uint8, H x W.
        control: see `Decode.control`: uint8, H x W x 3.
        shown: the picture that `control` was made from, not fitted.
    """

    references: np.ndarray | None
    mask: np.ndarray | None
    control: np.ndarray | None
    shown: Picture | None


@dataclass(frozen=True)
class Decode:
    """Add pixels to a gathered part: each row is fitted to the part's bucket, training rows augmented."""

    config: Config

    def __call__(self, row: RayRow) -> RayRow:
        part: PlannedPart = row["part"]
        width, height = part.bucket
        pixels = np.empty((len(part.rows), height, width, 3), np.uint8)
        conditioning, pngs, control_pngs, beside = [], [], [], list[Beside]()
        of, digest, picture = -1, "", None
        for number, index in enumerate(row["picture"]):
            if of != index:  # variants of a picture follow each other
                of, file = index, row["data"][index]
                digest, picture = content_digest(file), self.open(file, part.bucket)
            assert picture is not None
            if digest != part.digests[number]:
                raise ChangedFile(f"{row['name'][index]}: changed during prepare; run it again")
            draw = int(part.variants[number])
            fitted = self.fit(picture, part.split, part.bucket, digest, draw)
            given = list(
                zip(row["further"][index], part.further[number] if part.further else (), strict=True)
            )
            self.require_unchanged(given, row["name"][index])
            files, sizes = [content for content, _ in given], (part.bucket, part.reference_size)
            beside.append(self.beside(files, picture, part.split, *sizes, digest, draw))
            pixels[number] = fitted.pixels
            conditioning.append(fitted.sizes)
            plain = fit(picture.image, part.bucket).pixels if part.scored[number] else None
            pngs.append(b"" if plain is None else encode_png(plain))
            # As scores have the row's picture: not augmented. What a model computes, the encoders add.
            is_shown = part.scored[number] and not self.config.data.computes_control_by_model
            shown = beside[-1].shown if is_shown else None
            control_pngs.append(
                encode_png(self.control(shown, "floor", part.bucket, "", 0)) if shown else b""
            )
        return {
            "part": part,
            "text": [row["text"][index] for index in row["picture"]],
            "pixels": pixels.tobytes(),
            "image": pngs,
            "conditioning": conditioning,
            "references": joined([each.references for each in beside]),
            "masks": joined([each.mask for each in beside]),
            "controls": joined([each.control for each in beside]),
            "control_image": control_pngs,
        }

    @staticmethod
    def require_unchanged(given: Sequence[tuple[bytes, str]], name: str) -> None:
        """Raise ChangedFile if a further picture of the row `name` has another digest than when scanned.

        Args:
            given: contents and digests of their files.
        """
        if any(content_digest(data) != expected for data, expected in given):
            raise ChangedFile(
                f"{name}: a reference, control image or mask changed since it was scanned; run it again"
            )

    def beside(
        self,
        files: list[bytes],
        picture: Picture,
        split: str,
        bucket: Size,
        reference_size: Size | None,
        digest: str,
        draw: int,
    ) -> "Beside":
        """Fit what a row has beside its picture, in the same way.

        Args:
            files: of its further pictures: references, control image, mask.
            digest, draw: of its own picture, as for `fit`.
        """
        data, mask, control, shown, references = self.config.data, None, None, None, None
        if data.has_masks and files:
            mask = self.mask(files.pop(), split, bucket, digest, draw)
        if data.has_control:
            shown = self.open(files.pop(), bucket) if data.brings_control else picture
            control = self.control(shown, split, bucket, digest, draw)
        if reference_size and files:
            references = self.references(files, split, reference_size, digest, draw)
        return Beside(references, mask, control, shown)

    def references(
        self, files: Sequence[bytes], split: str, size: Size, digest: str, draw: int
    ) -> np.ndarray:
        """Fit a row's reference pictures, with the changes that its own picture gets: uint8, R x h x w x 3.

        Args:
            digest, draw: of the row's own picture, as for `fit`.
        """
        return np.stack([self.fit(self.open(data, size), split, size, digest, draw).pixels for data in files])

    def mask(self, data: bytes, split: str, bucket: Size, digest: str, draw: int) -> np.ndarray:
        """Fit a row's mask as its picture, without changes of its colours: uint8, h x w, white is learned."""
        pixels = self.fit(self.open(data, bucket), split, bucket, digest, draw, self._uncoloured).pixels
        return pixels.mean(axis=2).round().astype(np.uint8)

    def control(self, picture: Picture, split: str, bucket: Size, digest: str, draw: int) -> np.ndarray:
        """Fit a row's control image as its picture, without changes of its colours: uint8, H x W x 3.

        Args:
            picture: the control image; or, where it is to be computed, the row's own picture. What a model
                computes, the encoders do: this is then the picture that it is computed from.
        """
        pixels = self.fit(picture, split, bucket, digest, draw, self._uncoloured).pixels
        data = self.config.data
        if data.brings_control or data.computes_control_by_model:
            return pixels
        return edges(pixels, data.control.low_threshold, data.control.high_threshold)

    def open(self, data: bytes, bucket: Size) -> Picture:
        """Decode a picture; a large JPEG at 1/2, 1/4 or 1/8 of its size, which is much faster.

        It keeps at least twice the target size, so that the better filter does the last halving.
        """
        config = self.config.data
        limit = config.cleaning.max_pixels
        return read_picture(data, background=config.background, max_pixels=limit, at_least=2 * max(bucket))

    @cached_property
    def _uncoloured(self) -> AugmentationConfig:
        """The augmentation without changes of colours."""
        return self.config.data.augmentation.model_copy(update={"colour": 0.0})

    def fit(
        self,
        picture: Picture,
        split: str,
        bucket: Size,
        digest: str,
        draw: int,
        augmentation: AugmentationConfig | None = None,
    ) -> Fitted:
        """Fit one picture to the training size.

        Args:
            draw: its variant, or the epoch while streaming.
            augmentation: None: `data.augmentation`.
        """
        original = (picture.width, picture.height)
        augmentation = augmentation or self.config.data.augmentation
        if split != "train" or not augmentation.is_active:
            return fit(picture.image, bucket, original=original)
        return augment(
            picture.image,
            bucket,
            augmentation,
            row_generator(self.config.seed, digest, draw),
            original=original,
        )


def joined(arrays: Sequence[np.ndarray | None]) -> bytes:
    """Return the bytes of arrays one after another; none where there are none."""
    return b"".join(each.tobytes() for each in arrays if each is not None)


class EncodeRows:
    """Encoders in an actor: pixels and captions to tensors in stored form."""

    def __init__(self, config: Config) -> None:
        import torch

        from ray_jobs.diffusion.memory import Chunks
        from ray_jobs.diffusion.precision import PRECISIONS
        from ray_jobs.weights.conditioner import load_conditioner
        from ray_jobs.weights.encoders import Encoders

        data, model = config.data, config.model
        torch.set_num_threads(config.train.cpus_per_worker)
        device = "cuda" if config.train.use_gpu else "cpu"  # as `encoder_actors` reserves it
        self.encoders = Encoders(
            local_path(model.base),
            revision=model.revision,
            device=device,
            dtype=PRECISIONS[data.encode_precision],
            text_quantization=model.quantize_text,
        )
        self.batch_size = data.encode_batch_size
        self.pictures, self.captions = Chunks(), Chunks()
        self.looked_at, self.painted, self.controlled = Chunks(), Chunks(), Chunks()
        by_model = data.computes_control_by_model
        self.conditioner = load_conditioner(data.control, device) if by_model else None
        self.num_references = data.num_references
        self.dtype = PRECISIONS[data.encode_dtype]

    def encode(
        self,
        pixels: np.ndarray,
        captions: list[str],
        references: np.ndarray | None = None,
        masks: np.ndarray | None = None,
        controls: np.ndarray | None = None,
    ) -> dict[str, "torch.Tensor"]:
        """Tensors by name, N x ..., on the CPU: `latents_mean`, `latents_logvar`, caption encodings.

        Args:
            references: uint8, N x R x h x w x 3; the means of their posteriors are `reference_0`, ... Text
                encoders that see them give captions as `Encoders.encode_shown` does.
            masks: uint8, N x H x W; `mask` has the share of each of the denoiser's latents that is white,
                N x 1 x ..., 0 to 1. A model that paints masks gets what `Encoders.encode_masked` returns.
            controls: control images: uint8, N x H x W x 3. `control` is what the family's ControlNets look
                at: their pixels, uint8, N x 3 x H x W, or the mean of their posterior.
        """
        import torch

        from ray_jobs.diffusion.families.control import CONTROL
        from ray_jobs.diffusion.families.family import reference
        from ray_jobs.diffusion.memory import pictures_at_once

        limit = min(self.batch_size, pictures_at_once(*pixels.shape[1:3]))
        posteriors = self.pictures.run(pixels, self.encoders.encode_pictures, limit)
        tensors = self._captions(captions, references)
        tensors["latents_mean"] = torch.cat([mean for mean, _ in posteriors])
        tensors["latents_logvar"] = torch.cat([logvar for _, logvar in posteriors])
        for number in range(references.shape[1] if references is not None else 0):
            assert references is not None
            of_each = min(self.batch_size, pictures_at_once(*references.shape[2:4]))
            means = self.looked_at.run(references[:, number], self.encoders.encode_pictures, of_each)
            tensors[reference(number)] = torch.cat([mean for mean, _ in means])
        if masks is not None:
            *_, height, width = self.encoders.family.codec.packed_shape(
                tuple(tensors["latents_mean"].shape[1:])
            )
            white = torch.from_numpy(masks)[:, None].float() / 255
            tensors["mask"] = torch.nn.functional.adaptive_avg_pool2d(white, (height, width))
            if self.encoders.family.paints_masks:
                painted = self.painted.run(with_masks(pixels, masks), self.encoders.encode_masked, limit)
                tensors |= {name: torch.cat([part[name] for part in painted]) for name in painted[0]}
        if controls is not None:
            if self.encoders.family.control_form == "pixels":
                tensors[CONTROL] = torch.from_numpy(controls).permute(0, 3, 1, 2)
            else:
                means = self.controlled.run(controls, self.encoders.encode_pictures, limit)
                tensors[CONTROL] = torch.cat([mean for mean, _ in means])
        # Pixels are channels-last, which convolutions preserve; tensors are stored contiguous.
        return {
            name: (tensor.to(self.dtype) if tensor.is_floating_point() else tensor).contiguous()
            for name, tensor in sorted(tensors.items())
        }

    def _captions(self, captions: list[str], references: np.ndarray | None) -> dict[str, "torch.Tensor"]:
        """Encode N captions: tensors by name, N x ..."""
        import torch

        encoders = self.encoders
        if references is not None and encoders.family.text.sees_references:
            shown = references

            def encode(rows: range) -> dict[str, torch.Tensor]:
                own = slice(rows.start, rows.stop)
                return encoders.encode_shown(captions[own], shown[own])

            forms = self.captions.run(range(len(captions)), encode, self.batch_size)
            return {name: torch.cat([form[name] for form in forms]) for name in forms[0]}
        different = list(dict.fromkeys(captions))
        forms = self.captions.run(different, encoders.encode_captions, self.batch_size)
        places = torch.tensor([different.index(caption) for caption in captions])
        return {name: torch.cat([form[name] for form in forms])[places] for name in forms[0]}

    def control_images(self, pixels: np.ndarray) -> np.ndarray:
        """Return what a model computes from pictures, or the same where they are control images already.

        Args:
            pixels: uint8, N x H x W x 3, as is the result.
        """
        import torch

        from ray_jobs.diffusion.memory import pictures_at_once

        if self.conditioner is None:
            return pixels
        limit = min(self.batch_size, pictures_at_once(*pixels.shape[1:3]))
        pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        found = torch.cat(self.controlled.run(pictures, self.conditioner, limit))
        return found.permute(0, 2, 3, 1).numpy()


class EncodePart(EncodeRows):
    """Actor that encodes decoded parts and writes their files."""

    def __init__(self, cache: Storage, config: Config, reuse: dict[bytes, tuple[str, int]]) -> None:
        from safetensors.torch import save

        super().__init__(config)
        self.cache, self.reuse = cache, reuse
        if not cache.exists(EMPTY_CAPTION):
            forms = self.encoders.encode_captions([""], negative=True)
            # Copies: a mask may be a column of tokens and of embeddings alike, which safetensors refuses.
            cache.write_bytes(
                EMPTY_CAPTION, save({name: t.contiguous().clone() for name, t in forms.items()})
            )

    def __call__(self, row: RayRow) -> RayRow:
        part: PlannedPart = row["part"]
        width, height = part.bucket
        pixels = np.frombuffer(row["pixels"], np.uint8).reshape(-1, height, width, 3)
        new = [n for n, key in enumerate(part.keys) if key not in self.reuse]
        table = self._copied(part)
        if new:
            encoded = self._table(part, row, pixels, new)
            table = pa.concat_tables([encoded, *([table] if table else [])])
        assert table is not None
        order = {key: n for n, key in enumerate(table["key"].to_pylist())}
        table = table.take([order[key] for key in part.keys]).combine_chunks()
        write_part(self.cache, part.file, table)
        return {"rows": len(part.keys), "encoded": len(new)}

    def _table(self, part: PlannedPart, row: RayRow, pixels: np.ndarray, chosen: list[int]) -> pa.Table:
        """Encode the chosen rows of a part."""
        import torch

        from ray_jobs.diffusion.families.text import MASK, NULL

        references = references_of_part(part, row["references"])
        texts = [str(row["text"][n]) for n in chosen]
        columns = [
            (pa.field("key", pa.binary(16)), pa.array([part.keys[n] for n in chosen], pa.binary(16))),
            (pa.field("digest", pa.string()), pa.array([part.digests[n] for n in chosen])),
            (pa.field("text", pa.string()), pa.array(texts)),
            (pa.field("image", pa.binary()), pa.array([row["image"][n] for n in chosen], pa.binary())),
        ]
        sizes = np.array([row["conditioning"][n] for n in chosen], np.int32)
        field, values = tensor_column("conditioning", torch.from_numpy(sizes))
        columns.append(
            (field.with_metadata(field.metadata | {b"names": json.dumps(CONDITIONING).encode()}), values)
        )
        if references is not None:
            references = references[chosen]
            for number in range(references.shape[1]):
                columns.append(_shown(part, chosen, number, references[:, number]))
        masks = None
        if part.has_masks:
            masks = np.frombuffer(row["masks"], np.uint8).reshape(pixels.shape[:3])[chosen]
            if self.encoders.family.paints_masks:
                columns.append(_shown(part, chosen, 0, with_masks(pixels[chosen], masks)))
        controls = None
        if row["controls"]:
            fitted = np.frombuffer(row["controls"], np.uint8).reshape(pixels.shape)[chosen]
            controls = self.control_images(fitted)
            pngs = self._control_pngs([(row["image"][n], row["control_image"][n]) for n in chosen])
            field = pa.field(reference_image(self.num_references), pa.binary())
            columns.append((field, pa.array(pngs, pa.binary())))
        tensors = self.encode(pixels[chosen], texts, references, masks, controls)
        text = self.encoders.family.text
        for name, tensor in tensors.items():
            null = NULL if name.startswith(NULL) else ""
            is_ragged = name.removeprefix(null) in text.ragged
            lengths = tensors[null + MASK].sum(dim=1).tolist() if is_ragged else None
            columns.append(tensor_column(name, tensor, lengths))
        return pa.Table.from_arrays([c for _, c in columns], schema=pa.schema([f for f, _ in columns]))

    def _control_pngs(self, shown: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """Return PNGs of the control images of scored rows, and b"" for others.

        Args:
            shown: of each row a PNG of its picture, b"" if it is not scored, and of its control image, b"" if
                a model computes that.
        """
        if self.conditioner is None:
            return [control for _, control in shown]
        pictures = [np.array(Image.open(io.BytesIO(png))) for png, _ in shown if png]
        found = iter(self.control_images(np.stack(pictures)) if pictures else ())
        return [encode_png(next(found)) if png else b"" for png, _ in shown]

    def _copied(self, part: PlannedPart) -> pa.Table | None:
        """Read the rows of a part that are stored in other files of the cache."""
        places: dict[str, list[int]] = {}
        for key in part.keys:
            if key in self.reuse:
                file, number = self.reuse[key]
                places.setdefault(file, []).append(number)
        tables = [read_part(self.cache, file).take(numbers) for file, numbers in places.items()]
        return pa.concat_tables(tables) if tables else None


def reference_image(number: int) -> str:
    """Return the column with PNGs of the scored rows' reference pictures, counted from 0.

    Of a model that paints masks it is one, the picture that is transparent where it is to be painted. After
    those of the references comes the control image, if there is one.
    """
    return f"reference_image_{number}"


def _shown(
    part: PlannedPart, chosen: list[int], number: int, pictures: np.ndarray
) -> tuple[pa.Field, pa.Array]:
    """Return the column `reference_image` of the chosen rows of a part.

    Args:
        pictures: of these rows: uint8, N x H x W x 3, or 4 with an alpha channel.
    """
    shown = [encode_png(each) if part.scored[n] else b"" for n, each in zip(chosen, pictures, strict=True)]
    return pa.field(reference_image(number), pa.binary()), pa.array(shown, pa.binary())


def with_masks(pixels: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return pictures that are transparent, and grey, where they are to be painted: uint8, N x H x W x 4.

    Args:
        pixels: uint8, N x H x W x 3.
        masks: uint8, N x H x W; half white and more is to be painted, as in diffusers' pipelines.
    """
    painted = (masks >= WHITE)[..., None]
    alpha = np.where(painted, 0, 255).astype(np.uint8)
    return np.concatenate([np.where(painted, np.uint8(128), pixels), alpha], axis=3)


def references_of_part(part: PlannedPart, content: bytes) -> np.ndarray | None:
    """Return a part's reference pictures: uint8, N x R x h x w x 3; None if it has none."""
    if not part.reference_size or not part.further:
        return None
    width, height = part.reference_size
    count = len(part.further[0]) - part.has_masks - part.brings_control
    return np.frombuffer(content, np.uint8).reshape(len(part.further), count, height, width, 3)


def encoder_actors(config: Config) -> dict[str, object]:
    """Ray Data options for a step of `EncodeRows`: a pool of actors that keep the model loaded."""
    import ray.data

    return {
        "compute": ray.data.ActorPoolStrategy(size=config.data.encode_workers),
        "num_cpus": config.train.cpus_per_worker,
        "num_gpus": 1 if config.train.use_gpu else 0,
    }


@dataclass(frozen=True)
class Planned:
    """Chunks of a dataset, and what plans their parts."""

    planner: Planner
    chunks: Iterable[Chunk]


def encode_parts(
    config: Config,
    sources: Sequence[Source],
    entries: Sequence[Entry],
    planned: Planned,
    parts: Sequence[PartOutline],
    cache: Storage,
    progress: Callable[[int, int], None],
) -> int:
    """Write the parts missing from the cache; return the number of rows that had to be encoded.

    Args:
        planned: all chunks.
        parts: the parts of these that are to be in the cache.
        progress: callback that receives rows done and rows to do, after each part.
    """
    import ray.data

    present, missing = set(cache.files()), dict[int, set[str]]()
    whole = 0
    for part in parts:
        if part.file not in present:
            missing.setdefault(part.chunk, set()).add(part.file)
            whole += part.num_rows
    if not missing:
        return 0
    items: list[RayRow] = [
        {
            "chunk": chunk,
            "entries": entries[chunk.entry : chunk.entry + len(chunk.counts)],
            "files": missing[chunk.number],
        }
        for chunk in planned.chunks
        if chunk.number in missing
    ]
    reuse = known_rows(cache, present - {part.file for part in parts}, items, planned.planner)
    written = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .flat_map(Gather([source.reader() for source in sources], planned.planner), **GATHERING)
        .map(Decode(config), **DECODING)
        .map(EncodePart, fn_constructor_args=(cache, config, reuse), **encoder_actors(config))
    )
    written.context.target_max_block_size = 1  # one block per part, so that parts move on one by one
    # Ray Data would measure its workers' memory every second, which costs the encoder about 5 %.
    written.context.memory_usage_poll_interval_s = None
    done = encoded = 0
    for row in written.iter_rows():
        done, encoded = done + row["rows"], encoded + row["encoded"]
        progress(done, whole)
    return encoded


def known_rows(
    cache: Storage, files: set[str], items: Sequence[RayRow], planner: Planner
) -> dict[bytes, tuple[str, int]]:
    """Locate rows of the missing parts in other files of the cache: key to (file, row in it).

    Args:
        items: chunks with missing parts, as for `Gather`.
    """
    if not any(name.endswith(".parquet") for name in files):
        return {}
    parts = (part for item in items for part in planner.parts(item["chunk"]) if part.file in item["files"])
    needed = {key for part in parts for key in part.keys}

    def read(file: str) -> list[bytes]:
        return list(read_part(cache, file, ["key"])["key"].to_pylist())

    found: dict[bytes, tuple[str, int]] = {}
    ordered = sorted(name for name in files if name.endswith(".parquet"))
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for file, keys in zip(ordered, pool.map(read, ordered), strict=True):
            found |= {key: (file, number) for number, key in enumerate(keys) if key in needed}
    return found
