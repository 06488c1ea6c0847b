"""An image classifier in transformers' format, which says what pictures show."""

from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from ray_jobs.metrics.feature_network import freeze, full_precision

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

FIELD = "evaluate.balance.classifier"


class ImageClassifier:
    """Labels of pictures.

    Args:
        path: folder or hub name.

    Raises:
        ValueError: it is no image classifier with safetensors weights; the message names `FIELD`.
    """

    def __init__(self, path: str, device: str | torch.device = "cpu", revision: str | None = None) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        try:
            model = AutoModelForImageClassification.from_pretrained(
                path, revision=revision, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
            )
            processor = AutoImageProcessor.from_pretrained(path, revision=revision, backend="pil")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{FIELD}: {path}: no image classifier with safetensors weights and its processor ({reason})"
            ) from None
        self.device = torch.device(device)
        self.module: PreTrainedModel = model
        freeze(model, self.device)
        self.processor: BaseImageProcessor = processor
        self.names: dict[int, str] = {int(n): str(name) for n, name in model.config.id2label.items()}

    def labels(self, images: torch.Tensor) -> list[str]:
        """Return the likeliest label of each picture.

        Args:
            images: uint8, N x 3 x H x W.
        """
        pixels = self.processor(images=list(images.permute(0, 2, 3, 1).numpy()), return_tensors="pt")
        with torch.inference_mode(), full_precision():
            logits = self.module(pixel_values=pixels["pixel_values"].to(self.device)).logits
        return [self.names[number] for number in logits.argmax(dim=1).tolist()]
