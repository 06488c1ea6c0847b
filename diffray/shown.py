"""What a notebook shows of a run and of pictures, as HTML that needs nothing else."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from diffray.progress import best_rung, spent
from ray_jobs.config import Config
from ray_jobs.report.charts import points_of, trials_of
from ray_jobs.report.dataset_page import STYLE, data_uri
from ray_jobs.report.svg import Chart, Curve, Point, line_chart, number
from ray_jobs.report.tables import rungs_table
from ray_jobs.run.records import RungRow, Winner
from ray_jobs.run.series import Losses

if TYPE_CHECKING:
    from PIL import Image

HEIGHT = 560
"""Height of a run's frame, in CSS pixels."""

THUMBNAIL = 192  # longer side of a picture in it, in pixels


def run_state(name: str, status: str, line: str, facts: str, signs: Sequence[str] = ()) -> str:
    """Return a run's state in a line, what may be wrong with it, and the last line that it has printed.

    Args:
        facts: best score and cost, as `run_facts` writes them.
        signs: as `ray_jobs.run.signs.signs_of` returns them.
    """
    told = f"<div><b>{escape(name)}: {status}</b> {escape(facts)}</div>"
    told += "".join(f"<div style='color: #c73e1d'>{escape(each)}</div>" for each in signs)
    return f"{told}<pre style='white-space: pre-wrap; margin: .3em 0'>{escape(line)}</pre>"


def run_facts(config: Config, rows: Sequence[RungRow], winner: Winner | None) -> str:
    """Return the best score, hours and cost of a run in words; empty before its first rung."""
    if not rows:
        return ""
    best, (hours, cost) = best_rung(config, rows, winner), spent(config, rows)
    score = f"{best.measure.name} {number(best.score, best.measure.digits)} at {best.step:,} steps"
    price = "" if cost is None else f", cost {cost:.2f}"
    return f"{'winner:' if winner else 'best'} {score} · {hours:.2f} worker hours{price}"


def run_frame(name: str, rows: Sequence[RungRow], losses: Losses, drawn: "Sequence[Image.Image]" = ()) -> str:
    """Return a run's curves, pictures and rungs, in a frame that keeps its style to itself.

    Empty before there is anything to show.

    Args:
        drawn: pictures of the best rung.
    """
    if not (rows or losses):
        return ""
    body = charts(rows, losses)
    body += "".join(f'<img alt="" style="width: 8rem" src="{data_uri(each, THUMBNAIL)}"> ' for each in drawn)
    body += f'<div class="wide">{rungs_table(rows)}</div>' if rows else ""
    page = f"<style>{STYLE.read_text(encoding='utf-8')} body {{ padding: .5rem }}</style>{body}"
    return (
        f'<iframe title="run {escape(name)}" srcdoc="{escape(page)}" '
        f'style="width: 100%; height: {HEIGHT}px; border: 0"></iframe>'
    )


def charts(rows: Sequence[RungRow], losses: Losses) -> str:
    """Return the ranking score and the training loss over the steps.

    Args:
        losses: of every training; without, the loss is that of the rungs.
    """
    described = "One line per trial, one point per rung; lower is better."
    figures, trials = [], trials_of(rows)

    def of_rungs(key: str, title: str, digits: int) -> str:
        curves = [
            Curve(label, points_of(rungs, key), color) for color, (label, _, rungs) in enumerate(trials)
        ]
        return line_chart(Chart(key, title, described, title.lower(), digits), curves)

    if rows:
        measure = rows[0].measure
        figures.append(of_rungs(rows[0].ranked_by, f"Validation {measure.name}", measure.digits))
    figures.append(loss_chart(rows, losses) if losses else of_rungs("train_loss", "Training loss", 4))
    return f'<div class="charts">{"".join(figures)}</div>'


def loss_chart(rows: Sequence[RungRow], losses: Losses) -> str:
    """Return the training loss over all steps, one line per training, in the colour of its trial."""
    trials = {trial: (color, label) for color, (label, trial, _) in enumerate(trials_of(rows))}
    owners = {row.training_name: row.trial_id for row in rows}
    folds = len(owners) > len(
        trials
    )  # a trial has several trainings then, which its label does not tell apart
    curves = []
    for place, (name, points) in enumerate(losses.items()):
        color, label = trials.get(owners.get(name, ""), (len(trials) + place, name))
        values = [Point(step, loss) for step, loss in points]
        curves.append(Curve(name if folds else label, values, color, dots=False))
    curves.sort(key=lambda each: each.color)
    described = "One line per training; each value is the mean over the steps since the one before."
    return line_chart(Chart("train_loss", "Training loss", described, "training loss", 4), curves)


def pictures(shown: "Sequence[Image.Image]") -> str:
    """Return pictures side by side, in their own size."""
    return "".join(
        f'<img alt="" style="margin: 2px" src="{data_uri(each, max(each.size))}">' for each in shown
    )
