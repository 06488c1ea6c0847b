"""The Inception Score of class probabilities. Pure PyTorch, in float64."""

import torch

from ray_jobs.metrics.score import Score


def inception_score(probabilities: torch.Tensor, classifier: str, *, splits: int = 10) -> Score:
    """exp of the mean divergence of a picture's classes from those of all pictures.

    Salimans et al., arXiv 1606.03498, section 4.
    The mean over `splits` parts, as the paper takes it, and its standard error; the spread that papers write
    after "+-" is that of the parts, the error times the root of `splits`. Part i has the pictures i,
    i + splits, ..., so that neighbouring captions spread over the parts.

    The published scores are of the classifier of Inception v3. The FID network here has none: probabilities
    of EfficientNet-Lite0 (`EfficientNet.probabilities`) are a stand-in, whose scores compare only with
    each other. The score carries the classifier's identity as its network.

    Args:
        probabilities: float, N x C; rows sum to 1.
        classifier: FeatureNetwork.identity of what gave them.
        splits: 2 or more for an error.

    Raises:
        ValueError: if a part would be without pictures, or the rows are no probabilities.
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
    # xlogy: a class of probability 0 adds nothing.
    divergence = torch.xlogy(probabilities, probabilities) - torch.xlogy(probabilities, marginal)
    return divergence.sum(dim=1).mean().exp()
