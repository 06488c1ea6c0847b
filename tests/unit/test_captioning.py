"""Written captions between the scan and the encoding: which rows get one, and where it is kept."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.lease import held
from ray_jobs.config import CaptioningConfig, Config, ConfigError, load_config
from ray_jobs.data.curation.decisions import Decisions, decide
from ray_jobs.data.curation.findings import write_findings
from ray_jobs.data.curation.scan import SCHEMA, Entry, entries, read_index, scan_sample
from ray_jobs.data.curation.splits import content_digest
from ray_jobs.data.encoding.caption_writing import (
    Caption,
    ShowPictures,
    captions_folder,
    keep_captions,
)
from ray_jobs.data.encoding.captioning import (
    CAPTIONS,
    composed,
    edited_captions,
    edits_digest,
    write_captions,
)
from ray_jobs.data.encoding.encoding import ChangedFile, _gathered
from ray_jobs.data.encoding.plan import plan_parts
from ray_jobs.data.preparation import INDEX, _content, _inputs
from ray_jobs.data.sources.captions import CaptionRules, OptionalCaptions, caption_rules
from ray_jobs.data.sources.detection import Source
from ray_jobs.review.app import Review
from ray_jobs.review.captions import Captions, open_captions
from ray_jobs.review.export import export
from ray_jobs.run.folder import RunFolder
from tests.tiny_captioners import blip
from tests.unit.test_sources import (
    all_samples,
    facts,
    left_out,
    lines,
    opened,
    picture,
    problems,
    samples,
    write,
    write_parquet,
    write_tar,
)

OPTIONAL = OptionalCaptions()


def texts(path: Path, **settings: Any) -> list[tuple[str, str]]:
    """Name and caption of each row, where captions are optional."""
    source = opened(path, captions=OPTIONAL, **settings)
    assert not [sample for sample in samples(source) if sample.problem]
    assert all(sample.data for sample in samples(source))
    return [(sample.name, sample.text) for sample in samples(source)]


def test_pictures_without_captions_are_rows_in_every_kind_of_source(tmp_path: Path) -> None:
    a, b, c = (picture(number) for number in range(3))
    bare = write(tmp_path / "bare", {"a.png": a, "more/b.png": b})
    assert texts(bare) == [("a.png", ""), ("more/b.png", "")]
    some = write(tmp_path / "some", {"a.png": a, "a.txt": "a cat", "b.png": b, "c.png": c, "c.txt": " \n"})
    assert texts(some) == [("a.png", "a cat"), ("b.png", ""), ("c.png", "")]
    rows: list[dict[str, Any]] = [
        {"file_name": "a.png"},
        {"file_name": "b.png", "caption": "a dog"},
        {"file_name": "c.png", "text": None},
    ]
    listed = write(tmp_path / "listed", {"a.png": a, "b.png": b, "c.png": c, "metadata.jsonl": lines(rows)})
    assert texts(listed) == [("a.png", ""), ("b.png", "a dog"), ("c.png", "")]
    table = write_parquet(tmp_path / "a.parquet", [{"image": a}, {"image": b}])
    assert [text for _, text in texts(table)] == ["", ""]
    gaps = write_parquet(tmp_path / "b.parquet", [{"image": a, "text": None}, {"image": b, "text": "a bee"}])
    assert [text for _, text in texts(gaps)] == ["", "a bee"]
    tar = write_tar(
        tmp_path / "s.tar",
        {"0.png": a, "1.png": b, "1.txt": "one", "2.png": c, "2.seg.png": a, "3.0.png": a, "3.1.png": b},
    )
    found = opened(tar, captions=OPTIONAL)
    assert [(s.name, s.text) for s in samples(found)] == [
        ("s.tar: 0.png", ""),
        ("s.tar: 1.png", "one"),
        ("s.tar: 2.png", ""),
        ("s.tar: 3.0.png", ""),
        ("s.tar: 3.1.png", ""),
    ]
    assert left_out(found) == {"s.tar: 2.seg.png": "other_member"}
    for sample in all_samples(found):
        assert [facts(s) for s in found.read(found.pieces[0], {sample.row})] == [facts(sample)]


def test_a_caption_that_is_broken_or_named_but_missing_is_still_an_error(tmp_path: Path) -> None:
    write(tmp_path / "set", {"a.png": picture(), "a.txt": b"\xff\xfe", "b.png": picture(1)})
    assert problems(opened(tmp_path / "set", captions=OPTIONAL)) == {"a.png": "caption_not_utf8", "b.png": ""}
    table = write_parquet(tmp_path / "a.parquet", [{"image": picture()}])
    with pytest.raises(ConfigError, match="has no column 'words'"):
        opened(table, captions=OPTIONAL, caption_column="words")
    with pytest.raises(ConfigError, match="has no column 'text'"):
        opened(table)
    with pytest.raises(ConfigError, match="let a model write captions: data.captioning.model"):
        opened(write(tmp_path / "bare", {"a.png": picture()}))


def test_rules_with_optional_captions_are_scanned_anew_and_others_as_before(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(), "a.txt": "a cat"})
    data = configured(tmp_path).data
    plain, optional = opened(tmp_path), opened(tmp_path, captions=OPTIONAL)
    assert plain.digest != optional.digest
    assert entries([plain], data)[0].file != entries([optional], data)[0].file
    assert repr(plain.captions) == "CaptionRules(lines='whole', repaired=False)"


def configured(source: Path, *overrides: str) -> Config:
    cleaning = ["min_side=1", "min_contrast=null", "max_dark=null", "max_bright=null"]
    return load_config(
        Path("configs/demo.yaml"),
        [
            f"data.source={source}",
            f"storage={source.parent / 'runs'}",
            *(f"data.cleaning.{each}" for each in cleaning),
            *overrides,
        ],
    )


def test_the_configuration_decides_which_captions_are_optional(tiny_model: Path, tmp_path: Path) -> None:
    def rules(*overrides: str) -> CaptionRules:
        return caption_rules(configured(tmp_path, f"model.base={tiny_model}", *overrides))

    assert type(rules()) is CaptionRules
    model, each = "data.captioning.model=some", "data.caption_lines=each"
    assert rules(model, each) == OptionalCaptions("each", repaired=True)
    assert rules(model, each, "data.captioning.pictures=all") == OptionalCaptions("whole", repaired=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trigger=sks", "trigger: sks changes nothing without captioning.model; remove it"),
        ("prompt=hello", "prompt: hello changes nothing without captioning.model"),
        ('model=""', "captioning.model: String should have at least 1"),
        ("max_tokens=4", "max_tokens"),
        ("pictures=some", "pictures"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(tmp_path, f"data.captioning.{override}")


def test_without_a_model_digests_are_as_before_and_with_one_rows_decide(tmp_path: Path) -> None:
    plain, other = (
        configured(tmp_path, *given) for given in ((), ("data.captioning={model: x, trigger: sks}",))
    )
    assert "captioning" not in plain.data.affecting(*type(plain.data).effects("source"))
    assert _inputs(plain, [], "e") == _inputs(plain, [], "e", captions="")
    assert len({_inputs(each, [], "e", of) for each in (plain, other) for of in ("", "m", "n")}) == 6
    assert _content(plain, [], "e") == _content(other, [], "e")


@pytest.mark.parametrize(
    ("given", "text", "expected"),
    [
        ({}, "a cat", "a cat"),
        ({"prefix": "a photo of"}, "a cat", "a photo of a cat"),
        ({"prefix": "a photo of"}, "A photo of a cat", "A photo of a cat"),
        ({"prefix": "a photo of"}, "a photo often seen", "a photo of a photo often seen"),
        ({"trigger": "sks"}, "a cat", "sks, a cat"),
        ({"trigger": "sks"}, "sks, a cat", "sks, a cat"),
        ({"trigger": "sks"}, "sksy cat", "sks, sksy cat"),
        ({"trigger": "c++ (x)", "prefix": "art of"}, "a cat", "c++ (x), art of a cat"),
    ],
)
def test_prefix_and_trigger_stand_before_a_caption_once(
    given: dict[str, str], text: str, expected: str
) -> None:
    settings = CaptioningConfig.model_validate({"model": "some", **given})
    assert composed(settings, text) == expected
    if len(given) == 1:
        assert composed(settings, expected) == expected


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blip(tmp_path_factory.mktemp("captioner"))


def with_duplicates(config: Config, mode: str) -> Config:
    """The configuration, in which duplicates are looked for or not: that takes a cluster."""
    cleaning = config.data.cleaning.model_copy(update={"duplicates": mode})
    return config.model_copy(update={"data": config.data.model_copy(update={"cleaning": cleaning})})


class Scanned:
    """A scanned and decided set, whose captions are already in the storage."""

    def __init__(self, config: Config, source: Source) -> None:
        self.config, self.source = config, source
        self.dataset = RunFolder.of(config).dataset
        self.index = self.dataset.child(INDEX)
        self.found = entries([source], config.data)
        for entry in self.found:
            rows = [scan_sample(sample, config.data) for sample in source.read(entry.piece)]
            buffer = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer)
            self.index.write_bytes(entry.file, buffer.getvalue())
        self.before = decide(with_duplicates(config, "ignore"), self.found, self.index, self.dataset)

    def keep(self, captions: dict[bytes, str]) -> None:
        cut = {content_digest(data): Caption(text, text.endswith("of")) for data, text in captions.items()}
        keep_captions(captions_folder(self.config, "model"), cut)

    def write(self) -> tuple[list[Entry], Decisions]:
        """Apply the kept captions; no Ray runs here, so that a missing one is an error."""
        return write_captions(
            self.config,
            [self.source],
            self.found,
            self.index,
            self.before,
            "model",
            self.dataset,
            lambda done, whole: None,
        )

    def rows(self, found: list[Entry]) -> list[tuple[str, str]]:
        tables = read_index(self.index, [entry.file for entry in found], ["name", "text"])
        return [(row["name"], row["text"]) for table in tables for row in table.to_pylist()]

    def listed(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.dataset.read_text(CAPTIONS).splitlines()]


Scan = Callable[..., Scanned]


@pytest.fixture
def scan(captioner: Path, tmp_path: Path) -> Scan:
    def scanned(folder: Path, *overrides: str, rules: OptionalCaptions = OPTIONAL) -> Scanned:
        config = configured(
            folder,
            f"data.captioning.model={captioner}",
            "data.cleaning.duplicates=drop",
            "data.repair_captions=false",
            *overrides,
        )
        return Scanned(config, opened(folder, captions=rules))

    return scanned


def noise(number: int) -> bytes:
    """The file of a picture that no other number's resembles."""
    from PIL import Image

    buffer = io.BytesIO()
    values = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(values).resize((48, 40), Image.Resampling.BICUBIC).save(buffer, format="PNG")
    return buffer.getvalue()


def test_pictures_without_captions_get_one_and_the_file_can_be_edited_and_read_again(
    scan: Scan, tmp_path: Path, captioner: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files: dict[str, bytes | str] = {f"{n}.png": noise(n) for n in range(4)}
    folder = write(tmp_path / "set", {**files, "2.txt": "my own", "twin.png": noise(0)})
    scanned = scan(folder, "data.captioning.trigger=sks", "data.captioning.prefix=a photo of")
    scanned.keep({noise(0): "a cat", noise(1): "", noise(3): "a photo of"})
    found, decided = scanned.write()
    assert dict(scanned.rows(found)) == {
        "0.png": "sks, a photo of a cat",
        "1.png": "",
        "2.png": "my own",
        "3.png": "sks, a photo of",
        "twin.png": "sks, a photo of a cat",
    }
    assert dict(scanned.rows(scanned.found))["0.png"] == ""  # the scan itself stays
    assert decided.reasons.tolist() == ["", "empty_caption", "", "", "duplicate"]
    assert decided.rejected == {"empty_caption": 1} and decided.duplicates == {"duplicate": 1}
    assert (decided.num_captions, decided.num_written) == (3, 2)
    out = capsys.readouterr().out
    assert "captioned 3 pictures of 5 (0 now, 3 before), e.g. 0.png: 'sks, a photo of a cat'" in out
    assert "wrote nothing for 1 pictures, which are rejected, e.g. 1.png" in out
    assert "1 written captions are as long as data.captioning.max_tokens allows (128)" in out
    by = {"written_by": str(captioner)}
    assert scanned.listed() == [
        {"file_name": "0.png", "text": "sks, a photo of a cat", **by},
        {"file_name": "2.png", "text": "my own"},
        {"file_name": "3.png", "text": "sks, a photo of", **by},
    ]
    (folder / "2.txt").unlink()
    (folder / "metadata.jsonl").write_text(scanned.dataset.read_text(CAPTIONS).replace("a cat", "my cat"))
    again = {sample.name: sample.text for sample in samples(opened(folder))}
    assert again["0.png"] == "sks, a photo of my cat" and again["2.png"] == "my own"


def test_all_pictures_get_one_and_the_sources_captions_stay_beside_it(
    scan: Scan, tmp_path: Path, captioner: Path
) -> None:
    rows = [
        {"file_name": "0.png", "text": "one\nline more"},
        {"file_name": "0.png", "text": "two"},
        {"file_name": "1.png"},
    ]
    files: dict[str, bytes | str] = {f"{n}.png": noise(n) for n in range(2)}
    folder = write(tmp_path / "set", {**files, "metadata.jsonl": lines(rows)})
    scanned = scan(folder, "data.captioning.pictures=all")
    scanned.keep({noise(0): "a cat", noise(1): "a dog"})
    found, decided = scanned.write()
    assert scanned.rows(found) == [("0.png", "a cat"), ("0.png", "a cat"), ("1.png", "a dog")]
    assert decided.reasons.tolist() == ["", "duplicate", ""]
    assert decided.matches.of(0, 3).tolist() == [-1, 0, -1]
    assert (decided.num_captions, decided.num_written, decided.num_of_lines) == (2, 2, 0)
    by = {"written_by": str(captioner)}
    assert scanned.listed() == [
        {"file_name": "0.png", "text": "a cat", **by, "source_text": "one\nline more"},
        {"file_name": "1.png", "text": "a dog", **by},
    ]


def test_edited_captions_stay_instead_of_the_models_and_the_sources(
    scan: Scan, tmp_path: Path, captioner: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files: dict[str, bytes | str] = {f"{n}.png": noise(n) for n in range(4)}
    folder = write(tmp_path / "set", {**files, "2.txt": "my own"})
    scanned = scan(folder, "data.captioning.trigger=sks")
    scanned.keep({noise(0): "a cat", noise(1): ""})
    by = {"written_by": str(captioner)}
    edits = [
        {"file_name": "0.png", "text": "sks,\u2028 the cat's\nball", **by, "edited": True},
        {"file_name": "1.png", "text": "a dog", "edited": True},
        {"file_name": "2.png", "text": "our own", "source_text": "my own", "edited": True},
        {"file_name": "3.png", "text": "a bee", **by, "edited": True},
        {"file_name": "gone.png", "text": "a bee", "edited": True},
        {"file_name": "1.png", "text": " ", "edited": True},
    ]
    written = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in edits)
    scanned.dataset.write_text(CAPTIONS, written)
    found, decided = scanned.write()  # picture 3 needs no caption of the model's
    expected = ["sks,\u2028 the cat's\nball", "a dog", "our own", "a bee"]
    assert [text for _, text in scanned.rows(found)] == expected
    assert decided.reasons.tolist() == [""] * 4 and decided.num_written == 0
    assert "4 captions edited in captions.jsonl, 1 edits fit no row" in capsys.readouterr().out
    kept = scanned.dataset.read_text(CAPTIONS)
    scanned.write()
    assert scanned.dataset.read_text(CAPTIONS) == kept
    read = edited_captions(scanned.config, scanned.dataset)
    assert read[0, "2.png", "my own"] == "our own" and len(read) == 4
    assert edits_digest(read) != edits_digest({}) == ""
    plain = configured(folder)
    assert edited_captions(plain, scanned.dataset) == {}
    scanned.dataset.write_text(CAPTIONS, '{"file_name": "0.png", "edited": true}\n')
    with pytest.raises(ConfigError, match="captions.jsonl: a line is no object with file_name and text"):
        edited_captions(scanned.config, scanned.dataset)


def test_rows_of_one_picture_are_named_as_their_file(scan: Scan, tmp_path: Path) -> None:
    folder = write(
        tmp_path / "set", {"0.png": noise(0), "0.txt": "one\ntwo", "1.png": noise(1), "2.png": noise(2)}
    )
    write(folder, {"2.txt": "plain: line 1"})
    scanned = scan(folder, rules=OptionalCaptions("each"))
    scanned.keep({noise(1): "a dog"})
    scanned.write()
    named = [(line["file_name"], line["text"]) for line in scanned.listed()]
    assert named == [("0.png", "one"), ("0.png", "two"), ("1.png", "a dog"), ("2.png", "plain: line 1")]


def test_written_captions_are_repaired_where_the_bases_are(scan: Scan, tmp_path: Path) -> None:
    folder = write(tmp_path / "set", {"0.png": noise(0)})
    scanned = scan(folder, rules=OptionalCaptions(repaired=True))
    scanned.keep({noise(0): "the cat\N{RIGHT SINGLE QUOTATION MARK}s ball"})
    assert scanned.rows(scanned.write()[0]) == [("0.png", "the cat's ball")]


def test_prompts_and_sizes_have_captions_of_their_own_and_triggers_do_not(scan: Scan, tmp_path: Path) -> None:
    folder = write(tmp_path / "set", {"0.png": noise(0)})

    def uri(*overrides: str) -> str:
        return captions_folder(scan(folder, *overrides).config, "model").uri

    others = ["data.captioning.prompt=a photo", "data.captioning.max_side=64", "data.captioning.max_tokens=9"]
    others += ["data.background=black", "data.encode_precision=bf16"]
    assert len({uri(), *(uri(other) for other in others)}) == 6
    same = ["data.captioning.trigger=sks", "data.captioning.prefix=x", "data.resolution=128"]
    assert {uri(each) for each in [*same, "data.encode_batch_size=1"]} == {uri()}
    assert captions_folder(scan(folder).config, "other").uri != uri()


def test_parts_have_the_captions_of_the_index_not_those_of_the_source(scan: Scan, tmp_path: Path) -> None:
    folder = write(tmp_path / "set", {"0.png": noise(0), "1.png": noise(1), "1.txt": "my own"})
    scanned = scan(folder)
    scanned.keep({noise(0): "a cat"})
    found, decided = scanned.write()
    [part] = plan_parts(scanned.config, found, decided, [(32, 32)])
    assert part.texts == ["a cat", "my own"]
    read = {(0, sample.row): sample for sample in samples(scanned.source)}
    assert _gathered(part, read)["text"] == ["a cat", "my own"]


def test_pictures_are_shown_upright_on_the_background_and_not_larger_than_asked(tmp_path: Path) -> None:
    from PIL import Image

    image = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 20, 20))  # transparent on the left
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(buffer, format="PNG", exif=exif)
    data = buffer.getvalue()
    config = configured(tmp_path, "data.captioning={model: x, max_side: 20}", "data.background=blue")
    row = {"data": data, "name": "a.png", "digest": content_digest(data)}
    shown = ShowPictures(config)(row)
    pixels = np.frombuffer(shown["pixels"], np.uint8).reshape(shown["height"], shown["width"], 3)
    assert pixels.shape == (20, 10, 3)
    assert pixels[2, 5].tolist() == [0, 0, 255] and pixels[-3, 5].tolist() == [255, 0, 0]
    with pytest.raises(ChangedFile, match="a.png: changed during prepare"):
        ShowPictures(config)(row | {"digest": "other"})


# Corrections on the page of `ray_jobs.captions`


def listed(captions: Captions) -> list[tuple[str, str]]:
    return [(item.name, item.text) for item in captions.items]


def test_written_captions_are_corrected_in_the_runs_list_and_read_again(
    scan: Scan,
    tmp_path: Path,
) -> None:
    files: dict[str, bytes | str] = {f"{n}.png": noise(n) for n in range(4)}
    folder = write(tmp_path / "set", {**files, "2.txt": "my own", "4.png": b"no picture"})
    scanned = scan(folder)
    with pytest.raises(
        ConfigError, match="has no captions of these pictures yet; run python -m ray_jobs.prep"
    ):
        open_captions(scanned.config)
    scanned.keep({noise(0): "a cat", noise(1): "", noise(3): "a bee"})
    write_findings(scanned.write()[1], scanned.config, scanned.dataset)
    captions = open_captions(scanned.config)
    assert listed(captions) == [("0.png", "a cat"), ("1.png", ""), ("2.png", "my own"), ("3.png", "a bee")]
    for number, text in enumerate(["the cat", "a dog", "our own"]):
        captions.save(captions.items[number], text)
    again = open_captions(scanned.config)
    assert {item.name: (item.text, item.is_edited) for item in again.items} == {
        "0.png": ("the cat", True),
        "1.png": ("a dog", True),
        "2.png": ("our own", True),
        "3.png": ("a bee", False),
    }
    rewritten, decided = scanned.write()
    assert [text for _, text in scanned.rows(rewritten)] == ["the cat", "a dog", "our own", "a bee", ""]
    assert decided.reasons.tolist()[:4] == [""] * 4
    assert listed(open_captions(scanned.config)) == listed(again)
    with held(RunFolder.of(scanned.config).root), pytest.raises(ConfigError, match="is in use by process"):
        again.save(again.items[3], "a wasp")
    with pytest.raises(ConfigError, match="changed meanwhile"):  # by `scanned.write`
        captions.save(captions.items[3], "a wasp")
    assert open_captions(scanned.config).items[3].text == "a bee"
    folder.joinpath("5.png").write_bytes(noise(5))
    with pytest.raises(ConfigError, match="has no captions of these pictures yet"):
        open_captions(scanned.config)


def test_pictures_in_tar_files_are_read_some_at_a_time(scan: Scan, tmp_path: Path) -> None:
    write_tar(tmp_path / "set" / "s.tar", {f"{n}.png": noise(n) for n in range(3)})
    scanned = scan(tmp_path / "set")
    scanned.keep({noise(n): f"a {n}" for n in range(3)})
    write_findings(scanned.write()[1], scanned.config, scanned.dataset)
    review = Review(scanned.config)
    assert [item.text for item in review.captions.items] == ["a 0", "a 1", "a 2"]
    assert all((review.pictures.jpeg(n, 320) or b"").startswith(b"\xff\xd8") for n in range(3))
    assert list(review.pictures._kept) == [0, 1, 2]
    (tmp_path / "set" / "s.tar").unlink()
    assert review.pictures.jpeg(1, 320)  # read with the first
    with pytest.raises(ConfigError, match="lie in tables or tar files, which other programs cannot show"):
        export(scanned.config, review.captions, "label-studio", str(tmp_path / "out.json"))
