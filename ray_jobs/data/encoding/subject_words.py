"""Words that stand for subjects: best one rare token of the model's tokenizer (arXiv 2208.12242, 4.2)."""

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from cluster.fetched import local_path
from ray_jobs.config import Config, ConfigError, Range, SearchConfig, TrainConfig
from ray_jobs.console import say
from ray_jobs.data.sources.detection import Source
from ray_jobs.data.sources.dreambooth import Subject

if TYPE_CHECKING:
    from ray_jobs.diffusion.families.text import Tokenizer

FEWEST = 4  # photos of a subject
FREQUENT = 0.3  # of a vocabulary, in which frequent tokens come first: words that mean something already
PROPOSED = 3  # words

MANY_TIMES = 200  # a photo is seen before the first rung
USUAL_RATE = {"lora": 1e-3, "full": 1e-5}
PEOPLE = {"person", "man", "woman", "boy", "girl", "child", "baby", "face", "human", "people"}


def check_subjects(config: Config, sources: Sequence[Source]) -> None:
    """Say which subjects are called by a word that binds badly, with better ones.

    Raises:
        ConfigError: a subject has too few photos.
    """
    subjects = [source for source in sources if isinstance(source, Subject)]
    for subject in subjects:
        if subject.num_photos < FEWEST:
            raise ConfigError(
                f"{subject.name}: {subject.num_photos} photos; a subject needs at least {FEWEST}, from "
                "different sides and in different places: add some"
            )
    if not subjects:
        return
    tokenizer = _first_tokenizer(config)
    for subject in subjects:
        lines = advice(subject.instance_prompt, subject.class_prompt, tokenizer)
        lines += training_advice(config.train, config.search, subject)
        for line in lines:
            say("prepare", f"{subject.name}: {line}")


def training_advice(train: TrainConfig, search: SearchConfig, subject: Subject) -> list[str]:
    """Return a line for each setting with which subjects usually fail (arXiv 2208.12242, 4.1 and 4.4)."""
    lines = []
    first = search.ladder[0] if search.ladder else 0  # else it follows from the epochs that were asked for
    shown = first * train.training_rows
    if shown > MANY_TIMES * subject.num_photos:
        lines.append(
            f"each photo is seen {shown // subject.num_photos:,} times before the first rung (search.ladder: "
            f"{first:,}); a subject is often learned by heart by then: begin with an earlier rung"
        )
    usual = USUAL_RATE[train.method]
    rates = search.learning_rates
    lowest = rates.low if isinstance(rates, Range) else min(rates)
    if lowest > usual:
        lines.append(
            f"the lowest of search.learning_rates is {lowest:g}; with train.method: {train.method} a subject "
            f"is usually learned at {usual:g} or less"
        )
    of_class = set(_words(subject.class_prompt or subject.instance_prompt))
    if of_class & PEOPLE and not train.prior_loss_weight:
        lines.append(
            "a person's face soon becomes everybody's; train.prior_loss_weight: 1 with a class_prompt keeps "
            "other faces as they are"
        )
    return lines


def _first_tokenizer(config: Config) -> "Tokenizer":
    from ray_jobs.weights.loading import load_text

    text, tokenizers = load_text(local_path(config.model.base), revision=config.model.revision)
    found = (text.tokenizer_of(tokenizers, name) for name in text.tokens)
    return next(each for each in found if each is not None)


def advice(instance: str, class_prompt: str | None, tokenizer: Any) -> list[str]:
    """Return a line for each word of a subject's own that binds badly.

    Args:
        instance: `instance_prompt`.
        class_prompt: tells which of its words are the class's; without it there is nothing to say.
        tokenizer: of transformers; its tokens are in the order of their frequency, as those of BPE and
            SentencePiece are.
    """
    if class_prompt is None:
        return []
    common = set(_words(class_prompt))
    own = [word for word in _words(instance) if word not in common]
    if not own:
        return [
            f"instance_prompt {instance!r} has no word that class_prompt lacks, so all of the class will "
            f"become the subject; name it{_for_example(tokenizer)}"
        ]
    lines = []
    for word in own:
        tokens, whole = _tokens(tokenizer, word), len(tokenizer)
        if len(tokens) > 1:
            parts = " + ".join(repr(tokenizer.decode([token]).strip()) for token in tokens)
            lines.append(
                f"{word!r} is read as {parts}; one rare token binds a subject better{_for_example(tokenizer)}"
            )
        elif tokens and tokens[0] < FREQUENT * whole:
            lines.append(
                f"{word!r} means something to the model (token {tokens[0]:,} of {whole:,}, frequent ones "
                f"first), which the subject must displace; a rare token binds better{_for_example(tokenizer)}"
            )
    return lines


def _words(prompt: str) -> list[str]:
    return re.findall(r"\w+", prompt.lower())


def _tokens(tokenizer: Any, word: str) -> list[int]:
    """Tokens of a word inside a text."""
    return list(tokenizer(f" {word}", add_special_tokens=False).input_ids)


def _for_example(tokenizer: Any) -> str:
    found = list(islice(_rare_words(tokenizer), PROPOSED))
    return f", for example {', '.join(found)}" if found else ""


def _rare_words(tokenizer: Any) -> Iterator[str]:
    """Yield words of three consonants (without y) that are one token, the rarest first."""
    for token in range(len(tokenizer) - 1, int(FREQUENT * len(tokenizer)), -1):
        word = tokenizer.decode([token]).strip()
        if re.fullmatch("[b-df-hj-np-tv-xz]{3}", word) and _tokens(tokenizer, word) == [token]:
            yield word
