"""Parts of the pages as HTML: tables, notes, histograms."""

from collections.abc import Sequence
from html import escape

# Units of the plot's own view box; the page scales it.
PLOT_WIDTH, PLOT_HEIGHT, PLOT_HEAD, PLOT_FOOT = 240, 84, 6, 16
BAR_GAP = 0.8
LEAST_BAR = 1.5  # keeps one picture among thousands visible


def table(head: Sequence[str], rows: Sequence[Sequence[object]], kind: str = "") -> str:
    """Format an HTML table of escaped cells, with the style class `kind`; it scrolls if too wide."""
    columns = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(v))}</td>" for v in row) + "</tr>" for row in rows)
    content = f"<thead><tr>{columns}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table class="{kind}">{content}</table></div>'


def counted(number: int, noun: str) -> str:
    """Format a count: 1 and "step" -> `1 step`; 1200 and "step" -> `1,200 steps`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def note(text: str, kind: str = "note") -> str:
    return f'<p class="{kind}">{escape(text)}</p>'


def _position(value: float, edges: Sequence[float]) -> float:
    """Position of `value` on an axis with bins of equal width, in bins from the left.

    A measure with logarithmic bins thus gets a logarithmic axis. Values beyond the edges are at the end.
    """
    for index, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        if value < high:
            return index + max(0.0, (value - low) / (high - low))
    return len(edges) - 1.0


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bar(left: float, right: float, height: float, cut: float, side: str) -> str:
    """Draw a histogram bar, in two parts if the threshold at `cut` divides it."""
    at = min(max(cut, left), right)
    kinds = ("beyond", "kept") if side == "below" else ("kept", "beyond")
    return "".join(
        f'<rect class="{kind}" x="{start:.2f}" y="{PLOT_HEIGHT - height:.2f}"'
        f' width="{end - start:.2f}" height="{height:.2f}"/>'
        for start, end, kind in ((left, at, kinds[0]), (at, right, kinds[1]))
        if end > start
    )


def histogram_svg(
    edges: Sequence[float],
    counts: Sequence[int],
    label: str,
    threshold: float | None = None,
    side: str = "below",
) -> str:
    """Draw a histogram as SVG, tinted on the `side` of a threshold, which is a dashed line.

    Args:
        edges: increasing edges of the bins, one more than `counts`.
        label: what is counted, for screen readers.
    """
    step, highest = PLOT_WIDTH / len(counts), max([*counts, 1])
    nothing_beyond = 0.0 if side == "below" else float(PLOT_WIDTH)
    cut = nothing_beyond if threshold is None else _position(threshold, edges) * step
    parts = [
        _bar(
            index * step,
            (index + 1) * step - BAR_GAP,
            max(LEAST_BAR, (PLOT_HEIGHT - PLOT_HEAD) * count / highest),
            cut,
            side,
        )
        for index, count in enumerate(counts)
        if count
    ]
    parts.append(f'<line x1="0" x2="{PLOT_WIDTH}" y1="{PLOT_HEIGHT}" y2="{PLOT_HEIGHT}"/>')
    if threshold is not None:
        parts.append(f'<line class="threshold" x1="{cut:.2f}" x2="{cut:.2f}" y1="0" y2="{PLOT_HEIGHT}"/>')
    parts += [
        f'<text x="{at * step:.2f}" y="{PLOT_HEIGHT + 12}" text-anchor="{anchor}">{_short(edges[at])}</text>'
        for at, anchor in ((0, "start"), (len(counts) // 2, "middle"), (len(counts), "end"))
    ]
    box = f"0 0 {PLOT_WIDTH} {PLOT_HEIGHT + PLOT_FOOT}"
    return f'<svg role="img" aria-label="{escape(label)}" viewBox="{box}">{"".join(parts)}</svg>'
