"""What turns pictures and captions into what the denoiser is trained on: autoencoder and text encoders."""

from typing import Any

import numpy as np
import torch

from ray_jobs.diffusion.model_files import NOT_ENCODERS


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
