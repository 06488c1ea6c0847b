"""Contents of a dataset and its rejected pictures as HTML: a report section, and the page of a dry run.

Pure: values in, HTML out. Like the report, the page is one self-contained file without scripts or external
resources; light and dark mode follow the reader's setting.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from ray_jobs.report.composition import composition_section
from ray_jobs.report.elements import counted, histogram_svg, note, table
from ray_jobs.run.manifest import Bucket, Duplicates, Histogram, Manifest, SourceShare

STYLE = Path(__file__).with_name("style.css")
TEMPLATE = Path(__file__).with_name("dataset_page.html")
SPLITS = ("train", "validation", "test", "class")
THUMBNAIL = 128  # maximum side in pixels

# Rejection reasons: meaning and remedy, in the order of the contact sheet.
REASONS = {
    "empty_file": "The file is empty: copy it again, or remove it.",
    "unreadable": "The file cannot be read as a picture: repair or replace it.",
    "unknown_format": "The format is not supported: convert the file to PNG, JPEG, WebP, TIFF or AVIF.",
    "truncated": "The file ends too early: copy it again; the transfer was probably interrupted.",
    "too_many_pixels": "The picture has more pixels than data.cleaning.max_pixels: make it smaller, or raise"
    " the limit if you trust its source.",
    "too_small": "The shorter side has fewer pixels than data.cleaning.min_side: find a larger version, or"
    " lower the limit.",
    "extreme_aspect_ratio": "The aspect ratio is above data.cleaning.max_aspect_ratio: crop the picture,"
    " or raise the limit.",
    "missing_caption": "The picture has no caption: write one.",
    "empty_caption": "The caption is empty: describe the picture.",
    "caption_not_utf8": "The caption is not UTF-8 text: save it as UTF-8.",
    "outside_folder": "The path points outside the data set's folder: move the picture into the folder and"
    " give a path relative to it.",
    "missing_file": "A caption names a file that does not exist: correct the name, or add the file.",
    "incomplete": "A picture that reference_columns, control_column or mask_column names is missing, or"
    " cannot be read: add or replace it, or remove the row.",
    "control_of_another_shape": "The control image has another ratio of its sides than its picture: make it"
    " from the whole picture.",
    "mask_of_another_size": "The mask has other sides than its picture: draw it on the picture itself.",
    "empty_mask": "The mask is dark, so nothing of the picture would be learned: paint what is to be learned"
    " white (255, not 1), or remove the row.",
    "transparent_mask": "The mask has transparent pixels: save it without an alpha channel, white where the"
    " picture is to be learned and black elsewhere.",
    "broken_shard": "The file is damaged, and everything after the damage is lost: copy or create it again.",
    "missing_stratum": "The picture has no value for data.stratify or data.balance: add it to its .json.",
    "blurred": "The picture is less sharp than data.cleaning.min_sharpness: replace it with a sharper one, or"
    " lower the threshold.",
    "near_constant": "The picture has less contrast than data.cleaning.min_contrast, so there is little to"
    " learn from: replace it, or lower the threshold if it is meant to be flat.",
    "too_dark": "A larger share of the picture is black than data.cleaning.max_dark: replace it, or raise the"
    " threshold if it is meant to be dark.",
    "too_bright": "A larger share of the picture is white than data.cleaning.max_bright: replace it, or raise"
    " the threshold if it is meant to be bright.",
    "duplicate": "The same picture with the same caption appears earlier and is kept: nothing to do.",
    "near_duplicate": "A nearly identical picture appears earlier and is kept: if the two are meant to"
    " differ, lower data.cleaning.duplicate_distance or data.cleaning.duplicate_colour.",
    "not_listed": "Not counted: no line of a metadata file names the picture, or it is beside tables or"
    " shards, which alone are read: list it if it belongs to the set.",
    "in_subfolder": "Not counted: pictures of a subject must be in the folder itself, those of its class in"
    " class_data_dir: move the picture there if it belongs to the set.",
    "other_member": "Not counted: an additional picture of a tar sample, such as a mask, or a picture in an"
    " unsupported format beside one of the same name in a supported format.",
    "unusable_link": "Not counted: a broken link, a link to a folder, or a link in a tar file: replace it"
    " with the pictures themselves.",
    "near_duplicate_across_splits": "The picture resembles pictures of different splits and would leak one"
    " split into another: remove it, or all but one of those that it resembles.",
}

# Title and unit of each measure, as in ray_jobs/data/curation/cleaning.py.
TITLES = {
    "sharpness": ("Sharpness", "variance of the Laplacian"),
    "contrast": ("Contrast", "standard deviation of the luma, of 0..255"),
    "dark": ("Dark", "share of pixels that are nearly black"),
    "bright": ("Bright", "share of pixels that are nearly white"),
}


@dataclass(frozen=True)
class Example:
    """A picture that would be rejected."""

    reason: str  # one of REASONS
    name: str  # name to locate it by
    caption: str
    detail: str
    picture: Image.Image | None  # None: it cannot be read
    twin: Image.Image | None  # for a duplicate: the picture that is kept
    twin_name: str = ""  # empty: not a duplicate


def data_uri(picture: Image.Image, side: int) -> str:
    """Data URI of a picture as PNG, with sides of at most `side` pixels."""
    picture = picture.convert("RGB")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def histogram(name: str, measure: Histogram) -> str:
    """Draw one measure's histogram as SVG, tinted beyond the threshold, which is a dashed line.

    Args:
        name: a key of TITLES.
    """
    label = f"Number of pictures over {TITLES[name][0].lower()}"
    return histogram_svg(measure.edges, measure.counts, label, measure.threshold, measure.side)


def _measure(name: str, measure: Histogram) -> str:
    """Card with the histogram of one measure, and its threshold in words."""
    title, unit = TITLES[name]
    field, threshold = measure.field, measure.threshold
    if threshold is None:
        words = f"Off, because {field} is empty."
    else:
        aside = counted(measure.set_aside, "picture")
        words = f"{aside} rejected: {measure.side} {field} ({threshold:g})."
    head = f"<figcaption>{escape(title)}<small>{escape(unit)}</small></figcaption>"
    return f'<figure class="card">{head}{histogram(name, measure)}{note(words)}</figure>'


def _splits(manifest: Manifest) -> str:
    """Describe pictures per split, folds, and the number of different captions."""
    parts = []
    if not manifest.held_out and manifest.folds:
        parts.append(
            note(
                "There are too few pictures to hold any out: final scores compare with the training pictures."
                " Those of the folds, by which the search ranks, do not."
            )
        )
    elif not manifest.held_out:
        parts.append(
            note(
                "There are too few pictures to hold any out: scores compare with the training pictures, so"
                " they cannot distinguish learning from memorisation.",
                "note alert",
            )
        )
    rows = [
        (split, f"{manifest.rows(split):,}") for split in SPLITS if manifest.rows(split) or split != "class"
    ]
    parts.append(table(("split", "pictures"), rows, "numbers"))
    words = [counted(manifest.captions.different, "different caption")]
    if written := manifest.captions.written:
        words.append(f"{counted(written, 'caption')} written by a model: see dataset/captions.jsonl")
    if several := manifest.captions.of_lines:
        words.append(f"{counted(several, 'caption')} with several lines: see data.caption_lines")
    if repaired := manifest.captions.repaired:
        words.append(
            f"{counted(repaired, 'caption')} normalised as in CLIP's training (quotes, widths, HTML)"
        )
    if folds := manifest.folds:
        sizes = ", ".join(f"{size:,}" for size in folds)
        words.append(f"{len(folds)} folds of training and validation pictures: {sizes}")
    return "".join([*parts, *(note(f"{each}.") for each in words)])


def _duplicates(duplicates: Duplicates) -> str:
    groups, aside = counted(duplicates.groups, "group"), counted(duplicates.pictures, "picture")
    if duplicates.mode == "ignore":
        return "Near duplicates were not searched, because data.cleaning.duplicates is ignore."
    if duplicates.mode == "keep":
        return f"Near duplicates: {groups}, each kept within one split; {aside} rejected."
    return f"Duplicates: {groups}, the first picture of each is kept; {aside} rejected."


def _not_counted(manifest: Manifest) -> list[str]:
    """Sentences about files of the sources that are not rows of the dataset."""
    notes = []
    if left_out := manifest.left_out:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        notes.append(f"Pictures that are not part of the set and not counted above: {reasons}.")
    if others := manifest.no_pictures:
        suffixes = ", ".join(f"{count:,} {suffix}" for suffix, count in others.items())
        notes.append(f"Files that are not pictures: {suffixes}.")
    return notes


def _sources(sources: Sequence[SourceShare]) -> str:
    rows = [(each.name, f"{each.rows:,}", f"{each.share:.1%}") for each in sources]
    return "<h3>Sources</h3>" + table(("source", "pictures", "share of an epoch"), rows, "numbers")


def _buckets(buckets: dict[str, Bucket]) -> str:
    head = ("width x height", "training rows", "steps per epoch", "carried over")
    rows = [
        (shape, f"{bucket.rows:,}", f"{bucket.steps:,}", f"{bucket.rows_over:,}")
        for shape, bucket in buckets.items()
    ]
    words = note("Carried over: rows of an incomplete batch, with which the next epoch begins.")
    return "<h3>Buckets</h3>" + table(head, rows, "numbers") + words


def dataset_section(manifest: Manifest) -> str:
    """Section of dataset statistics: splits, rejections and reasons, duplicates, sources, buckets, measures.

    Args:
        manifest: content of dataset/manifest.json.

    Returns:
        An HTML fragment, for a page with the style of STYLE.
    """
    parts = [_splits(manifest)]
    if len(manifest.source) > 1:
        parts.append(_sources(manifest.source))
    if len(manifest.buckets) > 1:
        parts.append(_buckets(manifest.buckets))
    parts.append(composition_section(manifest.composition))
    parts.append("<h3>Rejected</h3>")
    # An unknown reason must not break the report of a long run; its name is enough.
    rejected = manifest.rejected
    rows = [(reason, f"{rejected[reason]:,}", REASONS.get(reason, "")) for reason in _in_order(rejected)]
    head = ("reason", "pictures", "meaning and remedy")
    parts.append(table(head, rows, "reasons") if rows else note("No picture is rejected."))
    parts.append(note(_duplicates(manifest.duplicates)))
    parts += map(note, _not_counted(manifest))
    cards = "".join(_measure(name, measure) for name, measure in manifest.measures.items())
    parts.append(f'<h3>Measures</h3><div class="cards measures">{cards}</div>')
    return "".join(parts)


def _in_order(reasons: Iterable[str]) -> list[str]:
    """Sort reasons in the order of REASONS, unknown ones last."""
    order = {reason: number for number, reason in enumerate(REASONS)}
    return sorted(reasons, key=lambda reason: (order.get(reason, len(order)), reason))


def _picture(picture: Image.Image | None, name: str, says: str) -> str:
    """Thumbnail, or an empty tile if there is none, above the file's name."""
    if picture is None:
        shown = '<div class="blank">no picture</div>'
    else:
        shown = f'<img src="{data_uri(picture, THUMBNAIL)}" alt="{escape(name)}">'
    return f"<div>{shown}<small>{escape(says + name)}</small></div>"


def _tile(example: Example) -> str:
    kind, sides = "card tile", _picture(example.picture, example.name, "")
    if example.twin_name:
        kind, sides = "card tile pair", sides + _picture(example.twin, example.twin_name, "kept: ")
    words = f"<p>{escape(example.caption)}</p>" if example.caption else ""
    words += f'<p class="detail">{escape(example.detail)}</p>' if example.detail else ""
    return f'<div class="{kind}"><div class="sides">{sides}</div>{words}</div>'


def _sheet(manifest: Manifest, examples: Sequence[Example]) -> str:
    """Contact sheet, one group per reason. For duplicates the manifest has only the sum of all reasons."""
    duplicates = f"the {counted(manifest.duplicates.pictures, 'duplicate')}"
    totals = {example.reason: duplicates for example in examples}
    totals |= {reason: f"{number:,}" for reason, number in (manifest.rejected | manifest.left_out).items()}
    parts = []
    for reason in _in_order(totals):
        shown = [example for example in examples if example.reason == reason]
        parts.append(f"<h3>{escape(REASONS.get(reason, reason))}</h3>")
        parts.append(note(f"{reason}: {len(shown):,} of {totals[reason]}"))
        parts.append(f'<div class="sheet">{"".join(map(_tile, shown))}</div>')
    return "".join(parts) or note("No picture would be rejected.")


def write_dataset_page(
    *, source: str, manifest: Manifest, examples: Sequence[Example], seen: int, max_rejected: float
) -> str:
    """Compose the page of `python -m ray_jobs.prepare --dry-run`.

    Args:
        source: source of the pictures, as the user wrote it.
        manifest: content that dataset/manifest.json would have.
        examples: pictures that would be rejected, all of which are shown.
        seen: number of scanned pictures: kept, rejected and duplicates.
        max_rejected: data.cleaning.max_rejected, a share of `seen`.

    Returns:
        One HTML document, to be written as UTF-8.
    """
    rejected = sum(manifest.rejected.values())
    aside = rejected + manifest.duplicates.pictures
    share = f"Without duplicates, {rejected / max(seen, 1):.1%} of the pictures are rejected"
    limit = f"data.cleaning.max_rejected, {max_rejected:.0%}"
    if rejected > max_rejected * seen:
        words = f"The job would stop. {share}, more than {limit}: repair the pictures, or raise the limit."
        summary = f'<span class="alert">{escape(words)}</span>'
    else:
        summary = escape(f"{share}, within {limit}.")
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        style=STYLE.read_text(encoding="utf-8"),
        source=escape(source),
        headline=escape(
            f"Of {counted(seen, 'picture')}, {seen - aside:,} would be kept and {aside:,} rejected."
        ),
        summary=summary,
        section=dataset_section(manifest),
        sheet=_sheet(manifest, examples),
    )
