"""The actor that samples pictures from weights and scores them; started by the pool only."""

import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from cluster.fetched import local_path
from cluster.gpus import take_share
from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.evaluation.dealing import Shape
from ray_jobs.evaluation.scores import (
    Copies,
    Features,
    Real,
    Scores,
    SetScores,
    control_difference_by,
    difference_by,
    more_scores,
    near_copies,
    num_black,
    precision_and_recall,
    scores_of,
)
from ray_jobs.metrics.control import DISAGREEMENT
from ray_jobs.metrics.copies import CopyDetector, DetectorFacts
from ray_jobs.metrics.corrected import Correction
from ray_jobs.metrics.edits import OUTSIDE, outside_change
from ray_jobs.metrics.preference import PreferenceModel
from ray_jobs.metrics.resampling import PairedDifference
from ray_jobs.registry.models import TEST_FEATURES
from ray_jobs.run.records import CONTROL, FID, PREFERENCE, Measurement
from ray_jobs.run.split import Split
from ray_jobs.weights.feature_networks import Networks, NetworkSet, load_networks

if TYPE_CHECKING:
    import torch

    from ray_jobs.diffusion.protocols import Pipeline
    from ray_jobs.evaluation.merged_adapters import MergedAdapters
    from ray_jobs.training.validation import HeldOutVotes, ValidationLoss
    from ray_jobs.weights.conditioner import Conditioner
    from ray_jobs.weights.image_classifier import ImageClassifier

R = TypeVar("R")


class Shown(NamedTuple):
    """PNGs of a row's pictures.

    Attributes:
        references: of its reference pictures; empty without any.
        target: of the picture that it is to become.
        control: of its control image; None without one.
    """

    references: list[bytes]
    target: bytes
    control: bytes | None = None


References = list[Shown]

FEATURES = "features.safetensors"  # features of a rung's pictures, stored with its checkpoint
BARE = ""  # in place of weights: the base itself
LOSS_ROWS = 32  # rows of the denoising loss: a twentieth of the cost of sampling as many pictures


@dataclass(frozen=True)
class SampleFiles:
    """Destination of the PNGs that an actor writes from its share while it measures the pictures.

    Attributes:
        names: one file name per picture; None skips that picture. Pictures past the end are skipped too.
    """

    folder: Storage
    names: list[str | None]


@contextmanager
def replaced_if_broken() -> Iterator[None]:
    """End the actor's process if its device breaks in the block, so that Ray starts another one.

    Every later call would fail too: a CUDA context does not recover.
    """
    from ray_jobs.diffusion.memory import device_broken

    try:
        yield
    except Exception as error:
        if device_broken(error):
            logging.getLogger(__name__).exception("the evaluator is replaced")
            os._exit(1)
        raise


class Evaluator:
    """Actor that keeps the base model and the feature networks loaded.

    Only the fine-tuned weights change between calls. They are loaded by `load`, or by the first call that
    needs them: what comes after the evaluators waits for their places only.
    """

    def __init__(self, config: Config, dataset: Dataset, num_threads: int) -> None:
        import torch

        from ray_jobs.diffusion.precision import PRECISIONS

        torch.set_num_threads(num_threads)
        self.config, self.dataset = config, dataset
        self.device = "cuda" if config.evaluate.use_gpu else "cpu"
        if config.evaluate.use_gpu:
            take_share(config.evaluate.gpu_share)
        self.dtype = PRECISIONS[config.evaluate.precision]
        self.pipeline: Pipeline | None = None
        self.adapted = False  # whether the base has an adapter
        self.merged: MergedAdapters | None = None
        self.loaded: str | None = None  # as `_use` takes them, or BARE
        self._losses: dict[Split, ValidationLoss] = {}  # by split; each instance reads its rows once
        # By split, and whether votes are of earlier rounds, with the losses of what the run begins from.
        self._votes: dict[tuple[Split, bool], tuple[HeldOutVotes, tuple[torch.Tensor, torch.Tensor]]] = {}

    @cached_property
    def conditioner(self) -> "Conditioner | None":
        """What computes the control image of drawn pictures; None if nothing says how."""
        from ray_jobs.weights.conditioner import load_conditioner

        control = self.config.data.control
        return load_conditioner(control, self.device) if control.kind else None

    @cached_property
    def networks(self) -> Networks:
        """The feature networks."""
        return load_networks(self.config.evaluate, self.device)

    @cached_property
    def classifier(self) -> "ImageClassifier":
        """The classifier of `evaluate.balance`."""
        from ray_jobs.weights.image_classifier import FIELD, ImageClassifier

        balance = self.config.evaluate.balance
        assert balance.classifier
        path = local_path(balance.classifier, FIELD)
        return ImageClassifier(path, self.device, balance.revision)

    @replaced_if_broken()
    def labels(self, pictures: list[bytes]) -> list[str]:
        """Return the classifier's label of each picture (PNG bytes)."""
        return [label for batch in self._stacked(pictures) for label in self.classifier.labels(batch)]

    def label_names(self) -> list[str]:
        """Return all labels of the classifier."""
        return list(self.classifier.names.values())

    @cached_property
    def base(self) -> "Pipeline":
        """The base model; its denoiser and text encoders take turns on the device."""
        from ray_jobs.weights.loading import load_pipeline

        model = self.config.model
        base = load_pipeline(
            local_path(model.base),
            revision=model.revision,
            dtype=self.dtype,
            quantization=model.quantize,
            text_quantization=model.quantize_text,
        )
        base.vae.to(self.device)
        return base

    def is_placed(self) -> bool:
        """Return True: the actor has its place."""
        return True

    def load(self) -> None:
        """Load the feature networks and the base model."""
        self.identities()
        self._use(None)

    def identities(self) -> list[str]:
        """Return the identity of every feature network, the ranking network first."""
        return [network.identity for network in self.networks.all]

    def resizing(self) -> dict[str, str]:
        """Return how each network's input pictures are resized, by network identity."""
        found = {network.identity: network.resizing for network in self.networks.all}
        judge = self.networks.preference
        return found | ({judge.identity: judge.resizing} if judge else {})

    def preference_model(self) -> str | None:
        """Return the identity of the reward model; None without `evaluate.preference.model`."""
        return self.networks.preference.identity if self.networks.preference else None

    def clip_network(self) -> str | None:
        """Return the identity of CLIP; None without `evaluate.clip`."""
        return self.networks.clip.identity if self.networks.clip else None

    def subject_network(self) -> str:
        """Return the identity of the network that compares subjects."""
        return self.networks.of_subjects.identity

    def text_features(self, texts: list[str]) -> np.ndarray | None:
        """Features of texts by CLIP: float32, N x D; None without `evaluate.clip`."""
        return self.networks.clip.text_features(texts).numpy() if self.networks.clip else None

    def num_features(self) -> int:
        """Return the number of features of the ranking network."""
        return self.networks.first.num_features

    def _use(self, weights: str | None) -> "Pipeline":
        """Return a pipeline with what the run begins from (None), the base alone (`BARE`), or the weights in
        a folder (path or URI).

        A run begins from the base, with `model.adapter` or `model.controlnet` if there is one.
        """
        from ray_jobs.diffusion.families import family_of
        from ray_jobs.diffusion.sampling import Prompts, place
        from ray_jobs.weights.controlnets import controlnet_folder, given_folder
        from ray_jobs.weights.loading import LORA_WEIGHTS, load_pipeline, unload_lora
        from ray_jobs.weights.schedulers import has_scheduler, load_scheduler
        from ray_jobs.weights.starting_adapter import adapter_folder

        if self.pipeline is None:
            self.base_prompts, self.base_scheduler = Prompts(self.base, self.device), self.base.scheduler
        elif weights == self.loaded:
            return self.pipeline
        elif self.pipeline is self.base and self.adapted:
            if self.merged:
                self.merged.undo()
            unload_lora(self.base)
            self.adapted, self.merged = False, None
        self.pipeline, self.prompts, self.loaded = self.base, self.base_prompts, BARE
        self.base.scheduler, family = self.base_scheduler, family_of(self.base)
        if weights is None:
            if self.config.model.adapter:
                denoiser = getattr(self.base, family.denoiser)
                with adapter_folder(self.config.model, family, denoiser) as folder:
                    self._adapt(folder)
            elif self.config.model.controlnet:
                self._control(given_folder(self.config.model))
        elif weights == BARE:
            return self.pipeline
        elif (folder := Storage.open(weights).local_copy()) and (folder / LORA_WEIGHTS).exists():
            self._adapt(folder)
        elif folder and (network := controlnet_folder(folder)):
            self._control(network)
            if has_scheduler(folder):
                self.pipeline.scheduler = load_scheduler(folder)
        else:
            place(self.base, self.device)  # away
            self.pipeline = load_pipeline(
                str(folder), dtype=self.dtype, text_quantization=self.config.model.quantize_text
            )
            self.pipeline.vae.to(self.device)
            self.prompts = Prompts(self.pipeline, self.device)
        self.loaded = weights
        return self.pipeline

    def _control(self, folder: Path) -> None:
        """Use the base with the ControlNet in a folder; prompts are the base's."""
        from ray_jobs.weights.controlnets import controlled

        self.pipeline = controlled(self.base, folder, dtype=self.dtype)

    def _adapt(self, folder: Path) -> None:
        """Add the adapter in a folder to the base, with the scheduler that it was trained with."""
        import torch

        from ray_jobs.diffusion.families import family_of
        from ray_jobs.diffusion.quantization import is_quantized
        from ray_jobs.diffusion.sampling import Prompts
        from ray_jobs.evaluation.merged_adapters import MergedAdapters
        from ray_jobs.weights.loading import load_lora
        from ray_jobs.weights.schedulers import has_scheduler, load_scheduler

        load_lora(self.base, folder)
        self.adapted = True
        # On a GPU, memory is what is short, and layers of adapters take little time.
        on_cpu = self.device == "cpu" and self.dtype == torch.float32
        if on_cpu and not is_quantized(getattr(self.base, family_of(self.base).denoiser)):
            self.merged = MergedAdapters(self.base)
        if has_scheduler(folder):
            self.base.scheduler = load_scheduler(folder)
        encoders = family_of(self.base).text.present(self.base).values()
        names = (name for part in encoders for name, _ in part.named_parameters())
        if any(".lora_" in name for name in names):
            self.prompts = Prompts(self.base, self.device)

    def _sample(
        self,
        weights: str | None,
        captions: list[str],
        seeds: list[int],
        shapes: list[Shape] | None,
        guidance_scale: float | None,
        references: References | None = None,
        places: Sequence[int] = (),
    ) -> "Iterator[torch.Tensor]":
        """Yield batches of pictures: uint8, N x 3 x H x W."""
        from ray_jobs.diffusion.families import family_of
        from ray_jobs.diffusion.sampling import sample_pictures

        pipeline = self._use(weights)
        evaluate, side = self.config.evaluate, self.config.data.resolution
        looked_at = None
        if references is not None:
            # The base of what is trained to follow them draws without.
            family = family_of(pipeline)
            is_controlled = family.is_controlled(family.model(pipeline))

            def looked_at(number: int) -> "list[torch.Tensor]":
                row = references[places[number]]
                control = [row.control] if row.control and is_controlled else []
                return [_pixels(data) for data in (*row.references, *control)]

        return sample_pictures(
            pipeline,
            captions,
            seeds,
            shapes=shapes or [(side, side)] * len(captions),
            num_steps=evaluate.inference_steps,
            guidance_scale=evaluate.guidance_scale if guidance_scale is None else guidance_scale,
            batch_size=evaluate.batch_size,
            encoded=self.prompts,
            references=looked_at,
        )

    @replaced_if_broken()
    def margins(
        self, weights: str | None, split: Split, earlier: bool = False
    ) -> tuple[list[float], list[str]]:
        """Return by how much the implicit rewards prefer what was preferred, and the prompt, of each vote.

        Rewards are differences from what the run begins from. With loss `kto` a liked picture and another
        one, which need not have one prompt, make a vote.

        Args:
            earlier: of the votes of earlier rounds.
        """
        import torch

        from ray_jobs.training.validation import HeldOutVotes

        votes = self.dataset.earlier_votes if earlier else self.dataset.votes
        preference = self.config.train.preference
        assert votes and preference
        if (split, earlier) not in self._votes:
            device = torch.device(self.device)
            held = HeldOutVotes(votes.config, votes.dataset, device, preference.loss, split.name)
            self._votes[split, earlier] = held, held.of_votes(self._use_for_losses(None))
        held, reference = self._votes[split, earlier]
        found = reference if weights is None else held.of_votes(self._use_for_losses(weights))
        preferred, other = (before - after for before, after in zip(reference, found, strict=True))
        count = min(len(preferred), len(other))
        margins = (preferred[:count] - other[:count]).tolist()
        return margins, held.prompts if preference.loss == "dpo" else list(map(str, range(count)))

    @replaced_if_broken()
    def validation_losses(self, weights: str | None, split: Split) -> list[float]:
        """Denoising loss of each row in a fixed subset of a split or fold, with fixed noise."""
        import torch

        from ray_jobs.training.validation import ValidationLoss

        if split not in self._losses:
            dataset = self.dataset.judged_by(split)
            device = torch.device(self.device)
            self._losses[split] = ValidationLoss(self.config, dataset, device, rows=LOSS_ROWS)
        return self._losses[split].of_rows(self._use_for_losses(weights)).tolist()

    def _use_for_losses(self, weights: str | None) -> "Pipeline":
        """Return the same as `_use`, with what predicts for stored rows on the device."""
        from ray_jobs.diffusion.sampling import place

        pipeline = self._use(weights)
        trained = self.config.train.train_text_encoder  # they then encode the rows' tokens
        place(pipeline, self.device, denoisers=True, text_encoders=trained)
        return pipeline

    def _features(
        self,
        batches: "Iterator[torch.Tensor]",
        by: NetworkSet,
        captions: Sequence[str] = (),
        before: Sequence[bytes] = (),
    ) -> Features:
        """Features of pictures in batches, and with their captions the rewards of the reward model.

        Args:
            before: PNGs that edits begin with.
        """
        networks, texts, first = self.networks.of(by), iter(captions), iter(before)
        is_judged = captions and by in (NetworkSet.RANKING, NetworkSet.ALL)
        judge = self.networks.preference if is_judged else None
        found: dict[str, list[np.ndarray]] = {network.identity: [] for network in networks}
        for batch in batches:
            for network in networks:
                found[network.identity].append(network.features(batch).numpy())
            if judge:
                rewards = _judged(judge, batch, texts, first)
                found.setdefault(judge.identity, []).append(rewards)
        return {identity: np.concatenate(parts) for identity, parts in found.items()}

    @replaced_if_broken()
    def sample_features(
        self,
        weights: str | None,
        captions: list[str],
        seeds: list[int],
        kept: SampleFiles | None = None,
        guidance_scale: float | None = None,
        by: NetworkSet = NetworkSet.RANKING,
        shapes: list[Shape] | None = None,
        references: References | None = None,
        places: Sequence[int] = (),
    ) -> Features:
        """Sample one picture per caption and return its features, and its reward by the reward model.

        Of edits there is also what changed outside of them, as features named `OUTSIDE` (`outside_change`),
        and of pictures for control images how far they are from these, named `DISAGREEMENT`.

        Args:
            kept: destination of the pictures to save.
            guidance_scale: None means `evaluate.guidance_scale`.
            by: the networks that see the pictures.
            shapes: one per picture; None means squares of `data.resolution`.
            references: reference pictures and control images of rows; None for none.
            places: the row in `references` of each picture.
        """
        drawn = self._sample(weights, captions, seeds, shapes, guidance_scale, references, places)
        batches, rows = _keeping(drawn, kept), [references[place] for place in places] if references else []
        changes, apart = list[float](), list[float]()
        if any(row.references for row in rows):
            batches = _compared(batches, rows, changes)
        if self.conditioner and any(row.control for row in rows):
            batches = _following(batches, rows, self.conditioner, apart)
        before = [row.references[0] for row in rows if row.references]
        found = self._features(batches, by, captions, before)
        for name, values in ((OUTSIDE, changes), (DISAGREEMENT, apart)):
            if values:
                found[name] = np.array(values, np.float32)[:, None]
        return found

    @replaced_if_broken()
    def sample_pictures(
        self,
        weights: str | None,
        captions: list[str],
        seeds: list[int],
        guidance_scale: float | None = None,
        shapes: list[Shape] | None = None,
        references: References | None = None,
        places: Sequence[int] = (),
    ) -> list[bytes]:
        """Sample one PNG per caption; arguments as for `sample_features`."""
        from ray_jobs.pictures.reading import encode_png

        batches = self._sample(weights, captions, seeds, shapes, guidance_scale, references, places)
        return [encode_png(picture.permute(1, 2, 0).numpy()) for batch in batches for picture in batch]

    @replaced_if_broken()
    def picture_features(
        self, pictures: list[bytes], through_autoencoder: int = 0, by: NetworkSet = NetworkSet.ALL
    ) -> Features:
        """Features of pictures (PNG bytes at their training shape).

        Args:
            through_autoencoder: of the pictures as the base's autoencoder restores them after so many times.
            by: the networks that see the pictures.
        """
        import torch

        from ray_jobs.diffusion.memory import Chunks, pictures_at_once
        from ray_jobs.diffusion.sampling import reconstructed

        stacked = self._stacked(pictures)

        def restored(pixels: torch.Tensor) -> torch.Tensor:
            for _ in range(through_autoencoder):
                pixels = reconstructed(self.base, pixels)
            return pixels

        if through_autoencoder:
            chunks = Chunks()
            stacked = (
                part
                for batch in stacked
                for part in chunks.run(batch, restored, pictures_at_once(*batch.shape[-2:]))
            )
        return self._features(stacked, by)

    @replaced_if_broken()
    def rewards(self, pictures: list[bytes], captions: list[str], before: Sequence[bytes] = ()) -> np.ndarray:
        """Rewards of pictures (PNG bytes) for their captions, by the reward model: float32, N x 1.

        Args:
            before: PNGs that edits begin with.
        """
        judge, texts, first = self.networks.preference, iter(captions), iter(before)
        assert judge
        return np.concatenate([_judged(judge, batch, texts, first) for batch in self._stacked(pictures)])

    def _stacked(self, pictures: list[bytes]) -> "Iterator[torch.Tensor]":
        """Yield PNGs in batches of one shape, in their order: uint8, N x 3 x H x W."""
        import torch

        from ray_jobs.diffusion.sampling import batches_of

        pixels = [_pixels(data)[:3] for data in pictures]
        sides = [(each.shape[1], each.shape[2]) for each in pixels]
        for batch in batches_of(sides, self.config.evaluate.batch_size):
            yield torch.stack(pixels[batch])

    def score(
        self, real: Real, folder: Storage | None, shares: Sequence[Sequence[int]] | None, *generated: Features
    ) -> Scores:
        """Score a set of pictures, given in parts.

        Args:
            folder: destination of the features; None: they are not saved.
            shares: picture numbers of each part; None: the parts are in order.
        """
        from safetensors.numpy import save

        whole = join(generated, shares)
        if folder:
            folder.write_bytes(FEATURES, save(whole))
        return self._scores(whole, real)

    def correction(self, real: Features, others: Features, count: int) -> Correction | None:
        """Measure the correction for scores of `count` pictures; None if there are too few `others`.

        Args:
            real: features of the pictures that scores are against.
            others: features of further real pictures.
        """
        import torch

        first = self.networks.first.identity
        one, other = (torch.from_numpy(each[first]) for each in (real, others))
        return self._computed(lambda device: Correction.of(one, other.to(device), count, first))

    def real_against_real(self, real: Real, other: Features) -> list[Measurement]:
        """Precision and recall of real pictures: the values that a perfect generator could reach."""
        return precision_and_recall(other, real, self.networks.first.identity)

    def measure(
        self,
        real: Real,
        captions: list[str],
        detector: tuple[CopyDetector, DetectorFacts] | None,
        shares: Sequence[Sequence[int]] | None,
        kept: Storage | None,
        *generated: Features,
    ) -> SetScores:
        """Compute all measures of a set of pictures, given in parts.

        Args:
            captions: captions of the real pictures.
            detector: of near copies by the ranking network; None skips the search for near copies.
            shares: picture numbers of each part; None: the parts are in order.
            kept: folder in which what ranks is saved, the ranking network's features and the rewards; None:
                it is not saved.
        """
        from safetensors.numpy import save

        whole, first = join(generated, shares), self.networks.first.identity
        if kept:
            names = (first, self.preference_model(), DISAGREEMENT)
            ranking = {name: each for name, each in whole.items() if name in names}
            kept.write_bytes(TEST_FEATURES, save(ranking))
        found, left_out = more_scores(whole, real, self.networks, captions)
        copies = near_copies(whole[first], *detector) if detector else None
        return SetScores(self._scores(whole, real), found, left_out, copies)

    def near_copies(self, drawn: Storage, detector: tuple[CopyDetector, DetectorFacts]) -> Copies:
        """Search the pictures whose features are in a rung's folder for near copies."""
        features = kept_features(drawn, FEATURES)
        return near_copies(features[self.networks.first.identity], *detector)

    def _scores(self, generated: Features, real: Real) -> Scores:
        import torch

        found = self._computed(
            lambda device: scores_of(generated, real, self.networks, self.config.evaluate.bootstrap, device)
        )
        first = self.networks.first
        return replace(found, black=num_black(torch.from_numpy(generated[first.identity]), first))

    def _computed(self, work: Callable[[str], R]) -> R:
        """Return what `work` computes on the device, or on the CPU if the device's memory is too small."""
        import torch

        with replaced_if_broken():
            try:
                return work(self.device)
            except torch.OutOfMemoryError:
                pass  # outside of the handler: the error holds on to what was computed
            torch.cuda.empty_cache()
            return work("cpu")

    def difference(
        self, real: Real, one: Storage, other: Storage, file: str = FEATURES, measure: str = FID
    ) -> PairedDifference:
        """Return how much worse the set with features in folder `one` is than the set in `other`.

        Args:
            measure: one of `records.MEASURES`.
        """
        import torch

        network, resamples = self.networks.first.identity, self.config.evaluate.bootstrap
        if measure == PREFERENCE:
            assert self.networks.preference
            network = self.networks.preference.identity
        sets = [kept_features(each, file) for each in (one, other)]
        if measure == CONTROL:
            ours, theirs = sets
            return self._computed(
                lambda device: control_difference_by(
                    ours, theirs, real, network, resamples=resamples, device=device
                )
            )
        first, second = (torch.from_numpy(each[network]) for each in sets)
        return self._computed(
            lambda device: difference_by(
                measure, first.to(device), second.to(device), real, network, resamples=resamples
            )
        )


def kept_features(folder: Storage, file: str) -> Features:
    """Read what `score` or `measure` has saved.

    Raises:
        ConfigError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return dict(load(folder.read_bytes(file)))
    except SafetensorError:
        raise ConfigError(f"{folder.uri}/{file}: damaged; restore it, or delete it") from None


def _compared(
    batches: "Iterator[torch.Tensor]", rows: References, changes: list[float]
) -> "Iterator[torch.Tensor]":
    """Pass batches of edits through unchanged, adding each one's `outside_change`."""
    pairs = iter(rows)
    for batch in batches:
        for picture in batch:
            row = next(pairs)
            changes.append(outside_change(picture, _pixels(row.references[0])[:3], _pixels(row.target)))
        yield batch


def _following(
    batches: "Iterator[torch.Tensor]", rows: References, conditioner: "Conditioner", apart: list[float]
) -> "Iterator[torch.Tensor]":
    """Pass batches of pictures through unchanged, adding each one's disagreement with its control image."""
    import torch

    given = (_pixels(row.control) for row in rows if row.control)
    for batch in batches:
        controls = torch.stack(list(islice(given, len(batch))))
        apart += conditioner.disagreement(batch, controls).tolist()
        yield batch


def _judged(
    judge: PreferenceModel, batch: "torch.Tensor", texts: Iterator[str], before: Iterator[bytes]
) -> np.ndarray:
    """Return the rewards of a batch of pictures for the next texts, float32, N x 1.

    Args:
        before: PNGs that edits begin with; read only by a model that looks at them.
    """
    shown = [_pixels(png)[:3] for png in islice(before, len(batch) if judge.sees_edits else 0)]
    return judge.rewards(batch, list(islice(texts, len(batch))), shown).numpy()


def _pixels(png: bytes) -> "torch.Tensor":
    """Decode a PNG: uint8, 3 x H x W, or 4 x H x W if it has an alpha channel."""
    import torch
    from PIL import Image

    picture = Image.open(io.BytesIO(png))
    mode = "RGBA" if picture.mode == "RGBA" else "RGB"
    return torch.from_numpy(np.array(picture.convert(mode))).permute(2, 0, 1)


def _keeping(batches: "Iterator[torch.Tensor]", kept: SampleFiles | None) -> "Iterator[torch.Tensor]":
    """Pass batches through unchanged, writing the pictures that have a file name."""
    from ray_jobs.pictures.reading import encode_png

    names = iter(kept.names if kept else ())
    for batch in batches:
        for picture in batch:
            if name := next(names, None):
                assert kept
                kept.folder.write_bytes(name, encode_png(picture.permute(1, 2, 0).numpy()))
        yield batch


def join(parts: Sequence[Features], shares: Sequence[Sequence[int]] | None = None) -> Features:
    """Concatenate parts, sorted by picture number if `shares` (see `dealing.dealt`) is given."""
    whole = {network: np.concatenate([part[network] for part in parts]) for network in parts[0]}
    if shares is None:
        return whole
    order = np.argsort(np.concatenate(shares))
    return {network: features[order] for network, features in whole.items()}
