"""Processors of models for text and images, which would need torchvision for videos."""

from typing import Any

from ray_jobs.diffusion.protocols import Tokenizer


def text_processor(kind: Any, tokenizer: Tokenizer) -> Any:
    """Return a processor of a class of transformers for texts only, which does not need torchvision."""
    from transformers import ProcessorMixin

    base: Any = kind  # for mypy, a parameter is no base class

    class TextProcessor(base):
        """A processor with a tokenizer alone."""

        def __init__(self, tokenizer: Any, chat_template: Any = None) -> None:
            ProcessorMixin.__init__(self, tokenizer, chat_template=chat_template)

        def __call__(self, text: Any, **options: Any) -> Any:
            """Tokenize texts; of one text too the result has a dimension of texts, as with Qwen3-VL's."""
            texts = [text] if isinstance(text, str) else text
            return ProcessorMixin.__call__(self, text=texts, **options)

    return TextProcessor(tokenizer, getattr(tokenizer, "chat_template", None))


def picture_processor(kind: Any, image_processor: Any, tokenizer: Tokenizer) -> Any:
    """Return a processor of a class of transformers for texts and pictures, without its part for videos.

    Args:
        image_processor: one that computes with Pillow, so that embeddings do not depend on what is installed.
    """
    base: Any = kind

    class PictureProcessor(base):
        """A processor that was given none of videos."""

        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None) -> None:
            base.__init__(self, image_processor, tokenizer, None, chat_template)

    PictureProcessor.__name__ = kind.__name__  # as it is saved
    return PictureProcessor(image_processor, tokenizer, getattr(tokenizer, "chat_template", None))
