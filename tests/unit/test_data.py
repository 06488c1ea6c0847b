"""Pictures keep their split, broken ones are set aside with a reason, captions are checked."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.storage import Storage
from ray_jobs.config import ConfigError, DataConfig
from ray_jobs.data.encoding import ReadPicture
from ray_jobs.data.images import Rejected, decode_image, encode_png
from ray_jobs.data.sources import ImageFolder
from ray_jobs.data.splits import Shares, content_digest, is_floor_candidate, split_of
from ray_jobs.data.streaming import permuted_epochs, read_tensors

SHARES = Shares(seed=0, validation=0.15, test=0.15)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def test_a_split_depends_on_the_bytes_alone_and_shares_come_out() -> None:
    splits = [split_of(content_digest(bytes([n % 256, n // 256])), SHARES) for n in range(4000)]
    assert splits == [split_of(content_digest(bytes([n % 256, n // 256])), SHARES) for n in range(4000)]
    assert abs(splits.count("train") / 4000 - 0.7) < 0.03
    assert abs(splits.count("test") / 4000 - 0.15) < 0.03


def test_another_seed_splits_independently() -> None:
    digests = [content_digest(str(n).encode()) for n in range(2000)]
    test = [d for d in digests if split_of(d, SHARES) == "test"]
    other = Shares(seed=1, validation=0.15, test=0.15)
    again = [d for d in test if split_of(d, other) == "test"]
    assert len(again) / len(test) < 0.3


def test_the_floor_is_made_of_training_pictures_as_many_as_test_pictures() -> None:
    digests = [content_digest(str(n).encode()) for n in range(2000)]
    floor = [d for d in digests if is_floor_candidate(d, SHARES)]
    assert {split_of(d, SHARES) for d in floor} == {"train"}
    assert len(floor) > 2 * sum(split_of(d, SHARES) == "test" for d in digests)


def test_a_picture_arrives_upright_cropped_and_on_the_background() -> None:
    wide = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    pixels = decode_image(png(wide), resolution=8, background="white")
    assert pixels.shape == (8, 8, 3)
    assert (pixels == 255).all()

    turned = Image.new("RGB", (20, 20), "black")
    turned.paste("white", (0, 0, 20, 10))
    exif = turned.getexif()
    exif[274] = 3  # upside down
    buffer = io.BytesIO()
    turned.save(buffer, format="PNG", exif=exif)
    upright = decode_image(buffer.getvalue(), resolution=8, background="white")
    assert upright[0].mean() < 10 and upright[-1].mean() > 245


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_file"),
        (b"no picture", "unreadable"),
        (png(Image.new("RGB", (64, 64)))[:60], "unreadable"),
    ],
)
def test_a_broken_picture_is_rejected_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        decode_image(data, resolution=8, background="white")
    assert caught.value.reason == reason


def test_a_rejected_row_keeps_its_name_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "good.png", "text": "good"}))
    (tmp_path / "good.png").write_bytes(encode_png(np.zeros((16, 16, 3), np.uint8)))
    read = ReadPicture(
        ImageFolder.open(str(tmp_path)).storage, DataConfig(source=str(tmp_path), resolution=8)
    )
    cases = {
        ("good.png", "good"): "",
        ("good.png", "  "): "empty_caption",
        ("gone.png", "gone"): "missing_file",
        ("../secret.png", "out"): "outside_folder",
        ("/etc/hostname", "out"): "outside_folder",
    }
    for (name, text), reason in cases.items():
        row = read({"file_name": name, "text": text})
        assert (row["file_name"], row["reason"]) == (name, reason)
        assert (row["split"] == "rejected") == bool(reason)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"file": "a.png", "text": "a"}', "line 1: field 'file_name' is missing"),
        ('{"file_name": "a.png", "caption": "a"}', "line 1: field 'text' is missing"),
        ('{"file_name": "a.png", "text": 5}', "line 1: field 'text' must be text"),
        ("file_name,text", "line 1: not JSON"),
        ("", "has no lines"),
    ],
)
def test_wrong_captions_name_file_line_and_field(tmp_path: Path, line: str, expected: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(ConfigError) as caught:
        ImageFolder.open(str(tmp_path))
    assert expected in str(caught.value) and "metadata.jsonl" in str(caught.value)


def test_a_missing_folder_or_caption_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.source: .*nowhere: no such folder"):
        ImageFolder.open(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="has no metadata.jsonl"):
        ImageFolder.open(str(tmp_path))


def test_every_epoch_holds_every_row_once_in_another_order() -> None:
    rows = {"latents": np.arange(10)}
    epochs = [epoch["latents"].tolist() for epoch in permuted_epochs(rows, epochs=3, seed=0)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1]
    assert epochs == [epoch["latents"].tolist() for epoch in permuted_epochs(rows, epochs=3, seed=0)]


def test_tensors_are_read_in_the_order_of_digests_whatever_file_they_lie_in(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from ray.data.extensions import ArrowTensorArray

    (tmp_path / "split=train").mkdir()
    for name, digests in (("z", ["a", "d"]), ("y", ["c", "b"])):
        latents = np.array([[ord(digest), 0] for digest in digests], dtype=np.float16)
        columns = {"digest": digests, "text": ["one", "two"], "latents": ArrowTensorArray.from_numpy(latents)}
        pq.write_table(pa.table(columns), tmp_path / "split=train" / f"{name}.parquet")
    latents = read_tensors(Storage.open(str(tmp_path)), "train", ["latents"])["latents"]
    assert latents.dtype == np.float16
    assert latents.tolist() == [[ord(digest), 0] for digest in "abcd"]
