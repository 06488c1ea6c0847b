"""The pictures of the page: what the model draws, how it learned, and whether it copies what it saw."""

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ray_jobs.dataset_report import data_uri

COLUMNS = ("real", "base", "fine-tuned")
PAGE_PICTURE = 192  # pixels a side on the page at most; larger ones are made smaller
STRIP_PICTURE = 128  # pixels a side in the strip and beside neighbours at most: there are many
SHEET_PICTURE = 128  # pixels a side on the sheet
SHOWN_NEIGHBOURS = 12  # the nearest of all


@dataclass(frozen=True)
class PictureRow:
    """One caption and its pictures."""

    caption: str
    real: Image.Image
    base: Image.Image
    winner: Image.Image

    @property
    def pictures(self) -> tuple[Image.Image, Image.Image, Image.Image]:
        """In the order of COLUMNS."""
        return self.real, self.base, self.winner


@dataclass(frozen=True)
class Strip:
    """What the winning trial drew at each rung, from the same captions and the same noise.

    Attributes:
        captions: the rows.
        columns: heading (`base`, or the rung's step) and a picture a caption, in the order of the steps.
        winner: heading of the winner's column.
    """

    captions: Sequence[str]
    columns: Sequence[tuple[str, Sequence[Image.Image]]]
    winner: str


@dataclass(frozen=True)
class Memorisation:
    """Samples beside the training pictures that are nearest to them.

    Attributes:
        pairs: PNG of the sample, PNG of the nearest training picture, their distance.
        near_copy: a distance up to this one is a near copy.
        measure: what the distance is, for a person.
    """

    pairs: Sequence[tuple[bytes, bytes, float]]
    near_copy: float
    measure: str

    @property
    def share(self) -> float:
        """Of the samples that are near copies."""
        return sum(distance <= self.near_copy for _, _, distance in self.pairs) / len(self.pairs)


def card(row: PictureRow) -> str:
    """One caption with its pictures."""
    caption = escape(row.caption)
    cells = "".join(
        f'<div><img src="{data_uri(picture, PAGE_PICTURE)}" alt="{caption}: {name}">'
        f"<small>{name}</small></div>"
        for name, picture in zip(COLUMNS, row.pictures, strict=True)
    )
    return f'<figure class="card"><figcaption>{caption}</figcaption><div class="three">{cells}</div></figure>'


def strip_section(strip: Strip | None) -> str:
    """The section with the strip; nothing where no rung has samples."""
    if strip is None:
        return ""

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
    note = (
        "The winning trial at each rung (training steps), from the same noise as the base model; ★ the"
        " winner. Pictures that turn stiff, noisy or all alike to the right are a sign of over-fitting."
    )
    return (
        f'<h2>How it learned</h2><p class="note">{note}</p><div class="wide"><table class="strip">'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def memorisation_section(found: Memorisation | None) -> str:
    """Samples beside their nearest training pictures, nearest first; empty where there are none."""
    if found is None or not found.pairs:
        return ""
    copies = sum(distance <= found.near_copy for _, _, distance in found.pairs)
    words = (
        f"{copies:,} of {len(found.pairs):,} samples ({found.share:.0%}) are near copies of a training"
        f" picture: {found.measure} of at most {found.near_copy:g}. A fine-tuned model should draw"
        " what it learnt, not what it saw."
    )
    kind = "note alert" if copies else "note"
    nearest = sorted(found.pairs, key=lambda pair: pair[2])[:SHOWN_NEIGHBOURS]
    return (
        f'<h2>Learnt by heart?</h2><p class="{kind}">{escape(words)}</p>'
        f'<div class="sheet">{"".join(_neighbours(*pair, found.near_copy) for pair in nearest)}</div>'
    )


def _neighbours(sample: bytes, training: bytes, distance: float, near_copy: float) -> str:
    says = f"distance {distance:.3g}" + (", a near copy" if distance <= near_copy else "")
    sides = "".join(
        f'<div><img src="{data_uri(Image.open(io.BytesIO(png)), STRIP_PICTURE)}" alt="{name}, {says}">'
        f"<small>{name}</small></div>"
        for png, name in ((sample, "sample"), (training, "nearest training picture"))
    )
    return f'<div class="card tile pair"><div class="sides">{sides}</div><p class="detail">{says}</p></div>'


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: it has Greek, Cyrillic and more, unlike Pillow's own."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def grid_image(rows: Sequence[PictureRow], columns: Sequence[str] = COLUMNS) -> Image.Image:
    """The picture grid as one RGB sheet: a row a caption; for a README.

    From five captions on it is laid out in two blocks side by side.

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
            sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (x, top))
            if line == 0:
                draw.text((x + side / 2, head / 2), name, "#555555", font, anchor="mm")
    return sheet
