"""The rivals: plain PyTorch loops over diffusers' own classes, as one would write them without diffray."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from ray_jobs.config import TrainConfig


def diffusion_loss(
    unet: Any,
    scheduler: Any,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    embeds: torch.Tensor,
) -> torch.Tensor:
    """The mean squared error of a batch, as diffusers' text-to-image example has it.

    Args:
        scheduler: a DDPMScheduler.
        latents, noise: float32, N x C x h x w. timesteps: int64, N. embeds: N x tokens x width.
    """
    noisy = scheduler.add_noise(latents, noise, timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    else:
        assert scheduler.config.prediction_type == "epsilon"
        target = noise
    prediction = unet(noisy, timesteps, embeds, return_dict=False)[0]
    return mse_loss(prediction.float(), target)


def ddpm_scheduler(pipeline: Any) -> Any:
    """What training scripts make of a model's scheduler."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(pipeline.scheduler.config)


class Optimizing:
    """Backward, clip, AdamW: what follows the loss in every plain loop.

    Args:
        unet: with what is trained needing gradients; wrapped in DistributedDataParallel where torch's process
            group has several members.
    """

    def __init__(self, unet: Any, train: TrainConfig) -> None:
        self.trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        self.unet = DistributedDataParallel(unet) if several else unet
        self.max_grad_norm = train.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=train.learning_rate,
            betas=train.betas,
            eps=train.epsilon,
            weight_decay=train.weight_decay,
        )

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


class BareLoop(Optimizing):
    """Trains on one batch, which lies in memory, for ever: the limit of what training can reach.

    Args:
        batch: latents, noise, timesteps, embeds, as `diffusion_loss` takes them: this rank's share.
    """

    causes: tuple[str, ...] = ("forward", "backward", "update")

    def __init__(self, pipeline: Any, train: TrainConfig, batch: dict[str, torch.Tensor]) -> None:
        super().__init__(pipeline.unet, train)
        self.scheduler, self.batch = ddpm_scheduler(pipeline), batch

    def forward(self) -> torch.Tensor:
        return diffusion_loss(self.unet, self.scheduler, **self.batch)

    def step(self) -> None:
        self.backward(self.forward())
        self.update()


class CaptionedFiles(Dataset[dict[str, torch.Tensor]]):
    """Pictures decoded, scaled, cropped and captions tokenised each time that they are asked for."""

    def __init__(self, rows: list[tuple[Path, str]], tokenizer: Any, resolution: int) -> None:
        self.rows, self.tokenizer, self.resolution = rows, tokenizer, resolution

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        path, caption = self.rows[number]
        picture = Image.open(path).convert("RGB")
        scale = self.resolution / min(picture.size)
        wide, high = (max(self.resolution, round(side * scale)) for side in picture.size)
        left, top = (wide - self.resolution) // 2, (high - self.resolution) // 2
        scaled = picture.resize((wide, high), Image.Resampling.BILINEAR)
        square = scaled.crop((left, top, left + self.resolution, top + self.resolution))
        pixels = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 127.5 - 1
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(caption, padding="max_length", max_length=length, truncation=True)
        return {"pixels": pixels, "input_ids": torch.tensor(tokens.input_ids)}


class UsualRecipe(Optimizing):
    """diffusers' `train_text_to_image.py` and its LoRA sibling, with their defaults: fp32, a DataLoader
    without workers, the frozen autoencoder and text encoder at every step.
    """

    causes: tuple[str, ...] = ("fetch", "encode", "forward", "backward", "update")

    def __init__(
        self, pipeline: Any, train: TrainConfig, rows: list[tuple[Path, str]], resolution: int
    ) -> None:
        super().__init__(pipeline.unet, train)
        self.pipeline, self.scheduler = pipeline, ddpm_scheduler(pipeline)
        files = CaptionedFiles(rows, pipeline.tokenizer, resolution)
        self.loader = DataLoader(files, batch_size=train.batch_size, shuffle=True, drop_last=True)
        self.batches = self._epochs()

    def _epochs(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield from self.loader

    def fetch(self) -> dict[str, torch.Tensor]:
        return next(self.batches)

    @torch.no_grad()
    def encode(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        posterior = self.pipeline.vae.encode(batch["pixels"]).latent_dist
        return {
            "latents": posterior.sample() * self.pipeline.vae.config.scaling_factor,
            "embeds": self.pipeline.text_encoder(batch["input_ids"])[0],
        }

    def forward(self, encoded: dict[str, torch.Tensor]) -> torch.Tensor:
        latents = encoded["latents"]
        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (len(latents),))
        noise = torch.randn_like(latents)
        return diffusion_loss(self.unet, self.scheduler, noise=noise, timesteps=timesteps, **encoded)

    def step(self) -> None:
        self.backward(self.forward(self.encode(self.fetch())))
        self.update()
