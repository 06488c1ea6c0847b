"""The pool of evaluators: assigns pictures to actors and combines their scores."""

import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from cluster.storage import Storage
from ray_jobs.config import Config, EvaluateConfig
from ray_jobs.console import say
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.data.preparation import prepared_by
from ray_jobs.data.sources.dreambooth import Subject
from ray_jobs.data.subjects import subjects_of
from ray_jobs.evaluation.actor import (
    BARE,
    FEATURES,
    Evaluator,
    References,
    SampleFiles,
    Shown,
    join,
    kept_features,
)
from ray_jobs.evaluation.cross_validation import held_out, splits, trained_on
from ray_jobs.evaluation.dealing import Shape, dealt, in_order
from ray_jobs.evaluation.scores import FEWEST, Copies, Features, Real, Recited, Scores, SetScores, recited
from ray_jobs.metrics.control import DISAGREEMENT, Scale
from ray_jobs.metrics.copies import CopyDetector, DetectorFacts, fit_detector
from ray_jobs.metrics.edits import over_unedited, target_distance
from ray_jobs.metrics.resampling import PairedDifference, difference_of
from ray_jobs.metrics.score import Score
from ray_jobs.metrics.subject import Drawn, DrawnSubjects, Photos, SubjectReference
from ray_jobs.metrics.votes import mean_of_groups, wrongly_ordered
from ray_jobs.registry.models import TEST_FEATURES
from ray_jobs.run.folder import SharedFolder
from ray_jobs.run.records import CONTROL, CORRECTED, FID, KID, MEASURES, SUBJECT, TARGET, VOTES, Measurement
from ray_jobs.run.samples import PROMPTS, SAMPLES, prompt_name, sample_name
from ray_jobs.run.split import TEST, VALIDATION, Split
from ray_jobs.weights.feature_networks import NetworkSet

if TYPE_CHECKING:
    import torch
    from ray import ObjectRef
    from ray.actor import ActorHandle

# More pictures of one caption say little about other captions, and prepare keeps no more real training
# pictures to compare with.
CAPTION_USES = 2

SUBJECT_FEATURES = "subject.features"  # features of what was drawn for subjects, beside FEATURES

MARGINS = "votes.json"  # margin and prompt of each held-out vote, beside FEATURES
REWARDS = "implicit rewards"  # what judges votes, in place of a feature network

OTHERS = 2  # real training pictures per picture of a score, to measure the correction of FID on

HELD_OUT = 299  # held-out pictures that tell how near pictures come: the third nearest is at 1 % of them

KNOWN_COPIES = 64  # training pictures, twice through the autoencoder, that try a detector of near copies

DRAWN_FOR_TRAINING = 32  # pictures for captions of training pictures: a quarter of a small score's

MOST_PHOTOS = 100  # of all subjects, in either set that pictures are compared with

RESTARTS = 10  # per evaluator; an actor that dies more often has another cause than a lost node


class Known(NamedTuple):
    """Training pictures among which near copies are searched."""

    detector: CopyDetector
    facts: DetectorFacts
    captions: list[str]
    shapes: list[Shape]
    references: "ObjectRef[References] | None"


class Task(NamedTuple):
    """M pictures for one actor to sample."""

    actor: "ActorHandle"
    numbers: list[int]  # positions in the requested order
    captions: list[str]
    seeds: list[int]
    shapes: list[Shape]
    references: "ObjectRef[References] | None" = None  # of a split; control images too
    places: Sequence[int] = ()  # of the pictures' references in these


def resources(evaluate: EvaluateConfig) -> dict[str, float]:
    """Return what an evaluator reserves, as options of a Ray actor."""
    return {"num_cpus": 1, "num_gpus": evaluate.gpu_share if evaluate.use_gpu else 0}


class EvaluatorPool:
    """Handles of the evaluators, with captions; cheap to send to a driver or trial.

    Picture i of a split has the caption and shape of real picture i modulo their number. Its noise is seeded
    with `evaluate.seed` + i, and it is in the same batch whatever the weights and the number of actors.
    Checkpoints are thus compared on the same noise.

    Attributes:
        rank_by: `search.rank_by`, or what a search of an earlier release was ranked by.
        subjects: with `search.rank_by: subject`, all of the run.
        captions, shapes, digests: of the pictures of each loaded split.
        references: their reference pictures and control images, in Ray's object store; of splits that have
            them.
        unedited: distance of the first reference pictures to their targets.
        corrected: whether there is a correction of FID for the scores of each loaded split.
        controlled: loaded splits whose scores say how pictures follow control images.
    """

    def __init__(self, config: Config, dataset: Dataset) -> None:
        import ray

        self.config, self.dataset = config, dataset
        # An actor whose process or node dies restarts elsewhere and retries its pending calls.
        remote = ray.remote(**resources(config.evaluate), max_restarts=RESTARTS, max_task_retries=-1)(
            Evaluator
        )
        self.actors = [
            remote.remote(config, dataset, config.train.cpus_per_worker)
            for _ in range(config.evaluate.num_actors)
        ]
        self.rank_by: str = config.search.rank_by
        self.subjects = subjects_of(config) if self.rank_by == SUBJECT else []
        self.captions: dict[Split, list[str]] = {}
        self.shapes: dict[Split, list[Shape]] = {}  # shapes of the same pictures
        self.references: dict[Split, ObjectRef[References]] = {}
        self.unedited: dict[Split, float] = {}
        self._edited: dict[
            Split, tuple[torch.Tensor, torch.Tensor]
        ] = {}  # features of references and targets
        self.corrected: dict[Split, bool] = {}
        self.controlled: set[Split] = set()
        self.digests: dict[Split, str] = {}  # digests of these pictures and their captions
        self._real: dict[Split, ObjectRef[Real]] = {}
        self._training: dict[int | None, Features] = {}  # by held-out fold
        self._known: dict[int | None, Known] = {}  # the same
        # Of each restored picture by its digest, by how often it was restored and which networks saw it.
        self._restored_features: dict[tuple[int, NetworkSet], dict[bytes, Features]] = {}
        self._subjects: dict[Split, SubjectReference] = {}
        # By weights, of the base and those drawn last.
        self._known_features: dict[str | None, dict[tuple[object, ...], list[ObjectRef[Features]]]] = {}

    def wait_until_placed(self) -> None:
        """Wait until every evaluator has its place."""
        import ray

        ray.get([actor.is_placed.remote() for actor in self.actors])

    def load_models(self) -> None:
        """Wait until every evaluator has loaded its models."""
        import ray

        ray.get([actor.load.remote() for actor in self.actors])

    def load(self, split: Split) -> None:
        """Read the captions of a split's pictures and compute the pictures' features, once per split."""
        import ray
        import torch

        if split in self._real:
            return
        rows = self._judged_by(split).pictures(split.name, self.config.evaluate.num_samples)
        self.captions[split] = [row["text"] for row in rows]
        self.shapes[split] = [shape_of(row["image"]) for row in rows]
        digest = hashlib.sha256()
        for row in rows:
            digest.update(
                hashlib.sha256(row["image"]).digest() + hashlib.sha256(row["text"].encode()).digest()
            )
            for picture in (*row["references"], *([row["control"]] if row["control"] else [])):
                digest.update(hashlib.sha256(picture).digest())
        self.digests[split] = digest.hexdigest()
        count, wanted = self._num_samples(split), self.config.evaluate.num_samples
        if count < wanted and not self._is_of_subjects(split):
            say(
                "evaluate",
                f"{split}: {len(rows):,} captions, so {count:,} pictures a score and not the {wanted:,} of "
                f"evaluate.num_samples: at most {CAPTION_USES} of a caption; hold out more pictures for more",
            )
        real = self._measure_real([row["image"] for row in rows])
        others = self.training_features(split, OTHERS * count)
        correction = ray.get(self.actors[0].correction.remote(real, others, count))
        edits = any(row["references"] for row in rows)
        prepared = Real.of(real, correction, self._rewards(rows), are_targets=edits)
        self._real[split] = ray.put(prepared)
        if shown := _shared(rows):
            self.references[split] = shown
        if edits:
            before = self._measure_real([row["references"][0] for row in rows])
            first = self._first_network()
            pair = torch.from_numpy(before[first]), torch.from_numpy(real[first])
            distance = target_distance(*pair, first)
            self.unedited[split], self._edited[split] = distance.value, pair
            name, digits = MEASURES[TARGET]
            say("evaluate", f"{split}: {name} of the pictures as they were {distance.value:.{digits}f}")
        self.corrected[split] = correction is not None
        if self.config.data.control.kind and any(row["control"] for row in rows):
            self._real[split] = ray.put(replace(prepared, scale=self._control_scale(split)))
            self.controlled.add(split)
        if self._is_of_subjects(split):
            self._subjects[split] = self._subject_reference(split)

    def _control_scale(self, split: Split) -> Scale:
        """Draw what the run begins from for the captions of a loaded split: the scale of its control score.

        Without a ControlNet it does not see the control images.
        """
        import ray

        tasks = self._tasks(None, split)
        by = NetworkSet.ALL if split == TEST else NetworkSet.RANKING  # as `measure` asks for next
        parts = self._drawn(None, tasks, None, by)
        shares = [task.numbers for task in tasks]
        scores: Scores = ray.get(self.actors[0].score.remote(self._real[split], None, shares, *parts))
        assert scores.disagreement
        found = Scale(scores.fid.value, scores.disagreement.value)
        name, digits = DISAGREEMENT, MEASURES[CONTROL].digits
        say("evaluate", f"{split}: {name} before training {found.disagreement:.{digits}f}")
        return found

    def over_unedited(self, split: Split, folder: Storage) -> PairedDifference | None:
        """Return how much further edits are from their targets than the pictures as they were.

        Args:
            folder: where `measure` has saved the features of the edits.

        Returns:
            None if the split has no edits.
        """
        import torch

        if split not in self._edited:
            return None
        first = self._first_network()
        drawn = torch.from_numpy(kept_features(folder, TEST_FEATURES)[first])
        return over_unedited(drawn, *self._edited[split], first)

    def _judged_by(self, split: Split) -> Dataset:
        """Return the dataset whose split `split.name` has the pictures of `split`."""
        return prepared_by(self.config, split.run) if split.run else self.dataset.judged_by(split)

    def _measure_real(self, pictures: list[bytes]) -> Features:
        """Features of real pictures, cached in the storage: they cost as much as a candidate's."""
        import ray

        identities = ray.get(self.actors[0].identities.remote())
        return self._cached(["\n".join(identities).encode(), *pictures], lambda: self.features(pictures))

    def _rewards(self, rows: Sequence[dict[str, Any]]) -> Features:
        """Rewards of real pictures for their captions, cached in the storage; {} without a reward model."""
        import ray

        if not self.config.evaluate.preference.model:
            return {}
        model = str(ray.get(self.actors[0].preference_model.remote()))
        pictures, captions = [row["image"] for row in rows], [row["text"] for row in rows]
        before = [row["references"][0] for row in rows if row["references"]]

        def judged() -> Features:
            shares = self._share([shape_of(picture) for picture in pictures])
            parts = [
                actor.rewards.remote(
                    [pictures[i] for i in numbers],
                    [captions[i] for i in numbers],
                    [before[i] for i in numbers] if before else [],
                )
                for actor, numbers in shares
            ]
            found: list[Features] = [{model: each} for each in ray.get(parts)]
            return join(found, [numbers for _, numbers in shares])

        told = [model.encode(), *pictures, *(each.encode() for each in captions)]
        return self._cached([*told, *before], judged)

    def _cached(self, told: Sequence[bytes], measure: Callable[[], Features]) -> Features:
        """Return what the storage has under the digest of what was measured, or measure and keep it."""
        from safetensors.numpy import load, save

        digest = hashlib.sha256(told[0])
        for each in told[1:]:
            digest.update(hashlib.sha256(each).digest())
        folder = SharedFolder.of(self.config).real_features
        file = f"{digest.hexdigest()[:32]}.safetensors"
        if folder.exists(file):
            return dict(load(folder.read_bytes(file)))
        found = measure()
        folder.write_bytes(file, save(found))
        return found

    def features(
        self, pictures: Sequence[bytes], through_autoencoder: int = 0, by: NetworkSet = NetworkSet.ALL
    ) -> Features:
        """Features of PNGs; see `Evaluator.picture_features`."""
        import ray

        shares = self._share([shape_of(picture) for picture in pictures])
        parts = [
            actor.picture_features.remote([pictures[number] for number in numbers], through_autoencoder, by)
            for actor, numbers in shares
        ]
        return join(ray.get(parts), [numbers for _, numbers in shares])

    def _share(
        self, shapes: Sequence[Shape], weights: str | None = None
    ) -> list[tuple["ActorHandle", list[int]]]:
        """Pairs of (actor, picture numbers); see `dealt`.

        Which actor comes first follows from the weights: trials with fewer batches than actors would else all
        wait for the same one, and an actor that has loaded the weights keeps them.
        """
        shares = dealt(shapes, len(self.actors), self.config.evaluate.batch_size)
        first = zlib.crc32((weights or "").encode()) % len(self.actors)
        return list(zip(self.actors[first:] + self.actors[:first], shares, strict=False))

    def _num_samples(self, split: Split) -> int:
        evaluate, captions = self.config.evaluate, self.captions[split]
        if self._is_of_subjects(split):
            return min(evaluate.num_samples, evaluate.subject_samples * len(set(captions)))
        return min(evaluate.num_samples, CAPTION_USES * len(captions))

    def _tasks(self, weights: str | None, split: Split, wanted: Sequence[int] | None = None) -> list[Task]:
        """Tasks for the given picture numbers of a split; None means all pictures of a score."""
        captions, shapes = self.captions[split], self.shapes[split]
        wanted = range(self._num_samples(split)) if wanted is None else wanted
        count, seed = len(captions), self.config.evaluate.seed
        return self._dealt_tasks(
            weights,
            [captions[i % count] for i in wanted],
            [seed + i for i in wanted],
            [shapes[i % count] for i in wanted],
            self.references.get(split),
            [i % count for i in wanted],
        )

    def _dealt_tasks(
        self,
        weights: str | None,
        captions: Sequence[str],
        seeds: Sequence[int],
        shapes: Sequence[Shape],
        references: "ObjectRef[References] | None" = None,
        places: Sequence[int] = (),
    ) -> list[Task]:
        return [
            Task(
                actor,
                numbers,
                [captions[i] for i in numbers],
                [seeds[i] for i in numbers],
                [shapes[i] for i in numbers],
                references,
                [places[i] for i in numbers] if references else (),
            )
            for actor, numbers in self._share(shapes, weights)
        ]

    def score(
        self,
        weights: str | None,
        split: Split,
        rung: Storage | None = None,
        guidance_scale: float | None = None,
    ) -> Scores:
        """Score weights on a loaded split.

        Args:
            weights: None: what the run begins from; `BARE`: the base alone.
            rung: checkpoint folder in which the first `publish.sample_count` pictures and the features of
                all pictures are saved; None: nothing is saved.
            guidance_scale: None means `evaluate.guidance_scale`.
        """
        import ray

        names = dict(enumerate(self.sample_names(split)))
        tasks, by = self._tasks(weights, split), NetworkSet.RANKING
        if self._is_of_subjects(split):
            by = NetworkSet.ALL
        files = (
            [SampleFiles(rung.child(SAMPLES), [names.get(i) for i in task.numbers]) for task in tasks]
            if rung
            else None
        )
        parts = self._drawn(weights, tasks, guidance_scale, by, files)
        shares = [task.numbers for task in tasks]
        found: Scores = ray.get(self.actors[0].score.remote(self._real[split], rung, shares, *parts))
        found = self._with_subjects(found, weights, split, guidance_scale, rung, tasks, parts)
        return self._with_votes(found, weights, split, rung)

    def measure(
        self,
        weights: str | None,
        split: Split,
        guidance_scale: float | None = None,
        kept: Storage | None = None,
    ) -> SetScores:
        """Compute all measures of weights on a loaded split, from the pictures that `score` samples.

        Near copies are searched among the first `evaluate.memorisation_pictures` training pictures that
        prepare keeps, in the order of their digests; the pictures of `held_out` set the threshold. Captions
        of `DRAWN_FOR_TRAINING` training pictures are drawn too: there memorisation shows most.

        Args:
            kept: folder in which the features are saved as `TEST_FEATURES`.
        """
        import ray

        tasks = self._tasks(weights, split)
        parts = self._drawn(weights, tasks, guidance_scale, NetworkSet.ALL)
        shares, known = [task.numbers for task in tasks], self._known_of(split)
        searched = (known.detector, known.facts) if known else None
        given = self._real[split], self.captions[split], searched, shares, kept
        found: SetScores = ray.get(self.actors[0].measure.remote(*given, *parts))
        scores = self._with_subjects(found.scores, weights, split, guidance_scale, kept, tasks, parts)
        found = replace(found, scores=self._with_votes(scores, weights, split, kept))
        return replace(found, recited=self._recited(weights, guidance_scale, known)) if known else found

    def _recited(self, weights: str | None, guidance_scale: float | None, known: Known) -> Recited:
        """Draw captions of training pictures and compare the pictures with these."""

        count, seed = min(DRAWN_FOR_TRAINING, self.config.evaluate.num_samples), self.config.evaluate.seed
        captions, shapes = known.captions[:count], known.shapes[:count]
        tasks = self._dealt_tasks(
            weights, captions, range(seed, seed + count), shapes, known.references, range(count)
        )
        drawn = self._drawn_features(weights, tasks, guidance_scale, NetworkSet.FIRST)
        return recited(drawn[known.facts.feature_network], known.captions, known.detector, known.facts)

    def copies_among(self, split: Split, drawn: Sequence[Storage]) -> list[Measurement | None]:
        """Return the share of near copies at each rung that a split evaluates.

        Args:
            drawn: folders in which `score` saved the features of what a rung drew.

        Returns:
            One record for each folder; None where the features are not there, or no share is known.
        """
        import ray

        if not (known := self._known_of(split)):
            return [None for _ in drawn]
        searched, actors = ray.put((known.detector, known.facts)), cycle(self.actors)
        parts = {
            folder.uri: next(actors).near_copies.remote(folder, searched)
            for folder in drawn
            if folder.exists(FEATURES)
        }
        found: dict[str, Copies] = dict(zip(parts, ray.get(list(parts.values())), strict=True))
        return [found[each.uri].record() if each.uri in found else None for each in drawn]

    def _known_of(self, split: Split) -> Known | None:
        """Return what is searched for near copies, fitted once; None if that is off."""
        import torch

        if not (bound := self.config.evaluate.memorisation_pictures):
            return None
        dataset = trained_on(self.config, self.dataset, split)
        if dataset.without_fold not in self._known:
            first, rows, unseen = self._first_network(), dataset.pictures("train", bound), None
            if self.dataset.manifest.held_out:
                held = held_out(self.config, split)
                others = self.dataset.judged_by(held).pictures(held.name, HELD_OUT)
                unseen = self._restored(others)[first]
            known_copies = self._restored(rows[:KNOWN_COPIES], times=2)[first]
            detector, facts = fit_detector(
                torch.from_numpy(self.restored_features(split, bound)[first]),
                torch.from_numpy(known_copies),
                None if unseen is None else torch.from_numpy(unseen),
                first,
            )
            captions, shapes = [row["text"] for row in rows], [shape_of(row["image"]) for row in rows]
            self._known[dataset.without_fold] = Known(detector, facts, captions, shapes, _shared(rows))
        return self._known[dataset.without_fold]

    def _drawn(
        self,
        weights: str | None,
        tasks: Sequence[Task],
        guidance_scale: float | None,
        by: NetworkSet,
        files: Sequence[SampleFiles] | None = None,
    ) -> "list[ObjectRef[Features]]":
        """Promises of the features of what tasks draw, one per task; see `Evaluator.sample_features`.

        What the base, or the weights that were drawn last, have drawn before is not drawn again: a subject's
        folds, its test split and its pages ask for the same pictures.
        """
        if weights not in self._known_features:
            of_base = self._known_features.get(None, {})
            self._known_features = {None: of_base, weights: {}}
        known = self._known_features[weights]
        scale = self.config.evaluate.guidance_scale if guidance_scale is None else guidance_scale
        drawn = (
            scale,
            *((*task.captions, *task.seeds, *task.shapes, task.references, *task.places) for task in tasks),
        )
        for wider in (by, NetworkSet.ALL):
            if not files and (found := known.get((wider, drawn))):
                return found
        parts = [
            each.actor.sample_features.remote(
                weights,
                each.captions,
                each.seeds,
                files[i] if files else None,
                scale,
                by,
                each.shapes,
                each.references,
                each.places,
            )
            for i, each in enumerate(tasks)
        ]
        known[by, drawn] = parts
        return parts

    def _drawn_features(
        self, weights: str | None, tasks: Sequence[Task], guidance_scale: float | None, by: NetworkSet
    ) -> Features:
        """Features of what tasks draw, in the requested order."""
        import ray

        parts = self._drawn(weights, tasks, guidance_scale, by)
        return join(ray.get(parts), [task.numbers for task in tasks])

    def _with_subjects(
        self,
        found: Scores,
        weights: str | None,
        split: Split,
        guidance_scale: float | None,
        kept: Storage | None,
        tasks: Sequence[Task],
        parts: "Sequence[ObjectRef[Features]]",
    ) -> Scores:
        """Add the subject score, for which further pictures are drawn, if the search is ranked by it.

        Args:
            kept: folder in which the pictures' features are saved.
            tasks, parts: of the scored pictures.
        """
        import ray
        from safetensors.torch import save

        if not self._is_of_subjects(split):
            return found
        reference, resamples = self._subjects[split], self.config.evaluate.bootstrap
        if weights is None and guidance_scale in (None, self.config.evaluate.guidance_scale):
            drawn = reference.base  # with this noise
        else:
            own = join(ray.get(list(parts)), [task.numbers for task in tasks])
            drawn = self._drawn_subjects(weights, split, guidance_scale, kept, own)
        if kept:
            kept.write_bytes(SUBJECT_FEATURES, save(drawn.tensors()))
        return replace(found, subject=reference.score(drawn, num_resamples=resamples))

    def _with_votes(self, found: Scores, weights: str | None, split: Split, kept: Storage | None) -> Scores:
        """Add the share of held-out votes that are ordered wrongly, if there are votes.

        Args:
            weights: None: what the run begins from.
            kept: folder in which each vote's margin is saved.
        """
        import ray

        if self.dataset.votes is None or split.run or weights == BARE:
            return found

        def judged(kept: Storage | None, *, earlier: bool) -> Score:
            margins, prompts = ray.get(self.actors[-1].margins.remote(weights, split, earlier))
            if kept:
                kept.write_text(MARGINS, json.dumps({"margins": margins, "prompts": prompts}))
            share, error = mean_of_groups(wrongly_ordered(margins), prompts)
            return Score(share, len(margins), REWARDS, error, MEASURES[VOTES].name)

        votes, before = judged(kept, earlier=False), None
        if self.dataset.earlier_votes is not None and split == TEST:
            before = judged(None, earlier=True)
        return replace(found, votes=votes, earlier_votes=before)

    def _subject_reference(self, split: Split) -> SubjectReference:
        """Measure what subjects on a loaded split are compared with: photos, prompts, the base's pictures."""
        import ray
        import torch

        network, dataset = self.subject_network, trained_on(self.config, self.dataset, split)
        unseen = self.dataset.judged_by(split).pictures(split.name, MOST_PHOTOS)
        is_apart = self.dataset.manifest.held_out or split.fold is not None
        seen = dataset.pictures("train", MOST_PHOTOS) if is_apart else []
        rows = [*unseen, *seen]
        restored = torch.from_numpy(self._restored(rows, by=NetworkSet.SUBJECTS)[network])

        def photos_of(prompt: str) -> Photos:
            its = torch.tensor([row["text"] == prompt for row in rows])
            held = torch.arange(len(rows)) < len(unseen)
            return Photos(restored[its & held], restored[its & ~held])

        photos = [photos_of(subject.instance_prompt) for subject in self._judged_subjects(split)]
        prompts, texts = self.config.evaluate.prompts, None
        if prompts and (found := ray.get(self.actors[0].text_features.remote(prompts))) is not None:
            texts = torch.from_numpy(found)
        own = self._drawn_features(None, self._tasks(None, split), None, NetworkSet.ALL)
        base = self._drawn_subjects(None, split, None, None, own)
        return SubjectReference(photos, base, network, texts)

    def _is_of_subjects(self, split: Split) -> bool:
        """Return whether a split's scores contain the subject score."""
        return self.rank_by == SUBJECT and not split.run

    def _judged_subjects(self, split: Split) -> list[Subject]:
        """Return the subjects of which a loaded split has photos."""
        present = set(self.captions[split])
        return [subject for subject in self.subjects if subject.instance_prompt in present]

    def _drawn_subjects(
        self,
        weights: str | None,
        split: Split,
        guidance_scale: float | None,
        kept: Storage | None,
        own: Features,
    ) -> DrawnSubjects:
        """Draw the class prompts and own prompts, from noise that is the same for all weights.

        Args:
            kept: folder in which pictures of own prompts are kept; None: they are not.
            own: features of the scored pictures.
        """
        import torch

        captions, subjects = self.captions[split], self._judged_subjects(split)
        shown = [captions[i % len(captions)] for i in range(self._num_samples(split))]
        count = self.config.evaluate.subject_samples
        of_classes: dict[str, torch.Tensor] = {}
        for prompt in sorted({each.class_prompt for each in subjects if each.class_prompt}):
            tasks = self._tasks_of_prompt(weights, prompt, count, self.shapes[split])
            drawn = self._drawn_features(weights, tasks, guidance_scale, NetworkSet.SUBJECTS)
            of_classes[prompt] = torch.from_numpy(drawn[self.subject_network])
        found = []
        for subject in subjects:
            its = torch.tensor([caption == subject.instance_prompt for caption in shown])
            of_class = of_classes.get(subject.class_prompt or "")
            found.append(Drawn(torch.from_numpy(own[self.subject_network])[its], of_class))
        prompted = None
        if self.config.evaluate.prompts and self.config.evaluate.clip:
            if kept and weights:
                of_prompts = self.features(self.prompts_of(weights, kept, guidance_scale))
            else:
                tasks = self._prompt_tasks(weights, range(len(self.config.evaluate.prompts)))
                of_prompts = self._drawn_features(weights, tasks, guidance_scale, NetworkSet.ALL)
            prompted = torch.from_numpy(of_prompts[self._clip_network])
        return DrawnSubjects(found, prompted)

    @cached_property
    def subject_network(self) -> str:
        """Identity of the network that compares subjects."""
        import ray

        return str(ray.get(self.actors[0].subject_network.remote()))

    @cached_property
    def _clip_network(self) -> str:
        import ray

        return str(ray.get(self.actors[0].clip_network.remote()))

    def training_features(self, split: Split, count: int) -> Features:
        """Features of the first `count` training pictures of the weights that a split evaluates, or of all
        that are measured: twice `evaluate.num_samples`.

        The order is that of `Dataset.pictures`. Features are computed once.
        """
        if split.run:
            return self._measure_real(
                [row["image"] for row in self._judged_by(split).pictures("train", count)]
            )
        dataset = trained_on(self.config, self.dataset, split)
        if dataset.without_fold not in self._training:
            rows = dataset.pictures("train", OTHERS * self.config.evaluate.num_samples)
            self._training[dataset.without_fold] = self._measure_real([row["image"] for row in rows])
        return {name: each[:count] for name, each in self._training[dataset.without_fold].items()}

    def restored_features(self, split: Split, count: int) -> Features:
        """Features of the same pictures as the base's autoencoder restores them; beyond
        `evaluate.num_samples` of them from the ranking network only.
        """
        rows = trained_on(self.config, self.dataset, split).pictures("train", count)
        first = self.config.evaluate.num_samples
        found = self._restored(rows[:first], by=NetworkSet.ALL)
        if not (further := rows[first:]):
            return found
        return {name: np.concatenate([found[name], each]) for name, each in self._restored(further).items()}

    def _restored(
        self, rows: Sequence[dict[str, Any]], times: int = 1, by: NetworkSet = NetworkSet.FIRST
    ) -> Features:
        """Features of pictures as the base's autoencoder restores them, one or more times.

        A picture is restored once: the training pictures of one fold are those of the others too.
        """
        pictures = {hashlib.sha256(row["image"]).digest(): row["image"] for row in rows}
        known = self._restored_features.get((times, NetworkSet.ALL), {})
        if not pictures.keys() <= known.keys():
            known = self._restored_features.setdefault((times, by), {})
            missing = {digest: each for digest, each in pictures.items() if digest not in known}
            found = self.features(list(missing.values()), through_autoencoder=times, by=by) if missing else {}
            for number, digest in enumerate(missing):
                known[digest] = {name: each[number] for name, each in found.items()}
        chosen = [known[hashlib.sha256(row["image"]).digest()] for row in rows]
        return {name: np.stack([each[name] for each in chosen]) for name in chosen[0]}

    def reference(self, checkpoint: Storage) -> Features:
        """Features for drift detection of a served checkpoint: float32, N x D, by `<network>/<kind>`.

        The kinds are `validation`, pictures not trained on (`held_out` of the test split, which publish has
        read by then); those of the detector of near copies (`CopyDetector.tensors`), if these are measured;
        and `published`, the generated pictures that the checkpoint was scored on.
        """
        import ray

        held = held_out(self.config, TEST)
        self.load(held)
        kinds: dict[str, Features] = {"validation": ray.get(self._real[held]).features}
        if known := self._known_of(TEST):
            for name, tensor in known.detector.tensors().items():
                kinds[name] = {self._first_network(): tensor.numpy()}
        if checkpoint.exists(FEATURES):
            drawn = kept_features(checkpoint, FEATURES)
            kinds["published"] = {name: drawn[name] for name in drawn.keys() & kinds["validation"].keys()}
        found = {f"{network}/{kind}": each for kind, part in kinds.items() for network, each in part.items()}
        return {name: np.ascontiguousarray(each, dtype=np.float32) for name, each in found.items()}

    def validation_losses(self, weights: str | None, split: Split = VALIDATION) -> list[float]:
        """Denoising loss of each row of a split or fold, at fixed timesteps and noise."""
        import ray

        return ray.get(self.actors[-1].validation_losses.remote(weights, split))

    def difference(
        self, one: Storage, other: Storage, split: Split, file: str = FEATURES, measure: str = FID
    ) -> PairedDifference:
        """Score of the features in `one` minus that of the features in `other`, from the same captions.

        Args:
            file: with the features, in both folders; of the subject score it is `SUBJECT_FEATURES`.
            measure: one of `records.MEASURES`.
        """
        import ray
        import torch
        from safetensors.torch import load

        if measure == SUBJECT:
            drawn = [DrawnSubjects.read(load(each.read_bytes(SUBJECT_FEATURES))) for each in (one, other)]
            return self._subjects[split].difference(*drawn, num_resamples=self.config.evaluate.bootstrap)
        if measure == VOTES:
            told = [json.loads(each.read_text(MARGINS)) for each in (one, other)]
            first, second = (torch.tensor(wrongly_ordered(each["margins"])).double() for each in told)
            apart, error = mean_of_groups((first - second).tolist(), told[0]["prompts"])
            count = len(first)
            return difference_of(apart, first, second, lambda _: error or 0.0, count, REWARDS)
        return ray.get(self.actors[0].difference.remote(self._real[split], one, other, file, measure))

    def ranked_by(self, split: Split) -> str:
        """Return the score that ranks on a loaded split: `rank_by`, or FID where the split does not have it.

        Folds are ranked by one score: where one of them does not have it, all are ranked by FID.
        """
        alike = (
            [each for each in self.corrected if each.fold is not None] if split.fold is not None else [split]
        )
        return self.rank_by if all(map(self._has_ranking, alike)) else FID

    def _has_ranking(self, split: Split) -> bool:
        """Return whether the scores of a loaded split contain `rank_by`."""
        if self.rank_by == SUBJECT:
            return self._is_of_subjects(split)
        if self.rank_by == TARGET:
            return split in self.unedited
        if self.rank_by == CONTROL:
            return split in self.controlled
        if self.rank_by == VOTES:
            return self.dataset.votes is not None and not split.run
        if self.rank_by == KID:
            return min(len(self.captions[split]), self._num_samples(split)) >= FEWEST
        return self.rank_by != CORRECTED or self.corrected[split]

    def resizing(self) -> dict[str, str]:
        """Return how each feature network's input pictures are resized, by network identity."""
        import ray

        return ray.get(self.actors[0].resizing.remote())

    def _first_network(self) -> str:
        """Return the identity of the ranking network."""
        import ray

        return str(ray.get(self.actors[0].identities.remote())[0])

    def num_features(self) -> int:
        """Return the number of features of the ranking network."""
        import ray

        return ray.get(self.actors[0].num_features.remote())

    def sample_names(self, split: Split) -> list[str]:
        """File names of the pictures saved per rung of a split, one per caption."""
        count = min(self.config.publish.sample_count, self._num_samples(split))
        return [sample_name(i, caption) for i, caption in enumerate(self.captions[split][:count])]

    def shown(self, split: Split, count: int) -> list[Shown]:
        """What a split's first pictures are drawn from, beside captions; empty if that is nothing."""
        import ray

        known = self.references.get(split)
        return [] if known is None else ray.get(known)[:count]

    def floor(self, split: Split) -> Scores:
        """Score real training pictures: as many as `score` generates, or as many as prepare kept."""
        return self._score_of_real(split, self.training_features(split, self._num_samples(split)))

    def reachable_floor(self, split: Split) -> Scores:
        """Score the same training pictures as the base's autoencoder restores them: the best to hope for."""
        return self._score_of_real(split, self.restored_features(split, self._num_samples(split)))

    def _score_of_real(self, split: Split, found: Features) -> Scores:
        """Score features of real training pictures, which are no edits of a split's references."""
        import ray

        scores: Scores = ray.get(self.actors[0].score.remote(self._real[split], None, None, found))
        return replace(scores, target=None)

    def real_against_real(self, split: Split) -> list[Measurement]:
        """Precision and recall of the pictures that `floor` scores."""
        import ray

        found = self.training_features(split, self._num_samples(split))
        return ray.get(self.actors[0].real_against_real.remote(self._real[split], found))

    def pictures(
        self,
        weights: str | None,
        split: Split,
        numbers: int | Sequence[int],
        guidance_scale: float | None = None,
    ) -> list[bytes]:
        """Sample PNGs of a split's pictures from the noise that `score` uses.

        Args:
            numbers: picture numbers; or a count, from the first.
        """
        wanted = range(self._num_samples(split))[:numbers] if isinstance(numbers, int) else numbers
        return self._draw(weights, self._tasks(weights, split, wanted), guidance_scale)

    def prompted(
        self, weights: str | None, prompt: str, count: int, shapes: Sequence[Shape] = ()
    ) -> list[bytes]:
        """Sample PNGs of one prompt; the noise of picture i is seeded with `evaluate.seed` + i.

        Args:
            shapes: picture i has shape i modulo their number; if empty, a square of `data.resolution`.
        """
        return self._draw(weights, self._tasks_of_prompt(weights, prompt, count, shapes), None)

    def labels(self, pictures: list[bytes]) -> list[str]:
        """Return what the classifier of `evaluate.balance` says of PNGs."""
        import ray

        return ray.get(self.actors[-1].labels.remote(pictures))

    def label_names(self) -> list[str]:
        """Return all labels of that classifier."""
        import ray

        return ray.get(self.actors[-1].label_names.remote())

    def prompted_features(
        self, weights: str | None, prompt: str, count: int, shapes: Sequence[Shape] = ()
    ) -> Features:
        """Features of what `prompted` samples, by the network that compares subjects."""
        tasks = self._tasks_of_prompt(weights, prompt, count, shapes)
        return self._drawn_features(weights, tasks, None, NetworkSet.SUBJECTS)

    def _tasks_of_prompt(
        self, weights: str | None, prompt: str, count: int, shapes: Sequence[Shape]
    ) -> list[Task]:
        side, seed = self.config.data.resolution, self.config.evaluate.seed
        shapes = shapes or [(side, side)]
        of_each = [shapes[i % len(shapes)] for i in range(count)]
        return self._dealt_tasks(weights, [prompt] * count, range(seed, seed + count), of_each)

    def draw_prompts(
        self,
        weights: str | None,
        numbers: Sequence[int] | None = None,
        guidance_scale: float | None = None,
    ) -> list[bytes]:
        """Sample PNGs of `evaluate.prompts`: squares of `data.resolution`.

        The noise of prompt i is seeded with `evaluate.seed` + i, whatever the weights.

        Args:
            numbers: positions of the prompts; None: all.
            guidance_scale: None means `evaluate.guidance_scale`.
        """
        numbers = range(len(self.config.evaluate.prompts)) if numbers is None else numbers
        return self._draw(weights, self._prompt_tasks(weights, numbers), guidance_scale)

    def _prompt_tasks(self, weights: str | None, numbers: Sequence[int]) -> list[Task]:
        """Tasks for `evaluate.prompts` at the given positions; see `draw_prompts`."""
        evaluate, side = self.config.evaluate, self.config.data.resolution
        return self._dealt_tasks(
            weights,
            [evaluate.prompts[i] for i in numbers],
            [evaluate.seed + i for i in numbers],
            [(side, side) for _ in numbers],
            *self._prompt_references(numbers),
        )

    def _prompt_references(self, numbers: Sequence[int]) -> "tuple[ObjectRef[References] | None, list[int]]":
        """Return what own prompts are drawn from: that of the first square pictures that rungs are measured
        on, in turn.
        """
        manifest = self.dataset.manifest
        if not (manifest.references or manifest.control):
            return None, []
        split, side = splits(self.config)[0], self.config.data.resolution
        self.load(split)
        shapes = self.shapes[split]
        places = [place for place, shape in enumerate(shapes) if shape == (side, side)]
        places = places or list(range(len(shapes)))
        return self.references[split], [places[number % len(places)] for number in numbers]

    def shown_with_prompts(self) -> list[Shown]:
        """What each of `evaluate.prompts` is drawn from, as for `shown`."""
        import ray

        known, places = self._prompt_references(range(len(self.config.evaluate.prompts)))
        return [] if known is None else [ray.get(known)[place] for place in places]

    def prompts_of(
        self, weights: str, checkpoint: Storage, guidance_scale: float | None = None
    ) -> list[bytes]:
        """Return PNGs of `evaluate.prompts` by a rung's weights; they are kept in its checkpoint's folder."""
        prompts, kept = self.config.evaluate.prompts, checkpoint.child(PROMPTS)
        names = [prompt_name(i, prompt) for i, prompt in enumerate(prompts)]
        missing = [i for i, name in enumerate(names) if not kept.exists(name)]
        for i, drawn in zip(missing, self.draw_prompts(weights, missing, guidance_scale), strict=True):
            kept.write_bytes(names[i], drawn)
        return [kept.read_bytes(name) for name in names]

    def _draw(self, weights: str | None, tasks: Sequence[Task], guidance_scale: float | None) -> list[bytes]:
        import ray

        parts = [
            task.actor.sample_pictures.remote(
                weights,
                task.captions,
                task.seeds,
                guidance_scale,
                task.shapes,
                task.references,
                task.places,
            )
            for task in tasks
        ]
        return in_order([task.numbers for task in tasks], ray.get(parts))

    def stop(self) -> None:
        import ray

        for actor in self.actors:
            ray.kill(actor)


def _shared(rows: Sequence[dict[str, Any]]) -> "ObjectRef[References] | None":
    """Put the reference pictures and control images of rows into Ray's object store; None without any."""
    import ray

    if not any(row["references"] or row["control"] for row in rows):
        return None
    return ray.put([Shown(row["references"], row["image"], row["control"]) for row in rows])


def shape_of(picture: bytes) -> Shape:
    """Read a PNG's height and width from its header."""
    width, height = Image.open(io.BytesIO(picture)).size
    return height, width


@contextmanager
def evaluators(config: Config, dataset: Dataset) -> Iterator[EvaluatorPool]:
    """Yield a pool of evaluators that is stopped at the end of the block."""
    pool = EvaluatorPool(config, dataset)
    try:
        yield pool
    finally:
        pool.stop()
