"""Prepared dataset: the manifest, the list of parts, and the files of the encoding cache."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cluster.storage import Storage
from ray_jobs.config import Config
from ray_jobs.data.curation.scan import FILES_AT_ONCE
from ray_jobs.data.encoding.cache_files import aside, read_part
from ray_jobs.data.encoding.encoding import EMPTY_CAPTION, reference_image
from ray_jobs.data.encoding.plan import PartRecord
from ray_jobs.run.folder import RunFolder, SharedFolder
from ray_jobs.run.manifest import MANIFEST, Manifest
from ray_jobs.run.split import Split

if TYPE_CHECKING:
    import torch
    from ray import ObjectRef

PARTS = "parts.json"
NO_FOLD = -1


@dataclass(frozen=True)
class Votes:
    """Prepared votes, with the configuration that they were prepared with."""

    config: Config
    dataset: "Dataset"


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset.

    Attributes:
        storage: `<storage>/<run>/dataset`.
        cache: folder of its parts' files.
        live: with `data.encode: stream`, a reference to the `streaming.Live` that encodes training rows.
        without_fold: cross-validation fold that replaces validation, else None.
        earlier_votes: votes that are not trained on.
        votes: with `train.preference`, what is trained on; the images here are what is measured against.
    """

    storage: Storage
    cache: Storage
    manifest: Manifest
    live: "ObjectRef | None" = None
    without_fold: int | None = None
    votes: Votes | None = None
    earlier_votes: Votes | None = None

    @classmethod
    def of_run(cls, config: Config) -> "Dataset | None":
        """Return what prepare left in a run, without votes; None if it has left nothing."""
        storage = RunFolder.of(config).dataset
        if not storage.exists(MANIFEST):
            return None
        manifest = Manifest.read(storage)
        return cls(storage, SharedFolder.of(config).encoded(manifest.encoders), manifest)

    @property
    def rows_an_epoch(self) -> int:
        """Number of rows of an epoch of training."""
        trained = self.votes.dataset if self.votes else self
        return trained.manifest.rows_an_epoch

    @cached_property
    def all_parts(self) -> list[PartRecord]:
        """One record per part: split, fold, source, bucket, rows, file."""
        return list(json.loads(self.storage.read_text(PARTS)))

    def parts(self, split: str) -> list[PartRecord]:
        """Stored parts of a split. A dataset of too few pictures has one split, used for all but folds."""
        of_fold = self.without_fold in range(len(self.manifest.folds))
        if not self.manifest.held_out and (split == "test" or (split == "validation" and not of_fold)):
            split = "train"
        if split == "train" and self.manifest.encode == "stream":
            split = "floor"  # of the training rows only those needed for scores are stored
        if self.without_fold is None or split not in ("train", "validation"):
            return [part for part in self.all_parts if part["split"] == split]
        both = [part for part in self.all_parts if part["split"] in ("train", "validation")]
        return [part for part in both if (part["fold"] == self.without_fold) == (split == "validation")]

    def judged_by(self, split: Split) -> "Dataset":
        """Return the dataset whose split `split.name` has the pictures of `split`, see `leave_out`."""
        return self if split.fold is None else self.leave_out(split.fold)

    def leave_out(self, fold: int) -> "Dataset":
        """Return the dataset for one round of cross-validation.

        `fold` of train and validation is used for evaluation, the other folds for training.

        Raises:
            ValueError: `data.folds` has no such fold.
        """
        if fold not in range(len(self.manifest.folds)):
            raise ValueError(f"data.folds: fold {fold} does not exist, of {len(self.manifest.folds)}")
        return replace(self, without_fold=fold)

    def together(self) -> "Dataset":
        """Return the dataset for the refit after cross-validation, which trains on train and validation."""
        return replace(self, without_fold=NO_FOLD)

    def num_rows(self, split: str) -> int:
        """Number of rows of a split; an augmented picture has one per variant."""
        return sum(int(part["rows"]) for part in self.parts(split))

    def require_parts(self) -> None:
        """Raise DamagedPart if a file was moved aside since prepare checked; no restart could pass it."""
        present = set(self.cache.files())
        for part in self.all_parts:
            if part["file"] not in present and (damage := aside(self.cache, part["file"])):
                raise damage

    def empty_caption(self) -> dict[str, "torch.Tensor"]:
        """Encoding of the empty caption: tokens (int32) and embeddings (float32), by name."""
        from safetensors.torch import load

        return dict(load(self.cache.read_bytes(EMPTY_CAPTION)))

    def table(self, split: str, columns: list[str]) -> pa.Table:
        """Read columns of a split's rows."""

        def read(part: PartRecord) -> pa.Table:
            return read_part(self.cache, part["file"], columns)

        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            return pa.concat_tables(pool.map(read, self.parts(split)))

    def read(self, split: str, columns: list[str], limit: int | None = None) -> list[dict[str, Any]]:
        """Read rows of a split in the order of their digests, so that the first are always the same."""
        names = list(dict.fromkeys([*columns, "digest", "text"]))
        kept = self.table(split, names).to_pylist()
        return sorted(kept, key=lambda row: (row["digest"], row["text"]))[:limit]

    def pictures(self, split: str, limit: int) -> list[dict[str, Any]]:
        """Up to `limit` different pictures of a split: dicts of `text`, `image`, `references` and `control`.

        Pictures are PNG bytes; `references` lists those of the row's reference pictures, and `control` is its
        control image, or None.
        """
        different: dict[str, dict[str, Any]] = {}
        count = self.manifest.references + self.manifest.control
        columns = [reference_image(number) for number in range(count)]
        for row in self.read(split, ["text", "image", *columns]):
            if row["image"]:
                row["references"] = [row.pop(column) for column in columns]
                row["control"] = row["references"].pop() if self.manifest.control else None
                different.setdefault(row["digest"], row)
        return list(different.values())[:limit]
