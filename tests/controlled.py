"""What tests of control images share: one prompt, one image to follow, and both ways to draw."""

from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from ray_jobs.diffusion.protocols import Pipeline
from ray_jobs.diffusion.sampling import sample_pictures

PROMPT, SEED, STEPS, GUIDANCE, SIDE = "a red apple", 7, 3, 3.0, 64


def control_image() -> np.ndarray:
    """A control image: uint8, SIDE x SIDE x 3."""
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def as_tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)


def pointed(pipeline: Pipeline) -> Pipeline:
    """Give an autoencoder a point for a posterior: we take its mean, and diffusers draws from it."""
    convolution = pipeline.vae.quant_conv
    with torch.no_grad():
        convolution.weight[4:], convolution.bias[4:] = 0, -60
    return pipeline


def plain_drawn(
    pipeline: Pipeline, argument: str = "control_image", guidance_scale: float = GUIDANCE
) -> np.ndarray:
    """Return the picture that diffusers' pipeline draws: float32, SIDE x SIDE x 3, 0 to 1.

    Args:
        argument: the pipeline's name for the control image.
    """
    found: np.ndarray = cast(Any, pipeline)(
        PROMPT,
        **{argument: Image.fromarray(control_image())},
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
    ).images[0]
    return found


def drawn(pipeline: Pipeline, picture: np.ndarray | None) -> torch.Tensor:
    """Return the picture that our sampler draws: uint8, 3 x SIDE x SIDE."""
    [batch] = sample_pictures(
        pipeline,
        [PROMPT],
        [SEED],
        shapes=[(SIDE, SIDE)],
        num_steps=STEPS,
        guidance_scale=GUIDANCE,
        batch_size=1,
        references=None if picture is None else lambda _: [as_tensor(picture)],
    )
    return batch[0]
