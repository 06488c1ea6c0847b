"""Evaluate: sample pictures from weights and measure them against real ones.

    python -m ray_jobs.evaluate --config configs/demo.yaml

Scores the base model and every checkpoint that the run's trainings have left, on the validation split.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.storage import Storage, slug
from ray_jobs.config import Config, resolve_path
from ray_jobs.data.dataset import Dataset
from ray_jobs.metrics.frechet import Moments
from ray_jobs.metrics.score import Score
from ray_jobs.prepare import prepare
from ray_jobs.progress import say
from ray_jobs.stage import run_stage
from ray_jobs.training.checkpoint import find_rungs

# More pictures of one caption would say little about other captions; and prepare keeps no more real
# training pictures to compare with.
CAPTION_USES = 2

SAMPLES = "samples"  # folder of the pictures that are kept of a rung, beside its checkpoint


@dataclass(frozen=True)
class Kept:
    """The first pictures of an actor's share, which it writes as PNGs while it measures them.

    Attributes:
        names: of the files, one a picture.
    """

    folder: Storage
    names: list[str]


def sample_name(number: int, caption: str) -> str:
    """The file of a kept picture."""
    return f"{number}-{slug(caption)}.png"


class Evaluator:
    """An actor that keeps the base model and the feature network loaded.

    Only the fine-tuned weights change between calls.
    """

    def __init__(self, config: Config, num_threads: int) -> None:
        import torch

        from ray_jobs.diffusion.loading import load_pipeline
        from ray_jobs.metrics.inception import load_inception as load_feature_network

        torch.set_num_threads(num_threads)
        self.config, self.device = config, "cuda" if config.evaluate.use_gpu else "cpu"
        self.network = load_feature_network(resolve_path(config.evaluate.feature_network), self.device)
        self.base = load_pipeline(resolve_path(config.model.base), revision=config.model.revision)
        self.base.to(self.device)
        self.loaded: str | None = None
        self.pipeline = self.base

    def _use(self, weights: str | None) -> None:
        """Bring the pipeline to the base (None) or to the weights in a folder, by path or URI."""
        from ray_jobs.diffusion.loading import LORA_WEIGHTS, load_lora, load_pipeline

        if weights == self.loaded:
            return
        if self.pipeline is self.base and self.loaded:
            self.base.unload_lora_weights()
        self.pipeline, self.loaded = self.base, None
        if weights is None:
            return
        folder = Storage.open(weights).local_copy()
        if (folder / LORA_WEIGHTS).exists():
            load_lora(self.base, folder)
        else:
            self.pipeline = load_pipeline(str(folder)).to(self.device)
        self.loaded = weights

    def _sample(self, weights: str | None, captions: list[str], seeds: list[int]) -> Iterator[Any]:
        """Batches of pictures: uint8, N x 3 x H x W."""
        from ray_jobs.diffusion.sampling import sample_pictures

        self._use(weights)
        evaluate = self.config.evaluate
        return sample_pictures(
            self.pipeline,
            captions,
            seeds,
            resolution=self.config.data.resolution,
            num_steps=evaluate.inference_steps,
            guidance_scale=evaluate.guidance_scale,
            batch_size=evaluate.batch_size,
        )

    def sample_moments(
        self, weights: str | None, captions: list[str], seeds: list[int], kept: Kept | None = None
    ) -> Moments:
        """Feature moments of one picture a caption, of which the first are kept."""
        import torch

        from ray_jobs.data.images import encode_png

        features, names = [], list(kept.names) if kept else []
        for batch in self._sample(weights, captions, seeds):
            features.append(self.network.features(batch))
            for picture in batch[: len(names)]:
                assert kept
                kept.folder.write_bytes(names.pop(0), encode_png(picture.permute(1, 2, 0).numpy()))
        return Moments.of(torch.cat(features), self.network.identity)

    def sample_pictures(self, weights: str | None, captions: list[str], seeds: list[int]) -> list[bytes]:
        """One PNG a caption."""
        from ray_jobs.data.images import encode_png

        batches = self._sample(weights, captions, seeds)
        return [encode_png(picture.permute(1, 2, 0).numpy()) for batch in batches for picture in batch]

    def real_moments(self, pictures: list[bytes]) -> Moments:
        """Feature moments of real pictures (PNG bytes at the training resolution)."""
        import numpy as np
        import torch
        from PIL import Image

        pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in pictures]
        stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        batches = stacked.split(self.config.evaluate.batch_size)
        features = torch.cat([self.network.features(batch) for batch in batches])
        return Moments.of(features, self.network.identity)

    def score(self, real: list[Moments], *generated: Moments) -> Score:
        """FID of the merged parts; computed here so that the caller needs no PyTorch."""
        return Score.of(sum(generated[1:], generated[0]), sum(real[1:], real[0]))


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
            remote.remote(config, config.train.cpus_per_worker) for _ in range(config.evaluate.num_actors)
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

    def _measure_real(self, pictures: list[bytes]) -> list[Moments]:
        import ray

        return ray.get([a.real_moments.remote(part) for a, part in self._share(pictures)])

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

    def score(self, weights: str | None, split: str, samples: Storage | None = None) -> Score:
        """FID of the weights (None: the base model) on a split that was loaded.

        Args:
            samples: where the first `publish.sample_count` of the pictures are kept.
        """
        import ray

        names = self.sample_names(split) if samples else []
        parts = []
        for actor, captions, seeds in self._tasks(split):
            kept = Kept(samples, names[: len(captions)]) if samples else None
            names = names[len(captions) :]
            parts.append(actor.sample_moments.remote(weights, captions, seeds, kept))
        return ray.get(self.actors[0].score.remote(self._real[split], *parts))

    def sample_names(self, split: str) -> list[str]:
        """The files of the pictures that are kept of a split's rungs, one a caption."""
        count = min(self.config.publish.sample_count, self._num_samples(split))
        return [sample_name(i, caption) for i, caption in enumerate(self.captions[split][:count])]

    def floor(self, split: str) -> Score:
        """FID of as many real training pictures as `score` generates, or as many as prepare kept."""
        import ray

        pictures = self.dataset.pictures("train", self._num_samples(split))
        parts = self._measure_real([row["image"] for row in pictures])
        return ray.get(self.actors[0].score.remote(self._real[split], *parts))

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
        score = pool.score(None, "validation")
        say("evaluate", f"base: FID {score.fid:.1f} ({score.num_samples} pictures, {score.feature_network})")
        for trial, rungs in find_rungs(Storage.open(config.storage).child(config.name, "train")).items():
            for rung in rungs:
                fid = pool.score(rung.weights, "validation").fid
                say("evaluate", f"{trial}  step {rung.metrics['step']}: FID {fid:.1f}")


if __name__ == "__main__":
    run_stage(__doc__, evaluate)
