"""Control images come with the rows of a source, or are computed from their pictures."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, ControlConfig, DataConfig
from ray_jobs.data.control import check_control, control_digest
from ray_jobs.data.curation.scan import entries, scan_sample
from ray_jobs.data.curation.splits import content_digest
from ray_jobs.data.encoding.encoding import Decode, EncodePart, reference_image
from ray_jobs.data.encoding.plan import PlannedPart, RowKeys
from ray_jobs.data.encoding.tensors import read_tensors
from ray_jobs.data.feeding.streaming import DecodeBatch, EncodeBatch, unpack
from ray_jobs.pictures.edges import edges
from ray_jobs.pictures.poses import COLOURS, NUM_POINTS, Person, draw_poses, key_points, person_of_coco
from ray_jobs.weights.conditioner import (
    Depth,
    check_conditioner,
    conditioner_bytes,
    conditioner_digest,
    load_conditioner,
)
from tests.tiny_conditioners import depth_model, people_detector, pose_model, zoe_depth
from tests.tiny_models import write as write_model
from tests.unit.test_sources import opened, samples, write

SIDE = 64


def drawing(number: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A picture with a bright rectangle, at another place and of another colour for each number."""
    picture = Image.new("RGB", size, (40, 30 * number % 256, 60))
    scale = size[0] / 96
    left, top = (round(scale * each) for each in (20 + 6 * number, 10 + 3 * number))
    picture.paste(
        (200, 220 - 20 * number, 90), (left, top, left + round(32 * scale), top + round(24 * scale))
    )
    return picture


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def configured(base: Path | str, control: dict[str, Any] | None = None, **data: Any) -> Config:
    source = {"path": "x", **({"control_column": "canny"} if control is None else {})}
    return Config.model_validate(
        {
            "name": "x",
            "data": {
                "sources": [source],
                "resolution": SIDE,
                "encode_dtype": "fp32",
                "control": control or {},
                **data,
            },
            "model": {"base": str(base)},
            "train": {"method": "lora" if control == {} else "controlnet"},
            "search": {"learning_rates": [1e-4], "ladder": [1]},
        }
    )


def gathered(pictures: list[bytes], further: list[list[bytes]], **part: Any) -> dict[str, Any]:
    """What a `Gather` yields for pictures of one part."""
    count = len(pictures)
    planned = PlannedPart(
        "train",
        0,
        0,
        0,
        (SIDE, SIDE),
        np.zeros(count, np.int32),
        np.arange(count, dtype=np.int32),
        np.zeros(count, np.int16),
        np.array([n != 1 for n in range(count)]),
        [content_digest(each) for each in pictures],
        [bytes([n] * 16) for n in range(count)],
        "a.parquet",
        further=[tuple(map(content_digest, each)) for each in further] if further else None,
        brings_control=bool(further),
    )
    return {
        "part": replace(planned, **part),
        "data": pictures,
        "text": ["a"] * count,
        "name": ["x"] * count,
        "further": further or [[]] * count,
        "picture": list(range(count)),
    }


def streamed(config: Config, row: dict[str, Any], name: str) -> np.ndarray:
    """Return the column `name` of a gathered part's rows as they are streamed in epoch 0."""
    part: PlannedPart = row["part"]
    batch = {
        "rank": 0,
        "step": 1,
        "epoch": 0,
        "bucket": f"{SIDE}x{SIDE}",
        "source": 0,
        "data": row["data"],
        "text": row["text"],
        "name": row["name"],
        "digest": part.digests,
        "further": row["further"],
        "further_digests": part.further or [()] * len(row["data"]),
        "reference_size": None,
    }
    decoded = DecodeBatch(config)(batch)
    plain = {key: np.array([value], object) for key, value in decoded.items()}
    [(_, _, found)] = unpack(EncodeBatch(config, (name,))(plain))
    return found[name]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: write_model(name, folder / name) for name in ("StableDiffusionPipeline", "FluxPipeline")}


AUGMENTED = {"flip": 0.5, "crop": 0.9, "scale": 0.9, "colour": 0.9, "max_hue": 0.4}


@pytest.mark.parametrize("kind", ["brought", "edges", "depth"])
@pytest.mark.parametrize("base", ["StableDiffusionPipeline", "FluxPipeline"])
def test_stored_and_streamed_rows_have_the_control_image_of_their_picture(
    bases: dict[str, Path], base: str, kind: str, tmp_path: Path
) -> None:
    given: dict[str, dict[str, Any] | None] = {
        "brought": None,
        "edges": {"kind": "edges", "low_threshold": 40},
        "depth": {"kind": "depth", "model": str(depth_model(tmp_path / "depth"))},
    }
    config = configured(bases[base], given[kind], augmentation=AUGMENTED)
    pictures = [drawing(n) for n in range(3)]
    # Half the size, and of one colour, so that what is changed of colours shows.
    further = [[png(drawing(n, (48, 32)).convert("L"))] for n in range(3)] if kind == "brought" else []
    row = gathered([png(each) for each in pictures], further)
    decode, part = Decode(config), row["part"]
    decoded = decode(row)
    encoder = EncodePart(Storage.open(str(tmp_path / "cache")), config, {})
    pixels = np.frombuffer(decoded["pixels"], np.uint8).reshape(3, SIDE, SIDE, 3)
    table = encoder._table(part, decoded, pixels, [0, 1, 2])
    [stored] = read_tensors(table, ["control"]).values()

    expected, shown = [], []
    for n, picture in enumerate(pictures):
        own = further[n][0] if further else png(picture)
        fitted = decode.open(own, part.bucket)
        plain = [
            decode.fit(fitted, split, part.bucket, part.digests[n], 0, decode._uncoloured).pixels
            for split in ("train", "validation")
        ]
        if kind == "edges":
            plain = [edges(each, 40, 200) for each in plain]
        if kind == "depth":
            stack = torch.from_numpy(np.stack(plain)).permute(0, 3, 1, 2)
            plain = list(load_conditioner(config.data.control)(stack).permute(0, 2, 3, 1).numpy())
        expected.append(plain[0])
        shown.append(plain[1])
    if base == "StableDiffusionPipeline":
        assert stored.dtype == np.uint8 and stored.shape == (3, 3, SIDE, SIDE)
        apart = np.abs(stored.astype(int) - np.stack(expected).transpose(0, 3, 1, 2))
        assert apart.max() <= (1 if kind == "depth" else 0)
    else:
        means, _ = encoder.encoders.encode_pictures(np.stack(expected))
        assert np.allclose(stored, means.numpy(), atol=0.02 if kind == "depth" else 1e-5)
    files = table[reference_image(0)].to_pylist()
    assert files[1] == b""  # not scored
    for n in (0, 2):
        apart = np.abs(np.asarray(Image.open(io.BytesIO(files[n]))).astype(int) - shown[n])
        assert apart.max() <= (1 if kind == "depth" else 0)
        assert np.ptp(shown[n]) > 0
    apart = np.abs(streamed(config, row, "control").astype(float) - stored)
    assert apart.max() <= (1 if stored.dtype == np.uint8 and kind == "depth" else 1e-5)


def test_edges_are_opencvs_of_a_picture_and_nothing_of_an_even_one() -> None:
    found = edges(np.asarray(drawing(0)), 100, 200)
    assert found.dtype == np.uint8 and set(np.unique(found)) == {0, 255}
    assert (found[..., 0] == found[..., 1]).all() and (found[..., 0] == found[..., 2]).all()
    rows, columns = np.nonzero(found[..., 0])
    assert 8 <= rows.min() <= 11 and 18 <= columns.min() <= 21  # the rectangle's left upper corner
    faint = np.asarray(Image.fromarray(np.asarray(drawing(0)) // 8 + 100))
    assert not edges(faint, 100, 200).any() and edges(faint, 20, 40).any()


def test_depth_is_white_where_it_is_near_whatever_a_model_measures(tmp_path: Path) -> None:
    pixels = torch.from_numpy(np.stack([np.asarray(drawing(n)) for n in range(2)])).permute(0, 3, 1, 2)
    relative = Depth(ControlConfig(kind="depth", model=str(depth_model(tmp_path / "a"))))
    found = relative(pixels)
    assert found.shape == pixels.shape and found.dtype == torch.uint8 and found.is_contiguous()
    assert (found[:, 0] == found[:, 1]).all() and (found[:, 0] == found[:, 2]).all()
    assert found.amin((1, 2, 3)).eq(0).all() and found.amax((1, 2, 3)).eq(255).all()
    metric = Depth(ControlConfig(kind="depth", model=str(depth_model(tmp_path / "b", "metric"))))
    raw = metric.parts.processor.post_process_depth_estimation(
        metric.parts.run(pixels), target_sizes=[(64, 96)] * 2
    )
    for distance, drawn in zip(raw, metric(pixels), strict=True):
        plain = distance["predicted_depth"].flatten().detach()
        near, far = drawn[0].flatten()[plain.argmin()], drawn[0].flatten()[plain.argmax()]
        assert int(near) - int(far) > 200


def test_what_zoedepth_adds_at_the_sides_is_cut_off(tmp_path: Path) -> None:
    zoe = Depth(ControlConfig(kind="depth", model=str(zoe_depth(tmp_path))))
    assert zoe.is_distance and zoe.parts.processor.do_pad
    pixels = torch.from_numpy(np.asarray(drawing(0))).permute(2, 0, 1)[None]
    with torch.inference_mode():
        padded = zoe.parts.run(pixels).predicted_depth
    # It adds 3 * sqrt(64 / 2) = 16 rows and 3 * sqrt(96 / 2) = 20 columns at each side.
    nearness = interpolate(1 / padded[:, None], (64 + 2 * 16, 96 + 2 * 20), mode="bilinear")
    found, inner = zoe(pixels)[0, 0], nearness[0, 0, 16:-16, 20:-20]
    whole = interpolate(nearness, (64, 96), mode="bilinear")[0, 0]
    alike = [np.corrcoef(found.flatten(), each.flatten())[0, 1] for each in (inner, whole)]
    assert alike[0] > 0.98 and alike[1] < 0.96, alike


def test_a_skeleton_is_drawn_and_read_back() -> None:
    places = np.zeros((17, 2))
    places[:, 0], places[:, 1] = np.linspace(20, 230, 17), np.linspace(200, 40, 17)
    seen = np.ones(17, bool)
    seen[9] = False  # the left wrist, 7 in OpenPose's order
    person = person_of_coco(places, seen)
    assert person.places[1] == pytest.approx((places[5] + places[6]) / 2)  # the neck
    picture = draw_poses([person], 256, 256)
    found = key_points(picture)
    assert found.shape == (NUM_POINTS, 256, 256)
    for number, (x, y) in enumerate(person.places):
        own = np.argwhere(found[number])
        if number == 7:
            assert not len(own)
        else:
            assert np.abs(own.mean(axis=0) - (y, x)).max() <= 1, number
    assert not draw_poses([], 8, 8).any() and len(np.unique(COLOURS, axis=0)) == NUM_POINTS
    hidden = Person(person.places, np.zeros(NUM_POINTS, bool))
    assert not draw_poses([hidden], 256, 256).any()


def test_poses_are_of_the_whole_picture_or_of_the_people_found(tmp_path: Path) -> None:
    pixels = torch.from_numpy(np.stack([np.asarray(drawing(n)) for n in range(2)])).permute(0, 3, 1, 2)
    model, detector = str(pose_model(tmp_path / "pose")), str(people_detector(tmp_path / "people"))
    whole = load_conditioner(ControlConfig(kind="pose", model=model))(pixels)
    assert whole.shape == pixels.shape and whole.dtype == torch.uint8
    several = load_conditioner(ControlConfig(kind="pose", model=model, detector=detector))(pixels)
    assert not torch.equal(several, whole)
    of_experts = ControlConfig(kind="pose", model=str(pose_model(tmp_path / "experts", experts=3)))
    assert load_conditioner(of_experts)(pixels).shape == pixels.shape


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ({"kind": "depth"}, "model: kind: depth needs one"),
        ({"kind": "edges", "model": "x"}, "model: x changes nothing without kind: depth or pose"),
        ({"kind": "depth", "model": "x", "low_threshold": 1}, "low_threshold: 1 changes nothing without"),
        ({"kind": "depth", "model": "x", "detector": "y"}, "detector: y changes nothing without kind: pose"),
        ({"kind": "pose", "model": "x", "detector_revision": "y"}, "detector_revision: y changes nothing"),
        ({"kind": "edges", "low_threshold": 300}, "low_threshold: 300 is above high_threshold, 200"),
        ({"low_threshold": 1}, "low_threshold: 1 changes nothing without kind: edges"),
    ],
)
def test_settings_of_another_kind_are_refused(control: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate({"source": "x", "control": control})


def test_sources_bring_control_images_all_or_none() -> None:
    sources = [{"path": "x", "control_column": "a"}, {"path": "y"}]
    with pytest.raises(ValueError, match="name a control_column in each, or in none"):
        DataConfig.model_validate({"sources": sources})
    with pytest.raises(ValueError, match="a is named twice"):
        DataConfig.model_validate({"sources": [{"path": "x", "control_column": "a", "mask_column": "a"}]})


def test_a_model_that_computes_control_images_is_checked_before_anything_is_reserved(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    depth, pose = str(depth_model(tmp_path / "depth")), str(pose_model(tmp_path / "pose"))
    people = str(people_detector(tmp_path / "people"))
    base = bases["StableDiffusionPipeline"]
    good = {"kind": "pose", "model": pose, "detector": people}
    check_control(configured(base, good))
    check_control(configured(base))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text('{"model_type": "dpt"}')
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    bad: list[tuple[dict[str, Any], str]] = [
        ({"kind": "depth", "model": pose}, "data.control.model: .*vitpose is no depth model"),
        ({"kind": "pose", "model": depth}, "data.control.model: .*depth_anything is no pose model"),
        ({"kind": "pose", "model": pose, "detector": depth}, "data.control.detector: .*finds no objects"),
        (
            {"kind": "pose", "model": pose, "detector": str(people_detector(tmp_path / "cats", "cat"))},
            "data.control.detector: .*has no label person",
        ),
        ({"kind": "depth", "model": str(pickled)}, "data.control.model: .*no safetensors file"),
        ({"kind": "depth", "model": str(tmp_path / "nowhere")}, "data.control.model: .*nowhere"),
    ]
    for control, message in bad:
        with pytest.raises(ConfigError, match=message):
            check_control(configured(base, control))
    other = write_model("SanaPipeline", tmp_path / "sana")
    with pytest.raises(ConfigError, match="data.control.kind: .*SanaPipeline.* has no ControlNets"):
        check_control(configured(other, {"kind": "edges"}))
    with pytest.raises(ConfigError, match="data.sources: control_column: .*has no ControlNets"):
        check_control(configured(other))
    settings = ControlConfig.model_validate(good)
    check_conditioner(settings)
    modules = [
        part.module
        for part in (load_conditioner(settings).parts, load_conditioner(settings).detector)  # type: ignore[attr-defined]
    ]
    assert conditioner_bytes(settings) == sum(4 * p.numel() for m in modules for p in m.parameters())
    assert conditioner_bytes(ControlConfig(kind="edges")) == 0


def test_rows_with_other_control_images_are_encoded_anew(bases: dict[str, Path], tmp_path: Path) -> None:
    base, other = bases["StableDiffusionPipeline"], bases["FluxPipeline"]
    one, two = str(depth_model(tmp_path / "a")), str(depth_model(tmp_path / "b", "metric"))
    configs = [
        configured(base, {}),
        configured(base),
        configured(other),
        configured(base, {"kind": "edges"}),
        configured(base, {"kind": "edges", "low_threshold": 50}),
        configured(base, {"kind": "depth", "model": one}),
        configured(base, {"kind": "depth", "model": two}),
        configured(base, {}, sources=[{"path": "x", "reference_columns": ["canny"]}]),
    ]
    keys = [RowKeys(config).key("a", "text", (8, 8), 0, "train", False, ("b",)) for config in configs]
    assert len(set(keys)) == len(keys)
    before = RowKeys(configs[5]).key("a", "text", (8, 8), 0, "train", False)
    inputs = control_digest(configs[5])
    # The same name, and another model in its place.
    depth_model(tmp_path / "a", "metric")
    assert RowKeys(configs[5]).key("a", "text", (8, 8), 0, "train", False) != before
    assert control_digest(configs[5]) != inputs and not control_digest(configs[0])
    assert conditioner_digest(configs[5].data.control) == conditioner_digest(configs[6].data.control)


def test_control_images_are_scanned_with_their_rows(tmp_path: Path) -> None:
    sizes = [(96, 64), (48, 32), (47, 32), (64, 64)]
    files: dict[str, bytes | str] = {}
    for n, size in enumerate(sizes):
        files |= {f"{n}.png": png(drawing(n)), f"{n}.txt": "a", f"canny/{n}.png": png(drawing(n, size))}
        files |= {f"mask/{n}.png": png(Image.new("L", (96, 64), 255))}
    files |= {"4.png": png(drawing(4)), "4.txt": "a", "canny/4.png": b"GIF", "mask/4.png": b"x"}
    files |= {"5.png": png(drawing(5)), "5.txt": "a", "mask/5.png": b"x"}
    columns = {"control_column": "canny", "mask_column": "mask"}
    source = opened(write(tmp_path, files), **columns)
    config = DataConfig.model_validate({"sources": [{"path": "x", **columns}], "resolution": 32})
    rows = [scan_sample(sample, config) for sample in samples(source)]
    reasons = [row["reason"] for row in rows]
    assert reasons == ["", "", "", "control_of_another_shape", "incomplete", "incomplete"]
    assert rows[3]["detail"] == "the control image has 64 x 64 and the picture 96 x 64 pixels"
    assert str(rows[4]["detail"]).startswith("control image: ")
    assert str(rows[5]["detail"]).startswith("canny: ")
    as_reference = DataConfig.model_validate({"sources": [{"path": "x", "reference_columns": ["canny"]}]})
    plain = opened(tmp_path, reference_columns=["canny"])
    own = opened(tmp_path, control_column="canny")
    found = DataConfig.model_validate({"sources": [{"path": "x", "control_column": "canny"}]})
    assert entries([plain], as_reference)[0].file != entries([own], found)[0].file
