"""Cosine similarity of embeddings: captions to pictures, and pictures to a subject's photos. Pure PyTorch."""

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from ray_jobs.metrics.score import Score

CLIP_SCORE_SCALE = 2.5  # w of the paper


def clip_score(pictures: torch.Tensor, captions: torch.Tensor, feature_network: str) -> Score:
    """How well pictures fit their captions (Hessel et al., arXiv 2104.08718, equation 1).

    The mean of 2.5 max(cos, 0), without the paper's "A photo depicts" before the captions, as image
    generators are measured. torchmetrics 1.9 takes 100 times the mean cosine and clamps only that, so its
    number is 40 times this one where no cosine is negative, and lower where some are.

    Args:
        pictures, captions: `Clip.features` and `Clip.text_features`, float, N x D each, in the same order.
        feature_network: identity of the Clip.
    """
    if pictures.shape != captions.shape:
        raise ValueError(f"captions: one a picture; got {len(captions)} for {len(pictures)} pictures")
    cosines = (_unit(pictures) * _unit(captions)).sum(dim=1)
    return _mean(CLIP_SCORE_SCALE * cosines.clamp(min=0), feature_network, "CLIP score")


def image_similarity(generated: torch.Tensor, photos: torch.Tensor, feature_network: str) -> Score:
    """Mean cosine of each generated picture to each of the subject's photos.

    Ruiz et al. (DreamBooth, arXiv 2208.12242, section 4.2): CLIP-I with CLIP's features, DINO with DINO's.
    The error is that of drawing other pictures; the photos are fixed.

    Args:
        generated, photos: features, float, N x D and M x D.
    """
    return _mean(_likeness(generated, photos), feature_network, "image similarity")


def paired_similarity(generated: torch.Tensor, real: torch.Tensor, feature_network: str) -> Score:
    """Mean cosine of each generated picture to the real picture of its caption.

    Args:
        generated, real: features, float, N x D each; picture i of both has the same caption.
    """
    if generated.shape != real.shape:
        raise ValueError(f"real: one a picture; got {len(real)} for {len(generated)} pictures")
    cosines = (_unit(generated) * _unit(real)).sum(dim=1)
    return _mean(cosines, feature_network, "CLIP image similarity")


@dataclass(frozen=True)
class ClassDrift:
    """What fine-tuning on a subject did to the pictures of its class.

    Attributes:
        distance: how far they have moved: mean of 1 - cosine of picture i before and after, 0 to 2.
        toward_subject: how much more like the subject's photos they have become: mean cosine after, less
            before. Above its error, other members of the class begin to look like the subject.
    """

    distance: Score
    toward_subject: Score


def class_drift(
    before: torch.Tensor, after: torch.Tensor, photos: torch.Tensor, feature_network: str
) -> ClassDrift:
    """Language drift and loss of variety, as a number (Ruiz et al., arXiv 2208.12242, section 3.2).

    Args:
        before, after: features of pictures of the class prompt ("a dog") by the base model and by the
            fine-tuned one; float, N x D each, picture i of both from the same noise, so that the errors are
            those of paired differences.
        photos: features of the subject's photos; float, M x D.
    """
    if before.shape != after.shape:
        raise ValueError(f"class prompt: as many pictures before as after; got {len(before)}, {len(after)}")
    moved = 1 - (_unit(before) * _unit(after)).sum(dim=1)
    nearer = _likeness(after, photos) - _likeness(before, photos)
    return ClassDrift(
        _mean(moved, feature_network, "class drift"), _mean(nearer, feature_network, "drift toward subject")
    )


def _unit(features: torch.Tensor) -> torch.Tensor:
    return normalize(features.detach().cpu().double(), dim=1)


def _likeness(pictures: torch.Tensor, photos: torch.Tensor) -> torch.Tensor:
    """Of each picture, its mean cosine to the photos: float64, N."""
    return (_unit(pictures) @ _unit(photos).T).mean(dim=1)


def _mean(values: torch.Tensor, feature_network: str, metric: str) -> Score:
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return Score(float(values.mean()), len(values), feature_network, error, metric)
