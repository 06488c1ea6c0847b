"""The search, and how its candidates are measured."""

import re
from itertools import combinations
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from ray_jobs.config.effects import Added, Effect, Formerly
from ray_jobs.config.fields import (
    LearningRate,
    Positive,
    Precision,
    Prompt,
    RunName,
    Section,
    by_device,
    require_unset,
)
from ray_jobs.config.space import Dimensions, Range, num_points, range_of

LEARNING_RATE = "train.learning_rate"

RankedBy = Literal[
    "corrected_fid", "fid", "kid", "mind", "preference", "subject", "target", "control", "votes"
]


def _kind(values: object) -> str:
    return "[section]" if isinstance(values, dict | Section) else "[values]"


def _word(value: object) -> str:
    return "[word]" if isinstance(value, str) and not value.isdigit() else "[number]"


def _off(value: object) -> object:
    return "off" if value is False else value  # YAML reads the bare word so


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

    affects: ClassVar = Effect.SCORES

    learning_rates: Rates = Field(description="values, or a range")
    space: dict[str, Values] = Field(
        {}, description="further settings to search, by name as in train.lora.rank: values, or a range"
    )
    algorithm: Literal["grid", "random", "optuna"] = Field(
        "grid",
        description="grid: every combination; random: random points; optuna: points proposed by a "
        "tree-structured Parzen estimator",
    )
    num_trials: Annotated[Positive | None, Effect.EXTENT] = Field(
        None, description="number of trials, for random and optuna"
    )
    scheduler: Literal["asha", "halving", "median", "population", "none"] = Field(
        "asha",
        description="asha: stop a trial that is not among the best that a rung has measured so far. "
        "halving: pause all trials at a rung, resume the best. median: stop a trial whose "
        "best is worse than the median of the others' means. population: stop none; at each "
        "rung the worst continue from the best with changed settings. none: stop none",
    )
    # Earlier releases ranked by FID. What they found keeps its winner: its digest is that of the default.
    rank_by: Annotated[RankedBy, Added("corrected_fid")] = Field(
        "corrected_fid",
        description="score that decides between checkpoints; subject unless given, if all sources are "
        "subjects, and target, if they have reference images. corrected_fid: FID without the bias of the "
        "number of images, by which few images reward a "
        "smaller variety; with fewer training images than a score has, it is FID. fid: FID as in the "
        "literature. kid: kernel distance, which has no such bias; with fewer than 4 images it is FID. mind: "
        "sliced Wasserstein distance, which has hardly any. preference: how much less evaluate.preference "
        "likes the pictures than the real ones of the same captions. subject: likeness to photos not trained "
        "on, learning by heart, and what is lost of class, variety and own prompts (docs/search.md). "
        "target: distance of edits to the images that they should be. control: corrected FID and "
        "disagreement with control images together, as shares of the base's (docs/control.md); unless given, "
        "with data.control.kind. votes: share of held-out votes that "
        "the model's implicit rewards order wrongly, among rungs whose FID is not worse than the beginning's "
        "by more than twice its error; unless given, with train.preference",
    )
    guidance_scales: Annotated[list[Annotated[float, Field(ge=1)]], Effect.EXTENT] = Field(
        [],
        description="guidance scales to try on the best rung of each trial, besides "
        "evaluate.guidance_scale; not with folds",
    )
    folds: int = Field(
        0,
        ge=0,
        description="rank by the mean over this many folds (data.folds), then train the winner on "
        "training and validation images together; 0: rank by the validation split. Unless given, subjects of "
        "fewer than 20 photos have one fold for every two photos, at most 4",
    )
    ladder: list[Positive] = Field(
        [], description="increasing step counts, the rungs; empty: by train.epochs and train.max_steps"
    )
    reduction_factor: int = Field(2, ge=2, description="asha and halving keep 1 / this many trials per rung")
    max_concurrent_trials: Annotated[Positive, Effect.NOTHING] = Field(
        1, description="trials that train at the same time, where each has its own workers (see pack)"
    )
    pack: Annotated[
        Annotated[Literal["auto", "off"], Tag("[word]")] | Annotated[int, Field(ge=2), Tag("[number]")],
        Discriminator(_word),
        BeforeValidator(_off),
        Effect.NOTHING,
    ] = Field(
        "off",
        description="train this many trials in one worker group, as adapters of one base, with one pass per "
        "step: they end as each would alone, for less time and memory. auto: up to 8 (with optuna 4), where "
        "their settings and the GPUs' memory allow it and max_concurrent_trials is 1; off: each trial has "
        "workers of its own",
    )
    wait_for_scores: Annotated[bool, Effect.NOTHING] = Field(
        False,
        description="pause a training at each rung until its score is known; false: it trains on "
        "meanwhile, in vain if it is then stopped",
    )
    patience: Annotated[Positive | None, Effect.EXTENT] = Field(
        None,
        description="stop a trial after this many rungs without a score that is lower by more than its "
        "error; empty: only the scheduler stops trials. A single training goes by its validation loss",
    )
    max_steps: Annotated[Positive | None, Effect.EXTENT] = Field(
        None,
        description="budget of optimizer steps over all trials; the search stops at the rung that exceeds it",
    )
    max_hours: Annotated[float | None, Effect.EXTENT] = Field(
        None,
        gt=0,
        description="budget of worker hours over all trials, without evaluators; stops like max_steps",
    )
    max_cost: Annotated[float | None, Effect.EXTENT] = Field(
        None, gt=0, description="budget in the currency of device_hour_price; stops like max_steps"
    )
    device_hour_price: Annotated[float | None, Effect.EXTENT, Effect.PUBLISHING] = Field(
        None,
        gt=0,
        description="price of one worker for one hour, for max_cost and the report; evaluators are not "
        "counted; empty: unknown",
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

    def rungs_up_to(self, last: int) -> list[int]:
        """Return the ladder of a training of so many steps: 1 / f^2, 1 / f and all of them.

        The steps of the first rung times f are those of the second, as ASHA multiplies them.
        """
        first = max(1, last // self.reduction_factor**2)
        return sorted({step for step in (first, first * self.reduction_factor) if step < last} | {last})

    @property
    def most_steps(self) -> int:
        """Of all trials, where none is stopped."""
        return self.grid_size * max(1, self.folds) * self.ladder[-1]

    def num_promoted(self, trials: int) -> int:
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
            trials, before = self.num_promoted(trials), rung
        return steps * max(1, self.folds)

    @model_validator(mode="after")
    def _increases(self) -> "SearchConfig":
        pairs = zip(self.ladder, self.ladder[1:], strict=False)
        if any(later <= earlier for earlier, later in pairs):
            raise ValueError(f"ladder must increase: {self.ladder}; sort it and remove repeated values")
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
                raise ValueError(f"{short}: not a name of a setting; write it like train.lora.rank")
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
            raise ValueError("num_trials: algorithm grid runs every combination; remove num_trials")
        if self.algorithm != "grid" and not self.num_trials:
            raise ValueError(f"num_trials is required with algorithm: {self.algorithm}")
        if self.num_trials and self.num_trials > self.combinations:
            raise ValueError(
                f"num_trials: {self.num_trials}, but the values have {self.combinations} combinations; use "
                "algorithm: grid, or give more values"
            )
        if self.folds == 1:
            raise ValueError("folds: one fold leaves nothing to train on; give 0 or at least 2")
        if self.folds and self.guidance_scales:
            raise ValueError(
                "guidance_scales needs a validation split, and folds leave none; remove one of them"
            )
        if self.scheduler == "halving" and self.algorithm == "optuna":
            raise ValueError(
                "scheduler: halving compares all trials at a rung, but optuna proposes them one by one; use "
                "algorithm: grid or random"
            )
        if self.scheduler not in ("asha", "halving"):
            require_unset(self, f"with scheduler: {self.scheduler}", "reduction_factor")
        if self.scheduler == "population":
            if self.grid_size < 2:
                raise ValueError("scheduler: population needs at least two trials")
            if self.algorithm == "optuna":
                raise ValueError(
                    "scheduler: population changes settings itself; use algorithm: grid or random"
                )
            if self.folds:
                raise ValueError("scheduler: population cannot be combined with folds; set folds: 0")
        return self


class NetworkConfig(Section):
    """A feature network other than the FID Inception, since one alone can misrank (arXiv 2604.28190)."""

    affects: ClassVar = Effect.SCORES

    kind: Literal["efficientnet-lite0", "transformers", "torchscript"] = Field(
        "efficientnet-lite0",
        description="transformers: a vision model such as DINOv2; torchscript: any file",
    )
    path: str = Field(
        ".cache/efficientnet-lite0.safetensors",
        description="its file, of transformers a folder (both also s3:// or gs://) or a hub name",
    )
    sha256: str | None = Field(
        None, description="digest of the file; required for torchscript, which is code"
    )
    name: str | None = Field(None, description="torchscript: name under which its scores are recorded")
    revision: str | None = Field(None, description="transformers: revision on the hub")
    size: Positive | None = Field(None, description="torchscript: side of its input, in pixels")
    interpolation: Literal["bilinear", "bicubic"] = Field(
        "bilinear", description="torchscript: interpolation to that size"
    )
    mean: tuple[float, float, float] | None = Field(
        None, description="torchscript: mean per channel, of values from 0 to 255"
    )
    std: tuple[float, float, float] | None = Field(
        None, description="torchscript: standard deviation per channel, of values from 0 to 255"
    )

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "NetworkConfig":
        """Not checked again where the network is loaded (`ray_jobs/metrics/networks.py`)."""
        of_torchscript = ("name", "size", "mean", "std")
        given = [field for field in of_torchscript if getattr(self, field) is not None]
        if self.kind == "torchscript":
            missing = [field for field in ("sha256", *of_torchscript) if getattr(self, field) is None]
            if missing:
                raise ValueError(f"{missing[0]} is required with kind: torchscript")
        elif given or self.interpolation != "bilinear":
            raise ValueError(f"{[*given, 'interpolation'][0]}: only used with kind: torchscript; remove it")
        if self.revision and self.kind != "transformers":
            raise ValueError("revision: only used with kind: transformers; remove it")
        return self


Network = Annotated[
    Annotated[str, Tag("[values]")] | Annotated[NetworkConfig, Tag("[section]")],
    Discriminator(_kind),
]


class PreferenceConfig(Section):
    """A model of what people prefer, which scores pictures for their captions."""

    affects: ClassVar = Effect.SCORES

    model: Annotated[str | None, Added()] = Field(
        None,
        min_length=1,
        description="folder (also s3:// or gs://) or hub name of a CLIPModel, PickScore "
        "(yuvalkirstain/PickScore_v1) or a plain CLIP, or of a vision-language model with a chat template, "
        "which is asked whether a picture shows its caption (VQAScore). Empty: none",
    )
    revision: Annotated[str | None, Added()] = Field(None, description="revision of model on the hub")
    processor: Annotated[str | None, Added()] = Field(
        None,
        min_length=1,
        description="folder or hub name of a CLIPModel's tokenizer and image processor, of PickScore "
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K; empty: the model's own",
    )

    @model_validator(mode="after")
    def _is_used(self) -> "PreferenceConfig":
        if self.model is None:
            require_unset(self, "without preference.model", "revision", "processor")
        return self


class BalanceConfig(Section):
    """Which attributes pictures show, beside those of the data and of what training began from."""

    affects: ClassVar = Effect.PUBLISHING

    classifier: Annotated[str | None, Added()] = Field(
        None,
        min_length=1,
        description="folder (also s3:// or gs://) or hub name of an image classifier in transformers' "
        "format, with safetensors weights, that says what a picture shows. Empty: balance is not measured",
    )
    revision: Annotated[str | None, Added()] = Field(None, description="revision of classifier on the hub")
    prompts: Annotated[list[Prompt], Added([])] = Field(
        [], max_length=64, description="prompts that leave the attribute open, as `a portrait of a doctor`"
    )
    pictures: Annotated[Positive, Added(16)] = Field(16, description="pictures of each prompt")

    @model_validator(mode="after")
    def _is_used(self) -> "BalanceConfig":
        if self.classifier is None:
            require_unset(self, "without balance.classifier", "revision", "prompts", "pictures")
        elif not self.prompts:
            raise ValueError("balance.classifier needs balance.prompts, of which pictures are drawn")
        return self


class EvaluateConfig(Section):
    """How a checkpoint is sampled and measured."""

    affects: ClassVar = Effect.SCORES

    num_samples: int = Field(
        96,
        ge=2,
        description="images per score; at most two per caption of the split, and a smaller number is "
        "announced",
    )
    inference_steps: Annotated[Positive, Effect.DATASET, Effect.SCORES] = Field(
        12, description="denoising steps per image, also of class images"
    )
    guidance_scale: Annotated[float, Effect.DATASET, Effect.SCORES] = Field(
        3.0, ge=1, description="scale of classifier-free guidance, also of class images; 1: off"
    )
    # A picture alone and in a batch differ by rounding only (tests/unit/test_sampling.py).
    batch_size: Annotated[Positive, Effect.NOTHING, Formerly(Effect.SCORES)] = Field(
        16, description="images sampled at once by an actor; actors are dealt whole batches"
    )
    num_actors: Annotated[Positive, Effect.NOTHING] = Field(
        2, description="evaluators, which live for the whole run"
    )
    use_gpu: Annotated[bool, Effect.NOTHING, Formerly(Effect.SCORES)] = Field(
        False, description="one GPU per evaluator"
    )
    gpu_share: Annotated[float, Effect.NOTHING] = Field(
        1.0,
        gt=0,
        le=1,
        description="share of a GPU per evaluator; below 1, evaluators and training share GPUs",
    )
    precision: Annotated[Precision, Added("fp32")] = Field(
        default_factory=by_device,
        description="of the denoiser; with bf16 also of text encoders and of autoencoders that allow it. "
        "Feature networks are always fp32",
    )
    seed: int = Field(0, description="seed of the initial noise, which is the same for every checkpoint")
    feature_network: Network = Field(
        ".cache/inception-2015-12-05.pt",
        description="network that ranks: TorchScript file of the FID Inception network, whose digest is "
        "checked; or any other network, written like second_network",
    )
    second_network: NetworkConfig | None = Field(
        NetworkConfig(),
        description="network whose scores are shown besides, with a note where the two disagree; null: none",
    )
    bootstrap: int = Field(
        100,
        ge=0,
        description="number of random halves of the images from which the errors of scores are estimated, "
        "at least 2 (the corrected FID takes at most 32 samples without a quarter of them; MIND needs none, "
        "and KID, which always has an error, takes its own); 0: no errors",
    )
    inception_classes: Annotated[str | None, Effect.PUBLISHING, Added()] = Field(
        None,
        description="file pt_inception-2015-12-05-6726825d.pth of pytorch-fid or torch-fidelity (also s3:// "
        "or gs://), whose classes give the Inception Score of the literature; empty: those of "
        "EfficientNet-Lite0 stand in for them, if it is one of the networks",
    )
    clip: Annotated[str | None, Effect.PUBLISHING] = Field(
        None,
        description="folder (also s3:// or gs://) or hub name of a CLIPModel, for the CLIP scores of "
        "publish; empty: none",
    )
    clip_revision: Annotated[str | None, Effect.PUBLISHING] = Field(
        None, description="revision of clip on the hub"
    )
    preference: PreferenceConfig = PreferenceConfig()
    balance: BalanceConfig = BalanceConfig()
    memorisation_pictures: Annotated[int, Effect.PUBLISHING] = Field(
        1000,
        ge=0,
        description="maximum number of training images among which publish looks for each sample's "
        "nearest; 0: none",
    )
    prompts: Annotated[list[Prompt], Effect.PUBLISHING, Added([])] = Field(
        [],
        max_length=64,
        description="your own prompts, each drawn from the same noise at every rung; the report shows them "
        "over the steps, beside the base model's pictures",
    )
    remember: Annotated[list[RunName], Effect.PUBLISHING, Added([])] = Field(
        [],
        max_length=16,
        description="names of earlier runs in the same storage, for whose validation captions publish "
        "measures how well the model draws before and after the training",
    )
    subject_samples: Annotated[int, Effect.PUBLISHING] = Field(
        16,
        ge=2,
        description="DreamBooth: images per prompt from which a subject is measured, at every rung with "
        "search.rank_by: subject",
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> "EvaluateConfig":
        if self.gpu_share < 1 and not self.use_gpu:
            raise ValueError("gpu_share needs use_gpu")
        if self.bootstrap == 1:
            raise ValueError("bootstrap: an error needs at least 2 halves; give 0 (no errors) or at least 2")
        if self.feature_network == self.second_network:
            raise ValueError("second_network: the same as feature_network; choose another, or set it to null")
        if self.clip_revision and not self.clip:
            raise ValueError("clip_revision needs clip")
        if self.inception_classes and not isinstance(self.feature_network, str):
            raise ValueError(
                "inception_classes are those of the FID Inception network; give feature_network its file, or "
                "leave them out"
            )
        return self
