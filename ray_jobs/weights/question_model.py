"""A vision-language model as a judge of pictures: does a picture show what its caption says?"""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ray_jobs.config import CaptioningConfig
from ray_jobs.metrics.feature_network import FeatureNetwork, require_pictures
from ray_jobs.metrics.preference import FIELD, PreferenceModel
from ray_jobs.metrics.vision_model import model_digest
from ray_jobs.weights.captioner import (
    CHAT,
    FILES,
    CaptionInputs,
    captioner_folder,
    empty_image_text_model,
    load_image_text_model,
)

if TYPE_CHECKING:
    from PIL import Image

ASKED = "CAPTION"
QUESTION = f'Does this figure show "{ASKED}"? Please answer yes or no.'
QUESTION_OF_EDITS = (
    f'The second figure was made from the first one, by the instruction "{ASKED}". Does it show what the '
    "instruction asks for? Please answer yes or no."
)
ANSWER = "Yes"


class QuestionModel(PreferenceModel):
    """A chat model that is asked whether a picture shows its caption (VQAScore, arXiv 2404.01291).

    The reward is the probability of "Yes" as the first token of the answer. Of an edit it is shown the
    picture before too, and asked whether the instruction was followed. The model computes in the precision of
    its files.

    Args:
        path: folder or hub name of a vision-language model with a chat template.
        device: device to run on; "meta" for a model without weights.

    Raises:
        ValueError: as for `check_question_model`, or weights are missing in its files.
    """

    sees_edits = True

    def __init__(self, path: str, device: str | torch.device = "cpu", *, revision: str | None = None) -> None:
        self.device, self.revision, self.path = torch.device(device), revision, path
        on_meta = self.device.type == "meta"
        settings = _settings(path, revision)
        self.folder = captioner_folder(settings, weights=not on_meta, field=FIELD)
        self.inputs = _inputs(settings, self.folder)
        told = settings.model_copy(update={"prompt": QUESTION_OF_EDITS})
        self.of_edits = CaptionInputs(told, self.folder, FIELD, pictures=2)
        if on_meta:
            self.module = empty_image_text_model(self.folder)
        else:
            self.module = load_image_text_model(self.folder, f"{FIELD}: {path}", "auto").to(self.device)

    @cached_property
    def identity(self) -> str:
        name = self.folder.name if self.folder == Path(self.path) else self.path
        return f"{name}@sha256:{model_digest(self.folder, FILES)[:12]}"

    @property
    def resizing(self) -> str:
        return "as its processor resizes it"

    @property
    def network(self) -> FeatureNetwork | None:
        return None

    @property
    def modules(self) -> list[torch.nn.Module]:
        return [self.module]

    @torch.inference_mode()
    def rewards(
        self, images: torch.Tensor, captions: list[str], before: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        require_pictures(images)
        kind = self.of_edits if before else self.inputs
        asked = [kind.prompt.replace(ASKED, self._plain(each)) for each in captions]
        shown = [[each] for each in _opened(images)]
        if before:
            shown = [[first, *edit] for first, edit in zip(_opened(before), shown, strict=True)]
        # The last token of every row, since rows are filled up at their beginning.
        inputs = kind.of(shown, asked)
        logits = self.module(**inputs.to(self.device, self.module.dtype)).logits[:, -1]
        tokenizer = self.inputs.processor.tokenizer
        answer = tokenizer.encode(ANSWER, add_special_tokens=False)[0]
        return logits.float().softmax(dim=-1)[:, answer : answer + 1].cpu()

    def _plain(self, caption: str) -> str:
        """Return a caption without what would count as a picture, or as the end of the question."""
        return self._control.sub(" ", caption)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        processor = self.inputs.processor
        names = [each.content for each in processor.tokenizer.added_tokens_decoder.values() if each.special]
        names += filter(None, (getattr(processor, f"{kind}_token", None) for kind in ("image", "video")))
        return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def check_question_model(path: str, *, revision: str | None = None) -> None:
    """Check a chat model's files without its weights.

    Raises:
        ValueError: naming the setting, if it is no vision-language model with a chat template, needs code of
            its own or a package that is missing, or has only pickled weights.
    """
    settings = _settings(path, revision)
    _inputs(settings, captioner_folder(settings, weights=False, field=FIELD))


def _settings(path: str, revision: str | None) -> CaptioningConfig:
    return CaptioningConfig(model=path, revision=revision, prompt=QUESTION)


def _inputs(settings: CaptioningConfig, folder: Path) -> CaptionInputs:
    known = "a CLIPModel, such as PickScore, and vision-language models with a chat template are read"
    try:
        inputs = CaptionInputs(settings, folder, FIELD)
    except ValueError as error:
        raise ValueError(f"{error}; {known}") from None
    if inputs.kind != CHAT:
        raise ValueError(f"{FIELD}: {settings.model}: answers no questions; {known}")
    return inputs


def _opened(images: Iterable[torch.Tensor]) -> "list[Image.Image]":
    from PIL import Image

    return [Image.fromarray(each.permute(1, 2, 0).cpu().numpy()) for each in images]
