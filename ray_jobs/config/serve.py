"""Where the winner goes: the registry and the endpoint."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ray_jobs.config.fields import ModelName, Positive, Section, Share, require_unset

Offload = Literal["none", "encoders", "model"]
Attention = Literal["auto", "flash", "efficient", "cudnn", "math"]
Solver = Literal["model", "ddim", "euler", "dpm++"]
NonNegative = Annotated[int, Field(ge=0)]


class PublishConfig(Section):
    """Where the winner goes."""

    model_name: ModelName = Field(
        "diffray", description="name in the MLflow registry: letters, digits, space . _ - +"
    )
    tracking_uri: str | None = Field(
        None,
        description="MLflow server; else MLFLOW_TRACKING_URI, else SQLite in the storage folder",
    )
    sample_count: Positive = Field(8, description="captions in the report's picture grid")


class ServeConfig(Section):
    """The endpoint."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 takes a free one")
    replicas: Positive | tuple[NonNegative, Positive] = Field(
        1, description="copies of the model; [min, max]: as many as the queue needs, 0 when nobody asks"
    )
    use_gpu: bool = Field(False, description="GPUs for replicas")
    gpu_share: float = Field(1.0, gt=0, le=1, description="of a GPU, a replica; several then share one")
    max_batch_size: Positive = Field(8, description="pictures denoised together")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of the denoiser")
    channels_last: bool = Field(False, description="memory format of a UNet's convolutions")
    compile: bool = Field(
        False, description="the denoiser by torch.compile; minutes at the start, and no LoRA versions"
    )
    int8_weights: bool = Field(False, description="of the denoiser's linear layers, for less memory")
    cache_features: bool = Field(
        False, description="every other step of a UNet takes deep features of the one before; not exact"
    )
    attention: Attention = Field(
        "auto", description="kernel of the denoiser's attention; auto: torch's own choice"
    )
    fuse_champion: bool = Field(
        False,
        description="merge a LoRA champion into a copy of the base, for speed; others stay its adapters",
    )
    offload: Offload = Field(
        "none",
        description="in the host's memory but for the layer that runs: text encoders and autoencoder, or all",
    )
    solver: Solver = Field(
        "model", description="of the diffusion; model: its own scheduler, with which it was measured"
    )
    default_steps: Positive = Field(20, description="denoising steps where the request names none")
    default_guidance_scale: float | None = Field(
        None,
        ge=1,
        description="where the request names none; null: that which the version was scored with",
    )

    max_queued_requests: Positive = Field(64, description="more are answered with 503")
    request_timeout_s: float = Field(120, gt=0, description="a request may take this many seconds")
    max_steps: Positive = Field(100, description="a request may ask for")
    max_pictures: Positive = Field(8, description="a request may ask for")
    max_prompt_length: Positive = Field(
        1000, le=10_000, description="characters, of a prompt and of a negative one"
    )
    max_side: Positive | None = Field(
        None, description="pixels of a picture's longer side; null: twice the model's own"
    )
    max_body_mb: Positive = Field(16, description="MiB of a request's body")

    keys: str | None = Field(None, description="file of API keys, made by python -m serving.keys")
    allow_anonymous: bool = Field(False, description="answer requests without a key too, with all scopes")
    requests_per_minute: Positive = Field(60, description="of a key that has no limit of its own")
    concurrent_requests: Positive = Field(8, description="of a key that has no limit of its own")

    models: list[ModelName | Literal["*"]] = Field(
        [], description="other registered models of the same base that may be asked for, by name; * is all"
    )
    adapter_mb: Positive = Field(1024, description="MiB of adapters that a replica keeps in memory")
    prompt_mb: Positive = Field(256, description="MiB of prompt embeddings that a replica keeps in memory")
    follow_s: float = Field(10, gt=0, description="seconds between looks at the registry's aliases")
    candidate_share: Share = Field(0.0, description="of users, whom the candidate answers")
    shadow_share: Share = Field(0.0, description="of requests, which the candidate draws too, unseen")
    rollback_requests: int = Field(
        50, ge=1, le=500, description="answers of the candidate before it may be taken out by itself"
    )
    rollback_error_rate: float = Field(
        0.05, gt=0, le=1, description="the candidate is taken out with so many more errors than the champion"
    )
    rollback_latency: float = Field(
        2.0, gt=1, description="the candidate is taken out when so many times as slow, in the median"
    )

    feedback_url: str | None = Field(
        None, description="SQL database of generations and ratings; null: SQLite in the storage folder"
    )
    log_prompts: bool = Field(False, description="write prompts into the logs")
    provenance: bool = Field(True, description="write model, version, seed and settings into each PNG")
    safety_checker: str | None = Field(
        None, description="module:function that looks at pictures before they are sent"
    )
    drift_pictures: int = Field(
        0, ge=0, description="window of served pictures that is scored in the background; 0: none"
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
            require_unset(self, "where no candidate answers (candidate_share, shadow_share)", *rollback)
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"replicas: {list(self.replicas)} must be [min, max]")  # type: ignore[arg-type]
        if self.gpu_share < 1 and not self.use_gpu:
            raise ValueError("gpu_share needs use_gpu")
        if self.compile and self.cache_features:
            raise ValueError("compile does not go with cache_features; turn one off")
        if self.offload != "none" and not self.use_gpu:
            raise ValueError("offload needs use_gpu; on a CPU the weights are in the host's memory anyway")
        if self.offload == "model" and self.compile:
            raise ValueError("offload: model does not go with compile; turn one off")
        if self.attention in ("efficient", "cudnn") and not self.use_gpu:
            raise ValueError(f"attention: {self.attention} needs use_gpu; a CPU has flash and math")
        if self.attention in ("flash", "cudnn") and self.use_gpu and self.precision == "fp32":
            raise ValueError(f"attention: {self.attention} on a GPU needs precision bf16 or fp16")
        if self.drift_pictures == 1:
            raise ValueError("drift_pictures: one picture has no spread; give 0 (none), or better hundreds")
        if self.default_steps > self.max_steps:
            raise ValueError(f"default_steps: {self.default_steps} are more than max_steps: {self.max_steps}")
        return self
