"""Prepare: read pictures and captions, set broken ones aside, split, encode once, write Parquet.

    python -m ray_jobs.prepare --config configs/demo.yaml

Writes `<storage>/<run>/dataset/`: `split=train|validation|test/*.parquet`, `rejected.jsonl` and, last,
`manifest.json`. With the same inputs it is skipped.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError
from ray_jobs.data.encoding import REJECTED, Encoder, ReadPicture
from ray_jobs.data.sources import ImageFolder
from ray_jobs.data.splits import SPLITS
from ray_jobs.data.streaming import stored_split
from ray_jobs.progress import say
from ray_jobs.stage import run_stage


@dataclass(frozen=True)
class Dataset:
    """What prepare wrote."""

    storage: Storage
    manifest: dict[str, Any]

    def num_rows(self, split: str) -> int:
        return int(self.manifest[split])

    def read(self, split: str, columns: list[str], limit: int | None = None) -> list[dict[str, Any]]:
        """Rows of a split in the order of their digests, so that the first are always the same."""
        names = list(dict.fromkeys([*columns, "digest", "text"]))
        kept = stored_split(self.storage, split).to_table(columns=names).to_pylist()
        return sorted(kept, key=lambda row: (row["digest"], row["text"]))[:limit]

    def pictures(self, split: str, limit: int) -> list[dict[str, Any]]:
        """Up to `limit` different pictures of a split: dicts of `text` and `image` (PNG bytes)."""
        different: dict[str, dict[str, Any]] = {}
        for row in self.read(split, ["text", "image"]):
            if row["image"]:
                different.setdefault(row["digest"], row)
        return list(different.values())[:limit]


def _key(config: Config, folder: ImageFolder) -> str:
    """Identifies the inputs: the pictures, how they are prepared, and the encoders."""
    settings = config.data.model_dump(mode="json") | config.model.model_dump(mode="json")
    return hashlib.sha256(f"{folder.digest}{json.dumps(settings, sort_keys=True)}".encode()).hexdigest()


def prepare(config: Config) -> Dataset:
    """Run the stage, or find its result. Ray must be initialised.

    Raises:
        ConfigError: the source has wrong captions, or a split comes out empty.
    """
    folder = ImageFolder.open(config.data.source)
    storage = Storage.open(config.storage).child(config.name, "dataset")
    key = _key(config, folder)
    if storage.exists("manifest.json"):
        manifest = json.loads(storage.read_text("manifest.json"))
        if manifest["inputs"] == key:
            say("prepare", "unchanged, skipped")
            return Dataset(storage, manifest)
    storage.delete("")
    say("prepare", f"{len(folder.rows)} captioned pictures in {config.data.source}")
    _encode(config, folder, storage)
    manifest = _summarise(storage) | {"inputs": key, "source": config.data.source}
    counts = ", ".join(f"{manifest[split]} {split}" for split in SPLITS)
    say("prepare", f"{counts}, {sum(manifest['rejected'].values())} set aside")
    for split in SPLITS:
        if manifest[split] < 2:
            raise ConfigError(
                f"{config.data.source}: {manifest[split]} pictures in the {split} split, 2 are needed; "
                f"add pictures or raise data.{'validation' if split == 'train' else split}"
            )
    storage.write_text("manifest.json", json.dumps(manifest, indent=2) + "\n")
    return Dataset(storage, manifest)


def _encode(config: Config, folder: ImageFolder, storage: Storage) -> None:
    """One streaming pass: read, encode, write, the rejected rows beside the good ones."""
    import ray

    use_gpu = config.train.use_gpu
    rows = ray.data.from_items(folder.rows, override_num_blocks=max(1, len(folder.rows) // 256))
    encoded = rows.map(ReadPicture(folder.storage, config.data)).map_batches(
        Encoder,
        fn_constructor_args=(config.model, config.train.cpus_per_worker),
        batch_size=config.data.encode_batch_size,
        compute=ray.data.ActorPoolStrategy(size=config.data.encode_workers),
        num_cpus=config.train.cpus_per_worker,
        num_gpus=1 if use_gpu else 0,
    )
    encoded.write_parquet(storage.path, filesystem=storage.filesystem, partition_cols=["split"])


def _summarise(storage: Storage) -> dict[str, Any]:
    """Count the splits, write `rejected.jsonl`, and digest the data set's content."""
    columns = ["file_name", "text", "digest", "reason", "detail"]
    rows: list[dict[str, Any]] = []
    for split in (*SPLITS, REJECTED):
        if storage.exists(f"split={split}"):
            part = stored_split(storage, split).to_table(columns=columns)
            rows += [row | {"split": split} for row in part.to_pylist()]
    rejected = sorted((row for row in rows if row["split"] == REJECTED), key=lambda row: row["file_name"])
    lines = [
        json.dumps({name: row[name] for name in ("file_name", "reason", "detail")}, ensure_ascii=False)
        for row in rejected
    ]
    storage.write_text("rejected.jsonl", "".join(f"{line}\n" for line in lines))
    storage.delete(f"split={REJECTED}")
    counts = Counter(row["split"] for row in rows)
    content = sorted(f"{row['split']} {row['digest']} {row['text']}" for row in rows)
    return {
        **{split: counts[split] for split in SPLITS},
        "rejected": dict(sorted(Counter(row["reason"] for row in rejected).items())),
        "digest": hashlib.sha256("\n".join(content).encode()).hexdigest(),
    }


if __name__ == "__main__":
    run_stage(__doc__, prepare)
