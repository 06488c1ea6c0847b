"""python -m benchmarks.score_precision [--size small|full] [--output FILE]

How far precision moves a score, beside the score's error: `models/emoji-base` draws the same captions from
the same noise in float32, in bf16 (`evaluate.precision`), and with its linear layers stored in 8 and 4 bits
(`model.quantize`), and the same pictures go through Inception in float32 and in bf16. On a CPU, whose bf16
has a GPU's rounding of values; sums inside of a product may be rounded elsewhere.

A precision is right for scores if it moves none by more than a tenth of its error. The error is that of the
score; `paired` is the error of the movement itself, in pairs of pictures.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.serving_faster import GUIDANCE_SCALE, MODEL, NETWORK, SIDE, STEPS, read_example
from ray_jobs.diffusion.sampling import sample_pictures
from ray_jobs.metrics.corrected import Correction, corrected_difference, corrected_score
from ray_jobs.metrics.feature_network import FeatureNetwork
from ray_jobs.metrics.frechet import Moments
from ray_jobs.metrics.inception import Inception, load_inception
from ray_jobs.metrics.kernel import kernel_distance
from ray_jobs.metrics.resampling import frechet_score, paired_difference
from ray_jobs.metrics.score import Score
from ray_jobs.weights.loading import load_pipeline

SIZES = {"small": (48, 24, 16), "full": (673, 305, 256)}
"""Real pictures, those of them that scores are against, and drawn ones; the other real pictures tell what is
missing of few pictures."""
BATCH = 32
PLAIN = "float32"
FEATURES = "bf16 features"
SHARE = 0.1  # of its error by which a score may move


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn: the dtype of the pipeline, and the storage of the denoiser's linear layers."""

    dtype: torch.dtype = torch.float32
    quantization: str | None = None


DRAWINGS = {
    PLAIN: Drawing(),
    "bf16": Drawing(torch.bfloat16),
    "int8": Drawing(quantization="int8"),
    "fp8": Drawing(quantization="fp8"),
    "nf4": Drawing(quantization="nf4"),
    "bf16, nf4": Drawing(torch.bfloat16, "nf4"),
}


class HalfInception(Inception):
    """Inception whose weights and arithmetic are in bf16."""

    @classmethod
    def load(cls) -> "HalfInception":
        plain = load_inception(NETWORK)
        module = plain.module.to(torch.bfloat16)
        return cls(plain.name, plain.digest, plain.device, plain.num_features, module)

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super()._features(images)


@dataclass(frozen=True)
class Movement:
    """How far a measure moved, its error, and the error of the movement; None where there is no estimate."""

    value: float
    error: float
    paired: float | None

    @property
    def share(self) -> float:
        return abs(self.value) / self.error


def draw(drawing: Drawing, captions: list[str]) -> torch.Tensor:
    """Draw one picture per caption: uint8, N x 3 x SIDE x SIDE."""
    pipeline = load_pipeline(MODEL, dtype=drawing.dtype, quantization=drawing.quantization)
    batches = sample_pictures(
        pipeline,
        captions,
        range(len(captions)),
        shapes=[(SIDE, SIDE)] * len(captions),
        num_steps=STEPS,
        guidance_scale=GUIDANCE_SCALE,
        batch_size=BATCH,
    )
    return torch.cat(list(batches))


def features_of(network: FeatureNetwork, pictures: torch.Tensor) -> torch.Tensor:
    return torch.cat([network.features(batch) for batch in pictures.split(BATCH)])


@dataclass(frozen=True)
class Judge:
    """Real pictures' features, and what scores need of them."""

    real: torch.Tensor
    moments: Moments
    correction: Correction

    @classmethod
    def of(cls, features: torch.Tensor, size: str) -> "Judge":
        _, compared, count = SIZES[size]
        real, others = features[:compared], features[compared:]
        correction = Correction.of(real, others, count)
        assert correction is not None
        return cls(real, Moments.of(real), correction)

    def scores(self, features: torch.Tensor) -> dict[str, Score]:
        return {
            "FID": frechet_score(features, self.moments),
            "corrected FID": corrected_score(features, self.moments, self.correction),
            "KID": kernel_distance(features, self.real, ""),
        }

    def paired_errors(self, one: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
        """Return the errors of the differences between two sets' scores."""
        corrected = corrected_difference(one, other, self.moments, self.correction)
        fid = paired_difference(one, other, self.moments)
        return {"FID": fid.standard_error, "corrected FID": corrected.standard_error}


def movements(
    scores: dict[str, Score], plain: dict[str, Score], paired: dict[str, float]
) -> dict[str, Movement]:
    """Return how far each measure moved from that of the plain pictures."""
    return {
        name: Movement(scores[name].value - each.value, float(each.standard_error or 0), paired.get(name))
        for name, each in plain.items()
    }


def measure(size: str) -> dict[str, dict[str, Movement]]:
    """Return the movement of each measure by way of drawing, and by features in bf16."""
    total, _, count = SIZES[size]
    real, captions = read_example(total)
    captions = captions[:count]
    network, half = load_inception(NETWORK), HalfInception.load()
    judge = Judge.of(features_of(network, real), size)
    pictures = {name: draw(drawing, captions) for name, drawing in DRAWINGS.items()}
    features = {name: features_of(network, drawn) for name, drawn in pictures.items()}
    plain, found = judge.scores(features[PLAIN]), {}
    for name in list(DRAWINGS)[1:]:
        errors = judge.paired_errors(features[name], features[PLAIN])
        found[name] = movements(judge.scores(features[name]), plain, errors)
    half_judge = Judge.of(features_of(half, real), size)
    half_scores = half_judge.scores(features_of(half, pictures[PLAIN]))
    found[FEATURES] = movements(half_scores, plain, {})
    return found


def table(found: dict[str, dict[str, Movement]]) -> str:
    lines = [f"{'':>14}  {'measure':>13}  {'moved by':>9}  {'+- paired':>9}  {'error':>8}  share of it"]
    for name, movements in found.items():
        for measured, each in movements.items():
            paired = "" if each.paired is None else f"{each.paired:.4f}"
            verdict = "" if each.share <= SHARE else f"  more than {SHARE:g}"
            lines.append(
                f"{name:>14}  {measured:>13}  {each.value:+9.4f}  {paired:>9}  {each.error:8.4f}  "
                f"{each.share:.2f}{verdict}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    arguments = parser.parse_args()
    found = measure(arguments.size)
    print(table(found))
    if arguments.output:
        figures = {name: {key: vars(each) for key, each in of.items()} for name, of in found.items()}
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
