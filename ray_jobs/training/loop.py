"""What every training worker runs: stream rows, take steps, report a checkpoint at each rung."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_jobs.config import Config, resolve_path
from ray_jobs.data.dataset import Dataset
from ray_jobs.data.streaming import StreamSettings, batches, split_stream
from ray_jobs.diffusion.ema import EMA
from ray_jobs.diffusion.finetuning import FineTuning, add_lora
from ray_jobs.diffusion.objectives import sample_posterior
from ray_jobs.progress import TrainingProgress
from ray_jobs.training.checkpoint import load_checkpoint, save_checkpoint
from ray_jobs.training.engine import build_engine, gathered


@dataclass(frozen=True)
class LoopSettings:
    """What the driver hands to every worker; plain values and handles."""

    config: Config
    dataset: Dataset
    trial_id: str
    ladder: list[int]
    board: Any = None  # handle of a ProgressBoard

    @property
    def caption_column(self) -> str:
        """Which form of the captions is streamed: tokens where the text encoder is trained."""
        return "input_ids" if self.config.train.train_text_encoder else "prompt_embeds"

    def stream(self, world_size: int) -> StreamSettings:
        """What a step consists of."""
        train = self.config.train
        return StreamSettings(
            self.config,
            rows_a_step=train.batch_size * train.gradient_accumulation * world_size,
            world_size=world_size,
            columns=("latents_mean", "latents_logvar", self.caption_column),
        )


def null_caption(config: Config, pipeline: Any) -> torch.Tensor:
    """The empty caption as it is streamed, 1 x tokens (x width): what a dropped caption becomes."""
    from ray_jobs.diffusion.loading import embed_tokens, tokenize

    input_ids = tokenize(pipeline.tokenizer, [""])
    if config.train.train_text_encoder:
        return input_ids
    return embed_tokens(pipeline.text_encoder, input_ids).float().cpu()


def train_worker(loop: dict[str, LoopSettings]) -> None:
    """The function that Ray Train runs on every worker."""
    import ray.train

    settings = loop["settings"]
    config, context = settings.config, ray.train.get_context()
    torch.set_num_threads(config.train.cpus_per_worker)
    torch.manual_seed(config.seed)
    pipeline, model = build_model(config)
    engine = build_engine(model, config.train, settings.ladder[-1])
    ema = EMA(_whole(model, config), config.train.ema_decay) if config.train.ema_decay else None
    checkpoint = ray.train.get_checkpoint()
    done = load_checkpoint(checkpoint, engine, ema) if checkpoint else 0

    source = NoiseSource(settings, pipeline, context.get_world_rank(), model)
    stream = stream_of_rank(settings, first_step=done + 1)
    meter = Meter(settings, context.get_world_size())
    for step in range(done + 1, settings.ladder[-1] + 1):
        meter.add(_step(engine, source, next(stream), step))
        if ema:
            with gathered((p for _, p in model.trained()), config.train.zero_stage):
                ema.update(model.trained(), step)
        if context.get_world_rank() == 0:
            meter.post(step)
        if step in settings.ladder:
            with tempfile.TemporaryDirectory() as folder:
                metrics = meter.metrics(step)
                save_checkpoint(Path(folder), pipeline, engine, ema, config.train, metrics)
                ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def build_model(config: Config) -> tuple[Any, FineTuning]:
    """The base pipeline and, around its denoiser, what is trained."""
    from ray_jobs.diffusion.loading import load_pipeline

    pipeline = load_pipeline(resolve_path(config.model.base), revision=config.model.revision)
    if config.train.method == "lora":
        add_lora(pipeline.unet, **config.train.lora.model_dump())
    else:
        pipeline.unet.requires_grad_(True)
        pipeline.text_encoder.requires_grad_(config.train.train_text_encoder)
    model = FineTuning(
        pipeline,
        text_encoder_trained=config.train.train_text_encoder,
        min_snr_gamma=config.train.min_snr_gamma,
    )
    return pipeline, model.train()


def _whole(model: FineTuning, config: Config) -> list[tuple[str, torch.Tensor]]:
    """Copies of the trained parameters, gathered where they are sharded."""
    with gathered((p for _, p in model.trained()), config.train.zero_stage):
        return [(name, value.detach().clone()) for name, value in model.trained()]


def stream_of_rank(settings: LoopSettings, *, first_step: int) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's rows of each step from `first_step` on; all ranks call it."""
    import ray
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    context, last_step = ray.train.get_context(), settings.ladder[-1]
    rank, stream = context.get_world_rank(), settings.stream(context.get_world_size())
    if first_step > last_step:
        return iter(())
    ends = None
    if rank == 0:
        # By reference: what is broadcast has to be small.
        ends = [ray.put(split_stream(settings.dataset, stream, first_step=first_step, last_step=last_step))]
    [reference] = broadcast_from_rank_zero(ends)
    return batches(ray.get(reference)[rank], rank=rank, first_step=first_step)


def _step(engine: Any, source: "NoiseSource", rows: dict[str, torch.Tensor], step: int) -> float:
    """One optimizer step over its micro batches; returns their mean loss on this rank."""
    losses = []
    micro_batches = engine.gradient_accumulation_steps()
    for micro in range(micro_batches):
        batch = {name: tensor.chunk(micro_batches)[micro] for name, tensor in rows.items()}
        latents, captions, noise, timesteps = source.draw(batch, step, micro)
        loss = engine(latents, captions, noise, timesteps)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


class NoiseSource:
    """The randomness of a step.

    Latents, noise, timesteps and dropped captions are drawn from a generator seeded by (run, rank, step), so
    that a resumed run draws what an uninterrupted one would have.
    """

    def __init__(self, settings: LoopSettings, pipeline: Any, rank: int, model: FineTuning) -> None:
        self.config, self.column, self.rank = settings.config, settings.caption_column, rank
        self.null = null_caption(self.config, pipeline)
        self.autoencoder = pipeline.vae.config
        self.num_timesteps, self.device = len(model.schedule), model.schedule.device

    def draw(
        self, batch: dict[str, torch.Tensor], step: int, micro: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, captions (some dropped), noise and timesteps of a micro batch, on the device."""
        entropy = np.random.SeedSequence([self.config.seed, self.rank, step, micro])
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
        mean, logvar = batch["latents_mean"].float(), batch["latents_logvar"].float()
        latents = sample_posterior(mean, logvar, self.autoencoder, generator)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(self.num_timesteps, (len(latents),), generator=generator)
        dropped = torch.rand(len(latents), generator=generator) < self.config.train.caption_dropout
        captions = batch[self.column]
        captions = captions.float() if captions.is_floating_point() else captions.long()
        captions = torch.where(dropped.reshape(-1, 1, *[1] * (captions.dim() - 2)), self.null, captions)
        return tuple(t.to(self.device) for t in (latents, captions, noise, timesteps))  # type: ignore[return-value]


class Meter:
    """Loss and speed since the last rung."""

    def __init__(self, settings: LoopSettings, world_size: int) -> None:
        self.settings, self.posted_at = settings, time.monotonic()
        train = settings.config.train
        self.images_per_step = train.batch_size * train.gradient_accumulation * world_size
        self.warming_up = True  # the first step compiles and fills caches: its time is left out
        self._restart()

    def _restart(self) -> None:
        self.losses: list[float] = []
        self.seconds, self.last = 0.0, time.monotonic()

    def add(self, loss: float) -> None:
        now = time.monotonic()
        if self.losses or not self.warming_up:
            self.seconds += now - self.last
        self.last = now
        self.losses.append(loss)

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / max(1, len(self.losses) - self.warming_up)

    def post(self, step: int) -> None:
        """Tell the board, at most every two seconds."""
        if self.settings.board is None or time.monotonic() - self.posted_at < 2 or not self.seconds:
            return
        self.posted_at = time.monotonic()
        ladder = self.settings.ladder
        progress = TrainingProgress(
            self.settings.trial_id,
            step,
            ladder[-1],
            min((rung for rung in ladder if rung >= step), default=ladder[-1]),
            sum(self.losses[-20:]) / len(self.losses[-20:]),
            self.images_per_step / self.seconds_per_step,
        )
        self.settings.board.post.remote(progress.trial_id, progress.line(self.seconds_per_step))

    def metrics(self, step: int) -> dict[str, Any]:
        """What a rung reports; starts the next."""
        metrics = {
            "step": step,
            "train_loss": sum(self.losses) / len(self.losses),
            "images_per_second": self.images_per_step / self.seconds_per_step if self.seconds else 0.0,
        }
        self.warming_up = False
        self._restart()
        return metrics
