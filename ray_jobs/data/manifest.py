"""Manifest of a dataset: its sources, the decisions on their pictures, and a check that enough remain."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError
from ray_jobs.data.curation.cleaning import QUALITY_CHECKS
from ray_jobs.data.curation.decisions import Decisions
from ray_jobs.data.encoding.plan import PartOutline
from ray_jobs.data.feeding.mixture import mixture
from ray_jobs.data.feeding.order import Order, Part
from ray_jobs.data.references import num_before
from ray_jobs.data.sources.detection import Source
from ray_jobs.run.manifest import Bucket, Captions, Duplicates, Histogram, Manifest, SourceShare
from ray_jobs.run.split import SPLITS

FOLDED = ("train", "validation")  # splits that cross-validation divides anew
MOST_VALUES = 256  # of data.balance: each has files of its own


def describe(
    config: Config,
    sources: Sequence[Source],
    decisions: Decisions,
    parts: Sequence[PartOutline],
    counts: Counter[str],
    digest: str = "",
) -> Manifest:
    """Compose the manifest from the sources and the decisions on their pictures.

    Args:
        digest: digest of the rows of all parts.
    """
    data, set_aside, folds = config.data, decisions.reasons.counts(), Counter[int]()
    for part in parts:
        if part.split in FOLDED:
            folds[part.fold] += part.num_pictures
    mixed = _mixed(config, parts)
    return Manifest(
        train=counts["train"],
        validation=counts["validation"],
        test=counts["test"],
        class_=counts["class"],
        encode=data.encode,
        held_out=decisions.held_out,
        rejected=dict(sorted(decisions.rejected.items())),
        left_out=dict(sorted(decisions.left_out.items())),
        no_pictures=dict(sorted(decisions.no_pictures.items())),
        duplicates=Duplicates(
            mode=data.cleaning.duplicates,
            groups=len(np.unique(decisions.matches.firsts)),
            pictures=sum(decisions.duplicates.values()),
        ),
        source=_shares(sources, parts, mixed),
        buckets=_bucket_rows(config, parts),
        folds=[folds[fold] for fold in range(data.folds)],
        captions=Captions(
            different=decisions.num_captions,
            repaired=decisions.num_repaired,
            of_lines=decisions.num_of_lines,
            written=decisions.num_written,
        ),
        measures={
            name: Histogram(
                edges=[float(edge) for edge in measure.edges],
                counts=decisions.histograms[name].tolist(),
                threshold=getattr(data.cleaning, measure.field),
                side="below" if measure.below else "above",
                field=f"data.cleaning.{measure.field}",
                set_aside=set_aside[measure.reason],
            )
            for name, measure in QUALITY_CHECKS.items()
        },
        rows_an_epoch=mixed.order.rows_an_epoch if mixed else 0,
        judged=decisions.num_judged,
        references=num_before(config),
        control=data.has_control,
        digest=digest,
    )


class _Mixed(NamedTuple):
    """Training parts, numbered by what is mixed (a source, or a value of data.balance), in their order."""

    parts: Sequence[PartOutline]
    records: Sequence[Part]
    order: Order


def _mixed(config: Config, parts: Sequence[PartOutline]) -> _Mixed | None:
    """Return the training rows as an epoch has them, to count them; None if there are none."""
    training = [part for part in parts if part.split == "train"]
    if not training:
        return None
    mixed, weights = mixture(config.data, [part.record() for part in training])
    order = Order(mixed, batch_size=config.train.batch_size, window_rows=1, seed=0, weights=weights)
    return _Mixed(training, mixed, order)


def _shares(
    sources: Sequence[Source], parts: Sequence[PartOutline], mixed: _Mixed | None
) -> list[SourceShare]:
    """Kept rows per source, and their realised share in a training epoch."""
    rows = Counter[int]()
    for part in parts:
        rows[part.source] += part.num_pictures
    shares: dict[int, float] = {}
    if mixed:
        of_group, whole, own = mixed.order.shares(), Counter[int](), Counter[tuple[int, int]]()
        for part, each in zip(mixed.parts, mixed.records, strict=True):
            whole[each.source] += each.rows
            own[part.source, each.source] += each.rows
        # All rows of a group, which is a source or a value of data.balance, come equally often.
        for (source, group), count in own.items():
            shares[source] = shares.get(source, 0.0) + of_group[group] * (count / whole[group])
    return [
        SourceShare(name=source.name, rows=rows[number], share=shares.get(number, 0.0))
        for number, source in enumerate(sources)
    ]


def balance_line(config: Config, parts: Sequence[PartOutline]) -> str | None:
    """Return the line that says how rows are repeated for `data.balance`; None without it.

    Raises:
        ConfigError: the column has too many values, or only one.
    """
    column, rows = config.data.balance, Counter[str]()
    if column is None:
        return None
    for part in parts:
        if part.split == "train":
            rows[part.value or ""] += part.num_rows
    if not 1 < len(rows) <= MOST_VALUES:
        raise ConfigError(
            f"data.balance: {column}: the training pictures have {len(rows):,} values of it, but 2 to "
            f"{MOST_VALUES} can be balanced; name a column of classes"
        )
    (_, most), (rarest, fewest) = rows.most_common()[0], rows.most_common()[-1]
    return (
        f"data.balance: {len(rows)} values of {column} come equally often in training; an epoch has "
        f"{most * len(rows):,} rows for {rows.total():,}, and repeats those of the rarest value "
        f"({rarest or '(empty)'}, {fewest:,} rows) {most / fewest:.3g} times"
    )


def _bucket_rows(config: Config, parts: Sequence[PartOutline]) -> dict[str, Bucket]:
    """Training rows of every bucket, their number of whole batches, and the remaining rows.

    The remaining rows are not lost: they start the bucket's first batch of the next epoch.
    """
    rows = Counter[str]()
    for part in parts:
        if part.split == "train":
            rows[part.record()["bucket"]] += part.num_rows
    size = config.train.training_rows
    return {
        bucket: Bucket(rows=count, steps=count // size, rows_over=count % size)
        for bucket, count in sorted(rows.items())
    }


def require_enough(config: Config, manifest: Manifest, storage: Storage) -> None:
    """Raise ConfigError if too many pictures were rejected, or a split is empty."""
    source = ", ".join(each.path for each in config.data.all_sources)
    aside, seen = sum(manifest.rejected.values()), manifest.judged
    if aside > config.data.cleaning.max_rejected * seen:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(manifest.rejected).most_common())
        raise ConfigError(
            f"{source}: {aside} of {seen} pictures are rejected ({reasons}), more than "
            f"data.cleaning.max_rejected ({config.data.cleaning.max_rejected:g}) allows; "
            f"{storage.uri}/rejected.jsonl lists them, and --dry-run shows them"
        )
    for split in SPLITS if manifest.held_out else ("train",):
        if manifest.rows(split) < 2:
            raise ConfigError(
                f"{source}: {manifest.rows(split)} pictures in the {split} split, but 2 are needed; "
                f"add pictures or raise data.{'validation' if split == 'train' else split}"
            )
    if manifest.folds and min(manifest.folds) < 2:
        raise ConfigError(
            f"{source}: {min(manifest.folds)} pictures in a fold, but 2 are needed; lower data.folds "
            f"({config.data.folds}) and search.folds, or add pictures"
        )
    if config.train.prior_loss_weight and not manifest.class_:
        raise ConfigError(
            f"{source}: all class pictures are rejected ({storage.uri}/rejected.jsonl says why); put others "
            "into class_data_dir/ or relax data.cleaning"
        )
