"""Qwen-Image-Edit, releases 2509 and 2511 (arXiv 2508.02324), whose text encoder sees the references."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ray_jobs.diffusion.families.qwen_image import MAX_TOKENS, QwenImage, QwenImageText
from ray_jobs.diffusion.families.text import Captions, Pictures
from ray_jobs.diffusion.families.text_processor import picture_processor
from ray_jobs.diffusion.protocols import Pipeline, TextEncoder, Tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

PREFIX = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a "
    "new image that meets the user's requirements while maintaining consistency with the original input "
    "where appropriate.<|im_end|>\n<|im_start|>user\n"
)
PREFIX_TOKENS = 64  # of the published tokenizer
PLACE = "<|image_pad|>"  # one for each token of a picture
SEEN_AREA = 384**2  # pixels of a picture as it is shown to the text encoder
SEEN_MULTIPLE = 32  # of its sides; the encoder's own processor then rounds them to those of its tokens
SEEN_TOKEN = 28  # pixels of a token's side
PIXELS, GRIDS = "pixel_values", "image_grid_thw"  # the encoder's inputs, by transformers' names


class QwenImageEditText(QwenImageText):
    """The last layer of Qwen2.5-VL on the reference pictures and a caption.

    The pipeline never cuts a caption; columns of captions need a limit.
    """

    prefix, prefix_tokens = PREFIX, PREFIX_TOKENS
    max_tokens = {"input_ids": PREFIX_TOKENS + MAX_TOKENS}
    ragged = ("prompt_embeds",)
    sees_references = True

    def tokenizer_of(self, pipeline: Any, name: str) -> Tokenizer | None:
        return pipeline.processor.tokenizer if name == "input_ids" else None

    def as_prompt(self, caption: str) -> str:
        """Return the caption without what would stand for a picture that is not there."""
        return caption.replace(PLACE, "")

    def tokenize_shown(self, pipeline: Pipeline, captions: list[str], pictures: Pictures) -> Captions:
        """Return also `PIXELS`, float32, N x patches x width, and `GRIDS`, int64, N x pictures x 3."""
        if not pictures:
            return self.tokenize(pipeline, captions)
        processor = pipeline.processor.image_processor
        rows = zip(*(map(shown_picture, each) for each in pictures), strict=True)
        inputs = processor(images=[picture for row in rows for picture in row], return_tensors="pt")
        grids = inputs[GRIDS].unflatten(0, (len(captions), len(pictures)))
        counts = (grids[0].prod(dim=1) // processor.merge_size**2).tolist()  # of all rows, as their sizes are
        shown = "".join(
            f"Picture {number}: <|vision_start|>{PLACE * count}<|vision_end|>"
            for number, count in enumerate(counts, start=1)
        )
        found = pipeline.processor.tokenizer(
            self.written(pipeline.processor.tokenizer, [shown + caption for caption in captions]),
            padding="max_length",
            max_length=self.max_tokens["input_ids"] + sum(counts),
            truncation=True,
            return_tensors="pt",
        )
        return {
            "input_ids": found.input_ids.int(),
            "attention_mask": found.attention_mask.bool(),
            PIXELS: inputs[PIXELS].unflatten(0, (len(captions), -1)),
            GRIDS: grids,
        }

    def seen(self, encoder: TextEncoder, tokens: Captions) -> Captions:
        if PIXELS not in tokens:
            return {}
        return {
            PIXELS: tokens[PIXELS].flatten(0, 1),
            GRIDS: tokens[GRIDS].flatten(0, 1),
            # The pipeline leaves these out, and transformers 5 then gives pictures the positions of words
            # (https://github.com/huggingface/diffusers/issues/14194).
            "mm_token_type_ids": (tokens["input_ids"] == encoder.config.image_token_id).int(),
        }

    def shown_tokens(self, references: Sequence[tuple[int, int]]) -> int:
        sizes = (shown_size(height, width) for height, width in references)
        return sum(round(height / SEEN_TOKEN) * round(width / SEEN_TOKEN) for height, width in sizes)


class QwenImageEdit(QwenImage):
    """Qwen-Image-Edit: references' patches follow the image's; in 2511 they are modulated as clean ones."""

    pipeline_class = "QwenImageEditPlusPipeline"
    text = QwenImageEditText()
    needs_references = True
    max_references = 3  # as its release notes advise; the pipeline has no limit

    def loaded(self, pipeline: Pipeline) -> None:
        """Let layers that see two timesteps of each row, 0 for its references, see them as one row's.

        diffusers 0.42.1 gives them those of all rows and then as many zeros, by which adapters that differ
        from row to row would be mixed up.
        """
        transformer = pipeline.transformer
        if transformer is None or not transformer.config.get("zero_cond_t"):
            return
        blocks = transformer.transformer_blocks
        for part in (transformer.time_text_embed.timestep_embedder, *(block.img_mod for block in blocks)):
            part.register_forward_pre_hook(_by_rows)
            part.register_forward_hook(_by_timesteps)

    def before_drawing(self, reference: tuple[int, int]) -> tuple[str, ...]:
        return (
            "from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edits",
            "",
            "def place_pictures(encoder, _, inputs):  # diffusers 0.42.1 forgets which tokens are pictures",
            '    places = (inputs["input_ids"] == encoder.config.image_token_id).int()',
            '    return (), {**inputs, "mm_token_type_ids": places}',
            "",
            "pipeline.text_encoder.register_forward_pre_hook(place_pictures, with_kwargs=True)",
            f"edits.VAE_IMAGE_SIZE = {reference[0]} * {reference[1]}  # pixels to which it scales references",
        )

    def tiny(self, captions: Sequence[str], variant: str = "") -> Pipeline:
        from diffusers import QwenImageEditPlusPipeline
        from transformers import Qwen2VLImageProcessorPil, Qwen2VLProcessor

        parts = self.tiny_parts(captions, zero_cond_t=True)
        processor = picture_processor(Qwen2VLProcessor, Qwen2VLImageProcessorPil(), parts["tokenizer"])
        pipeline = QwenImageEditPlusPipeline(processor=processor, **parts)
        pipeline.register_to_config(processor=("transformers", "Qwen2VLProcessor"))  # as it is published
        return pipeline


def _by_rows(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Turn what is told of N rows' timesteps, then of as many zeros, 2N x width, into N x 2 x width."""
    told, *others = inputs
    return told.unflatten(0, (2, -1)).transpose(0, 1), *others


def _by_timesteps(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
    """Inverse of `_by_rows`, for the output."""
    return output.transpose(0, 1).flatten(0, 1)


def shown_size(height: int, width: int) -> tuple[int, int]:
    """Return the height and width at which a picture of a size is shown to the text encoder."""
    ratio = width / height
    exact = (SEEN_AREA / ratio) ** 0.5, (SEEN_AREA * ratio) ** 0.5
    shown_height, shown_width = (max(1, round(side / SEEN_MULTIPLE)) * SEEN_MULTIPLE for side in exact)
    return shown_height, shown_width


def shown_picture(pixels: torch.Tensor) -> "Image":
    """Return a picture, uint8, 3 x height x width, as it is shown to the text encoder."""
    from PIL import Image

    height, width = shown_size(*pixels.shape[1:])
    picture = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
    return picture.resize((width, height), Image.Resampling.LANCZOS)
