"""Pictures of the page: samples, training progress, and near copies of training pictures."""

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ray_jobs.report.dataset_page import data_uri

COLUMNS = ("real", "base", "fine-tuned")
PAGE_PICTURE = 192  # maximum side in pixels on the page; larger pictures are reduced
STRIP_PICTURE = 128  # maximum side in pixels in the strip and among neighbours, which are many
SHEET_PICTURE = 128  # side in pixels on the sheet
SHOWN_NEIGHBOURS = 12  # number of nearest pairs shown


@dataclass(frozen=True)
class PictureRow:
    """One caption and its pictures."""

    caption: str
    real: Image.Image
    base: Image.Image
    winner: Image.Image

    @property
    def pictures(self) -> tuple[Image.Image, Image.Image, Image.Image]:
        """Return the pictures in the order of COLUMNS."""
        return self.real, self.base, self.winner


@dataclass(frozen=True)
class Strip:
    """Pictures of the winning trial at each rung, from the same captions, or own prompts, and noise.

    Attributes:
        captions: captions or prompts of the rows.
        columns: heading (`base`, or the rung's step) and one picture per caption, in step order.
        winner: heading of the winner's column.
    """

    captions: Sequence[str]
    columns: Sequence[tuple[str, Sequence[Image.Image]]]
    winner: str


@dataclass(frozen=True)
class Memorisation:
    """Samples and their nearest training pictures.

    Attributes:
        pairs: nearest samples: PNG of the sample, PNG of the training picture, their distance.
        num_samples: number of samples checked.
        share: share of near copies among them; None, as the next two, without held-out pictures.
        near_copy: distance below which a sample is a near copy.
        expected_share: share expected of a model without memorisation.
        num_held_out: number of pictures that `near_copy` is computed from.
        num_training, of_training: number of training pictures checked, and of all training pictures.
        feature_network: network whose features the distances are in.
    """

    pairs: Sequence[tuple[bytes, bytes, float]]
    num_samples: int
    share: float | None
    near_copy: float | None
    expected_share: float | None
    num_held_out: int
    num_training: int
    of_training: int
    feature_network: str


def card(row: PictureRow) -> str:
    """Card of one caption with its pictures."""
    caption = escape(row.caption)
    cells = "".join(
        f'<div><img src="{data_uri(picture, PAGE_PICTURE)}" alt="{caption}: {name}">'
        f"<small>{name}</small></div>"
        for name, picture in zip(COLUMNS, row.pictures, strict=True)
    )
    return f'<figure class="card"><figcaption>{caption}</figcaption><div class="three">{cells}</div></figure>'


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

    def cell(tag: str, heading: str, content: str) -> str:
        mark = ' class="winner"' if heading == strip.winner else ""
        return f"<{tag}{mark}>{content}</{tag}>"

    def name(heading: str) -> str:
        return f"★ {heading}" if heading == strip.winner else heading

    head = "".join(cell("th", heading, escape(name(heading))) for heading, _ in strip.columns)
    rows = []
    for number, caption in enumerate(strip.captions):
        cells = "".join(
            cell(
                "td",
                heading,
                f'<img src="{data_uri(pictures[number], STRIP_PICTURE)}" '
                f'alt="{escape(caption)}: {escape(name(heading))}">',
            )
            for heading, pictures in strip.columns
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
        f" Compared: {found.num_training:,} of {found.of_training:,} training pictures, by distances in the"
        f" features of {found.feature_network}."
    )
    nearest = sorted(found.pairs, key=lambda pair: pair[2])[:SHOWN_NEIGHBOURS]
    kind = "note alert" if _copies_too_often(found) else "note"
    return (
        f'<h2>Memorisation</h2><p class="{kind}">{escape(_copies(found))}</p>'
        f'<p class="note">{escape("The pictures nearest to a training picture." + looked_at)}</p>'
        f'<div class="sheet">{"".join(_neighbours(*pair, found.near_copy) for pair in nearest)}</div>'
    )


def _copies(found: Memorisation) -> str:
    """Describe the share of near copies, and define a near copy."""
    if found.share is None or found.near_copy is None or found.expected_share is None:
        return "No picture was held out, so there is no reference distance; compare the pictures yourself."
    few = found.num_held_out * found.expected_share < 1
    copies, rest = round(found.share * found.num_samples), 1 - found.expected_share
    return (
        f"{copies:,} of {found.num_samples:,} pictures of the winner ({found.share:.1%}) are near copies:"
        f" nearer to a training picture than {rest:.0%} of {found.num_held_out:,} pictures that it never saw"
        f" (distance {found.near_copy:.3g}). Without memorisation it would be about"
        f" {found.expected_share:.0%}."
        + (" With so few pictures, that distance is little more than the smallest one." if few else "")
    )


def _copies_too_often(found: Memorisation) -> bool:
    """Return whether the share exceeds the expected one by more than twice its chance variation."""
    if found.share is None or found.expected_share is None:
        return False
    chance = math.sqrt(found.expected_share * (1 - found.expected_share) / found.num_samples)
    return found.share > found.expected_share + 2 * chance


def _neighbours(sample: bytes, training: bytes, distance: float, near_copy: float | None) -> str:
    is_copy = near_copy is not None and distance < near_copy
    says = f"distance {distance:.3g}" + (", a near copy" if is_copy else "")
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


def grid_image(rows: Sequence[PictureRow], columns: Sequence[str] = COLUMNS) -> Image.Image:
    """Draw the picture grid as one RGB sheet for a README, one row per caption.

    With five or more captions it has two blocks side by side.

    Args:
        columns: headings of a row's three pictures.
    """
    if not rows:
        raise ValueError("rows: a sheet needs at least one caption")
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
