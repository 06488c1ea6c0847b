"""Subjects are called by a word that binds, of which there are enough photos."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer

from ray_jobs.config import ConfigError, load_config
from ray_jobs.data.encoding.subject_words import advice, check_subjects
from ray_jobs.data.preparation import open_sources

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "models" / "emoji-base" / "tokenizer")


def test_a_word_of_several_tokens_is_named_with_rare_ones_of_the_model(tokenizer: Any) -> None:
    [line] = advice("a photo of kangaroo dog", "a photo of a dog", tokenizer)
    assert line.startswith("'kangaroo' is read as 'k' + 'ang' + 'a' + 'ro' + 'o'; one rare token binds")
    proposed = line.partition("for example ")[2].split(", ")
    assert proposed == ["nch"]  # a small vocabulary has no other of three consonants
    for word in proposed:
        assert advice(f"a photo of {word} dog", "a photo of a dog", tokenizer) == []


def test_a_frequent_word_means_something_already(tokenizer: Any) -> None:
    [line] = advice("a photo of cat thing", "a photo of a thing", tokenizer)
    assert line.startswith(
        "'cat' means something to the model (token 371 of 1,467, frequent ones first), which"
    )


def test_a_prompt_without_a_word_of_its_own_would_change_the_class(tokenizer: Any) -> None:
    [line] = advice("a photo of a dog", "A photo of a dog.", tokenizer)
    assert "has no word that class_prompt lacks, so all of the class will become the subject" in line
    assert advice("a photo of sks dog", None, tokenizer) == []


def test_too_few_photos_are_refused(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / f"{number}.png")
    source = f"{{path: {tmp_path}, instance_prompt: a photo of sks dog}}"
    config = load_config(ROOT / "configs" / "demo.yaml", ["data.source=null", f"data.sources=[{source}]"])
    with pytest.raises(ConfigError, match=r"3 photos; a subject needs at least 4"):
        check_subjects(config, open_sources(config))
