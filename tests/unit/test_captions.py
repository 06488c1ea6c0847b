"""Captions between their files and the tokens: lines, and what CLIP's training had repaired."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from ray_jobs.config import load_config
from ray_jobs.data.curation.scan import entries
from ray_jobs.data.sources.captions import CaptionRules, caption_rules, clip_text
from tests.unit.test_sources import (
    facts,
    left_out,
    lines,
    opened,
    picture,
    problems,
    samples,
    tar_files,
    write,
    write_parquet,
    write_tar,
)

Lines = Literal["whole", "first", "each"]


@pytest.mark.parametrize(
    ("text", "repaired"),
    [
        ("the cat\N{RIGHT SINGLE QUOTATION MARK}s ball", "the cat's ball"),
        ("\N{LEFT DOUBLE QUOTATION MARK}stop\N{RIGHT DOUBLE QUOTATION MARK}", '"stop"'),
        ("\uff23\uff21\uff34", "CAT"),
        ("salt &amp; pepper, &amp;lt;3", "salt & pepper, <3"),
        ("cafÃ©", "café"),
        ("of\ufb01ce", "office"),
        (" two  spaces\nand\ta line ", "two spaces and a line"),
        ("Zürich, naïve, 一只猫, e\u0301", "Zürich, naïve, 一只猫, é"),
    ],
)
def test_captions_are_repaired_as_clip_was_trained(text: str, repaired: str) -> None:
    assert clip_text(text) == repaired
    assert clip_text(repaired) == repaired


def test_white_space_alone_is_no_repair() -> None:
    rules = CaptionRules(repaired=True)
    assert rules.texts("a  cat\nand a dog") == [("a cat and a dog", False)]
    assert rules.texts("a cat\N{RIGHT SINGLE QUOTATION MARK}s") == [("a cat's", True)]
    assert rules.texts("&nbsp;") == []
    assert CaptionRules().texts(" a\N{RIGHT SINGLE QUOTATION MARK}b\nc ") == [
        ("a\N{RIGHT SINGLE QUOTATION MARK}b\nc", False)
    ]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("whole", ["one\n\ntwo \u2028 three"]), ("first", ["one"]), ("each", ["one", "two \u2028 three"])],
)
def test_lines_of_a_caption_are_one_text_or_the_first_or_a_row_each(rule: Lines, expected: list[str]) -> None:
    assert [
        text for text, _ in CaptionRules(rule).texts("\r\none\n\ntwo \u2028 three\r\n".strip())
    ] == expected


def sources(folder: Path) -> list[Path]:
    """Two pictures with three captions, in every kind of source that can hold them."""
    text = {"0": "a cat\na red cat\n", "1": "a dog"}
    files = {f"{n}.png": picture(int(n)) for n in text}
    texts = {f"{n}.txt": caption for n, caption in text.items()}
    rows = [{"file_name": f"{n}.png", "text": caption} for n, caption in text.items()]
    tables = [{"image": picture(int(n)), "text": caption} for n, caption in text.items()]
    return [
        write(folder / "captions", {**files, **texts}),
        write(folder / "metadata", {**files, "metadata.jsonl": lines(rows)}),
        write_tar(folder / "s.tar", dict(sorted((files | texts).items()))),
        write_parquet(folder / "a.parquet", tables),
    ]


def test_each_line_is_a_row_of_its_picture_in_every_kind_of_source(tmp_path: Path) -> None:
    for path in sources(tmp_path):
        source = opened(path, captions=CaptionRules("each"))
        found = samples(source)
        assert [(s.row, s.text, s.data) for s in found] == [
            (0, "a cat", picture(0)),
            (1, "a red cat", picture(0)),
            (2, "a dog", picture(1)),
        ]
        assert found[1].name == found[0].name.replace(": line 1", ": line 2") != found[0].name
        for wanted in ({1}, {0, 2}, {2}, set[int]()):
            chosen = list(source.read(source.pieces[0], wanted))
            assert [facts(s) for s in chosen] == [facts(found[row]) for row in sorted(wanted)]
        first = samples(opened(path, captions=CaptionRules("first")))
        assert [(s.text, s.lines) for s in first] == [("a cat", 2), ("a dog", 1)]


def test_rows_behind_a_broken_one_keep_their_numbers_where_lines_are_rows(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(0), "a.txt": "one\ntwo", "b.png": picture(1), "c.png": picture(2)})
    write(tmp_path, {"c.txt": "three"})
    source = opened(tmp_path, captions=CaptionRules("each"))
    assert list(problems(source).values()) == ["", "", "missing_caption", ""]
    assert [s.text for s in source.read(source.pieces[0], {3})] == ["three"]


def test_a_caption_of_which_nothing_is_left_is_empty(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(), "a.txt": "&nbsp;"})
    assert problems(opened(tmp_path, captions=CaptionRules(repaired=True))) == {"a.png": "empty_caption"}
    assert problems(opened(tmp_path)) == {"a.png": ""}


def test_other_rules_are_scanned_anew_and_files_that_are_no_rows_stay(tmp_path: Path) -> None:
    write(tar_files(tmp_path), {"notes.md": "x"})
    data = load_config(Path("configs/demo.yaml"), []).data
    found = [opened(tmp_path, captions=CaptionRules(rule)) for rule in ("whole", "first", "each")]
    assert len({source.digest for source in found}) == 3
    assert len({entries([source], data)[0].file for source in found}) == 3
    assert all(left_out(source) == {str(tmp_path): "1 .md"} for source in found)


def test_the_base_decides_unless_the_configuration_does(tiny_model: Path, tmp_path: Path) -> None:
    def rules(base: Path, *overrides: str) -> CaptionRules:
        return caption_rules(load_config(Path("configs/demo.yaml"), [f"model.base={base}", *overrides]))

    assert rules(tiny_model) == CaptionRules("whole", repaired=True)
    assert rules(tiny_model, "data.repair_captions=false", "data.caption_lines=each") == CaptionRules("each")
    write(
        tmp_path,
        {"model_index.json": '{"_class_name": "X", "text_encoder": ["transformers", "T5EncoderModel"]}'},
    )
    assert rules(tmp_path) == CaptionRules()
    assert rules(tmp_path, "data.repair_captions=true").repaired


def test_a_repaired_caption_has_the_tokens_of_the_plain_one(tiny_model: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny_model / "tokenizer")
    curly, plain = "a cat\N{RIGHT SINGLE QUOTATION MARK}s ball", "a cat's ball"
    assert tokenizer(curly).input_ids != tokenizer(plain).input_ids
    assert tokenizer(clip_text(curly)).input_ids == tokenizer(plain).input_ids
    assert np.isfinite(len(tokenizer(clip_text("salt &amp; pepper")).input_ids))
