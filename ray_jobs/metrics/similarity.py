"""Cosine similarity of embeddings: captions to pictures, and pictures to a subject's photos. Pure PyTorch."""

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from ray_jobs.metrics.score import Score

CLIP_SCORE_SCALE = 2.5  # w of the paper


def clip_score(pictures: torch.Tensor, captions: torch.Tensor, feature_network: str) -> Score:
    """CLIPScore: agreement of pictures with their captions (Hessel et al., arXiv 2104.08718, equation 1).

    The value is the mean of 2.5 max(cos, 0), without the paper's prefix "A photo depicts", as is usual for
    image generators. torchmetrics 1.9 takes 100 times the mean cosine and clamps only the mean, so its
    value is 40 times this one if no cosine is negative, and lower otherwise.

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
    The error covers the sampling of the pictures; the photos are fixed.

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
    """Effect of fine-tuning on a subject on the pictures of its class.

    Attributes:
        distance: mean of 1 - cosine of picture i before and after, 0 to 2.
        toward_subject: mean cosine to the subject's photos after minus before. If it exceeds its error, other
            members of the class are becoming similar to the subject.
    """

    distance: Score
    toward_subject: Score


def class_drift(
    before: torch.Tensor, after: torch.Tensor, photos: torch.Tensor, feature_network: str
) -> ClassDrift:
    """Measure language drift and loss of variety (Ruiz et al., arXiv 2208.12242, section 3.2).

    Args:
        before, after: features of pictures of the class prompt ("a dog") from the base model and from the
            fine-tuned one; float, N x D each. Picture i of both has the same noise, so the errors are those
            of paired differences.
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
    """Mean cosine of each picture to the photos: float64, N."""
    return (_unit(pictures) @ _unit(photos).T).mean(dim=1)


def _mean(values: torch.Tensor, feature_network: str, metric: str) -> Score:
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return Score(float(values.mean()), len(values), feature_network, error, metric)
