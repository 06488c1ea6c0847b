"""A caption between its file and the tokens: which of its lines count, and how it is repaired."""

import functools
import html
import re
from dataclasses import dataclass
from typing import Literal

from cluster.fetched import local_path
from ray_jobs.config import Config, ConfigError
from ray_jobs.weights.model_files import model_folder, model_index

LINE_END = re.compile(r"\r\n|\r|\n")  # no others: a caption may hold U+2028


@dataclass(frozen=True)
class CaptionRules:
    """How the captions of a source are read.

    Attributes:
        lines: as `data.caption_lines`.
        repaired: whether they are brought to what CLIP was trained on (`clip_text`).
    """

    lines: Literal["whole", "first", "each"] = "whole"
    repaired: bool = False

    def texts(self, caption: str) -> list[tuple[str, bool]]:
        """The captions that one text gives, and whether each was repaired; none if nothing is left."""
        lines = [caption.strip()]
        if self.lines != "whole":
            lines = [line.strip() for line in LINE_END.split(caption) if line.strip()]
        if self.lines == "first":
            lines = lines[:1]
        if not self.repaired:
            return [(line, False) for line in lines if line]
        found = [(clip_text(line), " ".join(line.split())) for line in lines]
        return [(text, text != before) for text, before in found if text]


AS_WRITTEN = CaptionRules()


def num_lines(caption: str) -> int:
    """How many lines of a caption are not empty."""
    return sum(bool(line.strip()) for line in LINE_END.split(caption))


def clip_text(text: str) -> str:
    """The text that CLIP was trained on: as ftfy repairs it, without entities of HTML, words one space apart.

    OpenAI's tokenizer does the same (`basic_clean`, `whitespace_clean`); it also makes small letters, as all
    of CLIP's tokenizers do. That of transformers 5 leaves the rest out: for it a typographic apostrophe,
    full-width letters and `&amp;` are other, rare tokens.
    """
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def caption_rules(config: Config) -> CaptionRules:
    """How the captions of all sources are read.

    Raises:
        ConfigError: the base is no model in diffusers' format.
    """
    data, model = config.data, config.model
    repaired = data.repair_captions
    if repaired is None:
        try:
            repaired = _has_clip(local_path(model.base), model.revision)
        except ValueError as error:
            raise ConfigError(f"model.base: {error}") from None
    return CaptionRules(data.caption_lines, repaired)


@functools.cache
def _has_clip(base: str, revision: str | None) -> bool:
    """Whether one of a model's text encoders is CLIP's."""
    parts = model_index(model_folder(base, revision=revision)).values()
    return any(isinstance(each, list) and str(each[-1]).startswith("CLIPText") for each in parts)
