"""Records that a run keeps in files and that its stages hand on.

A record keeps keys that it does not know, and writes only values that it was given, so that a file of an
older release stays as it is. progress.json, winner.json and each line of results.jsonl carry the number of
their format; one without a number has format 1.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import stdev
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.storage import Storage
from ray_jobs.config import ConfigError, Settings
from ray_jobs.config.fields import explain
from ray_jobs.console.troubleshooting import Help, help_link

FORMAT = 1  # a change that this program could misread gets the next number
RESULTS = "results.jsonl"
WINNER = "winner.json"
# Fields that candidates are ranked by.
FID, CORRECTED, KID, MIND = "fid", "corrected_fid", "kid", "mind"
PREFERENCE, SUBJECT, TARGET, CONTROL = "preference", "subject", "target", "control"
VOTES, EARLIER_VOTES = "votes", "earlier_votes"  # the second does not rank, but may hold a version back

# Metrics of memorisation: near copies among pictures for the scored captions and for captions of training
# pictures, and how often the nearest training picture has the caption that was drawn.
COPIES, RECITED, OWN = "near copies", "near copies, training captions", "own picture nearest"


class Measure(NamedTuple):
    """A score that can rank: its name, and the decimal places that it is shown with."""

    name: str
    digits: int


MEASURES = {
    FID: Measure("FID", 1),
    CORRECTED: Measure("corrected FID", 1),
    KID: Measure("KID", 4),
    MIND: Measure("MIND", 1),
    PREFERENCE: Measure("preference gap", 2),
    SUBJECT: Measure("subject score", 2),
    TARGET: Measure("distance to the target", 3),
    CONTROL: Measure("control score", 3),
    VOTES: Measure("share of wrong votes", 3),
    EARLIER_VOTES: Measure("share of wrong earlier votes", 3),
}


# Parts of the subject score (`metrics.subject`), by field, and what they say of a training.
SUBJECT_PARTS = {
    "unlike": "unlike the photos",
    "by_heart": "learned by heart",
    "class_lost": "lost of the class",
    "variety_lost": "lost of variety",
    "fit_lost": "lost of prompts",
}


# Shown beside the control score, which it is a part of, with the corrected FID.
DISAGREEMENT = "disagreement"
BESIDE = {DISAGREEMENT: Measure("disagreement with control images", 3)}


class Record(BaseModel):
    """Base of all records: immutable; `record | {...}` is a copy with other values."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)

    @classmethod
    def parse(cls, content: Mapping[str, object], where: str) -> Self:
        """Validate the content of a file.

        Raises:
            ConfigError: it has a newer format, or lacks a value; `where` names the file.
        """
        values = dict(content)
        if (version := values.pop("format", 1)) not in range(1, FORMAT + 1):
            raise ConfigError(
                f"{where} was written by a newer diffray (format {version}); this one reads format {FORMAT}: "
                f"update it, or give the run another name; {help_link(Help.VERSIONS)}"
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(error, where)) from None

    def fields(self) -> dict[str, Any]:
        """Return the values that were given, without defaults."""
        return self.model_dump(exclude_unset=True, by_alias=True)

    def versioned(self) -> dict[str, object]:
        """Return the same with the format's number, as content of a file."""
        return {"format": FORMAT, **self.fields()}

    def __or__(self, changes: Mapping[str, object]) -> Self:
        return self.model_validate(self.fields() | dict(changes))

    def without(self, *names: str) -> Self:
        """Return a copy that was not given these values."""
        return self.model_validate({name: each for name, each in self.fields().items() if name not in names})


class Progress(Record):
    """State of a training at a checkpoint (progress.json): means since the previous checkpoint.

    Attributes:
        waiting_for_data: share of the time.
        state_bytes: memory of rank 0, by kind.
        startup_seconds: seconds of each start-up phase; only in a worker group's first checkpoint.
        why: reason for the checkpoint: `RUNG`, `INTERVAL` or `PREEMPTION`.
    """

    step: int
    train_loss: float = math.nan
    grad_norm: float = math.nan
    images_per_second: float = 0.0
    waiting_for_data: float = 0.0
    state_bytes: dict[str, int] = {}
    startup_seconds: dict[str, float] = {}
    why: str
    world_size: int


class RungRow(Record):
    """A measured rung (one line of results.jsonl), or a candidate for the winner.

    Attributes:
        settings: searched settings other than the learning rate.
        fold: cross-validation fold that was evaluated; None: the validation split.
        ranked_by: which score ranks, one of `MEASURES`.
        disagreement: of pictures with their control images (`metrics.control`).
        fid_means, spread: as in `evaluation.scores.Scores`.
        unlike, by_heart, class_lost, variety_lost, fit_lost: parts of the subject score (`metrics.subject`).
        training: folder of the checkpoints, if it is not named after the trial.
        parent: checkpoint of another trial that the training began with, at step `begins_at`.
        validation_losses: loss of each held-out row.
        black: number of its pictures that are black.
        seconds: time of the trial up to this rung, including evaluation; where trials share their workers,
            its share of the time for which these were held.
        checkpoint: URI of the checkpoint.
        folds: a candidate's ranking score in each fold; the other scores are means over the folds.
        guidance_scale: of a candidate that is not measured at `evaluate.guidance_scale` alone.
        features: URI of the folder of its pictures' features, if that is not the checkpoint.
        near_copies, copies_by_chance: share of near copies among its pictures, and the share that a model
            without memorisation has; in the report only.
        behind: ranking score above the lowest on common noise, with its error and the `variance_ratio` of
            `PairedDifference` (None: infinite); only given for rows that were compared.
    """

    trial_id: str
    learning_rate: float = math.nan
    settings: Settings = {}
    fold: int | None = None
    training: str | None = None
    parent: str | None = None
    begins_at: int = 0
    step: int
    ranked_by: str = FID
    fid: float
    fid_error: float | None = None
    corrected_fid: float | None = None
    corrected_fid_error: float | None = None
    fid_means: float | None = None
    spread: float | None = None
    kid: float | None = None
    kid_error: float | None = None
    mind: float | None = None
    mind_error: float | None = None
    preference: float | None = None
    preference_error: float | None = None
    target: float | None = None
    target_error: float | None = None
    votes: float | None = None
    votes_error: float | None = None
    earlier_votes: float | None = None
    earlier_votes_error: float | None = None
    outside: float | None = None
    outside_error: float | None = None
    control: float | None = None
    control_error: float | None = None
    disagreement: float | None = None
    disagreement_error: float | None = None
    subject: float | None = None
    subject_error: float | None = None
    unlike: float | None = None
    unlike_error: float | None = None
    by_heart: float | None = None
    by_heart_error: float | None = None
    class_lost: float | None = None
    class_lost_error: float | None = None
    variety_lost: float | None = None
    variety_lost_error: float | None = None
    fit_lost: float | None = None
    fit_lost_error: float | None = None
    fid_2: float | None = None
    fid_2_error: float | None = None
    feature_network: str | None = None
    feature_network_2: str | None = None
    subject_network: str | None = None
    preference_model: str | None = None
    num_samples: int | None = None
    train_loss: float = math.nan
    validation_loss: float | None = None
    validation_losses: list[float] = []
    black: int = 0
    images_per_second: float = math.nan
    seconds: float = 0.0
    checkpoint: str = ""
    folds: list[float] = []
    guidance_scale: float | None = None
    features: str | None = None
    near_copies: float | None = None
    near_copies_error: float | None = None
    copies_by_chance: float | None = None
    behind: float | None = None
    behind_error: float | None = None
    variance_ratio: float | None = None

    @property
    def training_name(self) -> str:
        """Name of the checkpoints' folder."""
        return self.training or self.trial_id

    @property
    def score(self) -> float:
        """What ranks; lower is better."""
        return float(getattr(self, self.ranked_by))

    @property
    def score_error(self) -> float | None:
        """Standard error of `score`."""
        error: float | None = getattr(self, f"{self.ranked_by}_error")
        return error

    @property
    def measure(self) -> Measure:
        """Name and form of `score`."""
        return MEASURES[self.ranked_by]

    @property
    def place(self) -> tuple[str, int]:
        """Trial and step, which identify a candidate."""
        return self.trial_id, self.step


def paired_error(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return the standard error of the difference of two means over the same rows; None for fewer than two.

    What rows have in common, which is most of a denoising loss, does not count.
    """
    if len(one) != len(other) or len(one) < 2:
        return None
    return stdev(a - b for a, b in zip(one, other, strict=True)) / math.sqrt(len(one))


def read_rows(search: Storage, file: str = RESULTS) -> list[RungRow]:
    """Read the rows of a file in the search's folder; empty if it does not exist.

    Raises:
        ConfigError: a line has a newer format, lacks the score that ranks it, or is damaged.
    """
    where = f"{search.uri}/{file}"
    rows = [RungRow.parse(line, where) for line in search.read_lines(file)]
    for row in rows:
        if row.ranked_by not in MEASURES or getattr(row, row.ranked_by) is None:
            raise ConfigError(
                f"{where}: {row.trial_id} at step {row.step} has no score {row.ranked_by}; update diffray, "
                "or give the run another name"
            )
    return rows


def write_rows(search: Storage, rows: Iterable[RungRow], file: str = RESULTS) -> None:
    search.write_lines(file, (row.versioned() for row in rows))


def worker_hours(rows: Iterable[RungRow], workers: int) -> dict[str, float]:
    """Return the hours of workers that each training took up to its last rung, by its name.

    Args:
        rows: one row per rung of a training, as in results.jsonl.
        workers: workers of a training.
    """
    ordered = sorted(rows, key=lambda row: row.step)
    return {row.training_name: row.seconds / 3600 * workers for row in ordered}


class Measurement(Record):
    """One number with all that it depends on; `standard_error` is None if it was not estimated.

    Attributes:
        num_samples: number of generated pictures.
        num_real: number of real pictures, where that matters.
        num_training, num_held_out, num_unseen, threshold, extrapolated, expected_share, sensitivity: as in
            `metrics.copies.DetectorFacts`; of memorisation only. Earlier releases wrote a threshold that
            is a distance, and no `num_unseen`, `extrapolated`, `sensitivity`.
    """

    metric: str
    value: float
    standard_error: float | None = None
    num_samples: int
    feature_network: str
    num_real: int | None = None
    num_training: int | None = None
    num_held_out: int | None = None
    num_unseen: int | None = None
    threshold: float | None = None
    extrapolated: bool | None = None
    expected_share: float | None = None
    sensitivity: float | None = None


class FinalMeasures(Record):
    """Measures on the test split beyond the scores that rank.

    Attributes:
        left_out: measures that were not computed and the reasons, as sentences.
        floor: the values of real training pictures.
    """

    base: list[Measurement] = []
    winner: list[Measurement] = []
    left_out: list[str] = []
    floor: list[Measurement] = []


class SubjectScores(Record):
    """Measures of a DreamBooth subject; the last two only if its class has a prompt."""

    instance_prompt: str
    class_prompt: str | None
    num_photos: int
    base_similarity: Measurement
    winner_similarity: Measurement
    class_drift: Measurement | None = None
    toward_subject: Measurement | None = None


class Remembered(Record):
    """Scores on the validation pictures of an earlier run; higher afterwards: something was forgotten.

    Attributes:
        run: the earlier run.
        measure: which score they are, one of `MEASURES`.
        before, after: of what the run began from, and of the winner.
        base: of the base without the adapter that the run began from; None if there was none.
        change: after minus before, in pairs of pictures; None without error estimates.
    """

    run: str
    measure: str
    before: float
    before_error: float | None = None
    after: float
    after_error: float | None = None
    base: float | None = None
    base_error: float | None = None
    change: float | None = None
    change_error: float | None = None
    num_samples: int
    feature_network: str
    feature_network_2: str | None = None


class Balance(Record):
    """Which attributes pictures show (`evaluate.balance`).

    Attributes:
        classifier: as configured.
        prompts: number of prompts, of each of which `pictures` were drawn.
        column: of the data, whose values are its counts; "": the classifier says them of real pictures.
        data, base, winner: number of pictures by label.
        shares: by label, of data, base and winner: the share with its 95 % interval.
        base_distance, distance: total variation distance to the data's shares.
        by_chance, at_most: mean and 95 % quantile of the distance of as many pictures that are like the data.
    """

    classifier: str
    prompts: int
    pictures: int
    column: str = ""
    data: dict[str, int]
    base: dict[str, int]
    winner: dict[str, int]
    shares: dict[str, list[tuple[float, float, float]]]
    base_distance: float
    distance: float
    by_chance: float
    at_most: float


class Winner(Record):
    """The published model and its scores (winner.json).

    Attributes:
        settings: searched settings other than the learning rate.
        begins_from: registered version or adapter that training began from, by field of `model`; scores of
            the base are those of the base with that adapter.
        guidance_scale: scale that the search chose; None if it tried one only.
        folds: ranking score in each fold.
        ranked_by: which validation score ranked, one of `MEASURES`.
        test_reads: how often the test split of this run was read.
        test_floor_fid: FID of real training pictures.
        reachable_test_fid: FID of these as the base's autoencoder restores them.
        measure_settings: settings of `evaluate` that affect these scores but not the search.
        test_shapes: generated pictures by shape, named width x height.
        resizing: how pictures were resized for each feature network.
        test_digest: digest of the test pictures and their captions.
        registry_version: version in the registry; None until it is registered.
        search_digest: digest of the search's result.
        publish_settings: settings of the registry and the report, by name; empty in earlier releases.
    """

    trial_id: str
    learning_rate: float
    settings: Settings = {}
    begins_from: dict[str, str] = {}
    step: int
    guidance_scale: float | None = None
    folds: list[float] = []
    ranked_by: str = FID
    validation_fid: float
    validation_fid_error: float | None = None
    validation_corrected_fid: float | None = None
    validation_corrected_fid_error: float | None = None
    validation_kid: float | None = None
    validation_kid_error: float | None = None
    validation_mind: float | None = None
    validation_mind_error: float | None = None
    validation_preference: float | None = None
    validation_preference_error: float | None = None
    validation_target: float | None = None
    validation_target_error: float | None = None
    validation_control: float | None = None
    validation_control_error: float | None = None
    validation_disagreement: float | None = None
    validation_disagreement_error: float | None = None
    validation_votes: float | None = None
    validation_votes_error: float | None = None
    validation_earlier_votes: float | None = None
    validation_earlier_votes_error: float | None = None
    validation_subject: float | None = None
    validation_subject_error: float | None = None
    test_reads: int = 1
    test_fid: float
    test_fid_error: float | None = None
    test_corrected_fid: float | None = None
    test_corrected_fid_error: float | None = None
    test_spread: float | None = None
    test_kid: float | None = None
    test_kid_error: float | None = None
    test_mind: float | None = None
    test_mind_error: float | None = None
    test_preference: float | None = None
    test_preference_error: float | None = None
    test_target: float | None = None
    test_target_error: float | None = None
    test_votes: float | None = None
    test_votes_error: float | None = None
    test_earlier_votes: float | None = None
    test_earlier_votes_error: float | None = None
    test_outside: float | None = None
    test_outside_error: float | None = None
    test_control: float | None = None
    test_control_error: float | None = None
    test_disagreement: float | None = None
    test_disagreement_error: float | None = None
    test_subject: float | None = None
    test_subject_error: float | None = None
    test_fid_2: float | None = None
    test_fid_2_error: float | None = None
    base_test_fid: float
    base_test_fid_error: float | None = None
    base_test_corrected_fid: float | None = None
    base_test_corrected_fid_error: float | None = None
    base_test_spread: float | None = None
    base_test_kid: float | None = None
    base_test_kid_error: float | None = None
    base_test_mind: float | None = None
    base_test_mind_error: float | None = None
    base_test_preference: float | None = None
    base_test_preference_error: float | None = None
    base_test_target: float | None = None
    base_test_target_error: float | None = None
    base_test_votes: float | None = None
    base_test_votes_error: float | None = None
    base_test_earlier_votes: float | None = None
    base_test_earlier_votes_error: float | None = None
    base_test_outside: float | None = None
    base_test_outside_error: float | None = None
    base_test_control: float | None = None
    base_test_control_error: float | None = None
    base_test_disagreement: float | None = None
    base_test_disagreement_error: float | None = None
    unedited_test_target: float | None = None
    unedited_test_target_error: float | None = None  # of the winner's difference from it, in pairs
    base_test_subject: float | None = None
    base_test_subject_error: float | None = None
    base_test_fid_2: float | None = None
    base_test_fid_2_error: float | None = None
    feature_network: str
    num_samples: int
    feature_network_2: str | None = None
    preference_model: str | None = None
    base_validation_fid: float
    base_validation_fid_error: float | None = None
    base_validation_corrected_fid: float | None = None
    base_validation_kid: float | None = None
    base_validation_mind: float | None = None
    base_validation_preference: float | None = None
    base_validation_target: float | None = None
    base_validation_control: float | None = None
    base_validation_disagreement: float | None = None
    base_validation_votes: float | None = None
    base_validation_earlier_votes: float | None = None
    base_validation_subject: float | None = None
    validation_num_samples: int = 0
    test_floor_fid: float
    reachable_test_fid: float | None = None
    measures: FinalMeasures | None = None
    measure_settings: Settings = {}
    test_shapes: dict[str, int] = {}
    resizing: dict[str, str] = {}
    test_digest: str = ""
    subjects: list[SubjectScores] = []
    balance: Balance | None = None
    remembered: list[Remembered] = []
    registry_version: int | None = None
    registry_decision: str | None = None
    search_digest: str = ""
    publish_settings: Settings = {}

    @property
    def measure(self) -> Measure:
        """Name and form of the score that ranked."""
        return MEASURES[self.ranked_by]

    def value_of(self, key: str) -> tuple[float | None, float | None]:
        """Return a score by its field, with its standard error; None where it was not measured."""
        return getattr(self, key), getattr(self, f"{key}_error", None)

    @property
    def corrected_test(self) -> tuple[float, float] | None:
        """Corrected FID of base and winner on the test split; None if one of them has none."""
        base, own = self.base_test_corrected_fid, self.test_corrected_fid
        return None if base is None or own is None else (base, own)

    @classmethod
    def read(cls, run: Storage) -> Self:
        """Read winner.json from the run's folder.

        Raises:
            ConfigError: it has a newer format, lacks a value, or is damaged.
        """
        return cls.parse(run.read_json(WINNER), f"{run.uri}/{WINNER}")

    def write(self, run: Storage) -> None:
        run.write_text(WINNER, json.dumps(self.versioned(), indent=2) + "\n")
