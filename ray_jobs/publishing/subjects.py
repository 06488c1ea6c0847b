"""Measures of DreamBooth subjects: similarity to the subject, and drift of its class.

Features come from `Networks.of_subjects`. Every number records its network.
"""

from dataclasses import dataclass

from ray_jobs.config import Config
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.data.sources.dreambooth import Subject
from ray_jobs.data.subjects import subjects_of
from ray_jobs.evaluation.dealing import Shape
from ray_jobs.evaluation.pool import MOST_PHOTOS, EvaluatorPool, shape_of
from ray_jobs.evaluation.scores import Features, measurement
from ray_jobs.run.records import Measurement, SubjectScores
from ray_jobs.weights.feature_networks import NetworkSet

SHOWN = 4  # pictures per kind and subject in the report


@dataclass(frozen=True)
class MeasuredSubject:
    """Measurements of a subject, with some of the pictures that they are computed from.

    Attributes:
        scores: its measures, for winner.json.
        photos: PNGs of the subject, at most `SHOWN`.
        drawn: generated PNGs by (`base` or `winner`, prompt), as many.
    """

    scores: SubjectScores
    photos: list[bytes]
    drawn: dict[tuple[str, str], list[bytes]]


def measure_subjects(
    config: Config, dataset: Dataset, pool: EvaluatorPool, weights: str
) -> list[MeasuredSubject]:
    """Measure all subjects of a run; empty if no source is a subject.

    Pictures of the subject's prompt are compared with its photos. Pictures of the class prompt from the base
    model are compared with those from the weights, from the same noise. All have the shapes of the photos.
    """
    subjects = subjects_of(config)
    if not subjects:
        return []
    rows = dataset.pictures("train", dataset.manifest.train)
    photos = [
        [row["image"] for row in rows if row["text"] == each.instance_prompt][:MOST_PHOTOS]
        for each in subjects
    ]
    shapes: dict[str, list[Shape]] = {}  # picture shapes of each prompt
    for subject, own in zip(subjects, photos, strict=True):
        for prompt in (subject.instance_prompt, subject.class_prompt):
            if prompt:
                shapes.setdefault(prompt, [shape_of(photo) for photo in own])
    drawn: dict[tuple[str, str], list[bytes]] = {}
    features: dict[tuple[str, str], Features] = {}
    for whose, which in (("base", None), ("winner", weights)):  # outer loop: each model is loaded once
        for prompt in sorted(shapes):
            place, count = (whose, prompt), config.evaluate.subject_samples
            drawn[place] = pool.prompted(which, prompt, min(SHOWN, count), shapes[prompt])
            features[place] = pool.prompted_features(which, prompt, count, shapes[prompt])
    network, by = pool.subject_network, NetworkSet.SUBJECTS
    return [
        MeasuredSubject(
            _scores(subject, pool.features(own, by=by), features, network),
            own[:SHOWN],
            drawn,
        )
        for subject, own in zip(subjects, photos, strict=True)
        if own  # empty if prepare rejected all photos, or keeps none of them for scores
    ]


def _scores(
    subject: Subject, photos: Features, features: dict[tuple[str, str], Features], network: str
) -> SubjectScores:
    import torch

    from ray_jobs.metrics.similarity import class_drift, image_similarity

    instance, kind = subject.instance_prompt, subject.class_prompt
    of_photos = torch.from_numpy(photos[network])

    def drawn(whose: str, prompt: str) -> torch.Tensor:
        return torch.from_numpy(features[whose, prompt][network])

    def similarity(whose: str) -> Measurement:
        return measurement(image_similarity(drawn(whose, instance), of_photos, network))

    found = SubjectScores(
        instance_prompt=instance,
        class_prompt=kind,
        num_photos=len(of_photos),
        base_similarity=similarity("base"),
        winner_similarity=similarity("winner"),
    )
    if not kind:
        return found
    drift = class_drift(drawn("base", kind), drawn("winner", kind), of_photos, network)
    return found | {
        "class_drift": measurement(drift.distance),
        "toward_subject": measurement(drift.toward_subject),
    }
