"""What turns pictures and captions into what the denoiser is trained on: autoencoder and text encoders."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Folders of a model in diffusers' format that are not needed to encode.
NOT_ENCODERS = ("unet", "transformer", "scheduler", "safety_checker", "feature_extractor", "image_encoder")


class Encoders:
    """The autoencoder and all text encoders of a model; its denoiser is not loaded.

    Args:
        base: folder or hub name of a model in diffusers' format.
        device: where they run, in float32.

    Raises:
        ValueError: for a pipeline whose captions this does not know how to encode.
    """

    def __init__(self, base: str, *, revision: str | None = None, device: str = "cpu") -> None:
        from diffusers import DiffusionPipeline

        present = DiffusionPipeline.load_config(base, revision=revision)
        left_out = {name: None for name in NOT_ENCODERS if name in present}
        self.pipeline = DiffusionPipeline.from_pretrained(
            base, revision=revision, torch_dtype=torch.float32, use_safetensors=True, **left_out
        ).to(device)
        self.kind = present["_class_name"]
        if self.kind not in CAPTIONS:
            raise ValueError(f"model.base: {base}: {self.kind} is none of {', '.join(CAPTIONS)}")
        self.device = device
        self.pipeline.vae.requires_grad_(False).eval()

    @torch.no_grad()
    def encode_pictures(self, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The autoencoder's posterior.

        Args:
            pixels: uint8, N x H x W x 3.

        Returns:
            Mean and logarithm of the variance, float32, N x C x h x w, on the CPU. Not scaled: a latent is
            (sample - shift_factor) * scaling_factor of the autoencoder's configuration.
        """
        pictures = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = self.pipeline.vae.encode(pictures).latent_dist
        return posterior.mean.float().cpu(), posterior.logvar.float().cpu()

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """Each form of the captions that the model's denoiser takes, by name, on the CPU."""
        return CAPTIONS[self.kind](self.pipeline, captions)


def _stable_diffusion(pipeline: Any, captions: list[str]) -> dict[str, torch.Tensor]:
    """`input_ids` (int32, N x tokens; where the text encoder is trained) and `prompt_embeds` (float32, N x
    tokens x width)."""
    from ray_jobs.diffusion.loading import embed_tokens, tokenize

    input_ids = tokenize(pipeline.tokenizer, captions)
    return {
        "input_ids": input_ids.int(),
        "prompt_embeds": embed_tokens(pipeline.text_encoder, input_ids).float().cpu(),
    }


def _stable_diffusion_xl(pipeline: Any, captions: list[str]) -> dict[str, torch.Tensor]:
    """`prompt_embeds` (float32, N x tokens x both widths) and `pooled_prompt_embeds` (N x width) of the two
    text encoders (arXiv 2307.01952, section 2.1)."""
    embeds, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds.float().cpu(), "pooled_prompt_embeds": pooled.float().cpu()}


CAPTIONS = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
}


def encoders_digest(base: str, *, revision: str | None = None) -> str:
    """The sha256 of all files that the encodings depend on: weights and configurations of the autoencoder,
    the tokenizers and the text encoders. A hub name is downloaded first."""
    from diffusers import DiffusionPipeline

    folder = Path(base) if Path(base).is_dir() else Path(DiffusionPipeline.download(base, revision=revision))
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_dir() or len(inside.parts) < 2 or inside.parts[0] in NOT_ENCODERS:
            continue
        with path.open("rb") as file:
            digest.update(f"{inside.as_posix()} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def size_multiple(base: str, *, revision: str | None = None) -> int:
    """What the sides of a picture, in pixels, must be multiples of: the autoencoder's factor, times the patch
    size where the denoiser is a transformer."""
    from diffusers import AutoencoderKL, DiffusionPipeline

    channels = AutoencoderKL.load_config(base, subfolder="vae", revision=revision)["block_out_channels"]
    factor = 2 ** (len(channels) - 1)
    if "transformer" not in DiffusionPipeline.load_config(base, revision=revision):
        return factor
    from diffusers import ModelMixin

    transformer = ModelMixin.load_config(base, subfolder="transformer", revision=revision)
    return factor * int(transformer.get("patch_size", 1))
