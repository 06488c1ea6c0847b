"""The search, and how its candidates are measured."""

import re
from itertools import combinations
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from ray_jobs.config.fields import LearningRate, Positive, Section, require_unset
from ray_jobs.config.space import Dimensions, Range, num_points, range_of

LEARNING_RATE = "train.learning_rate"


def _kind(values: Any) -> str:
    return "[section]" if isinstance(values, dict | Section) else "[values]"


# By its kind, so that an error is told of that one only.
Rates = Annotated[
    Annotated[list[LearningRate], Field(min_length=1), Tag("[values]")] | Annotated[Range, Tag("[section]")],
    Discriminator(_kind),
]
Values = Annotated[
    Annotated[list[Any], Field(min_length=1), Tag("[values]")] | Annotated[Range, Tag("[section]")],
    Discriminator(_kind),
]


class SearchConfig(Section):
    """The search over learning rate, steps and what `space` adds."""

    learning_rates: Rates = Field(description="values, or a range")
    space: dict[str, Values] = Field(
        {}, description="further settings to search, by name, as train.lora.rank: values, or a range"
    )
    algorithm: Literal["grid", "random", "optuna"] = Field(
        "grid", description="every combination; drawn ones; or ones that a tree of Parzen estimators proposes"
    )
    num_trials: Positive | None = Field(None, description="of random and optuna")
    scheduler: Literal["asha", "halving", "median", "population", "none"] = Field(
        "asha",
        description="stops trials: not among the best that a rung has seen up to then; not among the best of "
        "all, for which they pause at it; their best worse than the median of the others' means; never. "
        "population: none stops, the worst go on from the best with changed settings at each rung",
    )
    guidance_scales: list[Annotated[float, Field(ge=1)]] = Field(
        [],
        description="of sampling, tried on the best rung of each trial beside evaluate.guidance_scale; "
        "not with folds",
    )
    folds: int = Field(
        0,
        ge=0,
        description="ranks by the mean over so many folds (data.folds), then trains the winner on training "
        "and validation pictures together; 0: the validation split decides",
    )
    ladder: list[Positive] = Field(min_length=1, description="step counts, increasing: the rungs")
    reduction_factor: int = Field(2, ge=2, description="asha and halving go on with 1 / this many a rung")
    max_concurrent_trials: Positive = Field(1, description="trials that train at once")
    wait_for_scores: bool = Field(
        False,
        description="a training waits at each rung until it is measured; false: it trains on meanwhile, for "
        "nothing if it is then stopped",
    )
    patience: Positive | None = Field(
        None,
        description="a trial stops after so many rungs without a FID lower by more than its error; "
        "null: only the scheduler stops trials",
    )
    max_steps: Positive | None = Field(
        None, description="computed, of all trials; then the search stops, at a rung"
    )
    max_hours: float | None = Field(
        None, gt=0, description="of workers, of all trials, without evaluators; likewise"
    )
    max_cost: float | None = Field(None, gt=0, description="in the currency of device_hour_price; likewise")
    device_hour_price: float | None = Field(
        None,
        gt=0,
        description="of one worker for an hour, for max_cost and the report; those of evaluators are not "
        "counted; null: unknown",
    )

    @property
    def dimensions(self) -> Dimensions:
        """What is searched beside steps, the learning rate first, by the name of its setting."""
        given: Dimensions = {LEARNING_RATE: self.learning_rates, **self.space}
        return {
            name: range_of(name, values) if isinstance(values, Range) else values
            for name, values in given.items()
        }

    @property
    def grid_size(self) -> int:
        """Number of trials."""
        if self.num_trials:
            return self.num_trials
        return int(self.combinations)

    @property
    def combinations(self) -> float:
        """Of all values; infinite with a range that is not of whole numbers."""
        return num_points(self.dimensions)

    @property
    def most_steps(self) -> int:
        """Of all trials, where none is stopped."""
        return self.grid_size * max(1, self.folds) * self.ladder[-1]

    def going_on(self, trials: int) -> int:
        """How many halving lets go on, of so many that were measured at a rung."""
        return min(trials, max(1, trials // self.reduction_factor))

    @property
    def planned_steps(self) -> int:
        """Of all trials at most: where none is stopped, or what halving takes."""
        if self.scheduler != "halving":
            return self.most_steps
        trials, before, steps = self.grid_size, 0, 0
        for rung in self.ladder:
            steps += trials * (rung - before)
            trials, before = self.going_on(trials), rung
        return steps * max(1, self.folds)

    @model_validator(mode="after")
    def _increases(self) -> "SearchConfig":
        pairs = zip(self.ladder, self.ladder[1:], strict=False)
        if any(later <= earlier for earlier, later in pairs):
            raise ValueError(f"ladder must increase: {self.ladder}; sort it and drop repeats")
        if self.max_cost and not self.device_hour_price:
            raise ValueError("max_cost needs device_hour_price")
        return self

    @model_validator(mode="after")
    def _can_be_searched(self) -> "SearchConfig":
        if LEARNING_RATE in self.space:
            raise ValueError(f"space.{LEARNING_RATE}: give it as search.learning_rates")
        for name, values in {LEARNING_RATE: self.learning_rates, **self.space}.items():
            short = "learning_rates" if name == LEARNING_RATE else f"space.{name}"
            if not re.fullmatch(r"\w+(\.[\w-]+)*", name, re.ASCII):
                raise ValueError(f"{short}: write it as train.lora.rank: letters, digits and _ between dots")
            if above := next((each for each in self.space if name.startswith(f"{each}.")), None):
                raise ValueError(f"{short} is part of space.{above}; search one of the two")
            if isinstance(values, Range):
                if self.algorithm == "grid":
                    raise ValueError(
                        f"{short}: a range needs algorithm: random or optuna; a grid needs values"
                    )
                try:
                    range_of(name, values)
                except ValueError as error:
                    raise ValueError(f"{short}: {error}") from None
            elif any(one == other for one, other in combinations(values, 2)):
                raise ValueError(f"{short} repeats a value: {values}")
        if self.algorithm == "grid" and self.num_trials:
            raise ValueError("num_trials: a grid has as many as it has combinations; leave it out")
        if self.algorithm != "grid" and not self.num_trials:
            raise ValueError(f"num_trials: algorithm {self.algorithm} needs it")
        if self.num_trials and self.num_trials > self.combinations:
            raise ValueError(
                f"num_trials: {self.num_trials}, but the values have {self.combinations} combinations; take "
                "algorithm: grid, or give more values"
            )
        if self.folds == 1:
            raise ValueError("folds: one fold leaves nothing to train on; give 0 or at least 2")
        if self.folds and self.guidance_scales:
            raise ValueError("guidance_scales: the validation split decides, and folds leave none; drop one")
        if self.scheduler == "halving" and self.algorithm == "optuna":
            raise ValueError(
                "scheduler: halving compares all trials at a rung, and optuna proposes one after the other: "
                "algorithm grid or random"
            )
        if self.scheduler not in ("asha", "halving"):
            require_unset(self, f"with scheduler: {self.scheduler}", "reduction_factor")
        if self.scheduler == "population":
            if self.grid_size < 2:
                raise ValueError("scheduler: population needs at least two trials")
            if self.algorithm == "optuna":
                raise ValueError("scheduler: population changes settings itself: algorithm grid or random")
            if self.folds:
                raise ValueError("scheduler: population and folds do not go together; set folds: 0")
        return self


class NetworkConfig(Section):
    """A feature network other than the FID Inception, since one alone can misrank (arXiv 2604.28190)."""

    kind: Literal["efficientnet-lite0", "transformers", "torchscript"] = Field(
        "efficientnet-lite0",
        description="transformers: a vision model such as DINOv2; torchscript: any file",
    )
    path: str = Field(
        ".cache/efficientnet-lite0.safetensors",
        description="its file, of transformers a folder (both also s3:// or gs://) or a hub name",
    )
    sha256: str | None = Field(None, description="digest of the file; torchscript needs it, being code")
    name: str | None = Field(None, description="torchscript: what its scores are recorded as")
    revision: str | None = Field(None, description="transformers: on the hub")
    size: Positive | None = Field(None, description="torchscript: pixels a side of its input")
    interpolation: Literal["bilinear", "bicubic"] = Field("bilinear", description="torchscript: to that size")
    mean: tuple[float, float, float] | None = Field(None, description="torchscript: a channel, of 0 to 255")
    std: tuple[float, float, float] | None = Field(None, description="torchscript: a channel, of 0 to 255")

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "NetworkConfig":
        """Not checked again where the network is loaded (`ray_jobs/metrics/networks.py`)."""
        of_torchscript = ("name", "size", "mean", "std")
        given = [field for field in of_torchscript if getattr(self, field) is not None]
        if self.kind == "torchscript":
            missing = [field for field in ("sha256", *of_torchscript) if getattr(self, field) is None]
            if missing:
                raise ValueError(f"{missing[0]}: kind torchscript needs it")
        elif given or self.interpolation != "bilinear":
            raise ValueError(f"{[*given, 'interpolation'][0]}: only kind torchscript has it; remove it")
        if self.revision and self.kind != "transformers":
            raise ValueError("revision: only kind transformers has it; remove it")
        return self


Network = Annotated[
    Annotated[str, Tag("[values]")] | Annotated[NetworkConfig, Tag("[section]")],
    Discriminator(_kind),
]


class EvaluateConfig(Section):
    """How a checkpoint is sampled and measured."""

    # Fields of measures that only come after a search: its results do not depend on them.
    AFTER_SEARCH: ClassVar = ("clip", "clip_revision", "memorisation_pictures", "subject_samples")

    num_samples: int = Field(
        96,
        ge=2,
        description="pictures for a score; at most two of each caption of the split, and fewer are announced",
    )
    inference_steps: Positive = Field(12, description="denoising steps a picture")
    guidance_scale: float = Field(3.0, ge=1, description="of classifier-free guidance; 1: off")
    batch_size: Positive = Field(
        16, description="pictures sampled at once by an actor; whole batches are dealt to the actors"
    )
    num_actors: Positive = Field(2, description="evaluators, alive for the whole run")
    use_gpu: bool = Field(False, description="one GPU an evaluator")
    seed: int = Field(0, description="of the initial noise, the same for every checkpoint")
    feature_network: Network = Field(
        ".cache/inception-2015-12-05.pt",
        description="ranks: TorchScript file of the FID Inception network, whose digest is checked; or any "
        "other one, written as second_network is",
    )
    second_network: NetworkConfig | None = Field(
        NetworkConfig(), description="shown beside it, and told where they disagree; null: none"
    )
    bootstrap: int = Field(
        100,
        ge=0,
        description="random halves of the pictures, for the errors of scores, 2 or more; 0: no errors",
    )
    clip: str | None = Field(
        None,
        description="folder (also s3:// or gs://) or hub name of a CLIPModel, for the CLIP scores of "
        "publish; null: none",
    )
    clip_revision: str | None = Field(None, description="of a hub name")
    memorisation_pictures: int = Field(
        1000,
        ge=0,
        description="training pictures among which publish looks for each sample's nearest, at most; 0: none",
    )
    subject_samples: int = Field(
        16, ge=2, description="DreamBooth: pictures of each prompt that publish measures a subject by"
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> "EvaluateConfig":
        if self.bootstrap == 1:
            raise ValueError("bootstrap: one half has no spread; give 0 (no errors) or at least 2")
        if self.feature_network == self.second_network:
            raise ValueError("second_network: the same as feature_network; name another one, or give null")
        if self.clip_revision and not self.clip:
            raise ValueError("clip_revision needs clip")
        return self
