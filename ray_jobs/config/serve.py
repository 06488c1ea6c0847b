"""Where the winner goes: the registry and the endpoint."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ray_jobs.config.effects import Added, Effect
from ray_jobs.config.fields import ModelName, Positive, Precision, Section, Share, by_device, require_unset

Offload = Literal["none", "encoders", "model"]
Attention = Literal["auto", "flash", "efficient", "cudnn", "math"]
Solver = Literal["model", "ddim", "euler", "dpm++"]
NonNegative = Annotated[int, Field(ge=0)]


class PublishConfig(Section):
    """The registry and the report."""

    affects: ClassVar = Effect.PUBLISHING

    model_name: ModelName = Field(
        "diffray", description="name in the MLflow registry: letters, digits, space . _ - +"
    )
    tracking_uri: str | None = Field(
        None,
        description="MLflow server; empty: MLFLOW_TRACKING_URI, else SQLite in the storage folder",
    )
    sample_count: Positive = Field(8, description="captions in the image grid of the report")
    release: Annotated[Literal["best", "canary"], Added("best")] = Field(
        "best",
        description="best: a version that beats the champion replaces it, any other becomes the candidate. "
        "canary: a version that beats the champion becomes the candidate, on which the endpoint decides, any "
        "other is held back",
    )


class UpdateConfig(Section):
    """The next version from feedback (`diffray update`)."""

    affects: ClassVar = Effect.NOTHING

    train_on: Literal["votes", "liked"] = Field(
        "votes",
        description="votes: train on preferences, as train.preference says (by default dpo); liked: train "
        "further on the data set with the liked images mixed in",
    )
    liked_share: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="with train_on: liked, share of the liked images in the rows of an epoch",
    )
    url: str | None = Field(
        None, description="running endpoint that draws the images again, which were not kept"
    )
    after_votes: Positive = Field(
        200, description="number of new votes, or with liked of liked images, with which an update is due"
    )
    after_drift: float | None = Field(
        None,
        gt=1,
        description="an update is also due if the champion's drift FID is this many times what it was when "
        "published (serve.drift_pictures); empty: never",
    )

    @model_validator(mode="after")
    def _is_used(self) -> "UpdateConfig":
        if self.train_on == "votes":
            require_unset(self, "with train_on: votes", "liked_share")
        return self


class ServeConfig(Section):
    """The endpoint."""

    affects: ClassVar = Effect.SERVING

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0: any free one")
    replicas: Positive | tuple[NonNegative, Positive] = Field(
        1,
        description="copies of the model; [min, max]: scaled with the queue, down to 0 when idle if min is 0",
    )
    use_gpu: bool = Field(False, description="run replicas on GPUs")
    gpu_share: float = Field(
        1.0, gt=0, le=1, description="share of a GPU per replica; below 1, several replicas share one"
    )
    max_batch_size: Positive = Field(
        8, description="maximum number of images denoised together; of larger ones than the model's own fewer"
    )
    precision: Precision = Field(
        default_factory=by_device,
        description="of the denoiser; with bf16 also of text encoders and of autoencoders that allow it",
    )
    channels_last: bool = Field(False, description="channels-last memory layout of a UNet's convolutions")
    compile: bool = Field(
        False,
        description="compile the denoiser with torch.compile; takes minutes at start, and LoRA versions "
        "cannot be served",
    )
    int8_weights: bool = Field(
        False, description="int8 weights in the denoiser's linear layers, to save memory"
    )
    cache_features: bool = Field(
        False, description="reuse a UNet's deep features in every other step; not exact"
    )
    attention: Attention = Field("auto", description="attention kernel of the denoiser; auto: torch's choice")
    fuse_champion: bool = Field(
        False,
        description="merge a LoRA champion into a copy of the base, for speed; other versions remain "
        "adapters",
    )
    offload: Offload = Field(
        "none",
        description="keep the text encoders and the autoencoder, or the whole model, in pinned host memory "
        "except for the layer that runs and, where there is room, the next one",
    )
    solver: Solver = Field(
        "model", description="diffusion solver; model: the scheduler that the model was evaluated with"
    )
    default_steps: Positive = Field(20, description="denoising steps of a request that names none")
    default_guidance_scale: float | None = Field(
        None,
        ge=1,
        description="guidance scale of a request that names none; empty: the one that the version was "
        "evaluated with",
    )

    max_queued_requests: Positive = Field(
        64, description="queue length beyond which requests are answered with 503"
    )
    request_timeout_s: float = Field(120, gt=0, description="maximum duration of a request, in seconds")
    max_steps: Positive = Field(100, description="maximum denoising steps of a request")
    max_pictures: Positive = Field(8, description="maximum images per request")
    max_prompt_length: Positive = Field(
        1000, le=10_000, description="maximum length of a prompt and of a negative prompt, in characters"
    )
    max_side: Positive | None = Field(
        None, description="maximum length of an image's longer side, in pixels; empty: twice the model's own"
    )
    url_minutes: Positive = Field(
        60, description="how long a picture can be fetched that was requested with response_format: url"
    )
    public_url: str | None = Field(
        None,
        pattern=r"^https?://[^\s?#]+$",
        description="address of the endpoint in answers, behind a proxy; empty: as the client reached it",
    )
    max_jobs: Positive = Field(
        100, description="maximum open jobs of a key, of requests that prefer to be answered later"
    )
    job_minutes: Positive = Field(60, description="maximum duration of drawing a job")
    job_hours: Positive = Field(24, description="how long a job and its result are kept after its end")
    private_webhooks: bool = Field(
        False, description="also announce jobs at private addresses, such as those of the own network"
    )
    max_body_mb: Positive = Field(16, description="maximum size of a request body, in MiB")

    keys: str | None = Field(None, description="file of API keys, made by python -m serving.keys")
    allow_anonymous: bool = Field(False, description="also answer requests without a key, with all scopes")
    requests_per_minute: Positive = Field(60, description="limit of a key that has none of its own")
    concurrent_requests: Positive = Field(8, description="limit of a key that has none of its own")

    models: list[ModelName | Literal["*"]] = Field(
        [], description="other registered models of the same base that may be requested, by name; *: all"
    )
    max_adapters: Positive = Field(8, description="maximum LoRA versions that a request may combine")
    adapter_mb: Positive = Field(1024, description="memory for adapters per replica, in MiB")
    prompt_mb: Positive = Field(
        256, description="memory for prompt embeddings per engine of a replica, in MiB; taken at its start"
    )
    follow_s: float = Field(
        10, gt=0, description="interval at which the registry's aliases are read, in seconds"
    )
    candidate_share: Share = Field(0.0, description="share of users whose requests the candidate answers")
    shadow_share: Share = Field(
        0.0, description="share of requests that the candidate also draws, without showing the result"
    )
    rollback_requests: int = Field(
        50, ge=1, le=500, description="answers of the candidate before it may be withdrawn automatically"
    )
    rollback_error_rate: float = Field(
        0.05,
        gt=0,
        le=1,
        description="withdraw the candidate if its error rate exceeds the champion's by more than this",
    )
    rollback_latency: float = Field(
        2.0,
        gt=1,
        description="withdraw the candidate if its median latency is this many times the champion's",
    )

    rollback_feedback: Share = Field(
        0.01,
        description="withdraw the candidate, or take back a champion that replaced another version, if votes "
        "and ratings show that people like it less; this is the probability of doing so with a version that "
        "they like as much, however often one looks; 0: never",
    )
    promote_feedback: Share = Field(
        0.0,
        description="make the candidate the champion if votes and ratings show that people like it more; "
        "this is the probability of doing so with a version that they like no more; 0: by hand only",
    )
    rollback_drift: float | None = Field(
        None,
        gt=1,
        description="withdraw the candidate, or take the champion back, if its drift FID is this many times "
        "what it was when published, or if it draws more near copies than chance has; empty: never",
    )

    feedback_url: str | None = Field(
        None, description="SQL database of generations and ratings; empty: SQLite in the storage folder"
    )
    keep_days: Positive | None = Field(
        None,
        description="how long it is kept how pictures were drawn, with their feedback, and shadow mode's "
        "pairs; empty: for ever",
    )
    log_prompts: bool = Field(False, description="write prompts to the logs")
    provenance: bool = Field(True, description="write model, version, seed and settings into each PNG")
    safety_checker: str | None = Field(
        None, description="module:function of a checker that sees each image before it is sent"
    )
    drift_pictures: int = Field(
        0, ge=0, description="number of recently served images that are scored in the background; 0: none"
    )

    @property
    def min_replicas(self) -> int:
        return self.replicas if isinstance(self.replicas, int) else self.replicas[0]

    @property
    def max_replicas(self) -> int:
        return self.replicas if isinstance(self.replicas, int) else self.replicas[1]

    @model_validator(mode="after")
    def _fits(self) -> "ServeConfig":
        if not (self.candidate_share or self.shadow_share):
            rollback = ("rollback_requests", "rollback_error_rate", "rollback_latency")
            require_unset(self, "without candidate_share or shadow_share", *rollback)
        if self.min_replicas > self.max_replicas:
            low, high = self.min_replicas, self.max_replicas
            raise ValueError(f"replicas: [{low}, {high}] must be [min, max]; swap the two numbers")
        if self.gpu_share < 1 and not self.use_gpu:
            raise ValueError("gpu_share needs use_gpu")
        if self.compile and self.cache_features:
            raise ValueError("compile cannot be combined with cache_features; turn one off")
        if self.offload != "none" and not self.use_gpu:
            raise ValueError("offload needs use_gpu; on a CPU the weights are in host memory anyway")
        if self.offload == "model" and self.compile:
            raise ValueError("offload: model cannot be combined with compile; turn one off")
        if self.attention in ("efficient", "cudnn") and not self.use_gpu:
            raise ValueError(f"attention: {self.attention} needs use_gpu; on a CPU use flash or math")
        if self.attention in ("flash", "cudnn") and self.use_gpu and self.precision == "fp32":
            raise ValueError(f"attention: {self.attention} on a GPU needs precision bf16 or fp16")
        if self.rollback_drift and not self.drift_pictures:
            raise ValueError("rollback_drift needs drift_pictures, the number of images that are scored")
        if self.promote_feedback and not self.candidate_share:
            raise ValueError("promote_feedback needs candidate_share, of users who see the candidate")
        if self.drift_pictures == 1:
            raise ValueError("drift_pictures: one image is too few; give 0 (off) or some hundreds")
        if self.default_steps > self.max_steps:
            raise ValueError(
                f"default_steps: {self.default_steps} is more than max_steps: {self.max_steps}; lower it"
            )
        return self
