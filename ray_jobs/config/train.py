"""What is trained and how."""

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ray_jobs.config.effects import Added, Effect
from ray_jobs.config.fields import (
    LearningRate,
    Positive,
    Precision,
    Section,
    Share,
    by_device,
    named_version,
    require_unset,
)

Quantization = Literal["nf4", "int8", "fp8"]


class ModelConfig(Section):
    """The model to fine-tune."""

    base: Annotated[str, Effect.ENCODINGS, Effect.WEIGHTS] = Field(
        description="folder (also s3:// or gs://) or hub name of a model in diffusers' format, or a version "
        "of the registry whose weights were all trained, as name@3 or name:champion"
    )
    revision: Annotated[str | None, Effect.ENCODINGS, Effect.WEIGHTS] = Field(
        None, description="revision on the hub"
    )
    quantize: Annotated[Quantization | None, Effect.WEIGHTS, Added()] = Field(
        None,
        description="how the denoiser's linear layers are stored while adapters are trained, scored and "
        "served: nf4 in 4.5 bits a weight, int8 and fp8 in 8; empty: as train.precision says",
    )
    quantize_text: Annotated[Quantization | None, Effect.ENCODINGS, Effect.WEIGHTS, Added()] = Field(
        None,
        description="how the text encoders' linear layers are stored wherever captions are encoded, as "
        "`quantize`; empty: plain",
    )
    adapter: Annotated[str | None, Effect.WEIGHTS, Added()] = Field(
        None,
        description="LoRA from which training goes on, with its rank, scale and layers: a file or folder "
        "(also s3:// or gs://), a hub name, with or without the file's, or a version of the registry, as "
        "name@3 or name:champion; empty: new adapters",
    )
    adapter_revision: Annotated[str | None, Effect.WEIGHTS, Added()] = Field(
        None, description="revision of model.adapter on the hub"
    )
    assistant: Annotated[str | None, Effect.WEIGHTS, Added()] = Field(
        None,
        description="LoRA that is active while training and off after, as de-distillation adapters are for "
        "models that were distilled for a few steps: a file or folder (also s3:// or gs://), or a hub name, "
        "with or without the file's",
    )
    assistant_revision: Annotated[str | None, Effect.WEIGHTS, Added()] = Field(
        None, description="revision of model.assistant on the hub"
    )

    controlnet: Annotated[str | None, Effect.WEIGHTS, Added()] = Field(
        None,
        description="with train.method: controlnet, the ControlNet from which training goes on: a folder in "
        "diffusers' format (also s3:// or gs://), a hub name, or a version of the registry, as name@3 or "
        "name:champion; empty: a copy of the base's first blocks",
    )
    controlnet_revision: Annotated[str | None, Effect.WEIGHTS, Added()] = Field(
        None, description="revision of model.controlnet on the hub"
    )

    @model_validator(mode="after")
    def _revisions(self) -> "ModelConfig":
        for field, revision in (
            ("adapter", "adapter_revision"),
            ("assistant", "assistant_revision"),
            ("controlnet", "controlnet_revision"),
        ):
            if not getattr(self, field):
                require_unset(self, f"without {field}", revision)
        for field, revision in (
            ("base", "revision"),
            ("adapter", "adapter_revision"),
            ("controlnet", "controlnet_revision"),
        ):
            if named_version(getattr(self, field)):
                require_unset(self, f"for a version of the registry ({field})", revision)
        return self


AdapterKind = Literal["lora", "loha", "lokr", "oft"]

ADAPTER_SETTINGS: dict[str, set[AdapterKind]] = {  # which kinds of adapters they change
    "rank": {"lora", "loha", "lokr"},
    "alpha": {"lora", "loha", "lokr"},
    "dropout": {"lora"},
    "use_dora": {"lora"},
    "use_rslora": {"lora"},
    "factor": {"lokr"},
    "block": {"oft"},
}


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685), by peft."""

    affects: ClassVar = Effect.WEIGHTS

    rank: Positive = Field(16, description="rank of the update")
    alpha: Positive = Field(16, description="the update is scaled by alpha / rank")
    dropout: Share = Field(0.0, description="probability of dropout before the down projection")
    target_modules: list[str] | None = Field(
        None, description="layers that get an adapter, by the end of their name; empty: the attention layers"
    )
    use_dora: bool = Field(
        False, description="decompose weights into magnitude and direction (arXiv 2402.09353)"
    )
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (arXiv 2312.03732)")
    kind: Annotated[AdapterKind, Effect.WEIGHTS, Added("lora")] = Field(
        "lora",
        description="lora: the update is a product of two thin matrices. loha: an element-wise product of "
        "two of `rank` (arXiv 2108.06098); it is kept as the LoRA that it is, of rank times rank. lokr: the "
        "Kronecker product of a small matrix and one of `rank` (arXiv 2309.14859); kept as a LoRA of rank "
        "times factor. oft: an orthogonal matrix times the weights (arXiv 2306.07280); what is kept is a "
        "whole model",
    )
    factor: Annotated[Positive, Effect.WEIGHTS, Added(8)] = Field(
        8,
        description="with lokr: largest number of rows and columns of the small matrix; the nearest divisor "
        "of a layer's size below is taken",
    )
    block: Annotated[Positive, Effect.WEIGHTS, Added(32)] = Field(
        32,
        description="with oft: rows of each block on the diagonal of the orthogonal matrix; it divides the "
        "inputs of the layers",
    )

    @model_validator(mode="after")
    def _has_own_settings(self) -> "LoraConfig":
        for setting, having in ADAPTER_SETTINGS.items():
            if self.kind not in having:
                require_unset(self, f"with kind: {self.kind}", setting)
        return self


class LossConfig(Section):
    """The training objective; the defaults are the model's own."""

    affects: ClassVar = Effect.WEIGHTS

    timestep_sampling: Literal["uniform", "logit_normal"] | None = Field(
        None, description="density of the timesteps; empty: uniform, or logit_normal for flow matching"
    )
    timestep_mean: float = Field(0.0, description="mean of the logit-normal density")
    timestep_std: float = Field(1.0, gt=0, description="standard deviation of the logit-normal density")
    min_snr_gamma: float | None = Field(None, gt=0, description="gamma of min-SNR weighting; empty: off")
    offset_noise: float = Field(
        0.0, ge=0, description="strength of noise that is constant over a channel, relative to the noise"
    )
    input_perturbation: float = Field(
        0.0, ge=0, description="strength of extra noise on the input only (arXiv 2301.11706)"
    )
    huber_delta: float | None = Field(
        None, gt=0, description="delta of the pseudo-Huber loss; empty: squared error"
    )
    outside_mask: Annotated[float, Added(0.0)] = Field(
        0.0,
        ge=0,
        le=1,
        description="with `mask_column` in data.sources: weight of what is outside of a row's mask, for 1 of "
        "what is inside",
    )
    zero_terminal_snr: bool = Field(False, description="rescale the noise schedule to end in pure noise")


def _as_list(given: object) -> object:
    return [given] if isinstance(given, str) else given


class VotesConfig(Section):
    """Training on what people prefer, in place of denoising the data set's images."""

    affects: ClassVar = Effect.WEIGHTS

    votes: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1), Effect.NOTHING] = Field(
        description="folders of votes, local, s3:// or gs://: exports of `diffray feedback preferences "
        "--draw`, with pairs in preferences.jsonl; or with kto also such with liked/ and disliked/, each a "
        "folder of captioned images as `diffray feedback ratings --draw` writes them",
    )
    earlier: Annotated[list[str], BeforeValidator(_as_list), Effect.PUBLISHING] = Field(
        [],
        description="folders of votes that are not trained on, as those of earlier rounds: a version whose "
        "implicit rewards order more than half of their test share wrongly does not become champion",
    )
    loss: Literal["dpo", "kto"] = Field(
        "dpo",
        description="dpo: of each pair the preferred image (Diffusion-DPO, arXiv 2311.12908). kto: liked "
        "images and no others, which need not be pairs (Diffusion-KTO, arXiv 2404.04465)",
    )
    beta: float = Field(
        2000.0,
        gt=0,
        description="weight of the mean squared error's difference from the reference, by half: the larger, "
        "the less the model leaves the reference; 2,000 to 5,000 in the literature",
    )
    liked_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="with kto: share of liked images in the rows of an epoch; empty: as there are",
    )

    @model_validator(mode="after")
    def _is_used(self) -> "VotesConfig":
        if self.loss == "dpo":
            require_unset(self, "with loss: dpo, whose pairs have one of each", "liked_share")
        return self


Schedule = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "warmup_stable_decay",
]


Optimizer = Literal["adamw", "adam", "nadam", "lion", "sgd", "adafactor", "muon", "prodigy", "schedule_free"]

OPTIMIZER_SETTINGS: dict[str, set[Optimizer]] = {  # which optimizers they change
    "betas": {"adamw", "adam", "nadam", "lion", "muon", "prodigy", "schedule_free"},
    "epsilon": {"adamw", "adam", "nadam", "muon", "prodigy", "schedule_free"},
    "momentum": {"sgd", "muon"},
}
WHOLE_TENSORS: frozenset[Optimizer] = frozenset({"adafactor", "muon", "prodigy"})
"""Optimizers whose steps depend on more than an element, so that no engine may divide parameters."""
ALL_LAYERS: frozenset[Optimizer] = frozenset({"prodigy", "schedule_free"})
"""Optimizers that keep something of all layers from their first step on: no stage may leave some out."""


class StageConfig(Section):
    """A part of a run with settings of its own; empty ones are taken from `train`."""

    affects: ClassVar = Effect.WEIGHTS

    steps: Positive = Field(description="number of steps; the last stage continues to the end of the ladder")
    learning_rate: LearningRate | None = Field(None, description="peak learning rate")
    schedule: Schedule | None = Field(None, description="learning rate schedule over the steps of this stage")
    warmup_steps: int | None = Field(None, ge=0, description="steps of linear warm-up")
    optimizer: Annotated[Optimizer | None, Effect.WEIGHTS, Added()] = Field(
        None, description="optimizer; another one than the stage before begins without moments"
    )
    weight_decay: float | None = Field(None, ge=0, description="weight decay")
    betas: tuple[Share, Share] | None = Field(None, description="betas of the optimizer")
    epsilon: float | None = Field(None, gt=0, description="epsilon of the optimizer")
    momentum: Annotated[Share | None, Effect.WEIGHTS, Added()] = Field(
        None, description="momentum of sgd and muon"
    )
    trainable: list[str] | None = Field(None, description="names in `groups` of the layers that are trained")

    @model_validator(mode="after")
    def _warms_up(self) -> "StageConfig":
        if self.schedule == "constant" and self.warmup_steps:
            raise ValueError("warmup_steps: schedule constant has no warm-up; use constant_with_warmup")
        return self


OTHER_LAYERS = "other"
WARMUP_STEPS = 10  # where none are given
ENDLESS = {"constant", "constant_with_warmup"}  # schedules that do not depend on the last step
SCHEDULE_SETTINGS = {  # which schedules they change
    "schedule_cycles": {"cosine_with_restarts"},
    "schedule_power": {"polynomial"},
    "decay_share": {"warmup_stable_decay"},
    "schedule_end": {"linear", "cosine", "cosine_with_restarts", "polynomial", "warmup_stable_decay"},
}


class TrainConfig(Section):
    """One training run."""

    affects: ClassVar = Effect.WEIGHTS

    method: Literal["lora", "full", "controlnet"] = Field(
        "lora",
        description="lora: train adapters; full: train all weights; controlnet: train a ControlNet (arXiv "
        "2302.05543) beside the frozen base, which follows a condition of each row (`control_column` in "
        "data.sources, or data.control)",
    )
    controlnet_layers: Annotated[Positive | None, Effect.WEIGHTS, Added()] = Field(
        None,
        description="with method controlnet, of models without a UNet: blocks of each kind that the "
        "ControlNet copies from the base; empty: 12 of SD3, 4 of FLUX.1",
    )
    lora: LoraConfig = LoraConfig()
    loss: LossConfig = LossConfig()
    preference: Annotated[VotesConfig | None, Effect.WEIGHTS, Added()] = Field(
        None,
        description="train on votes, with method lora; the reference is the base with model.adapter, "
        "from which the training begins. A step's images are then batch_size pairs, or with kto images",
    )
    dropout: Annotated[Share, Effect.WEIGHTS, Added(0.0)] = Field(
        0.0,
        description="with method full: probability of the denoiser's own dropout layers, as in residual, "
        "attention and feed-forward blocks, while it is trained; adapters have lora.dropout",
    )
    train_text_encoder: bool = Field(False, description="also train the CLIP text encoders")
    groups: dict[str, list[str]] = Field(
        {}, description="named groups of layers: patterns of parameter names, for example *attn*"
    )
    trainable: list[str] | None = Field(
        None, description=f"groups that are trained; {OTHER_LAYERS}: what is in none; empty: all"
    )
    stages: list[StageConfig] = Field([], description="parts of the run with settings of their own")
    learning_rate: LearningRate = Field(
        1e-4, description="learning rate of a single run; a search sets its own"
    )
    schedule: Schedule = Field("constant_with_warmup", description="learning rate schedule")
    warmup_steps: int = Field(WARMUP_STEPS, ge=0, description="steps of linear warm-up; constant has none")
    schedule_cycles: Positive = Field(1, description="number of cycles of cosine_with_restarts")
    schedule_power: float = Field(1.0, gt=0, description="power of polynomial")
    schedule_end: Share = Field(0.0, description="final learning rate, as a share of the peak")
    decay_share: float = Field(
        0.2, gt=0, le=1, description="share of the steps in which warmup_stable_decay decays"
    )
    epochs: Annotated[float | None, Effect.SCORES, Added()] = Field(
        None,
        gt=0,
        description="length of a training as passes over the training split, instead of search.ladder; its "
        "rungs are then a quarter, a half and all of it (1 / f^2, 1 / f and 1, with f "
        "search.reduction_factor)",
    )
    max_steps: Annotated[Positive | None, Effect.SCORES, Added()] = Field(
        None,
        description="length of a training in steps, instead of search.ladder, with the same rungs as epochs; "
        "with epochs, the shorter one counts",
    )
    batch_size: Positive = Field(16, description="images per optimizer step, over all workers")
    prior_loss_weight: float = Field(
        0.0,
        ge=0,
        description="weight of DreamBooth's prior preservation loss (arXiv 2208.12242, eq. 2); above 0, "
        "half of the images of a step (batch_size // 2) are class images; 0: no class images",
    )
    micro_batch_size: Annotated[Positive | None, Effect.NOTHING] = Field(
        None,
        description="images per forward pass of a worker, with gradients accumulated; empty: all its "
        "images of a step",
    )
    num_workers: Annotated[Positive | tuple[Positive, Positive], Effect.NOTHING] = Field(
        2, description="Ray Train workers; [min, max]: as many as fit, adjusted while the run goes on"
    )
    use_gpu: Annotated[bool, Effect.NOTHING] = Field(False, description="one GPU per worker")
    gpu_share: Annotated[float, Effect.NOTHING] = Field(
        1.0,
        gt=0,
        le=1,
        description="share of a GPU per worker; the rest of it is for evaluators or other trials. Several "
        "workers of a training need more than 0.5 each",
    )
    cpus_per_worker: Annotated[Positive, Effect.NOTHING] = Field(
        1, description="logical CPUs, and PyTorch threads, per worker"
    )
    zero_stage: Annotated[Literal[0, 1, 2, 3], Effect.NOTHING] = Field(
        2, description="ZeRO stage (arXiv 1910.02054); a single worker shards nothing"
    )
    engine: Annotated[Literal["auto", "flat", "deepspeed"], Effect.NOTHING] = Field(
        "auto",
        description="what takes the steps. flat: ZeRO stages 0 to 2, with few kernels and messages; "
        "deepspeed: all stages, offloading and fp16; auto: flat where it can do what is set",
    )
    offload_optimizer: Annotated[bool, Effect.NOTHING] = Field(
        False, description="keep the optimizer states in host memory (stages 1 to 3)"
    )
    offload_parameters: Annotated[bool, Effect.NOTHING] = Field(
        False, description="keep the weights in host memory (stage 3)"
    )
    offload_base: Annotated[bool, Effect.NOTHING] = Field(
        False,
        description="with method lora and gradient_checkpointing, keep the frozen weights of the denoiser's "
        "blocks in host memory; a block's are on the GPU while it runs and while the next one does",
    )
    deepspeed: dict[str, Any] = Field({}, description="merged into DeepSpeed's configuration")
    precision: Precision = Field(
        default_factory=by_device,
        description="of weights and arithmetic. ZeRO keeps fp32 copies of what it updates, and gradients "
        "of several micro-batches are accumulated in fp32. fp16 needs a GPU and has never "
        "been run",
    )
    gradient_checkpointing: Annotated[bool, Effect.NOTHING] = Field(
        False, description="recompute activations in the backward pass: less memory, slower"
    )
    checkpoint_every: Annotated[Positive, Effect.NOTHING] = Field(
        1,
        description="with gradient_checkpointing, recompute one of so many blocks: the more, the faster, and "
        "the more memory",
    )
    channels_last: Annotated[bool, Effect.NOTHING] = Field(
        False, description="channels-last memory layout of convolutions"
    )
    compile: Annotated[bool, Effect.NOTHING] = Field(
        False,
        description="compile the denoiser with torch.compile: a slow start, then faster steps. A UNet is "
        "compiled whole, other denoisers block by block",
    )
    on_oom: Annotated[Literal["halve", "stop"], Effect.NOTHING] = Field(
        "halve",
        description="where a GPU's memory is too small. halve: half of the images per forward pass, and so "
        "on; the flat engine tries before the first step, later a restart takes it up (max_failures). stop: "
        "the error ends the training",
    )
    optimizer: Optimizer = Field(
        "adamw",
        description="with fp32 states. adamw: AdamW (arXiv 1711.05101). adam: Adam (arXiv 1412.6980). nadam: "
        "NAdam, with AdamW's weight decay. lion: Lion (arXiv 2302.06675), which keeps one moment instead of "
        "two; its authors take a third to a tenth of AdamW's learning rate, as "
        "much more weight decay, and betas of 0.9 and 0.99. sgd: with momentum. adafactor: Adafactor (arXiv "
        "1804.04235), which keeps a number per row and column; its steps are in proportion to a layer's "
        "weights, and rates of 1e-3 to 1e-2 are usual. muon: Muon for matrices, with AdamW's rates, and "
        "AdamW for the rest. prodigy: Prodigy (arXiv 2306.06101), AdamW that finds the size of its steps, "
        "which the learning rate multiplies: 1 is usual. schedule_free: Schedule-Free AdamW (arXiv "
        "2405.15682), which averages the weights that are evaluated instead of lowering the rate: with "
        "ema_decay: 0 and a constant schedule, with or without warm-up. adafactor, muon and prodigy need "
        "whole layers: zero_stage: 0 or one worker",
    )
    weight_decay: float = Field(
        1e-2,
        ge=0,
        description="weight decay, decoupled; with adam and sgd it is part of the gradient. Biases and norms "
        "are exempt",
    )
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="betas of the optimizer")
    epsilon: float = Field(1e-8, gt=0, description="epsilon of AdamW, Adam and NAdam")
    momentum: Annotated[Share, Effect.WEIGHTS, Added(0.9)] = Field(
        0.9, description="momentum of sgd and muon"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    caption_dropout: Share = Field(
        0.1, description="share of captions that are dropped, for classifier-free guidance"
    )
    ema_decay: Share = Field(
        0.99, description="decay of the averaged weights, which are evaluated and published; 0: off"
    )
    checkpoint_minutes: Annotated[float, Effect.NOTHING] = Field(
        10, gt=0, description="minutes between checkpoints, in addition to those at the rungs"
    )
    max_failures: Annotated[int, Effect.NOTHING] = Field(
        1, ge=0, description="how often the worker group restarts from its checkpoint"
    )

    @property
    def may_halve(self) -> bool:
        """Whether a worker's rows of a step may be divided into several passes where memory is too small."""
        return self.on_oom == "halve" and not (self.preference and self.preference.loss == "kto")

    @property
    def class_rows(self) -> int:
        """Rows of a step that are class pictures."""
        return self.batch_size // 2 if self.prior_loss_weight else 0

    @property
    def training_rows(self) -> int:
        """Rows of a step that are the user's own training pictures."""
        return self.batch_size - self.class_rows

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizer of each stage; without `stages`, of the run."""
        return [stage.optimizer or self.optimizer for stage in self.stages] or [self.optimizer]

    def own_of_stages(self, searched: Iterable[Any]) -> list[str]:
        """Return the settings of which every stage that reads them has its own; empty without `stages`.

        Args:
            searched: further values of `optimizer` that trials have.
        """
        found = []
        for field in StageConfig.model_fields.keys() - {"steps", "learning_rate"}:
            having = OPTIMIZER_SETTINGS.get(field, set(get_args(Optimizer)))
            readers = [
                stage
                for stage in self.stages
                if having.intersection([stage.optimizer] if stage.optimizer else [self.optimizer, *searched])
                and not (field == "warmup_steps" and stage.schedule == "constant")
            ]
            # Schedule-free keeps the first beta of the run through all stages.
            kept = field == "betas" and "schedule_free" in self.optimizers
            if readers and not kept and all(getattr(stage, field) is not None for stage in readers):
                found.append(field)
        return sorted(found)

    @property
    def makes_adapter(self) -> bool:
        """Whether an adapter is what is trained and kept, and not a whole model."""
        return self.method == "lora" and self.lora.kind != "oft"

    @property
    def makes(self) -> Literal["lora", "full", "controlnet"]:
        """The method of the versions that a training makes: adapters, whole models or ControlNets."""
        if self.method == "controlnet":
            return "controlnet"
        return "lora" if self.makes_adapter else "full"

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
            low, high = self.min_workers, self.max_workers
            raise ValueError(f"num_workers: [{low}, {high}] must be [min, max]; swap the two numbers")
        if self.batch_size < self.max_workers:
            raise ValueError(
                f"batch_size: {self.batch_size} is less than the number of workers ({self.max_workers}); "
                "raise batch_size or lower num_workers"
            )
        return self

    @model_validator(mode="after")
    def _drops_out(self) -> "TrainConfig":
        if self.dropout and self.method != "full":
            raise ValueError(f"dropout: {self.dropout:g} needs method: full; adapters have lora.dropout")
        return self

    @model_validator(mode="after")
    def _prefers(self) -> "TrainConfig":
        if self.preference is None:
            return self
        chosen = f"preference: loss: {self.preference.loss}"
        if not self.makes_adapter:
            raise ValueError(
                f"{chosen} trains adapters, beside the base as the reference; set method: lora and another "
                "lora.kind than oft"
            )
        if self.prior_loss_weight:
            raise ValueError(f"{chosen} has no class images; set prior_loss_weight: 0")
        if self.loss.huber_delta is not None or self.loss.min_snr_gamma is not None:
            raise ValueError(
                f"{chosen} compares squared errors; leave loss.huber_delta and loss.min_snr_gamma out"
            )
        if self.zero_stage == 3:
            raise ValueError(
                f"{chosen} takes two ways through the base, which zero_stage: 3 divides as it takes one; set "
                "it to 2 or less"
            )
        if self.preference.loss == "kto" and self.micro_batch_size is not None:
            raise ValueError(
                f"{chosen} measures a reference point over all images of a step, in one pass of each worker; "
                "leave micro_batch_size out"
            )
        if self.preference.loss == "kto" and self.on_oom == "halve" and "on_oom" in self.model_fields_set:
            raise ValueError(f"{chosen} takes the images of a step in one pass; set on_oom: stop")
        return self

    @model_validator(mode="after")
    def _controls(self) -> "TrainConfig":
        if self.method != "controlnet":
            require_unset(self, f"with method: {self.method}", "controlnet_layers")
        elif self.train_text_encoder:
            raise ValueError("train_text_encoder: method controlnet leaves the base as it is; turn it off")
        return self

    @model_validator(mode="after")
    def _divides_no_factors(self) -> "TrainConfig":
        if self.method == "lora" and self.lora.kind != "lora" and self.zero_stage == 3:
            raise ValueError(
                f"lora.kind: {self.lora.kind} multiplies whole matrices, which zero_stage: 3 divides; set it "
                "to 2 or less"
            )
        return self

    @model_validator(mode="after")
    def _recomputes(self) -> "TrainConfig":
        if not self.gradient_checkpointing:
            require_unset(self, "without gradient_checkpointing", "checkpoint_every")
        return self

    @model_validator(mode="after")
    def _offloads_base(self) -> "TrainConfig":
        if not self.offload_base:
            return self
        if not self.use_gpu:
            raise ValueError("offload_base needs use_gpu; on a CPU the weights are in host memory anyway")
        if self.method != "lora":
            raise ValueError(
                f"offload_base: method {self.method} trains whole layers; set method: lora, or "
                "offload_parameters"
            )
        if not self.flat:
            raise ValueError(
                f"offload_base: {self._only_deepspeed or 'engine: deepspeed'} is DeepSpeed's, which moves "
                "the whole model to the GPU; leave one of them out"
            )
        if not self.gradient_checkpointing or self.checkpoint_every > 1:
            raise ValueError(
                "offload_base needs gradient_checkpointing: true and checkpoint_every: 1; autograd would "
                "keep the weights of other blocks on the GPU until the backward pass"
            )
        if self.compile:
            raise ValueError("offload_base: compiled blocks keep their weights on the GPU; turn off compile")
        return self

    @model_validator(mode="after")
    def _shares_gpus(self) -> "TrainConfig":
        if self.gpu_share == 1:
            return self
        if not self.use_gpu:
            raise ValueError("gpu_share needs use_gpu")
        if self.is_elastic:  # Ray's policy adds up the rests of several GPUs
            raise ValueError("gpu_share: below 1, num_workers must be one number, not [min, max]")
        if self.min_workers > 1 and self.gpu_share <= 0.5:
            raise ValueError(
                f"gpu_share: {self.gpu_share:g} would put two workers of a training on one GPU, which NCCL "
                "refuses; give more than 0.5, or set num_workers: 1"
            )
        return self

    @model_validator(mode="after")
    def _prior_preservation(self) -> "TrainConfig":
        if self.prior_loss_weight and self.batch_size < 2:
            raise ValueError(
                f"prior_loss_weight: {self.prior_loss_weight:g} needs a batch_size of at least 2: "
                "half of the images of a step are class images"
            )
        return self

    @property
    def flat(self) -> bool:
        """Whether the flat engine takes the steps, and not DeepSpeed."""
        if self.engine != "auto":
            return self.engine == "flat"
        return not self._only_deepspeed

    @property
    def _only_deepspeed(self) -> str:
        """A setting that the flat engine does not have; empty if there is none."""
        found = {
            "zero_stage: 3": self.zero_stage == 3,
            "offload_optimizer": self.offload_optimizer,
            "offload_parameters": self.offload_parameters,
            "precision: fp16": self.precision == "fp16",
            "deepspeed": bool(self.deepspeed),
        }
        return next((name for name, chosen in found.items() if chosen), "")

    @model_validator(mode="after")
    def _engine(self) -> "TrainConfig":
        if self.engine == "flat" and self._only_deepspeed:
            raise ValueError(
                f"engine: flat does not have {self._only_deepspeed}; leave that out, or set engine: deepspeed"
            )
        return self

    @model_validator(mode="after")
    def _sharding(self) -> "TrainConfig":
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage < 3:
            raise ValueError("offload_parameters needs zero_stage: 3")
        if self.precision != "fp32" and not self.zero_stage and not self.flat:
            raise ValueError(
                f"precision: {self.precision} with DeepSpeed needs zero_stage 1, 2 or 3, which keep fp32 "
                "weights"
            )
        if self.precision == "fp16" and not self.use_gpu:
            raise ValueError("precision: fp16 needs use_gpu; on a CPU use bf16")
        return self

    @field_validator("optimizer", mode="before")
    @classmethod
    def _eight_bit(cls, given: object) -> object:
        if given == "adamw_8bit":
            raise ValueError(
                "adamw_8bit was removed because its states could not be resumed; use adamw, and to save "
                "memory zero_stage 1 or higher, or offload_optimizer"
            )
        return given

    @model_validator(mode="after")
    def _optimizers(self) -> "TrainConfig":
        if len(set(self.optimizers)) > 1 and not self.flat:
            raise ValueError(
                f"stages: optimizer: {self._only_deepspeed or 'engine: deepspeed'} is DeepSpeed's, which has "
                "one optimizer to the end; leave one of them out"
            )
        for setting, having in OPTIMIZER_SETTINGS.items():
            if having.isdisjoint(self.optimizers):
                names = ", ".join(dict.fromkeys(self.optimizers))
                require_unset(self, f"with optimizer: {names}", setting)
            for number, (stage, optimizer) in enumerate(zip(self.stages, self.optimizers, strict=False)):
                if getattr(stage, setting) is not None and optimizer not in having:
                    raise ValueError(f"stages.{number}.{setting}: {optimizer} has none; remove it")
        return self

    @model_validator(mode="after")
    def _keeps_all_layers(self) -> "TrainConfig":
        for name in ALL_LAYERS.intersection(self.optimizers):
            for number, stage in enumerate(self.stages):
                if stage.trainable is not None:
                    raise ValueError(
                        f"stages.{number}.trainable: {stage.trainable}: optimizer: {name} trains the same "
                        "layers from beginning to end; set train.trainable instead"
                    )
        return self

    @model_validator(mode="after")
    def _averages_itself(self) -> "TrainConfig":
        if "schedule_free" not in self.optimizers:
            return self
        if len(set(self.optimizers)) > 1:
            raise ValueError(
                "stages: optimizer: schedule_free averages the weights from beginning to end; use it in all "
                "stages or in none"
            )
        if self.ema_decay:
            raise ValueError(
                f"ema_decay: {self.ema_decay:g}: schedule_free averages the weights itself; set it to 0"
            )
        for number, stage in enumerate(self.stages or [None]):
            where = "" if stage is None else f"stages.{number}."
            schedule = (stage.schedule if stage else None) or self.schedule
            if schedule not in ENDLESS:
                raise ValueError(
                    f"{where}schedule: {schedule} lowers the rate, in place of which schedule_free averages; "
                    "use constant_with_warmup"
                )
            if stage and stage.betas is not None and stage.betas[0] != self.betas[0]:
                raise ValueError(f"{where}betas: schedule_free keeps its first one; set betas of the run")
        if not self.betas[0]:
            raise ValueError("betas: schedule_free needs a first one above 0, as 0.9")
        return self

    @model_validator(mode="after")
    def _keeps_layers_whole(self) -> "TrainConfig":
        whole = next((name for name in self.optimizers if name in WHOLE_TENSORS), None)
        if whole and not self.flat:
            raise ValueError(
                f"optimizer: {whole} needs whole layers, and {self._only_deepspeed or 'engine: deepspeed'} "
                "is DeepSpeed's, which divides them; leave one of them out"
            )
        if whole and self.zero_stage and self.max_workers > 1:
            raise ValueError(
                f"optimizer: {whole} needs whole layers, which zero_stage: {self.zero_stage} divides among "
                f"{self.max_workers} workers; set zero_stage: 0, or num_workers: 1"
            )
        return self

    @model_validator(mode="after")
    def _schedules(self) -> "TrainConfig":
        used = {stage.schedule or self.schedule for stage in self.stages} or {self.schedule}
        if used == {"constant"} and self.warmup_steps not in (0, WARMUP_STEPS):
            raise ValueError("warmup_steps: schedule constant has no warm-up; use constant_with_warmup")
        for number, stage in enumerate(self.stages):
            if stage.warmup_steps and (stage.schedule or self.schedule) == "constant":
                raise ValueError(
                    f"stages.{number}.warmup_steps: schedule constant has no warm-up; use "
                    "constant_with_warmup"
                )
            if stage.warmup_steps and stage.warmup_steps >= stage.steps and number < len(self.stages) - 1:
                raise ValueError(
                    f"stages.{number}.warmup_steps: {stage.warmup_steps} must be less than the stage's "
                    f"{stage.steps} steps; lower it"
                )
        known = {*self.groups, OTHER_LAYERS}
        for names in [self.trainable, *(stage.trainable for stage in self.stages)]:
            if names is not None and (not names or not known.issuperset(names)):
                raise ValueError(f"trainable: {names} must be names of groups: {sorted(known)}")
        if OTHER_LAYERS in self.groups:
            raise ValueError(
                f"groups: {OTHER_LAYERS} is reserved for layers in no group; choose another name"
            )
        return self
