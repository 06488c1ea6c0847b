"""Inception Score of class probabilities. Pure PyTorch, in float64."""

import torch

from ray_jobs.metrics.score import Score


def inception_score(probabilities: torch.Tensor, classifier: str, *, splits: int = 10) -> Score:
    """Inception Score: exp of the mean KL divergence of a picture's classes from those of all pictures.

    Salimans et al., arXiv 1606.03498, section 4.
    The value is the mean over `splits` parts, as in the paper, with its standard error. Papers report the
    parts' standard deviation after "+-", which is the error times the square root of `splits`. Part i has the
    pictures i, i + splits, ..., so that neighbouring captions are spread over the parts.

    Published scores use the classes of Inception v3 (`InceptionClasses`), which the FID network's file here
    does not include. Probabilities of EfficientNet-Lite0 (`EfficientNet.classes`) stand in for them; their
    scores are comparable only with each other. The score records the classifier's identity as its network.

    Args:
        probabilities: float, N x C; rows sum to 1.
        classifier: FeatureNetwork.identity of the classifier.
        splits: number of parts; an error needs at least 2.

    Raises:
        ValueError: a part would be empty, or the rows are not probabilities.
    """
    if not 1 <= splits <= len(probabilities):
        raise ValueError(f"splits: from 1 to the number of pictures, {len(probabilities)}; not {splits}")
    probabilities = probabilities.double()
    if probabilities.min() < 0 or (probabilities.sum(dim=1) - 1).abs().max() > 1e-3:
        raise ValueError("probabilities: each row must sum to 1; give them after the softmax")
    parts = torch.stack([_of_part(probabilities[i::splits]) for i in range(splits)])
    error = float(parts.std() / splits**0.5) if splits > 1 else None
    return Score(float(parts.mean()), len(probabilities), classifier, error, "IS")


def _of_part(probabilities: torch.Tensor) -> torch.Tensor:
    marginal = probabilities.mean(dim=0)
    # xlogy: a class of probability 0 contributes 0.
    divergence = torch.xlogy(probabilities, probabilities) - torch.xlogy(probabilities, marginal)
    return divergence.sum(dim=1).mean().exp()
