"""Captioning models of transformers: BLIP, BLIP-2, Florence-2, and vision-language models that chat.

Models are loaded from a folder or hub name, with safetensors weights only. Code in a model's repository is
never run.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from cluster.fetched import local_path
from ray_jobs.config import CaptioningConfig
from ray_jobs.metrics.vision_model import downloaded, model_digest, require_safetensors
from ray_jobs.weights.model_files import CONFIGURATIONS

if TYPE_CHECKING:
    from PIL import Image

FIELD = "data.captioning.model"
FILES = (*CONFIGURATIONS, "*.safetensors")

BLIP, BLIP_2, FLORENCE, CHAT = "blip", "blip-2", "florence2", "chat"
SUPPORTED = (
    "BLIP, BLIP-2, Florence-2, and vision-language models with a chat template, such as Qwen2.5-VL, LLaVA "
    "and Idefics3"
)
TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")  # of Florence-2
PROMPTS = {
    BLIP: "",
    BLIP_2: "",
    FLORENCE: TASKS[1],
    CHAT: "Describe this picture in one sentence. Answer with the description only.",
}
"""Prompt of each kind of model if none is configured."""


@dataclass(frozen=True)
class Written:
    """A caption that a model wrote.

    Attributes:
        text: the caption on one line, without the prompt; "" if the model wrote nothing.
        is_cut: True if it is as long as `max_tokens` allows, and may therefore end within a sentence.
    """

    text: str
    is_cut: bool


def captioner_folder(settings: CaptioningConfig, *, weights: bool = True, field: str = FIELD) -> Path:
    """Return the folder of the captioning model: its own, or its files in the local hub cache.

    Args:
        weights: False to fetch only configurations from the hub.
        field: the setting that names the model, for errors.

    Raises:
        ValueError: it is neither a folder nor a hub name, or has no safetensors file.
    """
    assert settings.model is not None
    path = local_path(settings.model, field)
    if Path(path).is_dir():
        folder, weights = Path(path), True
    else:
        folder = downloaded(path, settings.revision, field, FILES if weights else CONFIGURATIONS)
    if weights:
        require_safetensors(folder, field)
    return folder


def captioner_digest(settings: CaptioningConfig) -> str:
    """Return the sha256 of the captioning model's weights, configurations and tokenizer."""
    return model_digest(captioner_folder(settings), FILES)


def check_captioner(settings: CaptioningConfig) -> None:
    """Check the captioning model and its prompt, without its weights, by preparing a picture.

    Raises:
        ValueError: the model is missing or of no supported kind, needs code of its own or a package that is
            missing, has only pickled weights, takes no such prompt, or has no place for so many tokens; the
            message names the field.
    """
    from PIL import Image
    from transformers import AutoConfig

    folder = captioner_folder(settings, weights=False)
    inputs = CaptionInputs(settings, folder)
    try:
        prepared = inputs([Image.new("RGB", (settings.max_side, settings.max_side))])
    except (ImportError, LookupError, TypeError, ValueError) as error:
        raise _unusable(settings, error) from None
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    places = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    taken = 0 if _is_seq2seq(config) else prepared["input_ids"].shape[1]
    if places and taken + settings.max_tokens > places:
        raise ValueError(
            f"data.captioning.max_tokens: {settings.max_tokens}: {settings.model} has {places} places for "
            f"tokens, of which a picture and the prompt take {taken}; lower it, or data.captioning.max_side"
        )


def captioner_bytes(settings: CaptioningConfig, dtype: torch.dtype) -> int:
    """Return the bytes of the captioning model's weights, without reading them.

    Raises:
        ValueError: as for `check_captioner`.
    """
    folder = captioner_folder(settings, weights=False)
    _kind(settings, folder)
    return sum(each.numel() for each in empty_image_text_model(folder).parameters()) * dtype.itemsize


def prompt_of(settings: CaptioningConfig, folder: Path) -> str:
    """Return the configured prompt, or the default of the model's kind.

    Raises:
        ValueError: the model is of no supported kind, or takes no such prompt.
    """
    kind = _kind(settings, folder)
    if settings.prompt is None:
        return PROMPTS[kind]
    if kind == FLORENCE and settings.prompt not in TASKS:
        raise ValueError(
            f"data.captioning.prompt: {settings.prompt!r} is no task of Florence-2 that gives a caption; "
            f"choose one of {', '.join(TASKS)}"
        )
    return settings.prompt


def _kind(settings: CaptioningConfig, folder: Path, field: str = FIELD) -> str:
    """Return the kind of a model by its config.json: a key of PROMPTS."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    where = f"{field}: {settings.model}"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type, architectures = str(config["model_type"]), list(config["architectures"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{where}: has no config.json that names its model_type and architectures") from None
    if config.get("auto_map"):
        fix = "florence-community has such Florence-2" if model_type == FLORENCE else "take another model"
        raise ValueError(
            f"{where}: is loaded by Python code in its repository, which is never run; give one that "
            f"transformers knows ({fix})"
        )
    if stored := config.get("quantization_config"):
        raise ValueError(
            f"{where}: is stored in few bits ({stored.get('quant_method', 'an unknown method')}); give the "
            "model with plain weights"
        )
    if KNOWN.get(model_type) not in architectures:
        named = ", ".join(architectures)
        raise ValueError(f"{where}: {named} is no captioning model that is known; supported are {SUPPORTED}")
    if model_type == BLIP_2 and config.get("image_token_index") is None:
        raise ValueError(
            f"{where}: is a BLIP-2 without image_token_index in its config.json, as early ones are; give a "
            "newer revision"
        )
    return model_type if model_type in PROMPTS else CHAT


def _unusable(settings: CaptioningConfig, error: Exception, field: str = FIELD) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(f"{field}: {settings.model}: its processor cannot prepare a picture: {reason}")


def _is_seq2seq(config: Any) -> bool:
    """Whether an encoder reads the prompt, so that the decoder's tokens are the caption alone."""
    configs = (config, getattr(config, "text_config", None))
    return any(getattr(each, "is_encoder_decoder", False) for each in configs)


class CaptionInputs:
    """What a captioning model is given for pictures: their pixels and the prompt.

    Args:
        field: the setting that names the model, for errors.
        pictures: of a chat model, the number of pictures before each prompt.

    Raises:
        ValueError: as for `check_captioner`.
    """

    def __init__(
        self, settings: CaptioningConfig, folder: Path, field: str = FIELD, pictures: int = 1
    ) -> None:
        self.kind, self.prompt = _kind(settings, folder, field), prompt_of(settings, folder)
        try:
            self.processor = _load_processor(folder)
        except (ImportError, LookupError, OSError, TypeError, ValueError) as error:
            raise _unusable(settings, error, field) from None
        tokenizer = self.processor.tokenizer
        # A decoder continues each row at its end, so that shorter ones are filled up at their beginning.
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._options: dict[str, Any] = {}
        if self.kind == CHAT:
            self._apply_template(settings, field, pictures)

    def _apply_template(self, settings: CaptioningConfig, field: str, pictures: int) -> None:
        """Make the prompt a message with its pictures, followed by the beginning of the answer."""
        from transformers import ProcessorMixin

        template = self.processor.chat_template
        if not template:
            raise ValueError(
                f"{field}: {settings.model}: {type(self.processor).__name__} has no chat template; supported "
                f"are {SUPPORTED}"
            )
        content = [*[{"type": "image"}] * pictures, {"type": "text", "text": self.prompt}]
        # Of templates that know it: the answer is wanted without the thoughts.
        options = {"enable_thinking": False} if "enable_thinking" in str(template) else {}
        # SmolVLM's own method asks the processor of videos, which is not loaded.
        self.prompt = ProcessorMixin.apply_chat_template(
            self.processor,
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            **options,
        )
        start = self.processor.tokenizer.bos_token
        if start and self.prompt.startswith(start):
            self._options["add_special_tokens"] = False

    def __call__(self, pictures: "Sequence[Image.Image]", texts: Sequence[str] = ()) -> Any:
        """Return the model's inputs, a BatchFeature of N rows.

        Args:
            texts: one for each picture in place of the prompt.
        """
        return self.of([[each] for each in pictures] if self.kind == CHAT else list(pictures), texts)

    def of(self, images: "Sequence[Sequence[Image.Image] | Image.Image]", texts: Sequence[str] = ()) -> Any:
        """Return the same for N rows of a chat model with several pictures each.

        Args:
            images: a list for each row; of other models a picture.
        """
        texts = list(texts) or [self.prompt] * len(images)
        return self.processor(
            images=list(images), text=texts, padding=True, return_tensors="pt", **self._options
        )


def _load_processor(folder: Path) -> Any:
    """Load a model's processor of pictures and texts, without that of videos, which needs torchvision.

    The image processor's PIL implementation is always used, so that a caption does not depend on installed
    packages.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    kind: Any = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(folder, trust_remote_code=False))]

    class PictureProcessor(kind):
        """A model's processor that was given none of videos."""

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False),
        "tokenizer": AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        "video_processor": None,
    }
    fields, options = PictureProcessor.get_processor_dict(folder)
    fields = {name: value for name, value in fields.items() if name not in parts}
    return PictureProcessor.from_args_and_dict(
        [parts[name] for name in kind.get_attributes()], fields, **options
    )


def load_image_text_model(folder: Path, where: str, dtype: torch.dtype | Literal["auto"]) -> Any:
    """Return a frozen model of pictures and texts, in evaluation mode, on the CPU.

    Args:
        where: the setting and its value, for errors.
        dtype: of weights and activations; auto: that of its files.

    Raises:
        ValueError: weights are missing in its files.
    """
    from transformers import AutoModelForImageTextToText

    model, loading = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise ValueError(f"{where}: its weights lack {missing}")
    return model.requires_grad_(False).eval()


def empty_image_text_model(folder: Path) -> Any:
    """Return a model of pictures and texts without memory, on the meta device."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=False)


class Captioner:
    """A captioning model, which writes the likeliest next token at a time (greedy), so always the same.

    Args:
        settings: with a model.
        device: device to run on.
        dtype: of weights and activations.

    Raises:
        ValueError: as for `check_captioner`, or weights are missing in its files.
    """

    def __init__(
        self,
        settings: CaptioningConfig,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        folder = captioner_folder(settings)
        self.inputs = CaptionInputs(settings, folder)
        self.max_tokens, self.device, self.dtype = settings.max_tokens, torch.device(device), dtype
        self.model = load_image_text_model(folder, f"{FIELD}: {settings.model}", dtype).to(self.device)
        for part in self.model.modules():
            if getattr(part, "generation_config", None) is not None:
                # Of sampling, which greedy generation would warn about.
                part.generation_config.update(temperature=None, top_p=None, top_k=None, max_length=None)
        self._is_seq2seq = _is_seq2seq(self.model.config)

    @torch.no_grad()
    def write(self, pictures: "Sequence[Image.Image]") -> list[Written]:
        """Write a caption for each RGB picture; a batch gives the same captions as single pictures do."""
        tokenizer = self.inputs.processor.tokenizer
        inputs = self.inputs(pictures).to(self.device, self.dtype)
        output = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=self.max_tokens)
        new = output[:, self._prompt_length(output, inputs["input_ids"]) :].cpu()
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        # A row that ended earlier is filled up with special tokens.
        special, is_full = set(tokenizer.all_special_ids), new.shape[1] >= self.max_tokens
        cut = [is_full and int(row[-2]) not in special for row in new]
        return [Written(" ".join(text.split()), is_cut) for text, is_cut in zip(texts, cut, strict=True)]

    def _prompt_length(self, output: torch.Tensor, prompt: torch.Tensor) -> int:
        """Return how many tokens at the beginning of each row are no part of the caption.

        Some models return the prompt, BLIP without its last token, and some only what is new.
        """
        if self._is_seq2seq:
            return 1
        length = prompt.shape[1] - (self.inputs.kind == BLIP)
        is_prompt = output.shape[1] >= length and torch.equal(output[:, :length], prompt[:, :length])
        return length if is_prompt else 0
