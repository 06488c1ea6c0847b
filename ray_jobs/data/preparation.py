"""Prepare a dataset: scan its sources, decide on every picture, caption it if asked, and encode new ones."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from cluster.fetched import local_path
from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, Effect
from ray_jobs.console import phase, say
from ray_jobs.data.control import check_control, control_digest
from ray_jobs.data.curation.composition import compose
from ray_jobs.data.curation.decisions import Decisions, decide
from ray_jobs.data.curation.findings import examples, write_findings
from ray_jobs.data.curation.growth import looked_at_before
from ray_jobs.data.curation.photos import photo_faults
from ray_jobs.data.curation.scan import Entry, entries, missing_entries, scan
from ray_jobs.data.encoding.captioning import (
    announce_captions,
    captioning_digest,
    check_captioning,
    edited_captions,
    edits_digest,
    write_captions,
)
from ray_jobs.data.encoding.class_pictures import (
    announce_class_pictures,
    class_image_counts,
    generate_class_pictures,
)
from ray_jobs.data.encoding.encoding import EMPTY_CAPTION, Planned, encode_parts
from ray_jobs.data.encoding.long_captions import long_captions
from ray_jobs.data.encoding.outlines import outline
from ray_jobs.data.encoding.plan import PartOutline, Planner, chunks, plan_parts
from ray_jobs.data.encoding.shapes import picture_shapes, reference_sizes
from ray_jobs.data.encoding.subject_words import FEWEST, check_subjects
from ray_jobs.data.feeding.dataset import PARTS, Dataset, Votes
from ray_jobs.data.feeding.streaming import Live
from ray_jobs.data.manifest import balance_line, describe, require_enough
from ray_jobs.data.references import check_references
from ray_jobs.data.sources.captions import caption_rules
from ray_jobs.data.sources.detection import Source, open_source
from ray_jobs.data.sources.dreambooth import Subject
from ray_jobs.data.sources.samples import suffix_text
from ray_jobs.data.votes import check_votes, require_votes, votes_config
from ray_jobs.report.dataset_page import write_dataset_page
from ray_jobs.run.folder import RunFolder, SharedFolder
from ray_jobs.run.manifest import MANIFEST, Manifest
from ray_jobs.run.split import SPLITS
from ray_jobs.weights.model_files import encoders_digest

if TYPE_CHECKING:
    import ray

PREVIEW = "preview.html"
INDEX = "index"
SECONDS_BETWEEN_LINES = 10
FORMAT = 3  # version of the manifest; a change prepares anew


def open_sources(config: Config) -> list[Source]:
    """List the configured sources without reading them.

    Raises:
        ConfigError: a source cannot be read.
    """
    rules, storage = caption_rules(config), SharedFolder.of(config).root
    return [open_source(each, config.data.column, rules, storage) for each in config.data.all_sources]


def prepare(config: Config, check: Callable[[], object] | None = None) -> Dataset:
    """Run the stage, or reuse its result, also for votes. Ray must be initialised.

    Args:
        check: as for `prepare_set`.

    Raises:
        ConfigError: as for `prepare_set`, or there are too few votes.
    """
    folder, preference = RunFolder.of(config), config.train.preference
    if preference is None:
        return prepare_set(config, folder.dataset, check)
    check_votes(config)
    # First: a wrong folder is told before pictures are encoded.
    of_votes = votes_config(config, preference, preference.votes)
    dataset = prepare_set(config, folder.dataset, check)
    say("prepare", "votes:")
    votes = prepare_set(of_votes, folder.votes, are_votes=True)
    require_votes(of_votes, votes.manifest)
    dataset = replace(dataset, votes=Votes(of_votes, votes))
    if not preference.earlier:
        return dataset
    say("prepare", "votes of earlier rounds:")
    of_earlier = votes_config(config, preference, preference.earlier)
    earlier = prepare_set(of_earlier, folder.earlier_votes, are_votes=True)
    return replace(dataset, earlier_votes=Votes(of_earlier, earlier))


def prepare_set(
    config: Config,
    folder: Storage,
    check: Callable[[], object] | None = None,
    *,
    are_votes: bool = False,
) -> Dataset:
    """Prepare the data set of a configuration in a folder, or reuse what is there.

    Args:
        check: function called before anything is generated, captioned or encoded, and so before a GPU is
            requested; it raises to stop the job.
        are_votes: the configuration is that of `votes_config`.

    Raises:
        ConfigError: a source has wrong captions, a subject has too few photos, too many pictures are
            rejected, or a split is empty.
    """
    sources, is_trained = open_sources(config), are_votes == (config.train.preference is not None)
    picture_shapes(config)  # reject a wrong resolution before generating pictures at it
    if not are_votes:
        check_references(config)
        check_control(config)
    check_subjects(config, sources)
    check_captioning(config)
    captioner = captioning_digest(config)
    captions = captioner + edits_digest(edited_captions(config, folder))
    if check and class_image_counts(config, sources):
        check()
    sources += generate_class_pictures(config, sources, _progress("class pictures drawn:"))
    dataset, encoders = _open(config, folder)
    inputs = [_inputs(config, sources, encoders, captions, as_before) for as_before in (False, True)]
    counted = config.train.epochs is not None
    if config.data.encode == "cache" and (stored := _stored(dataset, *inputs, counted=counted)):
        if stored.manifest.judged:
            require_enough(config, stored.manifest, dataset.storage)
        say("prepare", "unchanged, skipped")
        if is_trained:
            _check_length(config, stored.manifest)
        if check:
            check()
        return stored
    phase("cleaning")
    found, decisions = examine(config, sources, dataset.storage)
    require_photos(sources, found, decisions, dataset.storage)
    if captioner:
        require_enough(config, _expected(config, sources, decisions), dataset.storage)
        if check:
            check()
        phase("captioning")
        found, decisions = write_captions(
            config,
            sources,
            found,
            dataset.storage.child(INDEX),
            decisions,
            captioner,
            dataset.storage,
            _progress("captioned"),
        )
        write_findings(decisions, config, dataset.storage)
    planner = Planner.of(config, decisions, picture_shapes(config), reference_sizes(config))
    manifest, parts = _plan(config, sources, found, decisions, planner)
    require_enough(config, manifest, dataset.storage)
    if is_trained:
        _check_length(config, manifest)
    if check:
        check()
    streams = config.data.encode == "stream" and any(part.split == "train" for part in parts)
    kept = [part for part in parts if part.split != "train"] if streams else parts
    cut = long_captions(config, decisions)
    phase("encoding")
    planned = Planned(planner, chunks(found, decisions))
    encoded = encode_parts(config, sources, found, planned, kept, dataset.cache, _progress("encoded"))
    rows = sum(part.num_rows for part in kept)
    say("prepare", f"{encoded:,} rows encoded, {rows - encoded:,} already in the cache")
    _say_cut(cut)
    dataset.storage.write_text(PARTS, json.dumps([part.record() for part in kept]))
    content = _content(config, parts, encoders)
    if _before(dataset).get("content") == (former := _content(config, parts, encoders, as_before=True)):
        content = former  # trainings on disk are recognised by it
    manifest |= {"inputs": inputs[0], "content": content, "encoders": encoders}
    manifest.write(dataset.storage)
    live = None
    if streams:
        every = plan_parts(config, found, decisions, planner.buckets, planner.reference_sizes)
        streamed = [part for part in every if part.split == "train"]
        live = Live.share([source.reader() for source in sources], found, streamed)
    return Dataset(dataset.storage, dataset.cache, manifest, live)


def _open(config: Config, folder: Storage) -> tuple[Dataset, str]:
    """Open the dataset's folders; return the dataset and the digest of the encoders."""
    model = config.model
    encoders = encoders_digest(
        local_path(model.base), revision=model.revision, text_quantization=model.quantize_text
    )
    cache = SharedFolder.of(config).encoded(encoders)
    return Dataset(folder, cache, Manifest()), encoders


def _inputs(
    config: Config,
    sources: Sequence[Source],
    encoders: str,
    captions: str = "",
    as_before: bool = False,
) -> str:
    """Digest of the dataset's inputs, without reading the pictures; a copied source counts as new.

    Args:
        captions: digests of the captioning model and of edited captions, if there are any.
        as_before: as earlier releases computed it.
    """
    effects = Effect.IMAGES, Effect.ENCODINGS, Effect.DATASET
    settings = config.data.affecting(*effects, as_before=as_before)
    return _identity(
        FORMAT,
        [source.digest for source in sources],
        settings,
        encoders,
        config.seed,
        config.train.training_rows,
        *([captions] if captions else []),
        *([control] if (control := control_digest(config)) else []),
    )


def _content(config: Config, parts: Sequence[PartOutline], encoders: str, as_before: bool = False) -> str:
    """Digest of the training input: the rows and their order, independent of the pictures' locations.

    Args:
        as_before: as earlier releases computed it.
    """
    settings = config.data.affecting(Effect.ENCODINGS, Effect.DATASET, as_before=as_before)
    return _identity([part.record() for part in parts], settings, encoders, config.seed)


def _identity(*content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _before(dataset: Dataset) -> dict[str, object]:
    """Read the manifest unvalidated, since earlier releases wrote other ones; empty if there is none."""
    exists = dataset.storage.exists(MANIFEST)
    return dict(json.loads(dataset.storage.read_text(MANIFEST))) if exists else {}


def _stored(dataset: Dataset, inputs: str, inputs_before: str, *, counted: bool) -> Dataset | None:
    """Return the dataset with its manifest if that has these inputs and all its files exist, else None.

    Args:
        inputs_before: inputs in the manifest of an earlier release, which does not say how many pictures were
            judged, so that another limit of rejected ones cannot be checked.
        counted: only if the manifest has the rows of an epoch, which earlier releases did not count.
    """
    before = _before(dataset)
    if before.get("inputs") != (inputs if before.get("judged") else inputs_before):
        return None
    if counted and not before.get("rows_an_epoch"):
        return None  # what an earlier release encoded is in the cache
    present = set(dataset.cache.files())
    needed = {EMPTY_CAPTION, *(part["file"] for part in dataset.all_parts)}
    if not needed <= present:
        return None
    return Dataset(dataset.storage, dataset.cache, Manifest.read(dataset.storage))


def _check_length(config: Config, manifest: Manifest) -> None:
    """Say how many steps `train.epochs` are, and raise ConfigError if they do not suit `train.stages`."""
    rows = manifest.rows_an_epoch
    last = config.with_ladder(rows).search.ladder[-1]
    if epochs := config.train.epochs:
        capped = " (train.max_steps)" if last == config.train.max_steps else ""
        say("prepare", f"a training: {epochs:g} epochs of {rows:,} rows, {last:,} steps{capped}")


def examine(config: Config, sources: Sequence[Source], storage: Storage) -> tuple[list[Entry], Decisions]:
    """Scan the sources and decide on every picture; write `rejected.jsonl` and `duplicates.jsonl`."""
    found = entries(sources, config.data)
    names = ", ".join(source.name for source in sources)
    counts = [source.num_rows for source in sources]
    known = f"{sum(n for n in counts if n):,} captioned pictures" if all(counts) else f"{len(found)} pieces"
    say("prepare", f"{known} in {names}")
    index = storage.child(INDEX)
    missing = missing_entries(found, index)
    before = looked_at_before(sources, missing, config.data, storage)
    scan(sources, missing, config.data, index, _progress("scanned"), before)
    decisions = decide(config, found, index, storage)
    write_findings(decisions, config, storage)
    return found, decisions


def require_photos(
    sources: Sequence[Source], found: Sequence[Entry], decisions: Decisions, storage: Storage
) -> None:
    """Raise ConfigError if too few different photos of a subject are left."""
    for number, source in enumerate(sources):
        if not isinstance(source, Subject):
            continue
        rows = decisions.rows.of_source(found, number)
        mine = np.array(rows, np.int64)
        reasons = decisions.reasons.at(mine[~decisions.splits.at(mine).are("class")]).counts()
        left = reasons.pop("", 0)
        if left < FEWEST:
            why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            raise ConfigError(
                f"{source.name}: {left} of {source.num_photos} photos are left ({why}); a subject needs at "
                f"least {FEWEST} that differ: add some from other sides and places "
                f"({storage.uri}/duplicates.jsonl and rejected.jsonl name the others)"
            )


def _expected(config: Config, sources: Sequence[Source], decisions: Decisions) -> Manifest:
    """Return the manifest of an examined dataset if all its pictures get captions, without its parts."""
    kept = decisions.splits.at(decisions.kept).counts()
    return describe(config, sources, decisions, [], kept)


def _plan(
    config: Config,
    sources: Sequence[Source],
    found: Sequence[Entry],
    decisions: Decisions,
    planner: Planner,
) -> tuple[Manifest, list[PartOutline]]:
    """Return the manifest and the parts of an examined dataset."""
    rows = decisions.rows
    outlines = outline(planner, chunks(found, decisions), len(rows), rows.workers())
    parts, counts = outlines.parts, Counter[str]()
    for part in parts:
        counts[part.split] += part.num_pictures
    manifest = describe(config, sources, decisions, parts, counts, outlines.digest)
    manifest |= {"composition": compose(config, decisions)}
    for fault in photo_faults(config, sources, found, decisions):
        say("prepare", fault)
    if line := balance_line(config, parts):
        say("prepare", line)
    said = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS)
    duplicates = manifest.duplicates.pictures
    say(
        "prepare",
        f"{said}; rejected: {sum(decisions.rejected.values()):,}, and {duplicates:,} duplicates",
    )
    for line in _said_of_sources(config, sources, decisions):
        say("prepare", line)
    if bad := int((~decisions.kept[decisions.num_own :]).sum()):
        say("prepare", f"rejected class pictures of the base model: {bad:,}")
    if manifest.class_ and not config.train.prior_loss_weight:
        say(
            "prepare",
            f"{manifest.class_:,} class pictures are not used, because train.prior_loss_weight is 0",
        )
    if not decisions.held_out:
        of = "final scores compare" if manifest.folds else "scores compare"
        say("prepare", f"too few pictures to hold any out; {of} with the training pictures")
    return manifest, parts


def _said_of_sources(config: Config, sources: Sequence[Source], decisions: Decisions) -> Iterator[str]:
    """Yield lines about how sources and captions are read, and about files that are not rows."""
    for source in sources:
        yield from source.notes
    if (growth := decisions.growth) and (growth.new or growth.gone):
        yield (
            f"since the last run: {growth.new:,} pictures are new and {growth.gone:,} are gone; all others "
            "keep their split"
        )
    if decisions.left_out:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(decisions.left_out.items()))
        yield f"pictures that are not part of the set: {reasons}; rejected.jsonl lists them"
    if decisions.num_of_lines:
        taken = {
            "whole": "each used as a whole",
            "first": "only the first line used",
            "each": "one row per line",
        }
        yield (
            f"captions with several lines: {decisions.num_of_lines:,}, {taken[config.data.caption_lines]} "
            f"(data.caption_lines: {config.data.caption_lines})"
        )
    if decisions.num_repaired:
        yield (
            f"captions normalised as in CLIP's training (quotes, widths, HTML): {decisions.num_repaired:,}; "
            "data.repair_captions: false keeps them unchanged"
        )
    if decisions.no_pictures:
        files = sum(decisions.no_pictures.values())
        yield f"files that are not pictures: {files:,} ({suffix_text(Counter(decisions.no_pictures))})"


def _say_cut(counted: "ray.ObjectRef[str | None]") -> None:
    """Print the line of `long_captions`, if there is one."""
    import ray

    if line := ray.get(counted):
        say("prepare", line)


def _progress(verb: str) -> Callable[..., None]:
    """Return a callback that prints the progress of a long step, at most every few seconds."""
    said_at = time.monotonic()

    def tell(done: int, whole: int | None = None) -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= SECONDS_BETWEEN_LINES:
            said_at = time.monotonic()
            say("prepare", f"{verb} {done:,}" + (f" of {whole:,}" if whole else ""))

    return tell


def prepared_by(config: Config, run: str) -> Dataset:
    """Return the dataset that prepare left in a run of `evaluate.remember`, in the same storage.

    Raises:
        ConfigError: there is no such run, or it prepared nothing.
    """
    found = Dataset.of_run(config.model_copy(update={"name": run}))
    if found is None:
        raise ConfigError(
            f"evaluate.remember: {run}: no prepared run of this name in {config.storage}; correct the name"
        )
    return found


def dry_run(config: Config) -> str:
    """Scan and decide without captioning or encoding; write the preview and return its URI.

    Raises:
        ConfigError: as `prepare`; for too few photos of a subject only after the preview, which shows why.
    """
    sources = open_sources(config)
    check_references(config)
    check_control(config)
    check_subjects(config, sources)
    check_captioning(config)
    announce_class_pictures(config, sources)
    storage = RunFolder.of(config).dataset
    found, decisions = examine(config, sources, storage)
    announce_captions(config, found, storage.child(INDEX), decisions, storage)
    planner = Planner.of(config, decisions, picture_shapes(config), reference_sizes(config))
    manifest, _ = _plan(config, sources, found, decisions, planner)
    _say_cut(long_captions(config, decisions))
    page = write_dataset_page(
        source=", ".join(source.name for source in sources),
        manifest=manifest,
        examples=examples(config, sources, found, decisions),
        seen=decisions.num_judged + len(decisions.reasons) - decisions.num_own,
        max_rejected=config.data.cleaning.max_rejected,
    )
    storage.write_text(PREVIEW, page)
    say("prepare", f"nothing encoded; see {storage.uri}/{PREVIEW}")
    require_photos(sources, found, decisions, storage)
    return f"{storage.uri}/{PREVIEW}"
