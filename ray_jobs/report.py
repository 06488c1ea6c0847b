"""The page that a run leaves behind: what was found, how, and the pictures. Pure: values in, HTML out.

One self-contained file: no script, nothing fetched, light and dark by the reader's own setting.
"""

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ray_jobs.dataset_report import STYLE, counted, data_uri, dataset_section, table

COLUMNS = ("real", "base", "fine-tuned")
PAGE_PICTURE = 192  # pixels a side on the page at most; larger ones are made smaller
STRIP_PICTURE = 128  # pixels a side in the strip at most: there are many
SHEET_PICTURE = 128  # pixels a side on the sheet
TEMPLATE = Path(__file__).with_name("report.html")
# Readable on white and on near-black alike; in order of the learning rate.
PALETTE = ("#3b82f6", "#e0861a", "#10a37f", "#d6498f", "#8b6cf0", "#c2a000", "#0fa5c4", "#e0523f")
# Stands for the colour of the text in the plot, which only the page knows; replaced by `currentColor`.
INK = "#010203"


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


def closed_share(winner: dict[str, Any]) -> float | None:
    """Share of the distance from the base to real pictures that the winner closed, on the test split.

    1: as near as other real pictures; 0: no better than the base; negative: worse. None where the base is
    already as near as real pictures, or a score is not finite.
    """
    base, tuned, floor = (float(winner[k]) for k in ("base_test_fid", "test_fid", "test_floor_fid"))
    if not all(map(math.isfinite, (base, tuned, floor))) or base <= floor:
        return None
    return (base - tuned) / (base - floor)


def headline(winner: dict[str, Any]) -> str:
    """The result in one sentence."""
    who = f"A learning rate of {winner['learning_rate']:g} for {counted(winner['step'], 'step')}"
    share = closed_share(winner)
    if share is None:
        return f"{who} won; the base model left no distance to real pictures to close."
    if share < 0:
        return f"{who} won, yet on the test split it is further from real pictures than the base model."
    return f"{who} closed {share:.0%} of the distance from the base model to real pictures on the test split."


def _explained(winner: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The rows of the table of results: name, value, meaning."""
    samples = winner["num_samples"]

    def fid(key: str) -> str:
        return f"{float(winner[key]):.1f}"

    share = closed_share(winner)
    return [
        (
            "Base model, test",
            fid("base_test_fid"),
            f"{samples} pictures of the model before fine-tuning, against real test pictures",
        ),
        (
            "Winner, test",
            fid("test_fid"),
            f"{samples} pictures of the winner, same captions and seeds; measured once, after the search",
        ),
        (
            "Real pictures, test",
            fid("test_floor_fid"),
            f"the floor: {samples} real training pictures against the same test pictures; at this count"
            " no model can be expected to reach 0",
        ),
        (
            "Share closed",
            "–" if share is None else f"{share:.0%}",
            "(base − winner) / (base − real pictures), on the test split",
        ),
        ("Base model, validation", fid("base_validation_fid"), "the dashed line of the plot"),
        (
            "Winner, validation",
            fid("validation_fid"),
            "what the search chose by: the lowest of all rungs, so a little flattered",
        ),
    ]


def _curves(results: Sequence[dict[str, Any]]) -> list[tuple[float, str, list[tuple[int, float]]]]:
    """(learning rate, trial, [(step, FID)]) of every trial, in order of the learning rate.

    A rung that was measured twice (a resumed search) counts once, the last time.
    """
    trials: dict[tuple[float, str], dict[int, float]] = {}
    for row in results:
        rungs = trials.setdefault((float(row["learning_rate"]), str(row["trial_id"])), {})
        rungs[int(row["step"])] = math.nan if row["fid"] is None else float(row["fid"])
    return [(rate, trial, sorted(rungs.items())) for (rate, trial), rungs in sorted(trials.items())]


def fid_plot(winner: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    """FID over steps, a line a trial, as an SVG element whose ink is the page's text colour."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    style = {"svg.fonttype": "none", "svg.hashsalt": "diffray", "font.family": "sans-serif", "font.size": 11}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6, 4.6), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        last_rung = max((int(row["step"]) for row in results), default=int(winner["step"]))
        for index, (rate, trial, rungs) in enumerate(_curves(results)):
            color = PALETTE[index % len(PALETTE)]
            points = [(step, fid) for step, fid in rungs if math.isfinite(fid)]
            ended = rungs[-1][0] < last_rung or len(points) < len(rungs)
            label = f"{rate:g}" + (" (stopped)" if ended else "")
            steps, fids = [p[0] for p in points], [p[1] for p in points]
            axes.plot(steps, fids, color=color, linewidth=2, marker="o", markersize=5, label=label)
            if ended and points:
                axes.plot(steps[-1], fids[-1], "x", color=color, markersize=12, markeredgewidth=2.5)
            if trial == winner["trial_id"]:
                best = (winner["step"], winner["validation_fid"])
                axes.plot(*best, "*", color=color, markersize=20, markeredgecolor=INK, zorder=5)
        base = float(winner["base_validation_fid"])
        axes.axhline(base, color=INK, linestyle=(0, (5, 4)), linewidth=1.2, alpha=0.7, label="base model")
        _style_axes(axes, sorted({int(row["step"]) for row in results} or {int(winner["step"])}))
        axes.xaxis.set_minor_locator(NullLocator())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    label = "Validation FID of every trial over training steps"
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return svg.replace(INK, "currentColor")


def _style_axes(axes: Any, ladder: list[int]) -> None:
    """Axes of the plot: steps on a logarithmic scale with a tick a rung, no frame, the legend below."""
    axes.patch.set_alpha(0)
    axes.set_xscale("log")
    axes.set_xticks(ladder, [f"{step:,}" for step in ladder])
    axes.margins(x=0.06, y=0.1)
    axes.set_xlabel("training steps", color=INK)
    axes.set_ylabel("validation FID (lower is better)", color=INK)
    axes.tick_params(colors=INK)
    axes.grid(axis="y", color=INK, alpha=0.12)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(INK)
    legend = axes.figure.legend(
        title="learning rate", labelcolor=INK, frameon=False, loc="outside lower center", ncols=2
    )
    legend.get_title().set_color(INK)


def _card(row: PictureRow) -> str:
    caption = escape(row.caption)
    cells = "".join(
        f'<div><img src="{data_uri(picture, PAGE_PICTURE)}" alt="{caption}: {name}">'
        f"<small>{name}</small></div>"
        for name, picture in zip(COLUMNS, row.pictures, strict=True)
    )
    return f'<figure class="card"><figcaption>{caption}</figcaption><div class="three">{cells}</div></figure>'


def _strip(strip: Strip | None) -> str:
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


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _rungs(results: Sequence[dict[str, Any]]) -> str:
    head = ("learning rate", "step", "FID", "training loss", "images/s", "trial")
    rows = [
        (
            f"{row['learning_rate']:g}",
            f"{row['step']:,}",
            _number(row["fid"], 1),
            _number(row["train_loss"], 4),
            _number(row["images_per_second"], 1),
            row["trial_id"],
        )
        for row in sorted(results, key=lambda row: (row["learning_rate"], row["step"]))
    ]
    return table(head, rows, "numbers")


def write_report(
    *,
    winner: dict[str, Any],
    results: Sequence[dict[str, Any]],
    manifest: dict[str, Any],
    config_yaml: str,
    rows: Sequence[PictureRow],
    run_name: str,
    strip: Strip | None = None,
) -> str:
    """The page of a run.

    Args:
        winner: what winner.json holds.
        results: the lines of search/results.jsonl.
        manifest: what dataset/manifest.json holds.
        config_yaml: the resolved configuration.
        rows: the picture grid.
        strip: the winning trial at each rung; None where no rung has samples.

    Returns:
        One HTML document, to be written as UTF-8.

    Raises:
        KeyError: if `winner`, `results` or `manifest` lacks a key.
    """
    facts = (
        f"FID by {winner['feature_network']}; {winner['num_samples']} pictures a score."
        f" Registered as version {winner['registry_version']}; trial {winner['trial_id']}."
    )
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        style=STYLE.read_text(encoding="utf-8"),
        run_name=escape(run_name),
        headline=escape(headline(winner)),
        summary=escape(
            f"Test FID {winner['base_test_fid']:.1f} before, {winner['test_fid']:.1f} after;"
            f" real pictures score {winner['test_floor_fid']:.1f} against each other."
        ),
        cards="".join(map(_card, rows)),
        strip=_strip(strip),
        plot=fid_plot(winner, results),
        scores=table(("FID", "", "what it is"), _explained(winner), "scores"),
        facts=escape(facts),
        rungs=_rungs(results),
        dataset=dataset_section(manifest),
        digest=escape(str(manifest["digest"])[:16]),
        config=escape(config_yaml),
    )


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: it has Greek, Cyrillic and more, unlike Pillow's own."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def grid_image(rows: Sequence[PictureRow]) -> Image.Image:
    """The picture grid as one RGB sheet: a row a caption, columns real, base, fine-tuned; for a README.

    From five captions on it is laid out in two blocks side by side.
    """
    if not rows:
        raise ValueError("rows: a sheet needs at least one caption")
    side, gap, head, words = SHEET_PICTURE, 8, 28, 128
    blocks = 1 if len(rows) < 5 else 2
    height = math.ceil(len(rows) / blocks)
    block_width = words + len(COLUMNS) * (side + gap) + 2 * gap
    sheet = Image.new("RGB", (blocks * block_width + gap, head + height * (side + gap)), "white")
    draw, font, small = ImageDraw.Draw(sheet), _font(14), _font(13)
    for index, row in enumerate(rows):
        block, line = divmod(index, height)
        left, top = block * block_width + 2 * gap, head + line * (side + gap)
        text = "\n".join(textwrap.wrap(row.caption, 15, max_lines=6, placeholder=" …"))
        draw.multiline_text((left, top + side / 2), text, "#222222", small, anchor="lm", spacing=5)
        for column, (name, picture) in enumerate(zip(COLUMNS, row.pictures, strict=True)):
            x = left + words + column * (side + gap)
            sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (x, top))
            if line == 0:
                draw.text((x + side / 2, head / 2), name, "#555555", font, anchor="mm")
    return sheet
