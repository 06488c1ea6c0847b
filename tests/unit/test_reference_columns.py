"""Reference pictures come with the rows of every kind of source, and decide what a row is."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, DataConfig, SourceConfig
from ray_jobs.data.curation.scan import entries, scan_sample
from ray_jobs.data.curation.splits import content_digest
from ray_jobs.data.encoding.encoding import ChangedFile, Decode, EncodePart, reference_image
from ray_jobs.data.encoding.plan import PlannedPart, RowKeys
from ray_jobs.data.encoding.tensors import read_tensors
from ray_jobs.data.feeding.streaming import DecodeBatch, EncodeBatch, unpack
from ray_jobs.data.references import check_references, suited_to_references
from ray_jobs.data.sources.samples import Source
from ray_jobs.diffusion.families import FAMILIES
from ray_jobs.diffusion.families.text import LENGTHS, MASK, NULL
from ray_jobs.diffusion.sampling import encode_prompts, null_captions
from ray_jobs.planning.checks import check_stages
from ray_jobs.planning.footprint import blank_conditions
from ray_jobs.training.batch import PAINTED, InputMaker, Piece
from ray_jobs.training.rehearsal import blank
from ray_jobs.training.setup import build_model
from ray_jobs.weights.encoders import Encoders
from ray_jobs.weights.loading import load_pipeline
from tests.tiny_models import write as write_model
from tests.unit.test_sources import (
    dreambooth,
    label_studio,
    lines,
    opened,
    picture,
    problems,
    samples,
    write,
    write_parquet,
    write_tar,
)


def image_folder(folder: Path) -> Source:
    rows = [
        {"file_name": f"{n}.png", "text": f"do {n}", "before": f"b/{n}.png", "mask": f"m/{n}.png"}
        for n in range(3)
    ]
    del rows[1]["mask"]
    pictures: dict[str, bytes | str] = {}
    for n in range(3):
        pictures |= {
            f"x/{n}.png": picture(n),
            f"x/b/{n}.png": picture(10 + n),
            f"x/m/{n}.png": picture(20 + n),
        }
    return opened(
        write(folder, {"x/metadata.jsonl": lines(rows), **pictures}), reference_columns=["before", "mask"]
    )


def parquet(folder: Path) -> Source:
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows: list[dict[str, Any]] = [
        {
            "image": picture(n),
            "text": f"do {n}",
            "before": picture(10 + n),
            "mask": {"bytes": picture(20 + n)},
        }
        for n in range(3)
    ]
    rows[1]["mask"] = None
    path = write_parquet(folder / "a.parquet", rows, mask=struct)
    return opened(path, reference_columns=["before", "mask"])


def captions(folder: Path) -> Source:
    files: dict[str, bytes | str] = {}
    for n in range(3):
        files |= {f"{n}.png": picture(n), f"{n}.txt": f"do {n}", f"before/{n}.jpg": picture(10 + n)}
        files |= {} if n == 1 else {f"mask/{n}.png": picture(20 + n)}
    return opened(write(folder, files), reference_columns=["before", "mask"])


def webdataset(folder: Path) -> Source:
    files: dict[str, bytes | str] = {}
    for n in range(3):
        files |= {f"{n}.before.png": picture(10 + n), f"{n}.png": picture(n), f"{n}.txt": f"do {n}"}
        files |= {} if n == 1 else {f"{n}.mask.png": picture(20 + n)}
    return opened(write_tar(folder / "a.tar", files), reference_columns=["before", "mask"])


ELEMENTS = ["references[0]", "references[1]"]


def list_of_names(folder: Path) -> Source:
    """References of a row in one field."""
    files: dict[str, bytes | str] = {}
    for n in range(3):
        files |= {f"{n}.png": picture(n), f"b/{n}.png": picture(10 + n), f"m/{n}.png": picture(20 + n)}
    rows: list[dict[str, Any]] = [
        {"file_name": f"{n}.png", "text": f"do {n}", "references": [f"b/{n}.png", f"m/{n}.png"]}
        for n in range(3)
    ]
    rows[1]["references"].pop()
    return opened(write(folder, {"metadata.jsonl": lines(rows), **files}), reference_columns=ELEMENTS)


def rows_of_lists() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"image": picture(n), "text": f"do {n}", "references": [picture(10 + n), picture(20 + n)]}
        for n in range(3)
    ]
    rows[1]["references"].pop()
    return rows


def parquet_lists(folder: Path) -> Source:
    return opened(write_parquet(folder / "a.parquet", rows_of_lists()), reference_columns=ELEMENTS)


def arrow_lists(folder: Path) -> Source:
    """As the datasets library writes a list of images."""
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = rows_of_lists()
    for row in rows:
        row["references"] = [{"bytes": each, "path": None} for each in row["references"]]
    schema = pa.schema({"image": pa.binary(), "text": pa.string(), "references": pa.large_list(struct)})
    with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        stream.write_table(pa.Table.from_pylist(rows, schema))
    return opened(folder, reference_columns=ELEMENTS)


LISTS = [list_of_names, parquet_lists, arrow_lists]
KINDS = [image_folder, parquet, captions, webdataset, *LISTS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_its_references_or_says_which_is_missing(kind: Any, tmp_path: Path) -> None:
    source = kind(tmp_path)
    found = samples(source)
    assert [(s.text, s.data, s.further) for s in (found[0], found[2])] == [
        (f"do {n}", picture(n), (picture(10 + n), picture(20 + n))) for n in (0, 2)
    ]
    assert len(found) == 3 and not found[1].further and not found[1].data
    assert sorted(problems(source).values()) == ["", "", "incomplete"]
    missing = "references[1]: " if kind in LISTS else "mask: "
    assert found[1].problem and found[1].problem.detail.startswith(missing)


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_is_named_element_by_element(kind: Any, tmp_path: Path) -> None:
    kind(tmp_path)
    path = next(tmp_path.glob("*.parquet"), tmp_path)
    with pytest.raises(ConfigError, match=r"'references' is a list; name its elements .*references\[0\]"):
        samples(opened(path, reference_columns=["references"]))
    with pytest.raises(ConfigError, match=r"'text' (is string, not a list|must be a list of file names)"):
        samples(opened(path, reference_columns=["text[0]"]))
    with pytest.raises(ConfigError, match=r"(no column|no line has a field) 'other"):
        samples(opened(path, reference_columns=["other[0]"]))
    if path.is_file():  # such a name of a column comes first
        rows = [row | {"references[0]": picture(9)} for row in rows_of_lists()]
        named = opened(write_parquet(tmp_path / "b.parquet", rows), reference_columns=ELEMENTS)
        assert samples(named)[0].further == (picture(9), picture(20))


@pytest.mark.parametrize("kind", KINDS)
def test_references_are_scanned_with_their_rows(kind: Any, tmp_path: Path) -> None:
    source, config = kind(tmp_path), DataConfig(source="x", resolution=8)
    row = scan_sample(samples(source)[0], config)
    assert not row["reason"] and isinstance(row["further"], list) and len(row["further"]) == 2
    broken = scan_sample(
        samples(source)[0].__class__(**{**vars(samples(source)[0]), "further": (b"GIF",)}), config
    )
    assert broken["reason"] == "incomplete" and str(broken["detail"]).startswith("reference 1: ")


def test_another_choice_of_references_is_scanned_anew(tmp_path: Path) -> None:
    first = image_folder(tmp_path)
    plain, one, other = (
        entries([opened(tmp_path, reference_columns=columns)], DataConfig(source="x"))[0].file
        for columns in ([], ["before"], ["mask"])
    )
    assert len({plain, one, other, entries([first], DataConfig(source="x"))[0].file}) == 4


def test_a_row_with_another_reference_is_encoded_anew(tmp_path: Path) -> None:
    kontext, fill = (write_model(f"Flux{name}Pipeline", tmp_path / name) for name in ("Kontext", "Fill"))
    keys = RowKeys(edits(kontext, sources=[{"path": "x"}]))
    one, other, none = (
        keys.key("a", "text", (8, 8), 0, "train", False, references) for references in (("b",), ("c",), ())
    )
    assert len({one, other, none}) == 3
    # Of one picture a reference and a mask store other columns, and so do models with the same encoders.
    kinds = [
        edits(base, sources=[{"path": "x", **column}])
        for base, column in (
            (kontext, {"reference_columns": ["b"]}),
            (kontext, {"mask_column": "b"}),
            (fill, {"mask_column": "b"}),
        )
    ]
    found = {RowKeys(each).key("a", "text", (8, 8), 0, "train", False, ("b",)) for each in kinds}
    assert len(found | {one}) == 4
    assert none == keys.key("a", "text", (8, 8), 0, "train", False)


@pytest.mark.parametrize("kind", [dreambooth, label_studio])
def test_kinds_without_references_refuse_them(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="reference_columns, control_column, mask_column: the pictures of .* have no others"
    ):
        opened(kind(tmp_path), reference_columns=["before"])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (image_folder, "no line has a field 'after' .*reference_columns"),
        (parquet, "no column 'after' .*reference_columns"),
        (captions, "no pictures in after/, which reference_columns, control_column or mask_column names"),
    ],
)
def test_a_wrong_name_is_told_before_anything_is_read(kind: Any, message: str, tmp_path: Path) -> None:
    kind(tmp_path)
    path = next(tmp_path.glob("*.parquet"), tmp_path)
    with pytest.raises(ConfigError, match=message):
        opened(path, reference_columns=["after"])


def masked(folder: Path, *masks: Image.Image, **given: Any) -> list[dict[str, object]]:
    """The index rows of pictures of 8 x 8 pixels with these masks."""
    rows = [{"file_name": f"{n}.png", "text": "a", "mask": f"m/{n}.png"} for n in range(len(masks))]
    files: dict[str, bytes | str] = {f"{n}.png": picture(n) for n in range(len(masks))}
    write(folder, {"metadata.jsonl": lines(rows), **files})
    (folder / "m").mkdir()
    for n, mask in enumerate(masks):
        mask.save(folder / "m" / f"{n}.png")
    source = opened(folder, mask_column="mask", **given)
    data = DataConfig(sources=[SourceConfig(path=str(folder), mask_column="mask")])
    return [scan_sample(sample, data) for sample in samples(source)]


def test_a_mask_has_the_size_of_its_picture_and_something_white(tmp_path: Path) -> None:
    white, black = Image.new("L", (8, 8), 255), Image.new("L", (8, 8))
    small, bits, ones = (Image.new("L", (8, 4), 255), Image.new("1", (8, 8), 1), Image.new("L", (8, 8), 1))
    painted = Image.new("RGBA", (8, 8), (255, 255, 255, 0))  # to be painted on
    found = masked(tmp_path, white, black, small, bits, ones, painted, Image.new("RGBA", (8, 8), "white"))
    reasons = ["", "empty_mask", "mask_of_another_size", "", "empty_mask", "transparent_mask", ""]
    assert [row["reason"] for row in found] == reasons
    assert found[2]["detail"] == "the mask has 8 x 4 and the picture 8 x 8 pixels"
    assert found[4]["detail"] == "the mask's brightest pixel has 1 of 255"


def test_a_mask_is_cut_and_turned_as_its_picture_and_keeps_its_colours() -> None:
    augmentation = {
        "flip": 0.5,
        "crop": 0.9,
        "scale": 0.9,
        "rotate": 0.5,
        "colour": 0.9,
        "max_brightness": 0.9,
    }
    data = {"sources": [{"path": "x", "mask_column": "mask"}], "resolution": 32, "augmentation": augmentation}
    given = {"name": "x", "data": data, "model": {"base": "x"}}
    config = Config.model_validate(given | {"search": {"learning_rates": [1e-4], "ladder": [1]}})
    drawing = Image.new("RGB", (60, 40))
    drawing.paste((255, 255, 255), (10, 5, 30, 25))
    buffer = io.BytesIO()
    drawing.save(buffer, format="PNG")
    decode = Decode(config)
    for draw in range(8):
        own = decode.fit(decode.open(buffer.getvalue(), (32, 32)), "train", (32, 32), "abc", draw).pixels
        mask = decode.mask(buffer.getvalue(), "train", (32, 32), "abc", draw)
        assert mask.shape == (32, 32) and mask.max() == 255
        bright = own.astype(int).sum(axis=2)
        assert np.corrcoef(bright.ravel(), mask.ravel().astype(int))[0, 1] > 0.95


@pytest.mark.parametrize("name", ["FluxKontextPipeline", "FluxFillPipeline", "QwenImageEditPlusPipeline"])
def test_rows_that_are_streamed_have_the_references_and_masks_of_those_that_are_stored(
    tmp_path: Path, name: str
) -> None:
    base = write_model(name, tmp_path / "base")
    paints = name == "FluxFillPipeline"
    sources = [{"path": "x", "reference_columns": [] if paints else ["before"], "mask_column": "mask"}]
    size = None if paints else 32
    config = edits(base, sources=sources, encode_dtype="fp32", reference_resolution=size)
    files = [_png(number) for number in range(6)]
    rows = [0, 2, 4]  # each followed by its reference, and with a mask
    looked_at = [[] if paints else [files[n + 1]] for n in rows]
    own, further = [files[n] for n in rows], [[*looked_at[n // 2], _png(n, "L")] for n in rows]
    digests = [[content_digest(file) for file in each] for each in further]
    part = PlannedPart(
        "train",
        0,
        0,
        0,
        (64, 64),
        np.zeros(3, np.int32),
        np.arange(3, dtype=np.int32),
        np.zeros(3, np.int16),
        np.ones(3, bool),
        [content_digest(file) for file in own],
        [bytes([n] * 16) for n in range(3)],
        "a.parquet",
        reference_size=(size, size) if size else None,
        has_masks=True,
        further=[tuple(each) for each in digests],
    )
    gathered = {
        "part": part,
        "data": own,
        "text": ["a"] * 3,
        "name": ["x"] * 3,
        "further": further,
        "picture": [0, 1, 2],
    }
    decoded = Decode(config)(gathered)
    encoder = EncodePart(Storage.open(str(tmp_path / "cache")), config, {})
    pixels = np.frombuffer(decoded["pixels"], np.uint8).reshape(3, 64, 64, 3)
    table = encoder._table(part, decoded, pixels, [0, 1, 2])
    names = ["latents_mean", "mask", *(PAINTED if paints else ("reference_0",))]
    seen = FAMILIES[name].text.sees_references
    names += [prefix + column for prefix in ("", NULL) for column in FAMILIES[name].text.embeds if seen]
    stored = read_tensors(table, names)
    assert stored["mask"].shape == (3, 1, 8, 8)
    assert 0 < stored["mask"].min() < stored["mask"].max() <= 1
    shown = [Image.open(io.BytesIO(each)) for each in table[reference_image(0)].to_pylist()]
    kind = ((64, 64), "RGBA") if paints else ((32, 32), "RGB")
    assert [(each.size, each.mode) for each in shown] == [kind] * 3
    if paints:
        painted = stored["mask_pixels"]
        assert painted.shape == (3, 1, 64, 64) and painted.dtype == bool and 0.1 < painted.mean() < 0.9
        colours = np.stack([np.array(each) for each in shown])
        assert ((colours[..., 3] == 0) == painted[:, 0]).all() and (
            colours[painted[:, 0]][:, :3] == 128
        ).all()
        assert (colours[~painted[:, 0]][:, :3] == pixels[~painted[:, 0]]).all()
    else:
        assert stored["reference_0"].shape == (3, 4, 4, 4)
    row = {
        "rank": 0,
        "step": 1,
        "epoch": 0,
        "bucket": "64x64",
        "source": 0,
        "data": own,
        "text": ["a"] * 3,
        "name": ["x"] * 3,
        "digest": part.digests,
        "further": further,
        "further_digests": digests,
        "reference_size": part.reference_size,
    }
    batch = DecodeBatch(config)(row)
    [(_, _, streamed)] = unpack(
        EncodeBatch(config, tuple(names))({name: np.array([value], object) for name, value in batch.items()})
    )
    for name in names:
        assert np.allclose(streamed[name], stored[name], atol=1e-5), name
    if seen:
        rows_of_training(base, config, {each: torch.from_numpy(stored[each]) for each in names}, shown)
    changed = [[*others, files[0]] for *others, _ in further]
    with pytest.raises(ChangedFile, match="a reference, control image or mask changed"):
        Decode(config)(gathered | {"further": changed})


def rows_of_training(
    base: Path, config: Config, rows: dict[str, torch.Tensor], shown: Sequence[Image.Image]
) -> None:
    """Captions come with the pictures of their own rows, and so do dropped ones."""
    pipeline, model = build_model(config)
    whole = load_pipeline(str(base))
    pictures = [torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1) for each in shown])]
    captions = encode_prompts(whole, ["a"] * 3, pictures=pictures)
    null = null_captions(whole, pictures=pictures)
    assert not torch.allclose(captions["prompt_embeds"][0], captions["prompt_embeds"][1], atol=1e-3)
    rows |= {"latents_logvar": torch.zeros_like(rows["latents_mean"])}
    piece = Piece(rows, [0, 1, 2], [1 / 3] * 3)
    empty = Encoders(str(base)).encode_captions([""], negative=True)
    for dropout, expected in ((0.0, captions), (1.0, null)):
        maker = InputMaker(
            pipeline.vae,
            model,
            empty,
            torch.device("cpu"),
            seed=0,
            caption_dropout=dropout,
            num_references=1,
            has_masks=True,
        )
        assert NULL + MASK in maker.columns and set(maker.columns) <= rows.keys()
        inputs, _ = maker.make(piece, 1)
        conditions = inputs["conditions"]
        for column, each in expected.items():
            assert torch.allclose(conditions[column].float(), each.float(), atol=1e-5), column
        assert conditions[LENGTHS].tolist() == expected[MASK].sum(dim=1).tolist()
        assert torch.isfinite(model(**inputs)).all()
        planned = blank_conditions(config, model.family, model.denoiser)
        assert planned[MASK].shape[1] == conditions[MASK].shape[1]
        blank_rows = blank(maker, (4, 8, 8), 2, [(4, 4, 4)]).rows
        assert blank_rows[MASK].shape[1] == conditions[MASK].shape[1]
        assert torch.isfinite(model(**maker.make(Piece(blank_rows, [0, 1], [1.0] * 2), 0)[0])).all()


def _png(seed: int, mode: str = "RGB") -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).resize((80, 80)).convert(mode).save(buffer, format="PNG")
    return buffer.getvalue()


def edits(base: Path, **data: Any) -> Config:
    return Config.model_validate(
        {
            "name": "edits",
            "data": {"sources": [{"path": "x", "reference_columns": ["before"]}], "resolution": 64, **data},
            "model": {"base": str(base)},
            "search": {"learning_rates": [1e-4], "ladder": [1]},
        }
    )


def test_settings_suit_references_unless_given(tmp_path: Path) -> None:
    suited = suited_to_references(edits(tmp_path))
    assert (suited.search.rank_by, suited.data.cleaning.duplicates) == ("target", "keep")
    given = suited_to_references(edits(tmp_path, cleaning={"duplicates": "drop"}))
    assert given.data.cleaning.duplicates == "drop"
    painter = write_model("FluxFillPipeline", tmp_path / "painter")
    suited = suited_to_references(edits(painter, sources=[{"path": "x", "mask_column": "mask"}]))
    assert (suited.search.rank_by, suited.data.cleaning.duplicates) == ("target", "keep")
    assert suited.evaluate.guidance_scale == 30
    plain = {
        "name": "x",
        "data": {"source": "x"},
        "model": {"base": "x"},
        "search": {"learning_rates": [1e-4], "ladder": [1], "rank_by": "target"},
    }
    with pytest.raises(ConfigError, match="search.rank_by: target is for models that edit"):
        suited_to_references(Config.model_validate(plain))
    with pytest.raises(ValueError, match="name as many reference_columns in each"):
        edits(tmp_path, sources=[{"path": "x", "reference_columns": ["before"]}, {"path": "y"}])
    twice: tuple[dict[str, Any], ...] = (
        {"reference_columns": ["a", "a"]},
        {"reference_columns": ["a"], "mask_column": "a"},
    )
    for columns in twice:
        with pytest.raises(ValueError, match="control_column, mask_column: a is named twice"):
            edits(tmp_path, sources=[{"path": "x", **columns}])
    with pytest.raises(
        ValueError, match="reference_resolution: 32 changes nothing without reference_columns"
    ):
        DataConfig(source="x", reference_resolution=32)


def test_a_model_that_takes_fewer_references_is_told_before_anything_is_reserved(tmp_path: Path) -> None:
    editor, other = (
        write_model("FluxKontextPipeline", tmp_path / "a"),
        write_model("SanaPipeline", tmp_path / "b"),
    )
    check_references(edits(editor))
    seeing = write_model("QwenImageEditPlusPipeline", tmp_path / "d")
    check_references(edits(seeing, sources=[{"path": "x", "reference_columns": ["a", "b", "c"]}]))
    with pytest.raises(ConfigError, match="reference_columns is missing: .*EditPlusPipeline.* edits images"):
        check_references(edits(seeing, sources=[{"path": "x"}]))
    painter = write_model("FluxFillPipeline", tmp_path / "c")
    check_references(edits(painter, sources=[{"path": "x", "mask_column": "mask"}]))
    with pytest.raises(ConfigError, match="mask_column is missing: .*FluxFillPipeline.* paints into a mask"):
        check_references(edits(painter, sources=[{"path": "x"}]))
    with pytest.raises(ConfigError, match="1 reference images a row, but .*FluxFillPipeline.* takes none"):
        both = {"path": "x", "reference_columns": ["a"], "mask_column": "m"}
        check_references(edits(painter, sources=[both]))
    with pytest.raises(ConfigError, match="2 reference images a row, but .*FluxKontextPipeline.* at most 1"):
        check_references(edits(editor, sources=[{"path": "x", "reference_columns": ["a", "b"]}]))
    with pytest.raises(ConfigError, match="SanaPipeline.* takes none"):
        check_stages(edits(other))  # as the plan does
    with pytest.raises(ConfigError, match="data.reference_resolution: 50 is not a multiple"):
        check_references(edits(editor, reference_resolution=50))
