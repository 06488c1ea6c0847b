"""The whole configuration of a run: one documented field a line, with its unit.

A run is one YAML file of this tree (`configs/demo.yaml`), completed by command-line overrides
(`--set train.zero_stage=3`). Everything a user can get wrong without touching the data or the cluster
is found here, before anything starts.
"""

import argparse
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from PIL import ImageColor
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator


class ConfigError(ValueError):
    """What a user must mend before the job can start. The message names the field or file and the fix."""


def home() -> Path:
    """The folder that relative paths start from: DIFFRAY_HOME, else the current one.

    A job on the embedded local Ray runs in Ray's copy of the checkout; `cluster/submit.py` sets
    DIFFRAY_HOME there, so that what it reads and writes is the user's own.
    """
    return Path(os.environ.get("DIFFRAY_HOME") or Path.cwd())


def resolve_path(path: str) -> str:
    """A relative path that exists under `home()` becomes absolute; all else is left as it is.

    So s3:// and gs:// addresses and hub names pass through, and a missing file keeps the name that
    the user wrote.
    """
    if "://" in path:
        return path
    found = home() / Path(path).expanduser()
    return str(found) if found.exists() else path


class Section(BaseModel):
    """Unknown keys are errors, and values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
LearningRate = Annotated[float, Field(gt=0, lt=1)]
Prompt = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class SourceConfig(Section):
    """One place with captioned pictures; what kind of place it is, is seen from what it holds."""

    path: str = Field(description="folder, Parquet or tar files; local, s3:// or gs://")
    weight: float | None = Field(None, gt=0, description="share among the sources of an epoch's rows")
    image_column: str = Field("image", description="Parquet: bytes, or a struct with bytes")
    caption_column: str = Field("text", description="Parquet and tar: column or key of the caption")
    instance_prompt: Prompt | None = Field(
        None, description="DreamBooth: caption of every picture of a folder that has no captions"
    )
    class_prompt: Prompt | None = Field(
        None, description="DreamBooth: what kind of thing it is, without the subject's own word"
    )


class CleaningConfig(Section):
    """What is set aside although it can be read; a threshold that is empty (null) is off."""

    max_rejected: float = Field(0.2, ge=0, le=1, description="a larger share set aside stops the job")
    max_pixels: Positive = Field(100_000_000, description="a larger picture is a decompression bomb")
    min_side: Positive = Field(32, description="pixels of the shorter side")
    max_aspect_ratio: float = Field(4.0, ge=1, description="longer side / shorter side")
    min_sharpness: float | None = Field(
        None, gt=0, description="variance of the Laplacian, of a picture whose short side has 256 pixels"
    )
    min_contrast: float | None = Field(2.0, gt=0, description="standard deviation of the luma, of 0..255")
    max_dark: float | None = Field(0.99, gt=0, le=1, description="share of pixels with a luma below 8")
    max_bright: float | None = Field(0.99, gt=0, le=1, description="share of pixels with a luma above 247")
    duplicates: Literal["drop", "keep", "ignore"] = Field(
        "drop", description="near duplicates: keep the first; keep all, in one split; or do not look"
    )
    duplicate_distance: int = Field(4, ge=0, le=8, description="bits of the 64 of the perceptual hash")
    duplicate_colour: float = Field(
        0.04, gt=0, le=1, description="mean difference of the colours of 4 x 4 fields, of the full range"
    )


class AugmentationConfig(Section):
    """Random changes to training pictures, drawn from a generator seeded by picture and epoch or variant."""

    variants: Positive = Field(1, description="encodings a training picture; each is a row of its own")
    flip: Share = Field(0.0, description="probability of a horizontal flip")
    rotate: Share = Field(0.0, description="probability of a rotation")
    max_degrees: float = Field(10.0, gt=0, le=45, description="of a rotation, to either side")
    crop: Share = Field(0.0, description="probability of a crop at a random place, not the centre")
    scale: Share = Field(0.0, description="probability of a crop that is smaller than what fits")
    min_scale: float = Field(0.8, gt=0, lt=1, description="side of the smallest crop, of what fits")
    colour: Share = Field(0.0, description="probability of a colour jitter")
    max_brightness: float = Field(0.1, ge=0, lt=1, description="relative change of brightness")
    max_contrast: float = Field(0.1, ge=0, lt=1, description="relative change of contrast")
    max_saturation: float = Field(0.1, ge=0, lt=1, description="relative change of saturation")
    max_hue: float = Field(0.02, ge=0, le=0.5, description="change of hue, of the full circle")

    @property
    def is_active(self) -> bool:
        return any((self.flip, self.rotate, self.crop, self.scale, self.colour))

    @model_validator(mode="after")
    def _variants_differ(self) -> "AugmentationConfig":
        if self.variants > 1 and not self.is_active:
            raise ValueError("variants would all be alike: give one of flip, rotate, crop, scale, colour")
        return self


class DataConfig(Section):
    """Where the pictures are and how they are prepared."""

    source: str | None = Field(None, description="folder, Parquet or tar files; or see `sources`")
    sources: list[SourceConfig] = Field([], description="instead of `source`: several, as a mixture")
    resolution: Positive = Field(64, description="pixels a side; with buckets, the root of their area")
    buckets: bool = Field(False, description="keep aspect ratios: crop to the nearest of several shapes")
    bucket_max_aspect_ratio: float = Field(2.0, gt=1, description="of the longest bucket")
    background: str = Field("white", description="colour that shows through transparent pixels")
    cleaning: CleaningConfig = CleaningConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    validation: Share = Field(0.15, description="share of the pictures that the search is judged on")
    test: Share = Field(0.15, description="share that is looked at once, when publishing")
    split_seed: int = Field(0, description="seed of the split; changing it moves pictures")
    stratify: str | None = Field(None, description="column whose values are split alike")
    folds: int = Field(0, ge=0, description="of training and validation pictures; 0: none")
    num_class_images: Positive = Field(
        100, description="class pictures a subject, for prior preservation; the base model draws missing ones"
    )
    encode: Literal["cache", "stream"] = Field(
        "cache", description="cache: encode once, to Parquet; stream: while training, nothing is written"
    )
    encode_batch_size: Positive = Field(32, description="pictures encoded at once")
    encode_workers: Positive = Field(
        1, description="actors that hold the encoders, or the model that generates class pictures"
    )
    encode_dtype: Literal["bf16", "fp32"] = Field("bf16", description="of stored latents and embeddings")
    shuffle_mb: Positive = Field(256, description="window of the shuffle: rows mixed at once, in MiB")

    @property
    def all_sources(self) -> list[SourceConfig]:
        return self.sources or [SourceConfig(path=self.source or "")]

    @property
    def weights(self) -> dict[int, float]:
        """Of the sources by their number; empty where they have none."""
        return {number: each.weight for number, each in enumerate(self.sources) if each.weight}

    @model_validator(mode="after")
    def _combinations(self) -> "DataConfig":
        if bool(self.source) == bool(self.sources):
            raise ValueError("give either source or sources")
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise ValueError(f"background: {self.background!r} is no colour; for example white") from None
        weights = [each.weight for each in self.sources]
        if any(weights) and not all(weights):
            raise ValueError("sources: give every source a weight, or none")
        if self.validation + self.test >= 1:
            raise ValueError("validation + test must leave a share for training: lower one of them")
        if self.folds == 1:
            raise ValueError("folds: one fold leaves nothing to train on; give 0 or at least 2")
        if self.encode == "stream" and self.augmentation.variants > 1:
            raise ValueError("augmentation.variants: with encode: stream every epoch is augmented anew")
        return self


class ModelConfig(Section):
    """The model that is fine-tuned."""

    base: str = Field(description="folder or hub name of a model in diffusers' format")
    revision: str | None = Field(None, description="revision on the hub")


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685), by peft."""

    rank: Positive = Field(16, description="rank of the update")
    alpha: Positive = Field(16, description="the update is scaled by alpha / rank")
    dropout: Share = Field(0.0, description="dropout before the down projection")
    target_modules: list[str] | None = Field(
        None, description="layers that get an adapter, by the end of their name; empty: the attention's"
    )
    use_dora: bool = Field(False, description="decompose weights into magnitude and direction (2402.09353)")
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (arXiv 2312.03732)")


class LossConfig(Section):
    """What the denoiser is trained on, and how its errors count; the defaults are the model's own."""

    timestep_sampling: Literal["uniform", "logit_normal"] | None = Field(
        None, description="density of the timesteps; empty: uniform, or logit_normal for flow matching"
    )
    timestep_mean: float = Field(0.0, description="of the logit-normal density")
    timestep_std: float = Field(1.0, gt=0, description="of the logit-normal density")
    min_snr_gamma: float | None = Field(None, gt=0, description="min-SNR weighting; off if empty")
    offset_noise: float = Field(0.0, ge=0, description="noise of a whole channel, as a share of the noise")
    input_perturbation: float = Field(0.0, ge=0, description="noise on the input only (arXiv 2301.11706)")
    huber_delta: float | None = Field(None, gt=0, description="pseudo-Huber loss; off if empty")
    zero_terminal_snr: bool = Field(False, description="rescale the schedule to end in pure noise")


Schedule = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "warmup_stable_decay",
]


class StageConfig(Section):
    """A part of a run with settings of its own; what is empty is as in `train`."""

    steps: Positive = Field(description="how many; the last stage goes on to the end of the ladder")
    learning_rate: LearningRate | None = Field(None, description="at its height")
    schedule: Schedule | None = Field(None, description="over the stage's own steps")
    warmup_steps: int | None = Field(None, ge=0, description="steps of linear warm-up")
    weight_decay: float | None = Field(None, ge=0, description="of AdamW")
    betas: tuple[Share, Share] | None = Field(None, description="of AdamW")
    epsilon: float | None = Field(None, gt=0, description="of AdamW")
    trainable: list[str] | None = Field(None, description="groups of layers that are trained, of `groups`")


OTHER_LAYERS = "other"


class TrainConfig(Section):
    """One training run."""

    method: Literal["lora", "full"] = Field("lora", description="what is trained")
    lora: LoraConfig = LoraConfig()
    loss: LossConfig = LossConfig()
    train_text_encoder: bool = Field(False, description="train the (CLIP) text encoders too")
    groups: dict[str, list[str]] = Field(
        {}, description="named groups of layers: patterns of parameter names, for example *attn*"
    )
    trainable: list[str] | None = Field(
        None, description=f"groups that are trained; {OTHER_LAYERS}: what is in none; empty: all"
    )
    stages: list[StageConfig] = Field([], description="parts of the run with settings of their own")
    learning_rate: LearningRate = Field(1e-4, description="for a single run; a search sets its own")
    schedule: Schedule = Field("constant_with_warmup", description="of the learning rate")
    warmup_steps: int = Field(10, ge=0, description="steps of linear warm-up; constant has none")
    schedule_cycles: Positive = Field(1, description="of cosine_with_restarts")
    schedule_power: float = Field(1.0, gt=0, description="of polynomial")
    schedule_end: Share = Field(0.0, description="share of the learning rate that is left at the end")
    decay_share: float = Field(0.2, gt=0, le=1, description="of the steps, in warmup_stable_decay")
    batch_size: Positive = Field(16, description="pictures an optimizer step, over all workers")
    prior_loss_weight: float = Field(
        0.0,
        ge=0,
        description="lambda of DreamBooth's prior preservation (arXiv 2208.12242, eq. 2); above 0, "
        "batch_size // 2 pictures of a step are class pictures; 0: they are not used",
    )
    micro_batch_size: Positive | None = Field(
        None, description="pictures a worker takes at once, accumulating gradients; empty: all of its own"
    )
    num_workers: Positive | tuple[Positive, Positive] = Field(
        2, description="Ray Train workers; [min, max]: as many as there is room for, also while it runs"
    )
    use_gpu: bool = Field(False, description="one GPU a worker")
    cpus_per_worker: Positive = Field(1, description="logical CPUs (and PyTorch threads) a worker")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="DeepSpeed ZeRO stage (arXiv 1910.02054); full fp32 training on one worker needs none"
    )
    offload_optimizer: bool = Field(False, description="optimizer in the host's memory (stages 1 to 3)")
    offload_parameters: bool = Field(False, description="weights in the host's memory (stage 3)")
    deepspeed: dict[str, Any] = Field({}, description="merged into DeepSpeed's configuration")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of weights and arithmetic; ZeRO keeps what it updates in fp32"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, slower")
    channels_last: bool = Field(False, description="memory layout of convolutions")
    compile: bool = Field(False, description="torch.compile: a slow start, then faster steps")
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="8 bit: by bitsandbytes, GPUs only"
    )
    weight_decay: float = Field(1e-2, ge=0, description="of AdamW; biases and norms are exempt")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="of AdamW")
    epsilon: float = Field(1e-8, gt=0, description="of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    caption_dropout: Share = Field(0.1, description="share of captions replaced by the empty one")
    ema_decay: Share = Field(0.99, description="of the averaged weights that are evaluated; 0: off")
    checkpoint_minutes: float = Field(10, gt=0, description="between checkpoints, besides those of the rungs")
    max_failures: int = Field(1, ge=0, description="restarts of the worker group from its checkpoint")

    @property
    def class_rows(self) -> int:
        """Rows of a step that are class pictures."""
        return self.batch_size // 2 if self.prior_loss_weight else 0

    @property
    def training_rows(self) -> int:
        """Rows of a step that are the user's own training pictures."""
        return self.batch_size - self.class_rows

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def is_elastic(self) -> bool:
        return not isinstance(self.num_workers, int)

    @model_validator(mode="after")
    def _workers(self) -> "TrainConfig":
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers: {list(self.num_workers)} must be [min, max]")  # type: ignore[arg-type]
        if self.batch_size < self.max_workers:
            raise ValueError(
                f"batch_size: {self.batch_size} pictures a step leave some of {self.max_workers} workers "
                "without one; raise it"
            )
        return self

    @model_validator(mode="after")
    def _prior_preservation(self) -> "TrainConfig":
        if self.prior_loss_weight and self.batch_size < 2:
            raise ValueError(
                f"prior_loss_weight: {self.prior_loss_weight:g} needs a batch_size of at least 2: "
                "half of a step's pictures are class pictures"
            )
        return self

    @model_validator(mode="after")
    def _sharding(self) -> "TrainConfig":
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage < 3:
            raise ValueError("offload_parameters needs zero_stage: 3")
        if self.precision != "fp32" and not self.zero_stage:
            raise ValueError(
                f"precision: {self.precision} needs zero_stage 1, 2 or 3, which keep fp32 weights"
            )
        if self.precision == "fp16" and not self.use_gpu:
            raise ValueError("precision: fp16 needs use_gpu; a CPU has bf16")
        if self.optimizer == "adamw_8bit" and not self.use_gpu:
            raise ValueError("optimizer: adamw_8bit needs use_gpu")
        return self

    @model_validator(mode="after")
    def _schedules(self) -> "TrainConfig":
        given = "warmup_steps" in self.model_fields_set and self.warmup_steps
        if self.schedule == "constant" and given:
            raise ValueError("warmup_steps: schedule constant has none; take constant_with_warmup")
        known = {*self.groups, OTHER_LAYERS}
        for names in [self.trainable, *(stage.trainable for stage in self.stages)]:
            if names is not None and (not names or not known.issuperset(names)):
                raise ValueError(f"trainable: {names} must name some of groups: {sorted(known)}")
        if OTHER_LAYERS in self.groups:
            raise ValueError(f"groups: {OTHER_LAYERS} is the name of what is in no group; take another")
        return self


class SearchConfig(Section):
    """The search over learning rate and steps."""

    learning_rates: list[LearningRate] = Field(min_length=1, description="one trial each")
    ladder: list[Positive] = Field(min_length=1, description="step counts, increasing: the rungs")
    reduction_factor: int = Field(2, ge=2, description="ASHA goes on with 1 / this many a rung")
    max_concurrent_trials: Positive = Field(1, description="trials that train at once")
    patience: Positive | None = Field(
        None,
        description="a trial stops after so many rungs without a FID lower by more than its error; "
        "null: only ASHA stops trials",
    )
    max_steps: Positive | None = Field(None, description="of all trials; then the search stops, at a rung")
    max_hours: float | None = Field(None, gt=0, description="of workers, of all trials; likewise")
    max_cost: float | None = Field(None, gt=0, description="in the currency of device_hour_price; likewise")
    device_hour_price: float | None = Field(
        None, gt=0, description="of one worker for an hour, for max_cost and the report; null: unknown"
    )

    @model_validator(mode="after")
    def _increases(self) -> "SearchConfig":
        pairs = zip(self.ladder, self.ladder[1:], strict=False)
        if any(later <= earlier for earlier, later in pairs):
            raise ValueError(f"ladder must increase: {self.ladder}; sort it and drop repeats")
        if len(set(self.learning_rates)) < len(self.learning_rates):
            raise ValueError(f"learning_rates repeats a value: {self.learning_rates}")
        if self.max_cost and not self.device_hour_price:
            raise ValueError("max_cost needs device_hour_price")
        return self


class NetworkConfig(Section):
    """A feature network beside the FID Inception, since one alone can misrank (arXiv 2604.28190)."""

    kind: Literal["efficientnet-lite0", "transformers", "torchscript"] = Field(
        "efficientnet-lite0",
        description="transformers: a vision model such as DINOv2; torchscript: any file",
    )
    path: str = Field(
        ".cache/efficientnet-lite0.safetensors",
        description="its file; of transformers a folder or a hub name",
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
        of_torchscript = ("name", "size", "mean", "std")
        if self.kind == "torchscript":
            missing = [field for field in ("sha256", *of_torchscript) if getattr(self, field) is None]
            if missing:
                raise ValueError(f"{missing[0]}: kind torchscript needs it")
        else:
            given = [field for field in of_torchscript if getattr(self, field) is not None]
            if given:
                raise ValueError(f"{given[0]}: only kind torchscript has it; remove it")
        if self.revision and self.kind != "transformers":
            raise ValueError("revision: only kind transformers has it; remove it")
        return self


class EvaluateConfig(Section):
    """How a checkpoint is sampled and measured."""

    num_samples: int = Field(96, ge=2, description="pictures for a score, at most two a caption")
    inference_steps: Positive = Field(12, description="denoising steps a picture")
    guidance_scale: float = Field(3.0, ge=1, description="of classifier-free guidance; 1: off")
    batch_size: Positive = Field(32, description="pictures sampled at once by an actor")
    num_actors: Positive = Field(2, description="evaluators, alive for the whole run")
    use_gpu: bool = Field(False, description="one GPU an evaluator")
    seed: int = Field(0, description="of the initial noise, the same for every checkpoint")
    feature_network: str = Field(
        ".cache/inception-2015-12-05.pt",
        description="TorchScript file of the FID Inception network; its digest is checked",
    )
    second_network: NetworkConfig | None = Field(
        NetworkConfig(), description="shown beside it, and told where they disagree; null: none"
    )
    bootstrap: int = Field(100, ge=0, description="resamples for the errors of scores; 0: no errors")


class PublishConfig(Section):
    """Where the winner goes."""

    model_name: str = Field("diffray", min_length=1, description="name in the MLflow registry")
    tracking_uri: str | None = Field(
        None,
        description="MLflow server; else MLFLOW_TRACKING_URI, else SQLite in the storage folder",
    )
    sample_count: Positive = Field(8, description="captions in the report's picture grid")


class ServeConfig(Section):
    """The endpoint."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 takes a free one")
    replicas: Positive = Field(1, description="copies of the model")
    use_gpu: bool = Field(False, description="one GPU a replica")
    max_batch_size: Positive = Field(8, description="pictures denoised together")
    default_steps: Positive = Field(20, description="denoising steps where the request names none")
    default_guidance_scale: float = Field(3.0, ge=1, description="where the request names none")
    max_queued_requests: Positive = Field(64, description="more are answered with 503")
    request_timeout_s: float = Field(120, gt=0, description="a request may take this many seconds")


class PretrainConfig(Section):
    """A new base model in Stable Diffusion's architecture, from nothing (`python -m ray_jobs.pretrain`)."""

    output: str = Field(description="folder of the finished model")
    pictures: str = Field(description="folder with metadata.jsonl that the autoencoder learns from")
    autoencoder_channels: list[Positive] = Field([32, 48, 64, 96], description="of its levels")
    autoencoder_steps: Positive = Field(8000, description="optimizer steps")
    autoencoder_batch_size: Positive = Field(16, description="pictures a step")
    autoencoder_learning_rate: LearningRate = Field(1e-3, description="lowered to 0 by a cosine")
    kl_weight: float = Field(1e-4, ge=0, description="of the KL divergence a latent element")
    latent_channels: Positive = Field(16, description="of the autoencoder")
    denoiser_channels: list[Positive] = Field([128, 192], description="of the UNet's levels")
    denoiser_layers: Positive = Field(1, description="residual blocks a level")
    attention_heads: Positive = Field(4, description="of the UNet and the text encoder")
    text_width: Positive = Field(192, description="of the text encoder")
    text_layers: Positive = Field(3, description="of the text encoder")
    vocabulary: Positive = Field(1500, description="tokens, learnt from the captions")
    max_tokens: Positive = Field(20, description="longer captions are cut")


class LocalConfig(Section):
    """The embedded Ray that is started where no address is given."""

    num_cpus: Positive = Field(
        8, description="logical CPUs: more than cores, so that drivers and Ray Data tasks fit beside"
    )
    object_store_mb: int = Field(512, ge=80, description="object store, in MiB")


class Config(Section):
    """A run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="a run of the same name is resumed"
    )
    storage: str = Field("runs", description="folder, s3:// or gs:// that every node can reach")
    seed: int = Field(0, description="of training: data order, noise, initial adapters")
    data: DataConfig
    model: ModelConfig
    train: TrainConfig = TrainConfig()
    search: SearchConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    publish: PublishConfig = PublishConfig()
    serve: ServeConfig = ServeConfig()
    local: LocalConfig = LocalConfig()
    pretrain: PretrainConfig | None = None

    @model_validator(mode="after")
    def _stages_fit(self) -> "Config":
        stages, last = self.train.stages, self.search.ladder[-1]
        before = sum(stage.steps for stage in stages[:-1])
        if stages and before >= last:
            raise ValueError(
                f"train.stages: the last one begins after step {before}, the ladder ends at {last}"
            )
        fixed = stages and all(stage.learning_rate for stage in stages)
        if fixed and len(self.search.learning_rates) > 1:
            raise ValueError(
                "train.stages: every stage names a learning_rate, so searching one would change nothing; "
                "leave it out of a stage, or give search.learning_rates one value"
            )
        return self

    @model_validator(mode="after")
    def _prior_preservation(self) -> "Config":
        if not self.train.prior_loss_weight:
            return self
        if self.data.buckets:
            raise ValueError(
                "train.prior_loss_weight needs data.buckets: false: a step takes class pictures of the "
                "same shape as the others"
            )
        if self.data.encode == "stream":
            raise ValueError(
                "train.prior_loss_weight needs data.encode: cache: class pictures are few, so that it "
                "costs next to nothing"
            )
        return self

    def with_learning_rate(self, rate: float) -> "Config":
        """The configuration of one trial of a search."""
        return self.model_copy(update={"train": self.train.model_copy(update={"learning_rate": rate})})

    def to_yaml(self) -> str:
        """The resolved configuration, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _set(tree: dict[str, Any], override: str) -> None:
    """Put `a.b=value` into `tree`; the value is read as YAML."""
    dotted, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: write it as section.field=value")
    *sections, field = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    tree[field] = yaml.safe_load(value)


def _explain(error: ValidationError, where: str) -> str:
    """One line for the first problem of `error`: file, field, what is wrong."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "configuration"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key; remove it or correct its name (ray_jobs/config.py lists them all)"
    else:
        message += f" (it is {first['input']!r})" if not isinstance(first["input"], dict) else ""
    more = len(error.errors()) - 1
    return f"{where}: {field}: {message}" + (f" (and {more} more)" if more else "")


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and lay `overrides` (`section.field=value`) over it.

    Raises:
        ConfigError: naming the file or field, and the fix.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give --config one of configs/*.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: not a configuration: it must be a mapping of sections")
    for override in overrides or []:
        _set(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, str(path))) from None


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every stage shares: `--config` and `--set`."""
    parser.add_argument("--config", required=True, help="YAML file, for example configs/demo.yaml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        dest="overrides",
        help="override one field; may be repeated",
    )
