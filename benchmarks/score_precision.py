"""python -m benchmarks.score_precision [--pictures N]

How far precision moves a score, beside the score's error. `models/emoji-base` draws the same captions from
the same noise in float32, in bf16 (`evaluate.precision`), and with its linear layers stored in 8 and 4 bits
(`model.quantize`), as the demo's evaluators do. All pictures go through Inception in float32, and float32's
also through an emulation of bf16: CPUs without its instructions take minutes for what takes seconds.

A precision is right for scores if it moves none by more than a tenth of its error. `paired` is the error of
the movement itself, which the same captions and noise make small; there is none where the real pictures'
features change too.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from benchmarks.serving_faster import MODEL, NETWORK, SIDE, read_example
from ray_jobs.diffusion.sampling import sample_pictures
from ray_jobs.metrics.corrected import Correction, corrected_difference, corrected_score
from ray_jobs.metrics.feature_network import FeatureNetwork
from ray_jobs.metrics.frechet import Moments
from ray_jobs.metrics.inception import load_inception
from ray_jobs.metrics.kernel import kernel_difference, kernel_distance
from ray_jobs.metrics.resampling import frechet_score, paired_difference
from ray_jobs.metrics.score import Score
from ray_jobs.metrics.sliced import mind_difference, mind_score
from ray_jobs.weights.loading import load_pipeline

STEPS, GUIDANCE_SCALE = 10, 2.0  # of configs/demo.yaml
BATCH = 32
SHARE = 0.1  # of its error by which a score may move
PLAIN = "float32"
DRAWINGS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "bf16": {"dtype": torch.bfloat16},
    "int8": {"quantization": "int8"},
    "fp8": {"quantization": "fp8"},
    "nf4": {"quantization": "nf4"},
}
FEATURES = "bf16 features"


@dataclass(frozen=True)
class Movement:
    """How far a measure moved from float32's, the measure's error, and that of the movement, if known."""

    drawing: str
    measure: str
    value: float
    error: float
    paired: float | None = None

    @property
    def share(self) -> float:
        return abs(self.value) / self.error

    def __str__(self) -> str:
        paired = "" if self.paired is None else f"{self.paired:.4f}"
        verdict = "" if self.share <= SHARE else f"  more than {SHARE:g}"
        return (
            f"{self.drawing:>13}  {self.measure:>13}  {self.value:+9.4f}  {paired:>9}  {self.error:8.4f}  "
            f"{self.share:5.2f}{verdict}"
        )


HEADER = f"{'':>13}  {'measure':>13}  {'moved by':>9}  {'+- paired':>9}  {'error':>8}  share of it"


class Rounding(TorchDispatchMode):
    """Rounds what each operation returns to bf16, as a GPU does that sums in float32."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        return tree_map(_rounded, function(*arguments, **(named or {})))


def _rounded(value: Any) -> Any:
    floats = isinstance(value, torch.Tensor) and value.dtype == torch.float32
    return value.bfloat16().float() if floats else value


def in_bf16(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that computes as a module with weights and arithmetic in bf16; rounds its weights."""
    module.to(torch.bfloat16).float()

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        with Rounding():
            features: torch.Tensor = module(_rounded(inputs))
        return features

    return forward


def draw(model: str, captions: list[str], num_steps: int, drawing: dict[str, Any]) -> torch.Tensor:
    """Draw one picture per caption: uint8, N x 3 x SIDE x SIDE."""
    batches = sample_pictures(
        load_pipeline(model, **drawing),
        captions,
        range(len(captions)),
        shapes=[(SIDE, SIDE)] * len(captions),
        num_steps=num_steps,
        guidance_scale=GUIDANCE_SCALE,
        batch_size=BATCH,
    )
    return torch.cat(list(batches))


def features_of(network: FeatureNetwork, pictures: torch.Tensor) -> torch.Tensor:
    return torch.cat([network.features(batch) for batch in pictures.split(BATCH)])


@dataclass(frozen=True)
class Judge:
    """Features of real pictures, two thirds of which are compared with; the others tell the correction."""

    real: torch.Tensor
    moments: Moments
    correction: Correction

    @classmethod
    def of(cls, network: FeatureNetwork, pictures: torch.Tensor) -> "Judge":
        count = len(pictures) // 3
        real, others = features_of(network, pictures).split([len(pictures) - count, count])
        correction = Correction.of(real, others, count)
        assert correction is not None
        return cls(real, Moments.of(real), correction)

    def scores(self, features: torch.Tensor) -> dict[str, Score]:
        return {
            "FID": frechet_score(features, self.moments),
            "corrected FID": corrected_score(features, self.moments, self.correction),
            "KID": kernel_distance(features, self.real, ""),
            "MIND": mind_score(features, self.real, ""),
        }

    def paired_errors(self, one: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
        """Return the errors of the differences between two sets' scores."""
        found = {
            "FID": paired_difference(one, other, self.moments),
            "corrected FID": corrected_difference(one, other, self.moments, self.correction),
            "KID": kernel_difference(one, other, self.real, ""),
            "MIND": mind_difference(one, other, self.real, ""),
        }
        return {name: each.standard_error for name, each in found.items()}


def movements(
    drawing: str, scores: dict[str, Score], plain: dict[str, Score], paired: dict[str, float]
) -> Iterator[Movement]:
    """Yield how far each measure moved from that of the plain pictures."""
    for name, score in plain.items():
        assert score.standard_error is not None
        moved = scores[name].value - score.value
        yield Movement(drawing, name, moved, score.standard_error, paired.get(name))


def measure(
    model: str, network: Any, real: torch.Tensor, captions: list[str], num_steps: int = STEPS
) -> Iterator[Movement]:
    """Yield the movement of each measure by way of drawing, and by features in bf16.

    Args:
        network: feature network with a `module`; its weights are rounded in the end.
        real: real pictures, uint8, 3 N x 3 x height x width, for N captions.
    """
    judge = Judge.of(network, real)
    pictures = draw(model, captions, num_steps, DRAWINGS[PLAIN])
    features = features_of(network, pictures)
    plain = judge.scores(features)
    for name in list(DRAWINGS)[1:]:
        other = features_of(network, draw(model, captions, num_steps, DRAWINGS[name]))
        yield from movements(name, judge.scores(other), plain, judge.paired_errors(other, features))
    half = replace(network, module=in_bf16(network.module))
    scores = Judge.of(half, real).scores(features_of(half, pictures))
    yield from movements(FEATURES, scores, plain, {})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pictures", type=int, default=64, help="drawn by each; three times as many are real"
    )
    count = parser.parse_args().pictures
    real, captions = read_example(3 * count)
    print(HEADER)
    for movement in measure(MODEL, load_inception(NETWORK), real, captions[:count]):
        print(movement, flush=True)


if __name__ == "__main__":
    main()
