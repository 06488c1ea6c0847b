"""Evaluate: sample pictures from weights and measure them against real ones.

    python -m ray_jobs.evaluate --config configs/demo.yaml

Scores the base model and every checkpoint that the run's trainings have left, on the validation split.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cluster.storage import Storage, slug
from ray_jobs.config import Config
from ray_jobs.data.dataset import Dataset
from ray_jobs.evaluator import Evaluator, Features, Kept, Scores, join
from ray_jobs.metrics.resampling import PairedDifference
from ray_jobs.prepare import prepare
from ray_jobs.progress import say
from ray_jobs.report import number
from ray_jobs.stage import run_stage
from ray_jobs.training.checkpoint import find_rungs

# More pictures of one caption would say little about other captions; and prepare keeps no more real
# training pictures to compare with.
CAPTION_USES = 2

SAMPLES = "samples"  # folder of the pictures that are kept of a rung, beside its checkpoint
REAL_FEATURES = "features"  # folder in the storage: features of real pictures, by digest


def sample_name(number: int, caption: str) -> str:
    """The file of a kept picture."""
    return f"{number}-{slug(caption)}.png"


class EvaluatorPool:
    """A driver's or trial's view of the evaluators: handles and captions, cheap to send.

    Picture i of a split has caption i modulo the number of captions and starts from noise seeded with
    `evaluate.seed` + i, whatever the weights and however many actors share the work, so that checkpoints
    are compared on the same noise.
    """

    def __init__(self, config: Config, dataset: Dataset) -> None:
        import ray

        self.config, self.dataset = config, dataset
        remote = ray.remote(num_cpus=1, num_gpus=1 if config.evaluate.use_gpu else 0)(Evaluator)
        self.actors = [
            remote.remote(config, dataset, config.train.cpus_per_worker)
            for _ in range(config.evaluate.num_actors)
        ]
        self.captions: dict[str, list[str]] = {}
        self._real: dict[str, Any] = {}

    def load(self, split: str) -> None:
        """Read the captions of a split's pictures and start measuring the pictures, once."""
        import ray

        if split in self._real:
            return
        rows = self.dataset.pictures(split, self.config.evaluate.num_samples)
        self.captions[split] = [row["text"] for row in rows]
        self._real[split] = ray.put(self._measure_real([row["image"] for row in rows]))

    def _measure_real(self, pictures: list[bytes]) -> Features:
        """From the storage, where they were measured before: they cost as much as a candidate's."""
        import ray
        from safetensors.numpy import load, save

        identities = ray.get(self.actors[0].identities.remote())
        digest = hashlib.sha256("\n".join(identities).encode())
        for picture in pictures:
            digest.update(hashlib.sha256(picture).digest())
        folder = Storage.open(self.config.storage).child(REAL_FEATURES)
        file = f"{digest.hexdigest()[:32]}.safetensors"
        if folder.exists(file):
            return dict(load(folder.read_bytes(file)))
        parts = [actor.real_features.remote(part) for actor, part in self._share(pictures)]
        found = join(tuple(ray.get(parts)))
        folder.write_bytes(file, save(found))
        return found

    def _share(self, items: Sequence[Any]) -> list[tuple[Any, Sequence[Any]]]:
        """(actor, its items), in order, without empty shares (and no set of features of one picture)."""
        actors = self.actors[: max(1, len(items) // 2)]
        size = -(-len(items) // len(actors))
        return [
            (actor, items[i * size : (i + 1) * size])
            for i, actor in enumerate(actors)
            if items[i * size : (i + 1) * size]
        ]

    def _num_samples(self, split: str) -> int:
        return min(self.config.evaluate.num_samples, CAPTION_USES * len(self.captions[split]))

    def _tasks(self, split: str, count: int | None = None) -> list[tuple[Any, list[str], list[int]]]:
        captions, seed = self.captions[split], self.config.evaluate.seed
        return [
            (actor, [captions[i % len(captions)] for i in part], [seed + i for i in part])
            for actor, part in self._share(range(self._num_samples(split))[:count])
        ]

    def score(self, weights: str | None, split: str, rung: Storage | None = None) -> Scores:
        """Scores of the weights (None: the base model) on a split that was loaded.

        Args:
            rung: a folder in which the first `publish.sample_count` of the pictures and the features of all
                are kept: a checkpoint's.
        """
        import ray

        names = self.sample_names(split) if rung else []
        parts = []
        for actor, captions, seeds in self._tasks(split):
            kept = Kept(rung.child(SAMPLES), names[: len(captions)]) if rung else None
            names = names[len(captions) :]
            parts.append(actor.sample_features.remote(weights, captions, seeds, kept))
        return ray.get(self.actors[0].score.remote(self._real[split], rung, *parts))

    def validation_loss(self, weights: str | None) -> float:
        """The denoising loss of the weights on validation rows, at fixed timesteps and noise."""
        import ray

        return ray.get(self.actors[-1].validation_loss.remote(weights))

    def difference(self, one: Storage, other: Storage, split: str) -> PairedDifference:
        """By how much the FID of one folder's features is above another's, made from the same noise."""
        import ray

        return ray.get(self.actors[0].difference.remote(self._real[split], one, other))

    def sample_names(self, split: str) -> list[str]:
        """The files of the pictures that are kept of a split's rungs, one a caption."""
        count = min(self.config.publish.sample_count, self._num_samples(split))
        return [sample_name(i, caption) for i, caption in enumerate(self.captions[split][:count])]

    def floor(self, split: str) -> Scores:
        """Scores of as many real training pictures as `score` generates, or as many as prepare kept."""
        import ray

        pictures = self.dataset.pictures("train", self._num_samples(split))
        found = self._measure_real([row["image"] for row in pictures])
        return ray.get(self.actors[0].score.remote(self._real[split], None, found))

    def pictures(self, weights: str | None, split: str, count: int) -> list[bytes]:
        """PNGs for the first captions of a split, from the noise that `score` uses."""
        import ray

        parts = [a.sample_pictures.remote(weights, *work) for a, *work in self._tasks(split, count)]
        return [picture for part in ray.get(parts) for picture in part]

    def stop(self) -> None:
        import ray

        for actor in self.actors:
            ray.kill(actor)


@contextmanager
def evaluators(config: Config, dataset: Dataset) -> Iterator[EvaluatorPool]:
    """Evaluators that live as long as the block."""
    pool = EvaluatorPool(config, dataset)
    try:
        yield pool
    finally:
        pool.stop()


def evaluate(config: Config) -> None:
    """Run the stage."""
    dataset = prepare(config)
    with evaluators(config, dataset) as pool:
        pool.load("validation")
        found = pool.score(None, "validation")
        fid = found.fid
        say("evaluate", f"base: {told(found)} ({fid.num_samples} pictures, {fid.feature_network})")
        for trial, rungs in find_rungs(Storage.open(config.storage).child(config.name, "train")).items():
            for rung in rungs:
                found = pool.score(rung.weights, "validation")
                say("evaluate", f"{trial}  step {rung.metrics['step']}: {told(found)}")


def told(found: Scores) -> str:
    """The scores for a person."""
    named = {"FID": (found.fid, 1), "KID": (found.kid, 4)}
    if found.second:
        named[f"Fréchet distance by {found.second.feature_network.split('@')[0]}"] = (found.second, 2)
    lines = []
    for name, (score, digits) in named.items():
        if score:
            lines.append(f"{name} {number(score.value, digits, score.standard_error)}")
    return ", ".join(lines)


if __name__ == "__main__":
    run_stage(__doc__, evaluate)
