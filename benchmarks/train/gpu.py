"""Stable Diffusion 1.5's UNet on a GPU: our engine against diffusers' plain loop, from cached latents."""

import os
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.data.measuring import in_fresh_process
from benchmarks.train.measuring import timed_turns
from benchmarks.train.rivals import Optimizing, diffusion_loss
from ray_jobs.config import LoraConfig, TrainConfig
from ray_jobs.diffusion.families import FAMILIES
from ray_jobs.diffusion.families.family import UNET_ATTENTION
from ray_jobs.diffusion.finetuning import FineTuning, add_lora
from ray_jobs.diffusion.objectives import Diffusion, Draws, LossSettings
from ray_jobs.diffusion.randomness import draw
from ray_jobs.training.phases import stages_of
from ray_jobs.training.setup import build_engine

METHODS = ("lora", "full")
TURNS = {"small": 2, "full": 9}  # after one that warms up
STEPS = {"small": 1, "full": 10}  # of a turn
BATCH = {"small": 2, "full": 16}
SCHEDULE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# Stable Diffusion 1.5 (its unet/config.json), and what has all its kinds of layers and runs anywhere.
UNET: dict[str, dict[str, Any]] = {
    "full": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "small": {
        "sample_size": 16,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "block_out_channels": (16, 32, 32, 32),
        "norm_num_groups": 8,
        "layers_per_block": 1,
    },
}
TOKENS = 77
VAE = {"scaling_factor": 0.18215}
FAMILY = FAMILIES["StableDiffusionPipeline"]
AUTOENCODER: Any = SimpleNamespace(config=VAE)
SCALE = FAMILY.codec.scale(AUTOENCODER)
# Dense bf16 with fp32 accumulation, TFLOP/s, without sparsity: NVIDIA's data sheets. The longest name that is
# part of the device's counts.
PEAKS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100": 989.0,
    "H100 PCIe": 756.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10": 125.0,
    "A10G": 70.0,
    "A40": 150.0,
    "A6000": 155.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


def run(size: str, *, device: str) -> dict[str, Any]:
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu: skipped, there is no GPU here (--size small --device cpu shows that it runs)", flush=True)
        return {"skipped": "no GPU"}
    figures = in_fresh_process(measure, size, device)
    ratios = {}
    for method, rows in figures["methods"].items():
        for name, row in rows.items():
            share = row["share_of_peak"]
            told = f"{share:.0%} of the bf16 peak" if share is not None else "the peak is not known"
            print(
                f"{method}, {name}: {row['images_per_second']:.1f} images a second, "
                f"{row['tflops']:.3g} TFLOP/s, {told}",
                flush=True,
            )
        ratios[method] = rows["diffray"]["images_per_second"] / rows["diffusers"]["images_per_second"]
    said = ", ".join(f"{method}: {ratio:.2f}" for method, ratio in ratios.items())
    print(
        f"ratio: of the images a second of diffusers' plain loop on {figures['device']}, {said}", flush=True
    )
    return {**figures, "ratios": ratios}


def measure(size: str, device: str) -> dict[str, Any]:
    """Each method: ours and the plain loop, in turns, on one device."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    peak = peak_of(name)
    found: dict[str, Any] = {"device": name, "peak_tflops": peak, "batch_size": BATCH[size], "methods": {}}
    for method in METHODS:
        batch = Cached.random(size)
        plain = Plain(settings(method, size, device), size, device, batch)
        with FlopCounterMode(display=False) as counter:
            plain.forward().backward()
        flops = counter.get_total_flops()
        ours = Ours(settings(method, size, device), size, device, batch)
        loops = {"diffray": ours.step, "diffusers": plain.step}
        turns = timed_turns(loops, turns=TURNS[size], steps=STEPS[size])
        found["methods"][method] = {
            who: _figures(median(seconds), size, flops, peak) | {"seconds_a_step": seconds}
            for who, seconds in turns.items()
        }
        del loops, ours, plain
    torch.distributed.destroy_process_group()
    return found


def _figures(seconds: float, size: str, flops: int, peak: float | None) -> dict[str, Any]:
    tflops = flops / seconds / 1e12
    return {
        "images_per_second": BATCH[size] / seconds,
        "flops_a_step": flops,
        "tflops": tflops,
        "share_of_peak": tflops / peak if peak else None,
    }


def peak_of(name: str) -> float | None:
    """TFLOP/s of a device in bf16, or None if it is not in the table."""
    words = name.replace("-", " ").split()
    known = [each for each in PEAKS if set(each.split()) <= set(words)]
    return PEAKS[max(known, key=len)] if known else None


def settings(method: str, size: str, device: str) -> TrainConfig:
    """What both train with, as far as they know it."""
    return TrainConfig(
        method=method,
        lora=LoraConfig(rank=16, alpha=16),
        precision="bf16",
        use_gpu=device == "cuda",
        num_workers=1,
        batch_size=BATCH[size],
    )


def build_unet(method: str, size: str) -> Any:
    """With random weights in fp32; the same ones in every call."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET[size])
    if method == "lora":
        add_lora(unet, rank=16, alpha=16, dropout=0.0, target_modules=list(UNET_ATTENTION))
    return unet


@dataclass(frozen=True)
class Cached:
    """Rows as `prepare` stores them, on the host: mean and log-variance of the latents, N x 4 x h x w, and
    embeddings, N x 77 x width, all float32."""

    mean: torch.Tensor
    logvar: torch.Tensor
    embeds: torch.Tensor

    @staticmethod
    def random(size: str) -> "Cached":
        generator = torch.Generator().manual_seed(0)
        rows, unet = BATCH[size], UNET[size]
        shape = (rows, 4, unet["sample_size"], unet["sample_size"])
        return Cached(
            torch.randn(shape, generator=generator),
            torch.full(shape, -10.0),
            torch.randn((rows, TOKENS, unet["cross_attention_dim"]), generator=generator),
        )


class Ours:
    """A step as a worker takes it: randomness by row, FineTuning in the engine, the loss read."""

    def __init__(self, config: TrainConfig, size: str, device: str, batch: Cached) -> None:
        self.device, self.batch, self.steps = device, batch, 0
        pipeline: Any = SimpleNamespace(unet=build_unet(config.method, size), text_encoder=None)
        objective = Diffusion.from_scheduler(SCHEDULE).to(device)
        model = FineTuning(pipeline, FAMILY, objective, LossSettings())
        model.remember_trained({})
        model.train()
        self.engine = build_engine(model, config, 1, torch.device(device))
        [self.stage] = stages_of(config, 1000)

    def step(self) -> float:
        self.steps += 1
        self.engine.set_hyperparameters(self.stage, self.steps)
        batch = self.batch
        places = range(len(batch.mean))
        drawn = draw((0,), self.steps, places, tuple(batch.mean.shape[1:]), LossSettings())
        latents = FAMILY.codec.sample(batch.mean, batch.logvar, SCALE, drawn.posterior)
        there = {name: part.to(self.device) for name, part in vars(drawn.loss).items() if part is not None}
        captions = {"prompt_embeds": batch.embeds.to(self.device)}
        inputs = {"latents": latents.to(self.device), "conditions": captions, "draws": Draws(**there)}
        weights = torch.full((len(latents),), 1 / len(latents), device=self.device)
        loss = self.engine.accumulate(inputs, weights, last=True)
        self.engine.update(loss[None])
        return float(loss)


class Plain(Optimizing):
    """diffusers' example with `--mixed_precision bf16`: what is trained stays in fp32 under autocast, frozen
    weights are in bf16."""

    def __init__(self, config: TrainConfig, size: str, device: str, batch: Cached) -> None:
        from diffusers import DDPMScheduler
        from diffusers.training_utils import cast_training_params

        unet = build_unet(config.method, size).to(device)
        if config.method == "lora":
            unet.to(torch.bfloat16)
            cast_training_params(unet)
        super().__init__(unet.train(), config)
        self.device, self.batch, self.scheduler = device, batch, DDPMScheduler(**SCHEDULE)

    def forward(self) -> torch.Tensor:
        mean, logvar, embeds = (part.to(self.device) for part in vars(self.batch).values())
        latents = (mean + (0.5 * logvar).exp() * torch.randn_like(mean)) * VAE["scaling_factor"]
        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (len(latents),), device=self.device)
        noise = torch.randn_like(latents)
        with torch.autocast(self.device, torch.bfloat16):
            return diffusion_loss(self.unet, self.scheduler, latents, noise, timesteps, embeds)

    def step(self) -> float:
        loss = self.forward()
        self.backward(loss)
        self.update()
        return float(loss.detach())
