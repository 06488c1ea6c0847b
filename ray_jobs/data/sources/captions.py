"""Caption rules: selection of lines, and repair before tokenization."""

import functools
import html
import re
from dataclasses import dataclass
from typing import Literal

from cluster.fetched import local_path
from ray_jobs.config import Config, ConfigError
from ray_jobs.weights.model_files import model_folder
from ray_jobs.weights.model_index import model_index

LINE_END = re.compile(r"\r\n|\r|\n")  # no others: a caption may hold U+2028


@dataclass(frozen=True)
class CaptionRules:
    """Rules for reading the captions of a source.

    Attributes:
        lines: value of `data.caption_lines`.
        repaired: True to normalise captions to CLIP's training text (`clip_text`).
    """

    lines: Literal["whole", "first", "each"] = "whole"
    repaired: bool = False

    def texts(self, caption: str) -> list[tuple[str, bool]]:
        """Return the captions of one text, each with a flag for repaired; empty if nothing is left."""
        lines = [caption.strip()]
        if self.lines != "whole":
            lines = [line.strip() for line in LINE_END.split(caption) if line.strip()]
        if self.lines == "first":
            lines = lines[:1]
        if not self.repaired:
            return [(line, False) for line in lines if line]
        found = [(clip_text(line), " ".join(line.split())) for line in lines]
        return [(text, text != before) for text, before in found if text]


@dataclass(frozen=True)
class OptionalCaptions(CaptionRules):
    """Caption rules by which a picture without a caption is a row with an empty one.

    A model writes it later: see `captioning`.
    """

    optional: Literal[True] = True  # so that scans by these rules have names of their own

    def texts(self, caption: str) -> list[tuple[str, bool]]:
        return super().texts(caption) or [("", False)]


AS_WRITTEN = CaptionRules()


def num_lines(caption: str) -> int:
    """Number of non-empty lines of a caption."""
    return sum(bool(line.strip()) for line in LINE_END.split(caption))


def clip_text(text: str) -> str:
    """Normalise text as in CLIP's training: ftfy repair, HTML entities resolved, single spaces.

    OpenAI's tokenizer does the same (`basic_clean`, `whitespace_clean`), and lower-cases, as all CLIP
    tokenizers do. The tokenizer of transformers 5 omits the rest: it maps a typographic apostrophe,
    full-width letters and `&amp;` to other, rare tokens.
    """
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def caption_rules(config: Config) -> CaptionRules:
    """Return the caption rules of all sources.

    Raises:
        ConfigError: the base is not a model in diffusers format.
    """
    data, model = config.data, config.model
    repaired = data.repair_captions
    if repaired is None:
        try:
            repaired = _has_clip(local_path(model.base), model.revision)
        except ValueError as error:
            raise ConfigError(f"model.base: {error}") from None
    if data.captioning.model is None:
        return CaptionRules(data.caption_lines, repaired)
    # A picture has one written caption, however many lines its own has.
    return OptionalCaptions("whole" if data.captioning.pictures == "all" else data.caption_lines, repaired)


@functools.cache
def _has_clip(base: str, revision: str | None) -> bool:
    """Return whether one of a model's text encoders is CLIP's."""
    parts = model_index(model_folder(base, revision=revision)).values()
    return any(isinstance(each, list) and str(each[-1]).startswith("CLIPText") for each in parts)
