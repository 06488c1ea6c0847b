"""A served PNG says how it was drawn, to programs and to picture tools; and reading it is safe."""

import io
import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from serving.provenance import MAX_FACTS, SIGNATURE, encode_png, facts_of, parameters_line, read_provenance
from tests.serving.generations import generation

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(content: bytes, kind: bytes = b"tEXt") -> bytes:
    """A real PNG with a chunk of ours put behind its header."""
    png = encode_png(PIXELS, None)
    header = len(SIGNATURE) + 25
    return png[:header] + chunk(kind, content) + png[header:]


def test_facts_come_back_and_pixels_are_untouched() -> None:
    facts = facts_of(
        generation(7, adapter="fox").model_dump(), base="stable-diffusion", adapter_digest="ab" * 32
    )
    png = encode_png(PIXELS, facts)
    assert read_provenance(png) == facts
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), PIXELS)
    assert facts["image_id"] == f"img-{7:024x}" and (facts["seed"], facts["version"]) == (7, 3)


def test_it_is_off_without_facts() -> None:
    png = encode_png(PIXELS, None)
    assert read_provenance(png) is None
    assert Image.open(io.BytesIO(png)).info == {}


def test_who_asked_is_never_written_and_the_prompt_only_if_wanted() -> None:
    asked = generation(user="somebody", key_id="key-1", negative_prompt="blur").model_dump()
    assert not {"user", "key_id"} & set(facts_of(asked, base="sd"))
    assert facts_of(asked, base="sd")["negative_prompt"] == "blur"
    without = encode_png(PIXELS, facts_of(asked, base="sd", with_prompt=False))
    assert b"apple" not in without and b"blur" not in without


def test_picture_tools_find_the_usual_line() -> None:
    facts = facts_of(generation(7, negative_prompt="blur").model_dump(), base="sd")
    info = Image.open(io.BytesIO(encode_png(PIXELS, facts))).info
    assert info["parameters"] == (
        "a red apple\nNegative prompt: blur\n"
        "Steps: 4, CFG scale: 3.0, Seed: 7, Size: 64x64, Base model: sd, Model: served, Model version: 3"
    )
    assert json.loads(info["diffray"]) == facts


@given(prompt=st.text(st.characters(exclude_categories=())))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(prompt: str) -> None:
    facts = {"prompt": prompt, "seed": 1}
    png = encode_png(PIXELS, facts)
    assert read_provenance(png) == facts
    with Image.open(io.BytesIO(png)) as picture:  # an independent reader finds a whole file
        picture.load()
        assert picture.info["parameters"] == parameters_line(facts)


def test_more_than_can_be_read_back_is_not_written() -> None:
    with pytest.raises(ValueError, match="facts: .* shorten the prompt"):
        encode_png(PIXELS, {"prompt": "\N{FOX FACE}" * MAX_FACTS})


@pytest.mark.parametrize(
    "content",
    [
        b"diffray\0{not json",
        b"diffray\0[1, 2]",
        b"diffray\0\xff\xfe",
        b"diffray\0" + b"[" * 60000,
        b"diffray\0" + b"1" * 60000,
        b"diffray\0" + b'{"a": "' + b"x" * MAX_FACTS + b'"}',
        b"diffray",
        b"other\0{}",
    ],
)
def test_a_chunk_that_is_not_ours_is_none(content: bytes) -> None:
    assert read_provenance(with_chunk(content)) is None


def test_a_compressed_bomb_is_not_opened() -> None:
    bomb = zlib.compress(b"{" + b" " * 50_000_000 + b"}")
    assert read_provenance(with_chunk(b"diffray\0\0" + bomb, kind=b"zTXt")) is None


def test_a_damaged_chunk_is_none() -> None:
    png = encode_png(PIXELS, {"seed": 123456})
    assert read_provenance(png.replace(b"123456", b"654321")) is None


def damaged(png: bytes) -> Any:
    return st.one_of(
        st.integers(0, len(png)).map(lambda end: png[:end]),
        st.tuples(st.integers(0, len(png) - 1), st.binary(min_size=1, max_size=8)).map(
            lambda change: png[: change[0]] + change[1] + png[change[0] + len(change[1]) :]
        ),
        st.binary(max_size=200).map(lambda tail: SIGNATURE + tail),
    )


@given(data=damaged(encode_png(PIXELS, {"prompt": "a red apple"})))
@settings(max_examples=300, deadline=None)
def test_no_file_makes_reading_fail(data: bytes) -> None:
    found = read_provenance(data)
    assert found is None or found == {"prompt": "a red apple"}
