"""The pool of evaluators: which actor draws which pictures, and the scores of them all."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cluster.storage import Storage
from ray_jobs.config import Config
from ray_jobs.console import say
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.evaluation.actor import FEATURES, Evaluator, Kept, join
from ray_jobs.evaluation.cross_validation import held_out, trained_on
from ray_jobs.evaluation.dealing import Shape, dealt, in_order
from ray_jobs.evaluation.scores import Features, Measures, Real, Record, Scores
from ray_jobs.metrics.resampling import PairedDifference
from ray_jobs.run.samples import SAMPLES, sample_name

# More pictures of one caption would say little about other captions; and prepare keeps no more real
# training pictures to compare with.
CAPTION_USES = 2

RESTARTS = 10  # of an evaluator: one that dies again and again has another cause than a node

REAL_FEATURES = "features"  # folder in the storage: features of real pictures, by digest


class Task(NamedTuple):
    """What an actor draws: M pictures."""

    actor: Any
    numbers: list[int]  # their places in the order that was asked for
    captions: list[str]
    seeds: list[int]
    shapes: list[Shape]


class EvaluatorPool:
    """A driver's or trial's view of the evaluators: handles and captions, cheap to send.

    Picture i of a split has the caption and the shape of real picture i modulo their number and starts from
    noise seeded with `evaluate.seed` + i, in the same batch, whatever the weights and however many actors
    share the work, so that checkpoints are compared on the same noise.
    """

    def __init__(self, config: Config, dataset: Dataset) -> None:
        import ray

        self.config, self.dataset = config, dataset
        # One whose process or node dies starts again elsewhere and repeats what it was asked.
        remote = ray.remote(
            num_cpus=1,
            num_gpus=1 if config.evaluate.use_gpu else 0,
            max_restarts=RESTARTS,
            max_task_retries=-1,
        )(Evaluator)
        self.actors = [
            remote.remote(config, dataset, config.train.cpus_per_worker)
            for _ in range(config.evaluate.num_actors)
        ]
        self.captions: dict[str, list[str]] = {}
        self.shapes: dict[str, list[Shape]] = {}  # of the same pictures
        self.digests: dict[str, str] = {}  # of these pictures and their captions
        self._real: dict[str, Any] = {}
        self._training: dict[int | None, Features] = {}  # by the fold that is left out

    def load(self, split: str) -> None:
        """Read the captions of a split's pictures and start measuring the pictures, once.

        Args:
            split: or a fold of cross-validation, `fold-2`.
        """
        import ray

        if split in self._real:
            return
        dataset, name = self.dataset.judged_by(split)
        rows = dataset.pictures(name, self.config.evaluate.num_samples)
        self.captions[split] = [row["text"] for row in rows]
        self.shapes[split] = [shape_of(row["image"]) for row in rows]
        digest = hashlib.sha256()
        for row in rows:
            digest.update(
                hashlib.sha256(row["image"]).digest() + hashlib.sha256(row["text"].encode()).digest()
            )
        self.digests[split] = digest.hexdigest()
        if (count := self._num_samples(split)) < (wanted := self.config.evaluate.num_samples):
            say(
                "evaluate",
                f"{split}: {len(rows):,} captions, so {count:,} pictures a score and not the {wanted:,} of "
                f"evaluate.num_samples: at most {CAPTION_USES} of a caption; hold out more pictures for more",
            )
        self._real[split] = ray.put(Real.of(self._measure_real([row["image"] for row in rows])))

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
        found = self.features(pictures)
        folder.write_bytes(file, save(found))
        return found

    def features(self, pictures: Sequence[bytes]) -> Features:
        """Of PNGs, by all networks."""
        import ray

        shares = self._share([shape_of(picture) for picture in pictures])
        parts = [
            actor.picture_features.remote([pictures[number] for number in numbers])
            for actor, numbers in shares
        ]
        return join(ray.get(parts), [numbers for _, numbers in shares])

    def _share(self, shapes: Sequence[Shape]) -> list[tuple[Any, list[int]]]:
        """(actor, numbers of its pictures); see `dealt`."""
        shares = dealt(shapes, len(self.actors), self.config.evaluate.batch_size)
        return list(zip(self.actors, shares, strict=False))

    def _num_samples(self, split: str) -> int:
        return min(self.config.evaluate.num_samples, CAPTION_USES * len(self.captions[split]))

    def _tasks(self, split: str, wanted: Sequence[int] | None = None) -> list[Task]:
        """Who draws which of a split's pictures: of these numbers, or all that a score takes."""
        captions, shapes = self.captions[split], self.shapes[split]
        wanted = range(self._num_samples(split)) if wanted is None else wanted
        count, seed = len(captions), self.config.evaluate.seed
        return self._dealt_tasks(
            [captions[i % count] for i in wanted],
            [seed + i for i in wanted],
            [shapes[i % count] for i in wanted],
        )

    def _dealt_tasks(
        self, captions: Sequence[str], seeds: Sequence[int], shapes: Sequence[Shape]
    ) -> list[Task]:
        return [
            Task(
                actor,
                numbers,
                [captions[i] for i in numbers],
                [seeds[i] for i in numbers],
                [shapes[i] for i in numbers],
            )
            for actor, numbers in self._share(shapes)
        ]

    def score(
        self,
        weights: str | None,
        split: str,
        rung: Storage | None = None,
        guidance_scale: float | None = None,
    ) -> Scores:
        """Scores of the weights (None: the base model) on a split that was loaded.

        Args:
            rung: a folder in which the first `publish.sample_count` of the pictures and the features of all
                are kept: a checkpoint's.
            guidance_scale: None: `evaluate.guidance_scale`.
        """
        import ray

        names = dict(enumerate(self.sample_names(split)))
        parts, tasks = [], self._tasks(split)
        for actor, numbers, captions, seeds, shapes in tasks:
            kept = Kept(rung.child(SAMPLES), [names.get(i) for i in numbers]) if rung else None
            work = weights, captions, seeds, kept, guidance_scale
            parts.append(actor.sample_features.remote(*work, shapes=shapes))
        shares = [task.numbers for task in tasks]
        return ray.get(self.actors[0].score.remote(self._real[split], rung, shares, *parts))

    def measure(
        self,
        weights: str | None,
        split: str,
        guidance_scale: float | None = None,
        kept: Storage | None = None,
    ) -> Measures:
        """All measures of the weights on a split that was loaded, from the pictures that `score` draws.

        Args:
            kept: a folder in which the features are kept, `TEST_FEATURES`.

        Near copies are looked for among the first `evaluate.memorisation_pictures` of the training pictures
        that prepare keeps, in the order of their digests; the pictures of `held_out` say what is near.
        """
        import ray

        held = held_out(self.config, split)
        self.load(held)
        bound = self.config.evaluate.memorisation_pictures
        training = self.training_features(split, bound) if bound else None
        unseen = self._real[held] if self.dataset.manifest["held_out"] else None
        tasks = self._tasks(split)
        parts = [
            actor.sample_features.remote(weights, captions, seeds, None, guidance_scale, True, shapes)
            for actor, _, captions, seeds, shapes in tasks
        ]
        shares = [task.numbers for task in tasks]
        given = self._real[split], self.captions[split], training, unseen, shares, kept
        return ray.get(self.actors[0].measure.remote(*given, *parts))

    def training_features(self, split: str, count: int) -> Features:
        """Of the first pictures that the weights which a split judges were trained on, in the order of
        `Dataset.pictures`; measured once."""
        dataset = trained_on(self.config, self.dataset, split)
        if dataset.without_fold not in self._training:
            evaluate = self.config.evaluate
            rows = dataset.pictures("train", max(evaluate.memorisation_pictures, evaluate.num_samples))
            self._training[dataset.without_fold] = self._measure_real([row["image"] for row in rows])
        return {name: each[:count] for name, each in self._training[dataset.without_fold].items()}

    def reference(self, checkpoint: Storage) -> Features:
        """What drift of a served checkpoint is told by: float32, N x D, named `<network>/<kind>`.

        The kinds: `validation`, pictures that it never saw (`held_out` of the test split, which publish has
        read by then); `training` pictures, where near copies are looked for; and `published`, those that the
        checkpoint's score was taken of.
        """
        import ray
        from safetensors.numpy import load

        held = held_out(self.config, "test")
        self.load(held)
        kinds: dict[str, Features] = {"validation": ray.get(self._real[held]).features}
        if bound := self.config.evaluate.memorisation_pictures:
            kinds["training"] = self.training_features("test", bound)
        if checkpoint.exists(FEATURES):
            kinds["published"] = dict(load(checkpoint.read_bytes(FEATURES)))
        found = {f"{network}/{kind}": each for kind, part in kinds.items() for network, each in part.items()}
        return {name: np.ascontiguousarray(each, dtype=np.float32) for name, each in found.items()}

    def validation_losses(self, weights: str | None, split: str = "validation") -> list[float]:
        """The denoising loss of each row of a split or fold, at fixed timesteps and noise."""
        import ray

        return ray.get(self.actors[-1].validation_losses.remote(weights, split))

    def difference(self, one: Storage, other: Storage, split: str, file: str = FEATURES) -> PairedDifference:
        """By how much the FID of one folder's features is above another's, made of the same captions."""
        import ray

        return ray.get(self.actors[0].difference.remote(self._real[split], one, other, file))

    def resizing(self) -> dict[str, str]:
        """What becomes of a picture's size before each feature network sees it, by identity."""
        import ray

        return ray.get(self.actors[0].resizing.remote())

    def num_features(self) -> int:
        """Of the network that decides."""
        import ray

        return ray.get(self.actors[0].num_features.remote())

    def sample_names(self, split: str) -> list[str]:
        """The files of the pictures that are kept of a split's rungs, one a caption."""
        count = min(self.config.publish.sample_count, self._num_samples(split))
        return [sample_name(i, caption) for i, caption in enumerate(self.captions[split][:count])]

    def floor(self, split: str) -> Scores:
        """Scores of as many real training pictures as `score` generates, or as many as prepare kept."""
        import ray

        found = self.training_features(split, self._num_samples(split))
        return ray.get(self.actors[0].score.remote(self._real[split], None, None, found))

    def real_against_real(self, split: str) -> list[Record]:
        """Precision and recall of the pictures that `floor` takes."""
        import ray

        found = self.training_features(split, self._num_samples(split))
        return ray.get(self.actors[0].real_against_real.remote(self._real[split], found))

    def pictures(
        self,
        weights: str | None,
        split: str,
        numbers: int | Sequence[int],
        guidance_scale: float | None = None,
    ) -> list[bytes]:
        """PNGs of a split's pictures, from the noise that `score` uses.

        Args:
            numbers: which of them; or how many, from the first.
        """
        wanted = range(self._num_samples(split))[:numbers] if isinstance(numbers, int) else numbers
        return self._draw(weights, self._tasks(split, wanted), guidance_scale)

    def prompted(
        self, weights: str | None, prompt: str, count: int, shapes: Sequence[Shape] = ()
    ) -> list[bytes]:
        """PNGs of one prompt; picture i starts from noise seeded with `evaluate.seed` + i.

        Args:
            shapes: picture i has shape i modulo their number; none: a square of `data.resolution`.
        """
        side, seed = self.config.data.resolution, self.config.evaluate.seed
        shapes = shapes or [(side, side)]
        of_each = [shapes[i % len(shapes)] for i in range(count)]
        return self._draw(
            weights, self._dealt_tasks([prompt] * count, range(seed, seed + count), of_each), None
        )

    def _draw(self, weights: str | None, tasks: Sequence[Task], guidance_scale: float | None) -> list[bytes]:
        import ray

        parts = [
            actor.sample_pictures.remote(weights, captions, seeds, guidance_scale, shapes)
            for actor, _, captions, seeds, shapes in tasks
        ]
        return in_order([task.numbers for task in tasks], ray.get(parts))

    def stop(self) -> None:
        import ray

        for actor in self.actors:
            ray.kill(actor)


def shape_of(picture: bytes) -> Shape:
    """Of a PNG, by its header."""
    width, height = Image.open(io.BytesIO(picture)).size
    return height, width


@contextmanager
def evaluators(config: Config, dataset: Dataset) -> Iterator[EvaluatorPool]:
    """Evaluators that live as long as the block."""
    pool = EvaluatorPool(config, dataset)
    try:
        yield pool
    finally:
        pool.stop()
