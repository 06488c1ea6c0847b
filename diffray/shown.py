"""What a notebook shows of a run and of pictures, as HTML that needs nothing else."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from ray_jobs.report.charts import points_of, trials_of
from ray_jobs.report.dataset_page import STYLE, data_uri
from ray_jobs.report.svg import Chart, Curve, line_chart
from ray_jobs.report.tables import rungs_table
from ray_jobs.run.records import RungRow

if TYPE_CHECKING:
    from PIL import Image

HEIGHT = 560
"""Height of a run's frame, in CSS pixels."""


def run_page(name: str, status: str, line: str, rows: Sequence[RungRow]) -> str:
    """Return a run's state, curves and rungs, in a frame that keeps its style to itself.

    Args:
        line: the last one that the run has printed.
    """
    head = f"<h3>{escape(name)}: {status}</h3><p class='note'>{escape(line)}</p>"
    body = head + (charts(rows) + f'<div class="wide">{rungs_table(rows)}</div>' if rows else "")
    page = f"<style>{STYLE.read_text(encoding='utf-8')} body {{ padding: .5rem }}</style>{body}"
    height = HEIGHT if rows else 120
    return (
        f'<iframe title="run {escape(name)}" srcdoc="{escape(page)}" '
        f'style="width: 100%; height: {height}px; border: 0"></iframe>'
    )


def charts(rows: Sequence[RungRow]) -> str:
    """Return the ranking score and the training loss over the steps, one curve per trial."""
    measure = rows[0].measure
    drawn = [
        (rows[0].ranked_by, f"Validation {measure.name}", measure.digits),
        ("train_loss", "Training loss", 4),
    ]
    figures = []
    for key, title, digits in drawn:
        trials = enumerate(trials_of(rows))
        curves = [Curve(label, points_of(rungs, key), color) for color, (label, _, rungs) in trials]
        description = "One line per trial, one point per rung; lower is better."
        figures.append(line_chart(Chart(key, title, description, title.lower(), digits), curves))
    return f'<div class="charts">{"".join(figures)}</div>'


def pictures(shown: "Sequence[Image.Image]") -> str:
    """Return pictures side by side, in their own size."""
    return "".join(
        f'<img alt="" style="margin: 2px" src="{data_uri(each, max(each.size))}">' for each in shown
    )
