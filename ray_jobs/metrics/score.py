"""A score with everything that it depends on."""

from dataclasses import dataclass

from ray_jobs.metrics.frechet import Moments, frechet_distance, require_same_network


@dataclass(frozen=True)
class Score:
    """Score that `<` (and `min`) compares only with scores of the same metric, network and sample count.

    Attributes:
        num_samples: number of generated pictures; a Fréchet distance falls as it grows.
        feature_network: FeatureNetwork.identity.
        standard_error: error in the value's unit; None if it was not estimated.
    """

    value: float
    num_samples: int
    feature_network: str
    standard_error: float | None = None
    metric: str = "FID"

    @classmethod
    def of(cls, generated: Moments, real: Moments) -> "Score":
        """Fréchet distance of moments, without an error; for one with an error see `frechet_score`."""
        return cls(frechet_distance(generated, real), generated.count, generated.feature_network)

    @property
    def fid(self) -> float:
        assert self.metric == "FID"
        return self.value

    def __lt__(self, other: "Score") -> bool:
        require_same_network(self.feature_network, other.feature_network)
        if self.metric != other.metric:
            raise ValueError(f"metric: {self.metric} and {other.metric} do not compare")
        if self.num_samples != other.num_samples:
            raise ValueError(
                f"num_samples: {self.metric}s of {self.num_samples} and {other.num_samples} pictures do not"
                " compare; score both on as many"
            )
        return self.value < other.value
