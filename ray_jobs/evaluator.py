"""The actor that samples pictures from weights and measures them. Only `evaluate` starts it."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.storage import Storage
from ray_jobs.config import Config, EvaluateConfig, resolve_path
from ray_jobs.data.dataset import Dataset
from ray_jobs.metrics.resampling import PairedDifference, paired_difference
from ray_jobs.metrics.score import Score

if TYPE_CHECKING:
    from ray_jobs.training.validation import ValidationLoss

FEATURES = "features.safetensors"  # of a rung's pictures, beside its checkpoint
LOSS_ROWS = 32  # of the denoising loss: a twentieth of what sampling as many pictures costs
FEWEST = 4  # pictures of either set, below which neither a kernel distance nor an error is told

Features = dict[str, np.ndarray]
"""Of one set of pictures, by the identity of the network: float32, N x D."""


@dataclass(frozen=True)
class Kept:
    """The first pictures of an actor's share, which it writes as PNGs while it measures them.

    Attributes:
        names: of the files, one a picture.
    """

    folder: Storage
    names: list[str]


@dataclass(frozen=True)
class Scores:
    """What a set of pictures scores against real ones.

    Attributes:
        fid: by `evaluate.feature_network`, with its bootstrap error.
        kid: the kernel distance by the same network; None of too few pictures.
        second: the Fréchet distance by `evaluate.second_network`; None without one.
    """

    fid: Score
    kid: Score | None
    second: Score | None

    def row(self, prefix: str = "") -> dict[str, float | None]:
        """The numbers with their errors: `fid`, `fid_error`, `kid`, ... each behind a prefix."""
        named = {"fid": self.fid, "kid": self.kid, "fid_2": self.second}
        found: dict[str, float | None] = {}
        for name, score in named.items():
            if score:
                found |= {f"{prefix}{name}": score.value, f"{prefix}{name}_error": score.standard_error}
        return found

    @property
    def second_network(self) -> dict[str, str]:
        return {"feature_network_2": self.second.feature_network} if self.second else {}


class Evaluator:
    """An actor that keeps the base model and the feature networks loaded.

    Only the fine-tuned weights change between calls.
    """

    def __init__(self, config: Config, dataset: Dataset, num_threads: int) -> None:
        import torch

        from ray_jobs.diffusion.loading import load_pipeline

        torch.set_num_threads(num_threads)
        self.config, self.dataset = config, dataset
        self.device = "cuda" if config.evaluate.use_gpu else "cpu"
        self.networks = load_networks(config.evaluate, self.device)
        self.base = load_pipeline(resolve_path(config.model.base), revision=config.model.revision)
        self.base.to(self.device)
        self.loaded: str | None = None
        self.pipeline = self.base

    def identities(self) -> list[str]:
        """Of the feature networks, the one that decides first."""
        return [network.identity for network in self.networks]

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

    def validation_loss(self, weights: str | None) -> float:
        """The denoising loss on validation rows, always the same ones with the same noise."""
        self._use(weights)
        return self._loss(self.pipeline)

    @cached_property
    def _loss(self) -> "ValidationLoss":
        """Reads its rows where it is first asked."""
        import torch

        from ray_jobs.training.validation import ValidationLoss

        return ValidationLoss(self.config, self.dataset, torch.device(self.device), rows=LOSS_ROWS)

    def _features(self, batches: Iterator[Any]) -> Features:
        found: dict[str, list[np.ndarray]] = {network.identity: [] for network in self.networks}
        for batch in batches:
            for network in self.networks:
                found[network.identity].append(network.features(batch).numpy())
        return {identity: np.concatenate(parts) for identity, parts in found.items()}

    def sample_features(
        self, weights: str | None, captions: list[str], seeds: list[int], kept: Kept | None = None
    ) -> Features:
        """Features of one picture a caption, of which the first are kept."""
        return self._features(_keeping(self._sample(weights, captions, seeds), kept))

    def sample_pictures(self, weights: str | None, captions: list[str], seeds: list[int]) -> list[bytes]:
        """One PNG a caption."""
        from ray_jobs.data.images import encode_png

        batches = self._sample(weights, captions, seeds)
        return [encode_png(picture.permute(1, 2, 0).numpy()) for batch in batches for picture in batch]

    def real_features(self, pictures: list[bytes]) -> Features:
        """Features of real pictures (PNG bytes at the training resolution)."""
        import torch
        from PIL import Image

        pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in pictures]
        stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        return self._features(iter(stacked.split(self.config.evaluate.batch_size)))

    def score(self, real: Features, folder: Storage | None, *generated: Features) -> Scores:
        """What the parts of a set score, in their order; `folder`: where the features are kept."""
        from safetensors.numpy import save

        whole = join(generated)
        if folder:
            folder.write_bytes(FEATURES, save(whole))
        return scores_of(whole, real, self.identities(), self.config.evaluate.bootstrap)

    def difference(self, real: Features, one: Storage, other: Storage) -> PairedDifference:
        """How much worse the set whose features are kept in one folder is than that of another."""
        import torch
        from safetensors.numpy import load

        from ray_jobs.metrics.frechet import Moments

        [network, *_] = self.identities()
        first, second = (
            torch.from_numpy(load(folder.read_bytes(FEATURES))[network]) for folder in (one, other)
        )
        moments = Moments.of(torch.from_numpy(real[network]), network)
        return paired_difference(first, second, moments, num_resamples=self.config.evaluate.bootstrap)


def _keeping(batches: Iterator[Any], kept: Kept | None) -> Iterator[Any]:
    """The same batches; the first pictures are written on the way."""
    from ray_jobs.data.images import encode_png

    names = list(kept.names) if kept else []
    for batch in batches:
        for picture in batch[: len(names)]:
            assert kept
            kept.folder.write_bytes(names.pop(0), encode_png(picture.permute(1, 2, 0).numpy()))
        yield batch


def load_networks(evaluate: EvaluateConfig, device: str) -> list[Any]:
    """The network that decides, and the second one where there is one.

    Raises:
        ValueError: a file is missing, or another one than it should be.
    """
    from ray_jobs.metrics.feature_network import Preprocessing
    from ray_jobs.metrics.inception import load_inception
    from ray_jobs.metrics.networks import NetworkSpec, load_network

    networks: list[Any] = [load_inception(resolve_path(evaluate.feature_network), device)]
    if second := evaluate.second_network:
        prepared = None
        if second.size and second.mean and second.std:
            prepared = Preprocessing(second.size, second.interpolation, second.mean, second.std)
        path = resolve_path(second.path)
        spec = NetworkSpec(second.kind, path, second.sha256, second.name, prepared, second.revision)
        networks.append(load_network(spec, device))
    return networks


def join(parts: tuple[Features, ...]) -> Features:
    """One set of its parts, in their order."""
    return {network: np.concatenate([part[network] for part in parts]) for network in parts[0]}


def scores_of(generated: Features, real: Features, identities: list[str], resamples: int) -> Scores:
    """All scores of a set of pictures."""
    import torch

    from ray_jobs.metrics.frechet import Moments
    from ray_jobs.metrics.kernel import kernel_distance
    from ray_jobs.metrics.resampling import frechet_score

    def frechet(network: str) -> Score:
        features, moments = torch.from_numpy(generated[network]), Moments.of(to_torch(real[network]), network)
        if not resamples or len(features) < FEWEST:
            return Score.of(Moments.of(features, network), moments)
        return frechet_score(features, moments, num_resamples=resamples)

    to_torch = torch.from_numpy
    first, *others = identities
    sets = to_torch(generated[first]), to_torch(real[first])
    kid = kernel_distance(*sets, first) if min(map(len, sets)) >= FEWEST else None
    return Scores(frechet(first), kid, frechet(others[0]) if others else None)
