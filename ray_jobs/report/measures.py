"""Measures beyond the ranking scores: a table of base and winner, and a section on subjects."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from ray_jobs.report.dataset_page import data_uri, table
from ray_jobs.report.svg import number
from ray_jobs.run.records import COPIES, OWN, RECITED, Balance, Measurement, SubjectScores, Winner

SUBJECT_PICTURE = 128  # maximum side in pixels

# Name, digits and meaning of each metric, in the order of the table.
METRICS = {
    "precision": (
        "Precision",
        3,
        "share of generated pictures within the manifold of real ones: quality",
    ),
    "recall": (
        "Recall",
        3,
        "share of real pictures within the manifold of generated ones: variety",
    ),
    "IS": (
        "Inception Score",
        2,
        "clear and varied classes, higher is better; comparable with published scores if the classes are "
        "Inception's, else only for the same classifier",
    ),
    "fid_infinity": (
        "FID at infinity",
        1,
        "FID extrapolated to infinitely many pictures; the error is that of the fit",
    ),
    "CLIP score": (
        "CLIP score",
        3,
        "how well pictures fit their captions, 2.5 times the cosine; higher is better",
    ),
    "CLIP image similarity": ("CLIP image similarity", 3, "cosine to the real picture of the same caption"),
    COPIES: (
        "Near copies",
        3,
        "share of pictures that nearly copy a training picture: see “Memorisation”",
    ),
    RECITED: ("… for training captions", 3, "the same, drawn for captions of training pictures"),
    OWN: (
        "Own picture nearest",
        3,
        "share of these whose nearest training picture has their caption",
    ),
}


@dataclass(frozen=True)
class SubjectPictures:
    """A subject of the run.

    Attributes:
        rows: PNGs by row heading.
    """

    scores: SubjectScores
    rows: Mapping[str, Sequence[bytes]]


def measures_table(winner: Winner) -> str:
    """Table of base and winner on the test split; empty if nothing was measured.

    It includes the values of real training pictures, if known, and lists measures that were left out.
    """
    measures = winner.measures
    if measures is None:
        return ""
    base, tuned, floor = (
        {each.metric: each for each in records}
        for records in (measures.base, measures.winner, measures.floor)
    )
    rows = []
    for metric, (name, digits, meaning) in METRICS.items():
        if metric in tuned:
            values = [_value(records.get(metric), digits) for records in (base, tuned, floor)]
            rows.append((name, *values, f"{meaning}; {_source(tuned[metric])}"))
    head = ("measure", "base", "winner", "real pictures", "what it is")
    shown = table(head, rows, "pairs") if rows else ""
    return shown + "".join(f'<p class="note">{escape(sentence)}</p>' for sentence in measures.left_out)


def balance_section(found: Balance | None) -> str:
    """Section of the attributes that pictures show; empty where they were not measured."""
    if found is None:
        return ""
    rows = [
        (label, *(f"{share:.0%} ({low:.0%} to {high:.0%})" for share, low, high in columns))
        for label, columns in found.shares.items()
    ]
    of_data = f"column {found.column}" if found.column else "by the classifier"
    head = ("attribute", f"data ({of_data})", "before training", "winner")
    outside = found.distance > found.at_most
    verdict = "more than chance explains" if outside else "which chance explains"
    drawn = sum(found.winner.values())
    told = (
        f"{drawn} pictures of {found.prompts} prompts, by {found.classifier}, with 95 % intervals. "
        f"To be like the data, a share of {found.distance:.2f} of the winner's would have to show something "
        f"else, {verdict} ({found.by_chance:.2f} on average, {found.at_most:.2f} in 95 % of cases); before "
        f"training it was {found.base_distance:.2f}. The classifier's errors are in all that it counts."
    )
    kind = "note alert" if outside else "note"
    return f'<h2>Balance</h2><p class="{kind}">{escape(told)}</p>' + table(head, rows, "numbers")


def subjects_section(subjects: Sequence[SubjectPictures]) -> str:
    """Section of pictures of each subject and its class; empty without subjects."""
    if not subjects:
        return ""
    note = (
        "Pictures of the subject's prompt should look like its photos. Pictures of its class, drawn from the"
        " same noise before and after training, should not change."
    )
    return f'<h2>Subjects</h2><p class="note">{escape(note)}</p>' + "".join(map(_subject, subjects))


def _subject(subject: SubjectPictures) -> str:
    found = subject.scores
    like = found.winner_similarity
    rows = [
        (
            "Similarity to the photos",
            _value(found.base_similarity, 3),
            _value(like, 3),
            f"mean cosine to {found.num_photos} photos; {_source(like)}",
        )
    ]
    alert = ""
    drift, toward = found.class_drift, found.toward_subject
    if drift and toward:
        rows += [
            (
                "Change of the class",
                "–",
                _value(drift, 3),
                f"1 − cosine between before and after; {_source(drift)}",
            ),
            ("… towards the subject", "–", _value(toward, 3), f"increase in similarity; {_source(toward)}"),
        ]
        if toward.value > (toward.standard_error or 0.0):
            words = f"“{found.class_prompt}” is beginning to look like the subject: {_value(toward, 3)}."
            alert = f'<p class="note alert">{escape(words)}</p>'
    head = ("measure", "base", "winner", "meaning")
    title = found.instance_prompt + (f" / {found.class_prompt}" if found.class_prompt else "")
    return f"<h3>{escape(title)}</h3>{_pictures(subject.rows)}{alert}{table(head, rows, 'pairs')}"


def _pictures(rows: Mapping[str, Sequence[bytes]]) -> str:
    lines = []
    for name, pictures in rows.items():
        opened = [Image.open(io.BytesIO(png)) for png in pictures]
        cells = "".join(
            f'<td><img src="{data_uri(picture, SUBJECT_PICTURE)}" alt="{escape(name)}"></td>'
            for picture in opened
        )
        lines.append(f'<tr><th scope="row"><span>{escape(name)}</span></th>{cells}</tr>')
    return f'<div class="wide"><table class="strip"><tbody>{"".join(lines)}</tbody></table></div>'


def _value(record: Measurement | None, digits: int) -> str:
    if record is None:
        return "–"
    if record.metric in (COPIES, RECITED, OWN):
        return f"{record.value:.1%} ± {record.standard_error:.1%}"
    return number(record.value, digits, record.standard_error)


def _source(record: Measurement) -> str:
    """Describe the number of pictures and the network of a value."""
    real = f" and {record.num_real:,} real" if record.num_real is not None else ""
    return f"{record.num_samples:,} pictures{real}, {record.feature_network}"
