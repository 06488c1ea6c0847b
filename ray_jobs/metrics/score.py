"""A measured number with all that it depends on."""

from dataclasses import dataclass

from ray_jobs.metrics.frechet import Moments, frechet_distance, require_same_network


@dataclass(frozen=True)
class Score:
    """`<` (so `min`) compares only what is comparable: one metric, one network, one sample count.

    Attributes:
        num_samples: pictures that were generated; a Fréchet distance falls as they grow in number.
        feature_network: FeatureNetwork.identity.
        standard_error: in the value's unit; None where it was not measured.
    """

    value: float
    num_samples: int
    feature_network: str
    standard_error: float | None = None
    metric: str = "FID"

    @classmethod
    def of(cls, generated: Moments, real: Moments) -> "Score":
        """The Fréchet distance of merged moments, of which no error can be told: see `frechet_score`."""
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
