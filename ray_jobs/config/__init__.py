"""The whole configuration of a run: one documented field a line, with its unit.

A run is one YAML file of this tree (`configs/demo.yaml`), completed by command-line overrides
(`--set train.zero_stage=3`). Everything a user can get wrong without touching the data or the cluster
is found here, before anything starts.
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationError, field_validator, model_validator

from ray_jobs.config.data import (
    AugmentationConfig,
    CaptioningConfig,
    CleaningConfig,
    ControlConfig,
    DataConfig,
    SourceConfig,
)
from ray_jobs.config.effects import Effect
from ray_jobs.config.fields import (
    ConfigError,
    LearningRate,
    Positive,
    RunName,
    Section,
    by_device,
    explain,
    home,
    named_version,
    require_unset,
    resolve_path,
)
from ray_jobs.config.files import config_file, read_settings
from ray_jobs.config.packs import folds_together, pack_size, unpackable
from ray_jobs.config.search import (
    LEARNING_RATE,
    EvaluateConfig,
    NetworkConfig,
    PreferenceConfig,
    SearchConfig,
)
from ray_jobs.config.serve import PublishConfig, ServeConfig, UpdateConfig
from ray_jobs.config.space import Range, Settings, check_pairs, drawn, ends, read_values
from ray_jobs.config.train import (
    ENDLESS,
    OPTIMIZER_SETTINGS,
    OTHER_LAYERS,
    SCHEDULE_SETTINGS,
    WHOLE_TENSORS,
    LoraConfig,
    LossConfig,
    ModelConfig,
    Schedule,
    StageConfig,
    TrainConfig,
    VotesConfig,
)
from ray_jobs.config.yaml_text import write_yaml

__all__ = [
    "ENDLESS",
    "LEARNING_RATE",
    "OPTIMIZER_SETTINGS",
    "OTHER_LAYERS",
    "WHOLE_TENSORS",
    "AugmentationConfig",
    "CaptioningConfig",
    "CleaningConfig",
    "Config",
    "ConfigError",
    "ControlConfig",
    "DataConfig",
    "Effect",
    "EvaluateConfig",
    "LocalConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "NetworkConfig",
    "PreferenceConfig",
    "PretrainConfig",
    "PublishConfig",
    "Range",
    "Schedule",
    "SearchConfig",
    "Section",
    "ServeConfig",
    "Settings",
    "SourceConfig",
    "StageConfig",
    "TrainConfig",
    "UpdateConfig",
    "VotesConfig",
    "add_budget_arguments",
    "add_config_arguments",
    "home",
    "load_config",
    "named_version",
    "resolve_path",
]


# What lies in a storage beside the folders of its runs: `--fresh` of a run of that name would delete it.
NO_RUNS = {
    *("class_pictures", "encoded", "features", "registry", "mlartifacts", "mlruns"),
    *("written_captions", "mlflow.db", "feedback.db"),
}


class PretrainConfig(Section):
    """A new base model in Stable Diffusion's architecture, from scratch (`python -m ray_jobs.pretrain`)."""

    affects: ClassVar = Effect.PRETRAINING

    output: Annotated[str, Effect.NOTHING] = Field(description="folder of the finished model")
    pictures: str = Field(description="folder with metadata.jsonl on which the autoencoder is trained")
    autoencoder_channels: list[Positive] = Field(
        [32, 48, 64, 96], description="channels per level of the autoencoder"
    )
    autoencoder_steps: Positive = Field(8000, description="optimizer steps of the autoencoder")
    autoencoder_batch_size: Positive = Field(16, description="images per step of the autoencoder")
    autoencoder_learning_rate: LearningRate = Field(
        1e-3, description="learning rate of the autoencoder, decayed to 0 by a cosine"
    )
    kl_weight: float = Field(1e-4, ge=0, description="weight of the KL divergence per latent element")
    latent_channels: Positive = Field(16, description="channels of the latents")
    denoiser_channels: list[Positive] = Field([128, 192], description="channels per level of the UNet")
    denoiser_layers: Positive = Field(1, description="residual blocks per level")
    attention_heads: Positive = Field(4, description="attention heads of the UNet and the text encoder")
    text_width: Positive = Field(192, description="width of the text encoder")
    text_layers: Positive = Field(3, description="layers of the text encoder")
    vocabulary: Positive = Field(1500, description="number of tokens, learned from the captions")
    max_tokens: Positive = Field(20, description="maximum tokens per caption; longer ones are truncated")


class LocalConfig(Section):
    """The embedded Ray, which is started if no address is given."""

    affects: ClassVar = Effect.NOTHING

    num_cpus: Positive = Field(
        8, description="logical CPUs: more than there are cores, so that drivers and Ray Data tasks fit too"
    )
    object_store_mb: int = Field(512, ge=80, description="size of the object store, in MiB")
    niceness: int = Field(
        0,
        ge=0,
        le=19,
        description="niceness of tasks and actors, 0 to 19: 0 shares the cores with other programs; at "
        "15, Ray's own default, a run gets only what other programs leave, a fifth of its "
        "speed or less",
    )


class Config(Section):
    """A run."""

    name: Annotated[RunName, Effect.NOTHING] = Field(
        description="name of the run; a run of the same name is resumed"
    )
    storage: Annotated[str, Effect.NOTHING] = Field(
        "runs", description="folder, s3:// or gs:// that every node can reach"
    )
    seed: Annotated[int, Effect.ENCODINGS, Effect.WEIGHTS] = Field(
        0, description="seed of training: data order, noise, initial adapters"
    )
    data: DataConfig
    model: ModelConfig
    train: TrainConfig = TrainConfig()
    search: SearchConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    publish: PublishConfig = PublishConfig()
    serve: ServeConfig = ServeConfig()
    update: UpdateConfig = UpdateConfig()
    local: LocalConfig = LocalConfig()
    pretrain: Annotated[PretrainConfig | None, Effect.PRETRAINING] = Field(
        None, description="settings of `python -m ray_jobs.pretrain`"
    )

    @model_validator(mode="before")
    @classmethod
    def _encodes_by_device(cls, given: Any) -> Any:
        """Set `data.encode_precision` by the device, which `train` chooses."""
        data, train = (given.get(name) if isinstance(given, dict) else None for name in ("data", "train"))
        if isinstance(data, dict) and "encode_precision" not in data:
            use_gpu = train.get("use_gpu") if isinstance(train, dict) else getattr(train, "use_gpu", False)
            return given | {"data": data | {"encode_precision": by_device({"use_gpu": use_gpu})}}
        return given

    @field_validator("name")
    @classmethod
    def _is_no_folder_of_all_runs(cls, name: str) -> str:
        if name.lower() in NO_RUNS:
            raise ValueError(f"{name} is the name of a folder that all runs share; choose another name")
        return name

    @model_validator(mode="after")
    def _has_a_length(self) -> "Config":
        given = next((name for name in ("epochs", "max_steps") if getattr(self.train, name)), None)
        if given and self.search.ladder:
            raise ValueError(
                f"train.{given} and search.ladder both say how long a training lasts; remove one of the two"
            )
        if not given and not self.search.ladder:
            raise ValueError(
                "search.ladder: how long does a training last? Give its rungs, or train.epochs or "
                "train.max_steps"
            )
        return self

    @model_validator(mode="after")
    def _train_fits(self) -> "Config":
        self._check_stages()
        self._check_prior_preservation()
        self._check_masks()
        self._check_control()
        self._check_quantization()
        self._check_adapters()
        self._check_preference()
        return self

    def _check_stages(self) -> None:
        stages = self.train.stages
        before = sum(stage.steps for stage in stages[:-1])
        if stages and self.search.ladder and before >= (last := self.search.ladder[-1]):
            raise ValueError(
                f"train.stages: the last stage begins after step {before}, but search.ladder ends at {last}; "
                "shorten the earlier stages or extend the ladder"
            )
        fixed = stages and all(stage.learning_rate for stage in stages)
        rates = self.search.learning_rates
        if fixed and (isinstance(rates, Range) or len(rates) > 1):
            raise ValueError(
                "train.stages: every stage sets learning_rate, so searching it would change nothing; "
                "remove it from one stage, or give search.learning_rates a single value"
            )

    def _check_prior_preservation(self) -> None:
        if not self.train.prior_loss_weight:
            return
        if self.data.buckets:
            raise ValueError(
                "train.prior_loss_weight needs data.buckets: false, because the class images of a step must "
                "have the shape of the others"
            )
        if self.data.encode == "stream":
            raise ValueError(
                "train.prior_loss_weight needs data.encode: cache, which costs little for a few class images"
            )

    def _check_masks(self) -> None:
        if not self.data.has_masks:
            require_unset(self.train.loss, "without mask_column in data.sources", "outside_mask")

    def _check_control(self) -> None:
        """ControlNets need control images; whether other methods follow them is up to the base."""
        method, data = self.train.method, self.data
        if method == "controlnet" and not data.has_control:
            raise ValueError(
                "train.method: controlnet needs a control image of each row; name control_column in "
                "data.sources, or set data.control.kind, as edges"
            )
        if method == "lora" and data.has_control and self.train.lora.kind == "oft":
            raise ValueError(
                "train.lora.kind: oft leaves no adapter that could bring input channels for control images; "
                "choose another kind, or train.method: controlnet"
            )

    def _check_quantization(self) -> None:
        """A quantised base is frozen, whole on each worker, and never merged with what was trained on it."""
        if self.model.quantize_text and self.train.train_text_encoder:
            raise ValueError(
                f"model.quantize_text: {self.model.quantize_text} freezes the text encoders; turn off "
                "train.train_text_encoder, or leave it out"
            )
        chosen = f"model.quantize: {self.model.quantize}"
        if not self.model.quantize:
            return
        if self.train.method == "full":
            raise ValueError(f"{chosen} freezes the base; set train.method: lora, or leave it out")
        if self.train.method == "controlnet":
            raise ValueError(f"{chosen} leaves no plain layers for a ControlNet to copy; leave it out")
        if not self.train.makes_adapter:
            raise ValueError(
                f"{chosen} has no weights that train.lora.kind: oft could be merged into; choose another "
                "kind, or leave it out"
            )
        if self.train.zero_stage == 3:
            raise ValueError(f"{chosen} cannot be divided among workers; set train.zero_stage to 2 or less")
        if self.serve.fuse_champion:
            raise ValueError(
                f"{chosen} would round away what serve.fuse_champion merges; turn that off: adapters are "
                "served beside the base"
            )
        if self.serve.int8_weights:
            raise ValueError(f"serve.int8_weights changes nothing with {chosen}; turn it off")

    def _check_adapters(self) -> None:
        """Adapters that the user gives go with adapters in training, whose form `model.adapter` decides."""
        model, kind = self.model, self.train.lora.kind
        if self.train.method != "controlnet":
            require_unset(model, f"with train.method: {self.train.method}", "controlnet")
        if self.train.method == "lora":
            if model.assistant and kind != "lora":
                raise ValueError(
                    f"model.assistant: {model.assistant} is a LoRA, beside which train.lora.kind: {kind} is "
                    "not trained; set that to lora, or leave the assistant out"
                )
            return
        for field, given in (("adapter", model.adapter), ("assistant", model.assistant)):
            if given:
                raise ValueError(
                    f"model.{field}: {given} is for adapters; set train.method: lora, or leave it out"
                )

    def _check_preference(self) -> None:
        """Votes are on images that were drawn for a prompt alone."""
        if self.train.preference is None:
            return
        if self.data.num_references or self.data.has_masks or self.data.has_control:
            raise ValueError(
                "train.preference: votes are on images without references, masks or control images; leave "
                "reference_columns, mask_column and control_column of data.sources, and data.control, out"
            )
        if self.search.folds or self.data.folds:
            raise ValueError(
                "train.preference: votes have a held-out split of their own; set search.folds and data.folds "
                "to 0"
            )

    @model_validator(mode="after")
    def _remembers_others(self) -> "Config":
        runs = self.evaluate.remember
        if self.name in runs or len(set(runs)) < len(runs):
            raise ValueError(f"evaluate.remember: {runs} must be different runs, and not {self.name} itself")
        return self

    @model_validator(mode="after")
    def _searches_no_form(self) -> "Config":
        for name, values in self.search.space.items() if self.model.adapter else ():
            free = name == "train.lora.dropout" or not name.startswith("train.lora")
            if name == "train.lora":
                free = all(isinstance(each, dict) and each.keys() <= {"dropout"} for each in ends(values))
            if not free:
                raise ValueError(
                    f"search.space.{name}: training goes on from model.adapter: {self.model.adapter}, which "
                    "decides rank, scale and layers; leave it out, or search train.lora.dropout"
                )
        return self

    @model_validator(mode="after")
    def _is_used(self) -> "Config":
        """No setting that only some schedules or methods read is given where no trial has one of them."""
        train, space = self.train, self.search.space
        schedules: set[Schedule | None] = {train.schedule, *(stage.schedule for stage in train.stages)}
        schedules |= set(ends(space.get("train.schedule", [])))
        searched_stages = "train.stages" in space
        for field, of in SCHEDULE_SETTINGS.items():
            if of & schedules or searched_stages:
                continue
            where = f"without schedule {' or '.join(sorted(of))}"
            if f"train.{field}" in space:
                raise ValueError(f"search.space.train.{field} changes nothing {where}")
            require_unset(train, where, field)
        for field in () if searched_stages else train.own_of_stages(ends(space.get("train.optimizer", []))):
            where = "because every stage of train.stages has its own"
            if f"train.{field}" in space:
                raise ValueError(f"search.space.train.{field} changes nothing {where}")
            require_unset(train, where, field)
        methods = [train.method, *ends(space.get("train.method", []))]
        if adapters := [name for name in space if name.startswith("train.lora") and "lora" not in methods]:
            raise ValueError(
                f"search.space.{adapters[0]} changes nothing with train.method: {self.train.method}"
            )
        shown, measured = self.publish.sample_count, self.evaluate.num_samples
        # The default is a number at most, so that a written configuration loads again.
        if shown > measured and shown != PublishConfig.model_fields["sample_count"].default:
            raise ValueError(
                f"publish.sample_count: {shown} is more than evaluate.num_samples: {measured}; lower it"
            )
        return self

    @model_validator(mode="after")
    def _search(self) -> "Config":
        search = self.search
        if search.folds and search.folds != self.data.folds:
            raise ValueError(
                f"search.folds: {search.folds} needs data.folds: {search.folds} (it is {self.data.folds})"
            )
        if search.rank_by == "preference" and not self.evaluate.preference.model:
            raise ValueError(
                "search.rank_by: preference needs evaluate.preference.model, which judges the pictures"
            )
        if search.rank_by == "votes" and not self.train.preference:
            raise ValueError("search.rank_by: votes needs train.preference, which names the votes")
        if search.folds and self.data.encode == "stream":
            raise ValueError("search.folds needs data.encode: cache")
        if "train.prior_loss_weight" in search.space and not self.train.prior_loss_weight:
            raise ValueError(
                "search.space.train.prior_loss_weight needs train.prior_loss_weight above 0, so that prepare "
                "provides class images"
            )
        return self

    @model_validator(mode="after")
    def _packs(self) -> "Config":
        if isinstance(self.search.pack, int) and (reason := self.why_not_together):
            raise ValueError(
                f"search.pack: {self.search.pack} trials cannot be trained together: {reason}; set "
                "search.pack: auto or off"
            )
        return self

    @property
    def folds_together(self) -> int:
        """How many folds of a trial one worker group can train."""
        return folds_together(self.data, self.search)

    @property
    def why_not_together(self) -> str:
        """Why no trials of the search can be trained together; empty if they can."""
        return unpackable(self.model, self.train, self.search, self.folds_together)

    @property
    def not_together(self) -> str:
        """The line that says why `search.pack: auto` trains no trials together; empty otherwise."""
        if self.search.pack != "auto" or not self.why_not_together:
            return ""
        return f"search.pack: each trial has its own workers: {self.why_not_together}"

    @property
    def trials_together(self) -> int:
        """The most trials of the search that one worker group trains; 1: each has its own."""
        return pack_size(self.model, self.train, self.search, self.folds_together)

    @model_validator(mode="after")
    def _space(self) -> "Config":
        """Every trial can be trained, and records its settings as it reads them ("8" is 8)."""
        search = self.search
        search.space.update(read_values(search.space, self._trial))
        check_pairs(search.dimensions, self._trial)
        if search.algorithm != "grid":
            drawn(search.dimensions, search.grid_size, self.seed)
        return self

    def _trial(self, settings: Settings) -> TrainConfig:
        """What a trial trains with; ValueError if the settings do not go with the rest."""
        trial = self.with_settings(settings)
        if self.train.epochs and trial.train.training_rows != self.train.training_rows:
            raise ValueError(
                "train.epochs: trials that differ in the rows of a step need other numbers of steps; give "
                "search.ladder or train.max_steps"
            )
        if self.search.scheduler == "population" and self._differs_in_optimizers(trial.train):
            raise ValueError(
                "optimizer: scheduler: population continues trials from each other, with the moments of one "
                "optimizer; use another scheduler, or one optimizer"
            )
        trial._check_stages()
        trial._check_prior_preservation()
        trial._check_masks()
        trial._check_control()
        trial._check_quantization()
        trial._check_adapters()
        trial._check_preference()
        return trial.train

    def _differs_in_optimizers(self, train: TrainConfig) -> bool:
        """Return whether a trial may have another optimizer at some step than this configuration has."""
        own = self.train
        alike = (train.optimizer, train.stages) == (own.optimizer, own.stages)
        return not alike and len({*train.optimizers, *own.optimizers}) > 1

    def with_settings(self, settings: Mapping[str, Any]) -> "Config":
        """The configuration of one trial of a search.

        Args:
            settings: values by name, as `train.lora.rank`.

        Raises:
            ValueError: a name is no setting that may be searched.
            ValidationError: a value is refused.
        """
        train = self.train.model_dump(exclude_unset=True)
        free = {name for name in TrainConfig.model_fields if Effect.WEIGHTS not in TrainConfig.effects(name)}
        for name, value in settings.items():
            section, *path = name.split(".")
            place: Any = train
            for each in path[:-1]:
                place = place.setdefault(each, {}) if isinstance(place, dict) else None
            if section != "train" or not path or path[0] in free or not isinstance(place, dict):
                raise ValueError(
                    f"{name} cannot be searched: name a setting of train that changes the result"
                )
            place[path[-1]] = value
        return self.model_copy(update={"train": TrainConfig.model_validate(train)})

    def with_ladder(self, rows: int) -> "Config":
        """Return the configuration with a ladder, in place of `train.epochs` and `train.max_steps`.

        Every stage that knows the rows goes on with this one, so that all that depends on a training's length
        goes by the ladder. A configuration that has one is returned as it is.

        Args:
            rows: rows of an epoch, see `Manifest.rows_an_epoch`.

        Raises:
            ConfigError: `train.stages` are longer.
        """
        train, search = self.train, self.search
        if search.ladder:
            return self
        lengths = [train.max_steps] if train.max_steps else []
        if train.epochs:
            lengths.append(math.ceil(train.epochs * rows / train.training_rows))
        ladder = search.rungs_up_to(min(lengths))
        found = self.model_copy(
            update={
                "train": train.model_copy(update={"epochs": None, "max_steps": None}),
                "search": search.model_copy(update={"ladder": ladder}),
            }
        )
        try:
            found._check_stages()
        except ValueError as error:
            raise ConfigError(f"{error} (of train.epochs or train.max_steps)") from None
        return found

    def to_yaml(self) -> str:
        """The resolved configuration, every default written out."""
        return write_yaml(self.model_dump(mode="json"))


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, and those that it extends, with `overrides` (`section.field=value`) laid over them.

    A bare name, as `sdxl-lora`, is a recipe's. A relative path starts from `home()`: a job on the embedded
    Ray runs in a copy of the code, in which the user's own file does not lie.

    Raises:
        ConfigError: naming the file or field, and the fix.
    """
    try:
        return Config.model_validate(read_settings(config_file(str(path)), overrides or []))
    except ValidationError as error:
        raise ConfigError(explain(error, str(path), Config)) from None


def add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """`--max-steps`, `--max-hours` and `--max-cost`: as `--set search.max_steps=...` and so on."""
    for name, unit in (
        ("steps", "of optimizer steps over all trials"),
        ("hours", "of worker hours over all trials"),
        ("cost", "in the currency of search.device_hour_price"),
    ):
        parser.add_argument(
            f"--max-{name}",
            action="append",
            dest="overrides",
            type=f"search.max_{name}={{}}".format,
            metavar="N",
            help=f"budget {unit}; the search stops at the rung that exceeds it",
        )


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every stage shares: `--config` and `--set`."""
    parser.add_argument("--config", required=True, help="YAML file, or the name of a recipe, as sdxl-lora")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        dest="overrides",
        help="override one field; may be repeated",
    )
