"""Pictures of the page: samples, training progress, and near copies of training pictures."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ray_jobs.report.dataset_page import data_uri
from ray_jobs.run.records import OWN, RECITED, Measurement

COLUMNS = ("real", "base", "fine-tuned")
CONTROL_IMAGE = "control image"
TUNED = ' class="tuned"'  # attribute of the cells of the last of them
PAGE_PICTURE = 192  # maximum side in pixels on the page; larger pictures are reduced
STRIP_PICTURE = 128  # maximum side in pixels in the strip and among neighbours, which are many
SHEET_PICTURE = 128  # side in pixels on the sheet
NEARNESS = (
    "Nearness is the distance, divided by the mean distance to the next nearest ones: 0 for an exact copy,"
    " near 1 for a picture that belongs to none of them in particular."
)
RELIABLE = 0.9  # share of known copies below which a detector is said to miss some
SHOWN_NEIGHBOURS = 12  # number of nearest pairs shown


@dataclass(frozen=True)
class PictureRow:
    """One caption and its pictures."""

    caption: str
    real: Image.Image
    base: Image.Image
    winner: Image.Image
    references: Sequence[Image.Image] = ()
    control: Image.Image | None = None

    @property
    def pictures(self) -> tuple[Image.Image, ...]:
        """Return the pictures in the order of `columns`."""
        shown = [*self.references, *([self.control] if self.control else [])]
        if shown:
            return *shown, self.base, self.winner, self.real
        return self.real, self.base, self.winner

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the headings of the pictures: first what they are drawn from, and last what is real.

        Of an edit these are its references, and its target.
        """
        headings = [*_reference_headings(len(self.references)), *([CONTROL_IMAGE] if self.control else [])]
        if headings:
            return (*headings, *COLUMNS[1:], "target" if self.references else COLUMNS[0])
        return COLUMNS


def _reference_headings(count: int) -> list[str]:
    """Name the references of an edit, of which there are `count`."""
    return ["before"] if count == 1 else [f"reference {number}" for number in range(1, count + 1)]


@dataclass(frozen=True)
class Strip:
    """Pictures of the winning trial at each rung, from the same captions, or own prompts, and noise.

    Attributes:
        captions: captions or prompts of the rows.
        columns: heading (`base`, or the rung's step) and one picture per caption, in step order.
        winner: heading of the winner's column.
        references: the reference pictures of each row, if these are edits.
        controls: the control image of each row, if there are any.
    """

    captions: Sequence[str]
    columns: Sequence[tuple[str, Sequence[Image.Image]]]
    winner: str
    references: Sequence[Sequence[Image.Image]] = ()
    controls: Sequence[Image.Image] = ()

    @property
    def all_columns(self) -> list[tuple[str, Sequence[Image.Image]]]:
        """Return the columns, before them those of the references and of control images."""
        shown = list(zip(*self.references, strict=True))
        controls = [(CONTROL_IMAGE, self.controls)] if self.controls else []
        return [*zip(_reference_headings(len(shown)), shown, strict=True), *controls, *self.columns]


@dataclass(frozen=True)
class Memorisation:
    """Samples and their nearest training pictures.

    Attributes:
        pairs: nearest samples: PNG of the sample, PNG of the training picture, their nearness.
        num_samples: number of samples checked.
        share: share of near copies among them; None if the detector has no threshold.
        of_training: number of all training pictures.
        recited: measurements of pictures for captions of training pictures, by metric.
        recited_by_base: the same of the base model.
        threshold, expected_share, extrapolated, sensitivity, num_training, num_held_out, num_unseen: as in
            `metrics.copies.DetectorFacts`.
        feature_network: network whose features are compared.
    """

    pairs: Sequence[tuple[bytes, bytes, float]]
    num_samples: int
    share: float | None
    of_training: int
    recited: Mapping[str, Measurement]
    recited_by_base: Mapping[str, Measurement]
    threshold: float | None
    expected_share: float
    extrapolated: bool
    sensitivity: float | None
    num_training: int
    num_held_out: int
    num_unseen: int
    feature_network: str


def card(row: PictureRow) -> str:
    """Card of one caption with its pictures."""
    caption = escape(row.caption)
    cells = "".join(
        f"<div{TUNED if name == COLUMNS[-1] else ''}>"
        f'<img src="{data_uri(picture, PAGE_PICTURE)}" alt="{caption}: {name}">'
        f"<small>{name}</small></div>"
        for name, picture in zip(row.columns, row.pictures, strict=True)
    )
    return (
        f'<figure class="card"><figcaption>{caption}</figcaption><div class="abreast">{cells}</div></figure>'
    )


def strip_section(strip: Strip | None) -> str:
    """Section with captions of a split; empty if no rung has samples."""
    note = (
        "The winning trial at each rung (training steps), from the same noise as the base model; ★ the"
        " winner. Pictures that become stiff, noisy or alike towards the right are a sign of over-fitting."
    )
    return _over_steps("How it learned", note, strip) if strip else ""


def prompts_section(strip: Strip | None) -> str:
    """Section with the user's own prompts; empty if there are none."""
    note = (
        "Prompts of evaluate.prompts, drawn by the winning trial at each rung from the same noise as by"
        " the base model; ★ the winner. Where a prompt loses its place or action towards the right, or one"
        " of something else looks like the training pictures, the model has learned these too well."
    )
    return _over_steps("Your prompts", note, strip) if strip else ""


def _over_steps(title: str, note: str, strip: Strip) -> str:
    """Section with a row of pictures over the steps for each caption."""

    def cell(tag: str, heading: str, content: str) -> str:
        mark = ' class="winner"' if heading == strip.winner else ""
        return f"<{tag}{mark}>{content}</{tag}>"

    def name(heading: str) -> str:
        return f"★ {heading}" if heading == strip.winner else heading

    head = "".join(cell("th", heading, escape(name(heading))) for heading, _ in strip.all_columns)
    rows = []
    for number, caption in enumerate(strip.captions):
        cells = "".join(
            cell(
                "td",
                heading,
                f'<img src="{data_uri(pictures[number], STRIP_PICTURE)}" '
                f'alt="{escape(caption)}: {escape(name(heading))}">',
            )
            for heading, pictures in strip.all_columns
        )
        rows.append(f'<tr><th scope="row"><span>{escape(caption)}</span></th>{cells}</tr>')
    return (
        f'<h2>{title}</h2><p class="note">{note}</p><div class="wide"><table class="strip">'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def memorisation_section(found: Memorisation | None) -> str:
    """Section of samples and their nearest training pictures, nearest first; empty without data."""
    if found is None or not found.pairs:
        return ""
    looked_at = (
        f"The pictures nearest to a training picture. Compared: {found.num_training:,} of"
        f" {found.of_training:,} training pictures, as the autoencoder restores them, in the features of"
        f" {found.feature_network}. {NEARNESS}"
    )
    nearest = sorted(found.pairs, key=lambda pair: pair[2])[:SHOWN_NEIGHBOURS]
    notes = [(_copies(found), _too_often(found.share, found.num_samples, found)), *_recited(found)]
    shown = "".join(
        f'<p class="{"note alert" if alert else "note"}">{escape(sentence)}</p>' for sentence, alert in notes
    )
    return (
        f"<h2>Memorisation</h2>{shown}"
        f'<p class="note">{escape(looked_at)}</p>'
        f'<div class="sheet">{"".join(_neighbours(*pair, found.threshold) for pair in nearest)}</div>'
    )


def _copies(found: Memorisation) -> str:
    """Describe the share of near copies, and define a near copy."""
    if found.share is None or found.threshold is None:
        few = f"{found.num_unseen} pictures are too few to say what a near copy is"
        return f"{few}; compare the pictures yourself."
    copies, rest = round(found.share * found.num_samples), 1 - found.expected_share
    return (
        f"{copies:,} of {found.num_samples:,} pictures of the winner ({found.share:.1%}) are near copies:"
        f" nearer to a training picture than {rest:.0%} of pictures that it never saw (up to"
        f" {found.threshold:.3g}). Without memorisation it would be about {found.expected_share:.0%}."
        f" {_reliability(found)}"
    )


def _reliability(found: Memorisation) -> str:
    """Describe what the threshold comes from, and what it finds."""
    pictures = []
    if found.num_held_out:
        pictures.append(f"{found.num_held_out:,} held-out pictures")
    if among := found.num_unseen - found.num_held_out:
        pictures.append(f"{among:,} training pictures, each compared with the others")
    words = f"The limit comes from {' and '.join(pictures)}."
    if found.extrapolated:
        words += (
            f" These are too few to count {found.expected_share:.0%} of them, so it is half of the nearness"
            " of the nearest."
        )
    if found.sensitivity is not None:
        words += (
            f" It finds {found.sensitivity:.0%} of training pictures that went through the autoencoder twice."
        )
        if found.sensitivity < RELIABLE:
            words += " Copies can therefore go unseen: compare the pictures yourself."
    return words


def _recited(found: Memorisation) -> list[tuple[str, bool]]:
    """Sentences on pictures for captions of training pictures, and whether each is an alarm."""
    notes = []
    if copies := found.recited.get(RECITED):
        count = round(copies.value * copies.num_samples)
        sentence = (
            f"Of {copies.num_samples:,} more pictures, drawn for captions of training pictures, {count:,} are"
            " near copies."
        )
        notes.append((sentence, _too_often(copies.value, copies.num_samples, found)))
    if (own := found.recited.get(OWN)) and own.expected_share is not None:
        count, base = round(own.value * own.num_samples), found.recited_by_base[OWN]
        sentence = (
            f"For {count:,} of them the nearest training picture is the caption's own: {own.value:.0%}, of"
            f" the base model's {base.value:.0%}, by chance {own.expected_share:.1%}. A model that draws what"
            " a caption says raises this too; near copies are the alarm."
        )
        notes.append((sentence, False))
    return notes


def _too_often(share: float | None, count: int, found: Memorisation) -> bool:
    """Return whether a share exceeds the expected one by more than twice its chance variation."""
    if share is None:
        return False
    chance = math.sqrt(found.expected_share * (1 - found.expected_share) / count)
    return share > found.expected_share + 2 * chance


def _neighbours(sample: bytes, training: bytes, nearness: float, threshold: float | None) -> str:
    is_copy = threshold is not None and nearness <= threshold
    says = f"nearness {nearness:.3g}" + (", a near copy" if is_copy else "")
    sides = "".join(
        f'<div><img src="{data_uri(Image.open(io.BytesIO(png)), STRIP_PICTURE)}" alt="{name}, {says}">'
        f"<small>{name}</small></div>"
        for png, name in ((sample, "sample"), (training, "nearest training picture"))
    )
    return f'<div class="card tile pair"><div class="sides">{sides}</div><p class="detail">{says}</p></div>'


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans from matplotlib; unlike Pillow's font it has Greek, Cyrillic and more."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def grid_image(rows: Sequence[PictureRow], columns: Sequence[str] = ()) -> Image.Image:
    """Draw the picture grid as one RGB sheet for a README, one row per caption.

    With five or more captions it has two blocks side by side.

    Args:
        columns: headings of a row's pictures, if not their own.
    """
    if not rows:
        raise ValueError("rows: a sheet needs at least one caption")
    columns = columns or rows[0].columns
    side, gap, head, words = SHEET_PICTURE, 8, 28, 128
    blocks = 1 if len(rows) < 5 else 2
    height = math.ceil(len(rows) / blocks)
    block_width = words + len(columns) * (side + gap) + 2 * gap
    sheet = Image.new("RGB", (blocks * block_width + gap, head + height * (side + gap)), "white")
    draw, font, small = ImageDraw.Draw(sheet), _font(14), _font(13)
    for index, row in enumerate(rows):
        block, line = divmod(index, height)
        left, top = block * block_width + 2 * gap, head + line * (side + gap)
        text = "\n".join(textwrap.wrap(row.caption, 15, max_lines=6, placeholder=" …"))
        draw.multiline_text((left, top + side / 2), text, "#222222", small, anchor="lm", spacing=5)
        for column, (name, picture) in enumerate(zip(columns, row.pictures, strict=True)):
            x = left + words + column * (side + gap)
            fitted = ImageOps.contain(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
            sheet.paste(fitted, (x + (side - fitted.width) // 2, top + (side - fitted.height) // 2))
            if line == 0:
                draw.text((x + side / 2, head / 2), name, "#555555", font, anchor="mm")
    return sheet
