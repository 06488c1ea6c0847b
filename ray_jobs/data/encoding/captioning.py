"""Captions that a model writes for pictures, after the scan of a dataset and before its encoding.

In the dataset's index they stand in place of the source's own: everything that follows reads captions there.
`dataset/captions.jsonl` lists them, in the format of a metadata.jsonl. Its lines with `"edited": true` are
corrections, which stand in place of the model's captions and the source's.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Storage
from ray_jobs.config import CaptioningConfig, Config, ConfigError
from ray_jobs.console import say
from ray_jobs.data.curation.decisions import Decisions, Matches
from ray_jobs.data.curation.rows import Rows, gather_rows
from ray_jobs.data.curation.scan import SCHEMA, Entry, RayRow, read_index
from ray_jobs.data.encoding.caption_writing import (
    Caption,
    Place,
    caption_pictures,
    captions_folder,
    kept_captions,
)
from ray_jobs.data.sources.captions import caption_rules, clip_text
from ray_jobs.data.sources.detection import Source

CAPTIONS = "captions.jsonl"
CAPTIONED = "captioned_rows"  # folder of the rows with these captions
EDITED = "edited"  # key of a corrected line
LINE_OF_CAPTION = re.compile(r": line \d+$")  # see `Source`: in the name of a row that has one of several


def check_captioning(config: Config) -> None:
    """Check the captioning model, if there is one, without its weights.

    Raises:
        ConfigError: it cannot be used as configured; the message names the field.
    """
    if config.data.captioning.model is None:
        return
    from ray_jobs.weights.captioner import check_captioner

    try:
        check_captioner(config.data.captioning)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def captioning_digest(config: Config) -> str:
    """Return the digest of the captioning model's files; "" without a model.

    Raises:
        ConfigError: the model is missing, or has no safetensors file.
    """
    if config.data.captioning.model is None:
        return ""
    from ray_jobs.weights.captioner import captioner_digest

    try:
        return captioner_digest(config.data.captioning)
    except ValueError as error:
        raise ConfigError(str(error)) from None


Row = tuple[int, str, str]  # number of its source, name of its picture, the source's own caption


def captions_file(config: Config, source: int) -> str:
    """Name of the list of captions of a source: `captions.jsonl`; of several `captions-1.jsonl` and so on."""
    stem, suffix = CAPTIONS.split(".")
    return CAPTIONS if len(config.data.all_sources) == 1 else f"{stem}-{source + 1}.{suffix}"


def own_caption(line: Mapping[str, object]) -> str:
    """Return the source's own caption of the row that a line of `captions.jsonl` is about; "" if none."""
    is_own = "written_by" not in line and EDITED not in line
    return str(line.get("source_text", line["text"] if is_own else ""))


def picture_name(name: str, lines: int) -> str:
    """Name of a row's picture, without the number of its line where its caption has several."""
    return LINE_OF_CAPTION.sub("", name) if lines > 1 else name


def edited_captions(config: Config, dataset: Storage) -> dict[Row, str]:
    """Read the corrected captions, as training has them; none without a captioning model.

    Raises:
        ConfigError: a line of the file cannot be read.
    """
    edits: dict[Row, str] = {}
    if config.data.captioning.model is None:
        return edits
    for source in range(len(config.data.all_sources)):
        name = captions_file(config, source)
        try:
            text = dataset.read_text(name) if dataset.exists(name) else ""
            # Not at other line ends: a caption may hold U+2028.
            for line in map(json.loads, filter(str.strip, text.split("\n"))):
                if line.get(EDITED) and str(line["text"]).strip():
                    edits[source, line["file_name"], own_caption(line)] = str(line["text"]).strip()
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{dataset.uri}/{name}: a line is no object with file_name and text ({error}); correct or "
                "remove the file"
            ) from None
    is_repaired = bool(edits) and caption_rules(config).repaired
    return {row: clip_text(text) if is_repaired else text for row, text in edits.items()}


def edits_digest(edits: Mapping[Row, str]) -> str:
    """Return the digest of corrections; "" if there are none."""
    content = json.dumps(sorted(edits.items())).encode()
    return hashlib.sha256(content).hexdigest() if edits else ""


def announce_captions(
    config: Config, found: Sequence[Entry], index: Storage, decisions: Decisions, dataset: Storage
) -> None:
    """Print for how many pictures `write_captions` would have captions."""
    if model := config.data.captioning.model:
        count = len(_places(config, found, index, decisions, edited_captions(config, dataset)))
        say("prepare", f"{model} will caption {count:,} pictures, less those with captions in storage")


def write_captions(
    config: Config,
    sources: Sequence[Source],
    found: Sequence[Entry],
    index: Storage,
    decisions: Decisions,
    model: str,
    dataset: Storage,
    progress: Callable[[int, int], None],
) -> tuple[list[Entry], Decisions]:
    """Caption the kept pictures that need it; write `captions.jsonl`.

    Args:
        model: from `captioning_digest`.
        progress: callback that receives the numbers of pictures done and to do.

    Returns:
        The entries with new index files, and the decisions: a picture of which the model writes nothing is
        rejected as `empty_caption`.
    """
    edits = edited_captions(config, dataset)
    places = _places(config, found, index, decisions, edits)
    cache = captions_folder(config, model)
    known = kept_captions(cache, places)
    missing = {digest: place for digest, place in places.items() if digest not in known}
    captions = known | (caption_pictures(config, sources, found, missing, cache, progress) if missing else {})
    applied = _Application(config, captions, edits, is_repaired=sources[0].captions.repaired)
    entries = applied.to_index(found, index, decisions)
    applied.write_files(dataset)
    pictures = int(decisions.kept[: decisions.num_own].sum())
    example = f", e.g. {applied.example[0]}: {applied.example[1]!r}" if applied.example else ""
    say(
        "prepare",
        f"captioned {len(places):,} pictures of {pictures:,} ({len(missing):,} now, {len(known):,} before)"
        f"{example}",
    )
    if edits:
        say(
            "prepare",
            f"{len(applied.edited):,} captions edited in {CAPTIONS}"
            + (f", {lost:,} edits fit no row" if (lost := len(edits) - len(applied.edited)) else ""),
        )
    if applied.failed:
        say(
            "prepare",
            f"warning: {config.data.captioning.model} wrote nothing for {len(applied.failed):,} pictures, "
            f"which are rejected, e.g. {applied.failed[0]}",
        )
    if cut := sum(caption.is_cut for caption in captions.values()):
        say(
            "prepare",
            f"{cut:,} written captions are as long as data.captioning.max_tokens allows "
            f"({config.data.captioning.max_tokens}), and may end within a sentence",
        )
    return entries, applied.decisions(decisions, gather_rows(entries, index, dataset, folder=CAPTIONED))


def composed(settings: CaptioningConfig, text: str) -> str:
    """Return a caption with the prefix and the trigger before it, each once."""
    for words, between in ((settings.prefix, " "), (settings.trigger, ", ")):
        if words and not re.match(re.escape(words) + r"(?!\w)", text, re.IGNORECASE):
            text = f"{words}{between}{text}"
    return text


def _is_wanted(config: Config, text: str, role: str) -> bool:
    """Whether a model writes the caption of a row, by the source's own caption."""
    return role == "instance" and (config.data.captioning.pictures == "all" or not text)


def _places(
    config: Config,
    found: Sequence[Entry],
    index: Storage,
    decisions: Decisions,
    edits: Mapping[Row, str],
) -> dict[str, Place]:
    """Digests of the kept pictures that a model captions, with the first row of each."""
    places: dict[str, Place] = {}
    start, kept = 0, decisions.kept
    files = [entry.file for entry in found]
    columns = ["row", "name", "text", "role", "digest", "lines"]
    for number, table in enumerate(read_index(index, files, columns)):
        for at, values in enumerate(table.to_pylist()):
            name = picture_name(values["name"], values["lines"])
            wanted = _is_wanted(config, values["text"], values["role"])
            wanted = wanted and (found[number].source, name, values["text"]) not in edits
            if wanted and kept[start + at]:
                places.setdefault(values["digest"], (number, values["row"]))
        start += len(table)
    return places


class _Application:
    """Put written captions into the index, and collect what becomes of its rows.

    Attributes:
        failed: names of pictures of which the model wrote nothing.
        example: name of the first captioned picture, and its caption.
        edited: rows with corrected captions.
    """

    def __init__(
        self, config: Config, captions: Mapping[str, Caption], edits: Mapping[Row, str], is_repaired: bool
    ) -> None:
        self.config, self.settings, self.is_repaired = config, config.data.captioning, is_repaired
        self.texts = {digest: self._final(caption.text) for digest, caption in captions.items()}
        self.edits, self.edited = edits, set[Row]()
        self.failed = list[str]()
        self.example: tuple[str, str] | None = None
        self._reasons: dict[int, str] = {}  # of rows that are rejected now
        self._firsts: dict[int, int] = {}  # of rows that are duplicates now, the row that they duplicate
        self._different = set[int]()  # hashes of the captions of kept rows
        self._written = 0  # kept rows with written captions
        self._lines: dict[int, io.StringIO] = {}  # of captions.jsonl, by source

    def _final(self, text: str) -> str:
        """Return a written caption as training has it; "" if the model wrote nothing."""
        final = composed(self.settings, text) if text else ""
        return clip_text(final) if self.is_repaired else final

    def to_index(self, found: Sequence[Entry], index: Storage, decisions: Decisions) -> list[Entry]:
        """Write index files with the captions, where they differ; return the entries with these."""
        present, entries, start = set(index.files()), [], 0
        firsts: dict[str, int] = {}
        kept = decisions.kept
        for entry, table in zip(
            found, read_index(index, [each.file for each in found], SCHEMA.names), strict=True
        ):
            texts = [
                self._text(entry, row, start + at, bool(kept[start + at]), firsts)
                for at, row in enumerate(
                    table.select(["name", "text", "role", "digest", "lines"]).to_pylist()
                )
            ]
            start += len(table)
            if texts != table["text"].to_pylist():
                name = hashlib.sha256(json.dumps([entry.file, texts]).encode()).hexdigest()[:32] + ".parquet"
                if name not in present:
                    buffer = io.BytesIO()
                    place = table.schema.get_field_index("text")
                    pq.write_table(table.set_column(place, SCHEMA.field("text"), pa.array(texts)), buffer)
                    index.write_bytes(name, buffer.getvalue())
                entry = replace(entry, file=name)
            entries.append(entry)
        return entries

    def _text(self, entry: Entry, row: RayRow, number: int, is_kept: bool, firsts: dict[str, int]) -> str:
        """Return the caption of row `number` of the index, and note what becomes of it."""
        own, digest = str(row["text"]), str(row["digest"])
        name = picture_name(row["name"], row["lines"])
        is_wanted = _is_wanted(self.config, own, row["role"])
        text = self.texts.get(digest, own) if is_wanted else own
        is_edited = row["role"] == "instance" and (entry.source, name, own) in self.edits
        if is_edited:
            self.edited.add((entry.source, name, own))
            text = self.edits[entry.source, name, own]
        if is_wanted and is_kept:
            if not text:
                self._reasons[number] = "empty_caption"
                self.failed.append(name)
            elif self.config.data.cleaning.duplicates == "drop" and digest in firsts and not is_edited:
                # Its own caption was another one, but now the rows are equal.
                self._reasons[number], self._firsts[number] = "duplicate", firsts[digest]
            else:
                firsts.setdefault(digest, number)
                self._written += not is_edited
                self.example = self.example or (name, text)
        if is_kept and number not in self._reasons:
            self._different.add(hash(text))
        if text and row["role"] == "instance" and number not in self._firsts:
            line: dict[str, object] = {"file_name": name, "text": text}
            if is_wanted:
                line["written_by"] = str(self.settings.model)
            if own and (is_wanted or is_edited):
                line["source_text"] = own
            if is_edited:
                line[EDITED] = True
            lines = self._lines.setdefault(entry.source, io.StringIO())
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        return text

    def write_files(self, dataset: Storage) -> None:
        """Write `captions.jsonl`, of each source."""
        for source, lines in self._lines.items():
            dataset.write_text(captions_file(self.config, source), lines.getvalue())

    def decisions(self, before: Decisions, rows: Rows) -> Decisions:
        """Return the decisions with the rows that are rejected now, in `rows` with their captions."""
        reasons, matched = before.reasons.copy(), before.matches.pairs() | self._firsts
        for number, reason in self._reasons.items():
            reasons.codes[number] = reasons.code(reason)
        rejected, duplicates = dict(before.rejected), dict(before.duplicates)
        if self.failed:
            rejected["empty_caption"] = rejected.get("empty_caption", 0) + len(self.failed)
        if self._firsts:
            duplicates["duplicate"] = duplicates.get("duplicate", 0) + len(self._firsts)
        detail = f"{self.settings.model} wrote nothing"
        replaced = self.settings.pictures == "all"
        return replace(
            before,
            rows=rows,
            reasons=reasons,
            matches=Matches.of_pairs(matched),
            rejected=rejected,
            duplicates=duplicates,
            num_captions=len(self._different),
            num_repaired=0 if replaced else before.num_repaired,
            num_of_lines=0 if replaced else before.num_of_lines,
            num_written=self._written,
            details=before.details
            | {number: detail for number, reason in self._reasons.items() if reason == "empty_caption"},
        )
