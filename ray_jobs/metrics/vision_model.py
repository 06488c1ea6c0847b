"""Vision models of transformers as feature networks: DINOv2, CLIP, and others with a pooled output.

Models are loaded from a folder or hub name, with safetensors weights only. Code in a model's repository is
never run.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ray_jobs.metrics.feature_network import FeatureNetwork, freeze, full_precision, require_digest

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

# Files that determine a model's features; others in a repository (other formats, pictures) are not fetched.
CONFIGURATIONS = ("*.json", "*.txt")
FILES = (*CONFIGURATIONS, "*.safetensors")
# Settings that name a model.
FIELD, CLIP_FIELD = "evaluate.second_network.path", "evaluate.clip"


@dataclass(frozen=True, eq=False)
class VisionModel(FeatureNetwork):
    """Pooled output of a model, such as DINOv2's class token after the last layer norm.

    The model's own image processor prepares the pictures: it resizes, usually crops the centre, and
    normalises. Its PIL implementation is always used, so that a score does not depend on installed packages.
    """

    module: "PreTrainedModel"
    processor: "BaseImageProcessor"

    @property
    def resizing(self) -> str:
        """Description from the processor's settings; content outside a centre crop is not measured."""
        steps = []
        if getattr(self.processor, "do_resize", False):
            size = dict(self.processor.size)
            if "shortest_edge" in size:
                steps.append(f"resized to a shorter side of {size['shortest_edge']} pixels")
            elif "height" in size:
                steps.append(f"resized whole to {size['height']} x {size['width']} pixels")
        if getattr(self.processor, "do_center_crop", False):
            crop = dict(self.processor.crop_size)
            steps.append(f"cropped in the centre to {crop['height']} x {crop['width']}")
        return ", then ".join(steps) or "as its image processor resizes it"

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return self.module(pixel_values=self._pixels(images)).pooler_output

    def has_pooled_output(self) -> bool:
        with torch.inference_mode():
            black = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
            found = self.module(pixel_values=self._pixels(black))
        return getattr(found, "pooler_output", None) is not None

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        pictures = np.zeros(images.shape, np.uint8) if images.is_meta else images.cpu().numpy()
        inputs = self.processor(
            images=list(pictures), input_data_format="channels_first", return_tensors="pt"
        )
        return inputs["pixel_values"].to(self.device)


@dataclass(frozen=True, eq=False)
class Clip(VisionModel):
    """CLIP (Radford et al., arXiv 2103.00020): pictures and captions in one embedding space."""

    tokenizer: "PreTrainedTokenizerBase"

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return self.module.get_image_features(pixel_values=self._pixels(images)).pooler_output

    @torch.inference_mode()
    @full_precision()
    def text_features(self, captions: list[str]) -> torch.Tensor:
        """Features of captions, truncated to the model's limit: float32, N x num_features, on the CPU."""
        tokens = self.tokenizer(
            captions,
            padding=True,
            truncation=True,
            max_length=self.module.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        return self.module.get_text_features(**tokens).pooler_output.float().cpu()


def check_vision_model(
    path: str, *, revision: str | None = None, sha256: str | None = None, field: str = FIELD
) -> str:
    """Check a model's files without loading it; for a hub name only its JSON files are fetched.

    Args:
        sha256: expected digest of a folder.

    Returns:
        The model type as named by transformers.

    Raises:
        ValueError: as for `load_vision_model`, as far as these files show it.
    """
    folder = Path(path) if Path(path).is_dir() else downloaded(path, revision, field, ("*.json",))
    if folder == Path(path):
        require_safetensors(folder, field)
        if sha256:
            require_digest(path, model_digest(folder), sha256, field)
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError):
        raise ValueError(f"{field}: {path}: has no config.json that names a model_type") from None


def load_vision_model(
    path: str,
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
    field: str = FIELD,
    processor: str | None = None,
) -> VisionModel:
    """Load a vision model in float32; a `Clip` if its configuration is CLIP's.

    Args:
        path: folder or hub name.
        device: see `networks.load_network`.
        revision: revision of a hub name; a commit pins the network of a score.
        field: setting that names the model.
        processor: folder or hub name of its image processor and tokenizer; None: the model's own.

    Raises:
        ValueError: `path` is neither a folder nor a hub name, or the model has no safetensors file, lacks
            weights, an image processor or a tokenizer, or has no pooled output.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPModel

    device = torch.device(device)
    without_weights = device.type == "meta"
    files = CONFIGURATIONS if without_weights else FILES
    folder = Path(path) if Path(path).is_dir() else downloaded(path, revision, field, files)
    if not without_weights:
        require_safetensors(folder, field)
    config = AutoConfig.from_pretrained(folder)
    is_clip = config.model_type == "clip"
    kind = CLIPModel if is_clip else AutoModel
    if without_weights:
        with device:
            module = AutoModel.from_config(config, dtype=torch.float32)
    else:
        module, loading = kind.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        if loading["missing_keys"]:
            missing = ", ".join(sorted(loading["missing_keys"])[:3])
            raise ValueError(f"{field}: {path}: its weights lack {missing}")
    freeze(module, device)
    name = folder.name if folder == Path(path) else path
    digest = model_digest(folder)
    if is_clip:
        pictures, tokenizer, of_both = clip_processor(processor or str(folder), field=field)
        if processor:
            digest = hashlib.sha256(f"{digest} {of_both}".encode()).hexdigest()
        return Clip(name, digest, device, module.config.projection_dim, module, pictures, tokenizer)
    pictures = AutoImageProcessor.from_pretrained(folder, backend="pil")
    network = VisionModel(name, digest, device, module.config.hidden_size, module, pictures)
    if not network.has_pooled_output():
        raise ValueError(f"{field}: {path} has no pooled output; take another model")
    return network


def clip_processor(
    path: str, *, revision: str | None = None, field: str = CLIP_FIELD
) -> "tuple[BaseImageProcessor, PreTrainedTokenizerBase, str]":
    """Return a CLIP's image processor and tokenizer, and the digest of their files.

    Raises:
        ValueError: naming the field, if there are none.
    """
    from transformers import AutoImageProcessor, CLIPTokenizer

    folder = Path(path) if Path(path).is_dir() else downloaded(path, revision, field, CONFIGURATIONS)
    try:
        pictures = AutoImageProcessor.from_pretrained(folder, backend="pil")
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except OSError:
        beside = field.rpartition(".")[0] + ".processor" if field.endswith(".model") else "another model"
        raise ValueError(f"{field}: {path} has no image processor or no tokenizer; give {beside}") from None
    return pictures, tokenizer, model_digest(folder, CONFIGURATIONS)


def check_clip(path: str, *, revision: str | None = None, field: str = CLIP_FIELD) -> None:
    """Check a CLIP model's files, as `check_vision_model` does.

    Raises:
        ValueError: as there, or the model is not a CLIPModel.
    """
    if check_vision_model(path, revision=revision, field=field) != "clip":
        raise _no_clip(path, field)


def load_clip(
    path: str,
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
    field: str = CLIP_FIELD,
    processor: str | None = None,
) -> Clip:
    """Load a CLIP model, as `load_vision_model` does, for scores that also need captions.

    Raises:
        ValueError: as there, or the model is not a CLIPModel.
    """
    model = load_vision_model(path, device, revision=revision, field=field, processor=processor)
    if not isinstance(model, Clip):
        raise _no_clip(path, field)
    return model


def _no_clip(path: str, field: str) -> ValueError:
    return ValueError(f"{field}: {path} is not a CLIPModel; name one, such as openai/clip-vit-large-patch14")


def require_safetensors(folder: Path, field: str) -> None:
    """Raise ValueError, naming the field, if a folder has no weights in safetensors format."""
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"{field}: {folder}: no safetensors file; no other format is read")


def downloaded(name: str, revision: str | None, field: str, files: Sequence[str]) -> Path:
    """Return the folder, in the local hub cache, with a model's files that match the patterns `files`.

    Raises:
        ValueError: naming the field, if there is no such model.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{field}: {name}: neither a folder nor a name of the hub ({reason})") from None


def model_digest(folder: Path, files: Sequence[str] = FILES) -> str:
    """SHA-256 of the weights, the architecture, the image processor and the tokenizer: files by pattern."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in files for path in folder.glob(pattern)):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
