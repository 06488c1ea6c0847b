"""Models of true sizes, with random weights that are made on the device; small ones where there is no GPU."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ray_jobs.config import Config
from ray_jobs.diffusion.families import FAMILIES, Family
from ray_jobs.diffusion.protocols import Component, Pipeline
from ray_jobs.weights.model_files import latent_shapes
from ray_jobs.weights.model_index import INDEX

CAPTIONS = ("a red circle", "a blue cross", "a green square", "a yellow star")
SMALL_SIDE = 64  # pixels of a small model's images
CLIP_TOKENS = 77
CLIP = {"vocab_size": 49408, "max_position_embeddings": CLIP_TOKENS}
CLIP_L = CLIP | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP_G = CLIP | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
AUTOENCODER = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


@dataclass(frozen=True)
class Shape:
    """A model's sizes.

    Attributes:
        side: of its images, in pixels.
        parts: settings of its components, as in the published model's files; what is left out is the default
            of diffusers' or transformers' class. Empty: those of the family's small model.
    """

    pipeline_class: str
    side: int = SMALL_SIDE
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        return FAMILIES[self.pipeline_class]

    @cached_property
    def small(self) -> Pipeline:
        """The family's small model, which gives the classes, the scheduler and the tokenizers."""
        return self.family.tiny(CAPTIONS)

    def part(self, name: str, device: str, dtype: torch.dtype = torch.float32) -> Component:
        """Return a frozen component with random weights, the same ones in each call on a device."""
        small: Any = getattr(self.small, name)
        torch.manual_seed(0)
        with torch.device(device), _default(dtype):
            part: Component
            if hasattr(small, "config_class"):  # of transformers
                settings = small.config.to_dict() | self.parts.get(name, {})
                part = type(small)(type(small.config)(**settings))
            else:
                own = {key: value for key, value in small.config.items() if not key.startswith("_")}
                part = type(small)(**(self.parts.get(name) or own))
        return part.requires_grad_(False).eval()

    def pipeline(self, device: str, dtype: torch.dtype = torch.float32) -> Pipeline:
        """Return a whole pipeline of the family's class."""
        parts = dict(self.small.components)
        for name, part in parts.items():
            if isinstance(part, torch.nn.Module):
                parts[name] = self.part(name, device, dtype)
            elif self.parts and name.startswith("tokenizer"):
                part.model_max_length = CLIP_TOKENS
        made: Pipeline = type(self.small)(**parts)
        made.set_progress_bar_config(disable=True)
        return made

    def trainable(self, device: str, dtype: torch.dtype) -> Any:
        """Return what training takes of a pipeline: the denoiser, and of the autoencoder its settings."""
        return SimpleNamespace(
            config=dict(self.small.config),
            scheduler=self.small.scheduler,
            vae=self.part("vae", "meta"),
            **{name: self.part(name, device, dtype) for name in self.family.denoisers},
        )

    def write_settings(self, folder: Path) -> Path:
        """Write the files that planning reads: the settings of denoiser, autoencoder and scheduler."""
        index: dict[str, Any] = {"_class_name": self.pipeline_class}
        for name in ("vae", *self.family.denoisers):
            part = self.part(name, "meta")
            part.save_config(folder / name)
            index[name] = ["diffusers", type(part).__name__]
        scheduler = self.small.scheduler
        scheduler.save_pretrained(folder / "scheduler")
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        (folder / INDEX).write_text(json.dumps(index))
        return folder

    def config(self, folder: Path, **train: Any) -> Config:
        """Return the configuration of a training of this model, whose settings are in `folder`."""
        settings = {"num_workers": 1, "precision": "bf16", "lora": {"rank": 16, "alpha": 16}, **train}
        return Config.model_validate(
            {
                "name": "bench-gpu",
                "storage": str(folder),
                "data": {"source": "unused", "resolution": self.side},
                "model": {"base": str(folder)},
                "train": settings,
                "search": {"learning_rates": [1e-4], "ladder": [1000]},
            }
        )

    def rows(self, folder: Path, count: int, columns: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """Return rows as `prepare` stores them, by column: bfloat16, and the sizes int32.

        Args:
            columns: those to return; empty: all.
        """
        generator = torch.Generator().manual_seed(0)
        [latents] = latent_shapes(str(folder), [(self.side, self.side)])
        captions = self.family.text.shapes(self.part(self.family.denoiser, "meta").config)
        rows = {"latents_mean": torch.randn((count, *latents), generator=generator)}
        rows["latents_logvar"] = torch.full((count, *latents), -10.0)
        rows |= {
            name: torch.randn((count, *each), generator=generator) for name, (each, _) in captions.items()
        }
        found = {name: each.bfloat16() for name, each in rows.items()}
        sizes = [self.side, self.side, 0, 0, self.side, self.side]
        found["conditioning"] = torch.tensor([sizes] * count, dtype=torch.int32)
        return {name: each for name, each in found.items() if name in columns or not columns}


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SD15 = Shape(
    "StableDiffusionPipeline",
    512,
    {
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": AUTOENCODER | {"sample_size": 512},
        "text_encoder": CLIP_L,
    },
)
SDXL = Shape(
    "StableDiffusionXLPipeline",
    1024,
    {
        "unet": {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": AUTOENCODER | {"sample_size": 1024, "scaling_factor": 0.13025},
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
    },
)
FLUX = Shape(
    "FluxPipeline",
    1024,
    {
        "transformer": {"guidance_embeds": True},
        "vae": AUTOENCODER
        | {
            "latent_channels": 16,
            "sample_size": 1024,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    },
)
SHAPES = {
    "full": {"SD1.5": SD15, "SDXL": SDXL, "FLUX": FLUX},
    "small": {
        "SD1.5": Shape(SD15.pipeline_class),
        "SDXL": Shape(SDXL.pipeline_class),
        "FLUX": Shape(FLUX.pipeline_class),
    },
}
