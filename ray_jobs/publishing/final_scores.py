"""Final scores of a published model: base and winner on the test split, near copies, subjects."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import fmean
from typing import Any

from cluster.storage import Storage
from ray_jobs.config import Config, Effect, EvaluateConfig
from ray_jobs.console import say
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.evaluation.cross_validation import splits, standard_error, trained_on
from ray_jobs.evaluation.dealing import Shape
from ray_jobs.evaluation.pool import EvaluatorPool
from ray_jobs.evaluation.scores import Copies
from ray_jobs.publishing.subjects import MeasuredSubject, measure_subjects
from ray_jobs.report import SHOWN_NEIGHBOURS, Memorisation, SubjectPictures

SHOWN_OF_SUBJECT = 4  # pictures per kind and subject in the report


@dataclass(frozen=True)
class FinalScores:
    """Final measurements of publish.

    Attributes:
        numbers: values for winner.json.
        memorisation: near copies; None if `evaluate.memorisation_pictures` is 0.
        subjects: pictures of each subject; empty if no source is a subject.
    """

    numbers: dict[str, Any]
    memorisation: Memorisation | None
    subjects: list[SubjectPictures]


def settings_of(evaluate: EvaluateConfig) -> dict[str, Any]:
    """Settings that affect these scores but not the search; stored in winner.json."""
    return evaluate.affecting(Effect.PUBLISHING)


def counted(shapes: Iterable[Shape]) -> dict[str, int]:
    """Count pictures by shape, named width x height, the most frequent first."""
    return dict(Counter(f"{width}x{height}" for height, width in shapes).most_common())


def measure_final(
    config: Config, dataset: Dataset, pool: EvaluatorPool, weights: str, guidance_scale: float | None = None
) -> FinalScores:
    """Measure base and winner, each sampled once. Only this function reads the test split.

    Args:
        weights: weights of the winner.
        guidance_scale: scale that the search chose for the winner; the base is sampled at the configured one.
    """
    pool.load("test")
    for split in splits(config):
        pool.load(split)
    run = Storage.open(config.storage).child(config.name)
    base, test = pool.measure(None, "test"), pool.measure(weights, "test", guidance_scale, run)
    floor = pool.floor("test")
    fid, lowest = test.scores.fid, floor.fid
    if lowest.num_samples < fid.num_samples:
        say("publish", f"the floor comes out high: it has {lowest.num_samples} real training pictures only")
    judged = [pool.score(None, split).fid for split in splits(config)]
    values = [each.value for each in judged]
    subjects = measure_subjects(config, dataset, pool, weights)
    numbers: dict[str, Any] = test.scores.row("test_") | base.scores.row("base_test_")
    numbers |= test.scores.origin
    numbers |= {
        "base_validation_fid": fmean(values),
        "base_validation_fid_error": standard_error(values)
        if config.search.folds
        else judged[0].standard_error,
        "validation_num_samples": judged[0].num_samples,
        "test_floor_fid": lowest.value,
        "measures": {"base": base.records(), "winner": test.records(), "left_out": test.left_out}
        | {"floor": pool.real_against_real("test")},
        "measure_settings": settings_of(config.evaluate),
        "test_shapes": counted(islice(cycle(pool.shapes["test"]), fid.num_samples)),
        "resizing": pool.resizing(),
        "test_digest": pool.digests["test"],
        "subjects": [each.numbers for each in subjects],
    }
    memorisation = _memorisation(config, pool, weights, test.copies, guidance_scale) if test.copies else None
    return FinalScores(numbers, memorisation, [_pictures(each) for each in subjects])


def _memorisation(
    config: Config,
    pool: EvaluatorPool,
    weights: str,
    copies: Copies,
    guidance_scale: float | None,
) -> Memorisation:
    """Collect the samples nearest to a training picture; only these are sampled again, for the report."""
    order = sorted(range(len(copies.nearest)), key=lambda i: copies.nearest[i][1])[:SHOWN_NEIGHBOURS]
    trained = trained_on(config, pool.dataset, "test")
    parts = ("train", "validation") if config.search.folds else ("train",)
    seen = trained.pictures("train", config.evaluate.memorisation_pictures)
    drawn_again = pool.pictures(weights, "test", order, guidance_scale)
    pairs = [
        (drawn, seen[copies.nearest[i][0]]["image"], copies.nearest[i][1])
        for i, drawn in zip(order, drawn_again, strict=True)
    ]
    return Memorisation(
        pairs=pairs,
        num_samples=len(copies.nearest),
        share=copies.share,
        near_copy=copies.threshold,
        expected_share=copies.expected_share,
        num_held_out=copies.num_held_out,
        num_training=copies.num_training,
        of_training=sum(trained.manifest[name] for name in parts),
        feature_network=copies.feature_network,
    )


def _pictures(subject: MeasuredSubject) -> SubjectPictures:
    instance, kind = subject.numbers["instance_prompt"], subject.numbers["class_prompt"]
    columns = {"photo": subject.photos, "subject, fine-tuned": subject.drawn["winner", instance]}
    if kind:
        columns["class, base"] = subject.drawn["base", kind]
        columns["class, fine-tuned"] = subject.drawn["winner", kind]
    shown = {name: pictures[:SHOWN_OF_SUBJECT] for name, pictures in columns.items()}
    return SubjectPictures(subject.numbers, shown)
