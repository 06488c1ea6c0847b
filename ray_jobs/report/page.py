"""The report page: its parts in order."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from ray_jobs.report.charts import (
    control_charts,
    corrected_chart,
    fid_chart,
    heat_map,
    kid_chart,
    mind_chart,
    over_fitting_section,
    preference_chart,
    second_chart,
    subject_charts,
    target_chart,
    votes_chart,
)
from ray_jobs.report.dataset_page import STYLE, dataset_section, table
from ray_jobs.report.measures import SubjectPictures, balance_section, measures_table, subjects_section
from ray_jobs.report.pictures import (
    Memorisation,
    PictureRow,
    Strip,
    card,
    memorisation_section,
    prompts_section,
    strip_section,
)
from ray_jobs.report.svg import number
from ray_jobs.report.tables import Spent, costs_section, guidance_table, rungs_table, scores
from ray_jobs.report.verdict import Note, headline, notes, second_network
from ray_jobs.run.manifest import Manifest
from ray_jobs.run.records import SUBJECT, RungRow, Winner

TEMPLATE = Path(__file__).with_name("page.html")


def write_report(
    *,
    winner: Winner,
    results: Sequence[RungRow],
    manifest: Manifest,
    config_yaml: str,
    rows: Sequence[PictureRow],
    run_name: str,
    enough_samples: int,
    split: str = "validation",
    strip: Strip | None = None,
    prompts: Strip | None = None,
    memorisation: Memorisation | None = None,
    subjects: Sequence[SubjectPictures] = (),
    spent: Spent | None = None,
    guidance: Sequence[RungRow] = (),
    signs: Sequence[str] = (),
) -> str:
    """Compose the report page of a run. Parts without data are omitted.

    Args:
        results: measured rungs, or with folds the candidates.
        config_yaml: the resolved configuration.
        rows: rows of the picture grid.
        run_name: name of the run.
        enough_samples: with fewer pictures per score the page warns that the ranking may be noise.
        split: split of the captions in the grid.
        strip: the winning trial at each rung; None if no rung has samples.
        prompts: the same for the user's own prompts; None if there are none.
        memorisation: samples and their nearest training pictures.
        subjects: subjects of a DreamBooth run.
        spent: cost of the search.
        guidance: rows of `results` at each tried guidance scale, with `guidance_scale`.
        signs: lines about what may be wrong with a training.

    Returns:
        One HTML document, to be written as UTF-8.

    Raises:
        ValueError: the second scores of `results` are from different networks.
    """
    network = second_network(results)
    charts = [
        *subject_charts(winner, results),
        corrected_chart(winner, results),
        fid_chart(winner, results),
        heat_map(winner, results),
        kid_chart(winner, results),
        mind_chart(winner, results),
        preference_chart(winner, results),
        target_chart(winner, results),
        *control_charts(winner, results),
        votes_chart(winner, results),
    ]
    charts += [second_chart(winner, results, network)] if network else []
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        style=STYLE.read_text(encoding="utf-8"),
        run_name=escape(run_name),
        split=escape(split),
        headline=escape(headline(winner)),
        summary=escape(_summary(winner)),
        cards="".join(map(card, rows)),
        strip=strip_section(strip),
        prompts=prompts_section(prompts),
        charts="".join(charts),
        notes="".join(
            f'<p class="note{" alert" if each.alert else ""}">{escape(each.text)}</p>'
            for each in [*map(Note, signs), *notes(winner, results, enough_samples)]
        ),
        rungs=rungs_table(results),
        guidance=guidance_table(guidance, winner),
        losses=over_fitting_section(winner, results),
        memorisation=memorisation_section(memorisation),
        subjects=subjects_section(subjects),
        scores=table(("score", "", "meaning"), scores(winner, results), "scores"),
        measures=measures_table(winner) + balance_section(winner.balance),
        facts=escape(_facts(winner)),
        costs=costs_section(spent),
        dataset=dataset_section(manifest),
        digest=escape(manifest.digest[:16]),
        config=escape(config_yaml),
    )


def _summary(winner: Winner) -> str:
    if winner.ranked_by == SUBJECT:
        return (
            "The subject score adds up how unlike the pictures are to photos that were not trained on, what"
            " was learned by heart, and what was lost of the class, of variety and of your prompts."
        )
    before = number(winner.base_test_fid, 1, winner.base_test_fid_error)
    after = number(winner.test_fid, 1, winner.test_fid_error)
    floor = number(winner.test_floor_fid, 1)
    return (
        f"Test FID {before} before, {after} after training; real pictures score {floor} against each other."
    )


def _facts(winner: Winner) -> str:
    decision = f" ({winner.registry_decision})" if winner.registry_decision else ""
    return (
        f"FID by {winner.feature_network}; {winner.num_samples} pictures per score.{_resized(winner)}"
        f" Registered as version {winner.registry_version}{decision}; trial {winner.trial_id}."
    )


def _resized(winner: Winner) -> str:
    """Describe the shapes of generated pictures, and their resizing for the feature networks."""
    shapes, resizing = winner.test_shapes, winner.resizing
    if not shapes or not resizing:
        return ""
    named = ", ".join(f"{shape} ({count})" for shape, count in shapes.items())
    drawn = (
        f" Each caption is drawn in the shape of its real picture: {named}."
        if len(shapes) > 1
        else f" Pictures have {next(iter(shapes))} pixels."
    )
    seen = "; ".join(f"for {network.split('@')[0]} {words}" for network, words in resizing.items())
    return f"{drawn} Real and drawn pictures are treated alike: {seen}."
