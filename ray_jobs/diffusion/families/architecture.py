"""Build the parts of a small Stable Diffusion model with fresh weights. Pure PyTorch."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ray_jobs.diffusion.protocols import Tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

START, END = "<|startoftext|>", "<|endoftext|>"


def build_autoencoder(channels: list[int], latent_channels: int, resolution: int) -> "AutoencoderKL":
    """Return an AutoencoderKL that halves an image's sides len(channels) - 1 times."""
    from diffusers import AutoencoderKL

    levels = len(channels)
    return AutoencoderKL(
        block_out_channels=tuple(channels),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=resolution,
    )


def build_tokenizer(captions: Iterable[str], vocabulary: int, max_tokens: int) -> Any:
    """Learn a CLIPTokenizer's byte pairs (Sennrich et al., arXiv 1508.07909) from `captions`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(alphabet),
        special_tokens=[START, END],
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    learnt = json.loads(learner.to_str())["model"]
    # CLIP's vocabulary also holds every byte as the end of a word.
    vocab = dict(learnt["vocab"])
    for byte in sorted(alphabet):
        vocab.setdefault(byte + "</w>", len(vocab))
    merges = [tuple(pair) for pair in learnt["merges"]]
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        model_max_length=max_tokens,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
    )


def build_text_encoder(tokenizer: Tokenizer, *, width: int, layers: int, heads: int) -> Any:
    """Return a CLIPTextModel for `tokenizer`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_denoiser(
    channels: list[int],
    *,
    layers: int,
    heads: int,
    latent_size: int,
    latent_channels: int,
    text_width: int,
) -> Any:
    """Return a UNet2DConditionModel with cross-attention at every level."""
    from diffusers import UNet2DConditionModel

    levels = len(channels)
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(channels),
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        layers_per_block=layers,
        attention_head_dim=heads,  # diffusers' name for the number of heads
        cross_attention_dim=text_width,
        norm_num_groups=16,
    )


def build_scheduler() -> Any:
    """Return DPM-Solver++ 2M (arXiv 2211.01095) over Stable Diffusion's schedule, predicting velocity."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def build_pipeline(
    autoencoder: "AutoencoderKL",
    tokenizer: Tokenizer,
    *,
    text_width: int,
    text_layers: int,
    heads: int,
    denoiser_channels: list[int],
    denoiser_layers: int,
    latent_size: int,
) -> Any:
    """Return a StableDiffusionPipeline with this autoencoder and a new text encoder and denoiser."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=autoencoder,
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(tokenizer, width=text_width, layers=text_layers, heads=heads),
        unet=build_denoiser(
            denoiser_channels,
            layers=denoiser_layers,
            heads=heads,
            latent_size=latent_size,
            latent_channels=autoencoder.config.latent_channels,
            text_width=text_width,
        ),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
