"""Preparing a set on a real cluster: what is kept, where it goes, and that nothing is encoded twice."""

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter

from cluster.local import LocalCluster
from ray_jobs.config import Config, ConfigError
from ray_jobs.data.encoding.tensors import read_tensors
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.data.preparation import dry_run, prepare
from tests.conftest import captions, draw
from tests.ray.test_training import tiny_config
from tests.record import record_fault
from tests.s3_server import s3_server


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """48 pictures that are unlike each other, as a folder with captions."""
    folder = tmp_path / "pictures"
    add_pictures(folder, range(48))
    return folder


def add_pictures(folder: Path, numbers: range, first: list[dict[str, str]] | None = None) -> None:
    folder.mkdir(exist_ok=True)
    rows = list(first or [])
    for number in numbers:
        noisy(number).save(folder / f"{number:03d}.png")
        rows.append({"file_name": f"{number:03d}.png", "text": f"picture {number}"})
    with (folder / "metadata.jsonl").open("a") as metadata:
        metadata.writelines(json.dumps(row) + "\n" for row in rows)


def noisy(number: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A picture of coarse and fine detail that no other number resembles."""
    generator = np.random.default_rng(number)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), float)
    return Image.fromarray((smooth + generator.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8))


def configured(model: Path, source: Path, storage: Path, *overrides: str) -> Config:
    return tiny_config(model, source, storage, "data.cleaning.duplicates=drop", *overrides)


def members(dataset: Dataset, split: str) -> set[str]:
    return {row["text"] for row in dataset.read(split, ["text"])}


def files_of(dataset: Dataset) -> dict[str, str]:
    """Every file of the data set by name, with the digest of its bytes."""
    names = [part["file"] for part in dataset.all_parts]
    return {name: hashlib.sha256(dataset.cache.read_bytes(name)).hexdigest() for name in names}


def test_each_bad_picture_is_set_aside_with_its_reason_and_the_good_ones_are_kept(
    ray_cluster: LocalCluster, tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    bad: dict[str, str] = {
        "empty.png": "empty_file",
        "text.png": "unknown_format",
        "cut.png": "truncated",
        "tiny.png": "too_small",
        "long.png": "extreme_aspect_ratio",
        "grey.png": "near_constant",
        "blurred.png": "blurred",
        "twin.jpg": "near_duplicate",
        "gone.png": "missing_file",
        "../outside.png": "outside_folder",
        "silent.png": "empty_caption",
    }
    (pictures / "empty.png").write_bytes(b"")
    (pictures / "text.png").write_bytes(b"no picture")
    (pictures / "cut.png").write_bytes((pictures / "000.png").read_bytes()[:900])
    noisy(500, (16, 16)).save(pictures / "tiny.png")
    noisy(501, (400, 40)).save(pictures / "long.png")
    Image.new("RGB", (80, 80), "#777777").save(pictures / "grey.png")
    noisy(502).filter(ImageFilter.GaussianBlur(12)).save(pictures / "blurred.png")
    noisy(3).resize((192, 160)).save(pictures / "twin.jpg", quality=70)
    noisy(503).save(pictures / "silent.png")
    noisy(504).save(pictures / "unlisted.png")
    (pictures / "notes.md").write_text("not a picture")
    with (pictures / "metadata.jsonl").open("a") as metadata:
        for name in bad:
            text = "" if name == "silent.png" else f"bad {name}"
            metadata.write(json.dumps({"file_name": name, "text": text}) + "\n")
    config = configured(
        tiny_model,
        pictures,
        tmp_path,
        "data.cleaning.min_sharpness=20",
        "data.cleaning.max_rejected=0.5",
        "data.folds=3",
    )
    dataset = prepare(config)
    manifest = dataset.manifest
    written = [json.loads(line) for line in dataset.storage.read_text("rejected.jsonl").splitlines()]
    rest = {"unlisted.png": "not_listed", str(pictures): "no_picture"}
    assert {line["file_name"]: line["reason"] for line in written} == bad | rest
    assert all(line["detail"] for line in written)
    counted = {reason: 1 for name, reason in bad.items() if reason != "near_duplicate"}
    assert manifest.rejected == counted
    assert (manifest.left_out, manifest.no_pictures) == ({"not_listed": 1}, {".md": 1})
    assert manifest.duplicates.fields() == {"mode": "drop", "groups": 1, "pictures": 1}
    group = json.loads(dataset.storage.read_text("duplicates.jsonl"))
    assert group["first"] == "003.png" and group["others"][0]["file_name"] == "twin.jpg"
    kept = [members(dataset, split) for split in ("train", "validation", "test")]
    assert set.union(*kept) == {f"picture {number}" for number in range(48)}
    assert sum(map(len, kept)) == 48  # no picture lies in two splits
    assert sum(manifest.folds) == manifest.train + manifest.validation
    assert manifest.measures["sharpness"].set_aside == 1

    # Cross-validation: each fold is judged on once, and never trained on then.
    judged = [members(dataset.leave_out(fold), "validation") for fold in range(3)]
    assert set.union(*judged) == kept[0] | kept[1] and sum(map(len, judged)) == len(kept[0] | kept[1])
    for fold in range(3):
        assert not judged[fold] & members(dataset.leave_out(fold), "train")

    page = Path(dry_run(config)).read_text()
    assert all(name.rpartition("/")[2] in page for name in bad)

    stricter = ["data.cleaning.min_sharpness=20", "data.cleaning.max_rejected=0.15"]
    with pytest.raises(ConfigError, match="10 of 59 pictures are rejected .* data.cleaning.max_rejected"):
        prepare(configured(tiny_model, pictures, tmp_path, *stricter))


def test_a_set_that_grows_and_changes_moves_no_picture_and_encodes_only_what_is_new(
    ray_cluster: LocalCluster,
    tiny_model: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = configured(tiny_model, pictures, tmp_path, "data.cleaning.duplicates=keep")
    before = prepare(config)
    splits = {split: members(before, split) for split in ("train", "validation", "test")}

    # A copy elsewhere is the same set, and trainings on it go on.
    shutil.copytree(pictures, tmp_path / "copy")
    copied = prepare(configured(tiny_model, tmp_path / "copy", tmp_path, "data.cleaning.duplicates=keep"))
    assert copied.manifest.inputs != before.manifest.inputs
    assert copied.manifest.content == before.manifest.content
    capsys.readouterr()

    # New ones first, some of them near duplicates of old ones, and one that resembles two of them.
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    rows[7]["text"] = "another caption"
    (pictures / "metadata.jsonl").unlink()
    for number in range(6):
        noisy(number).resize((120, 100)).save(pictures / f"copy-{number}.png")
    copies = [{"file_name": f"copy-{n}.png", "text": f"copy {n}"} for n in range(6)]
    add_pictures(pictures, range(100, 120), copies)
    with (pictures / "metadata.jsonl").open("a") as metadata:
        metadata.writelines(json.dumps(row) + "\n" for row in rows)
    capsys.readouterr()
    after = prepare(config)
    assert rows_encoded(capsys) == 27
    grown = {split: members(after, split) for split in splits}
    for split, texts in splits.items():
        assert {"another caption" if text == "picture 7" else text for text in texts} <= grown[split]
        for number in range(6):  # near duplicates that are kept lie with what they resemble
            assert (f"copy {number}" in grown[split]) == (f"picture {number}" in texts)


def rows_encoded(capsys: pytest.CaptureFixture[str]) -> int:
    """How many rows the last run had to encode, as it said."""
    [line] = [line for line in capsys.readouterr().out.splitlines() if "rows encoded" in line]
    return int(line.split(" rows encoded")[0].split()[-1].replace(",", ""))


def test_kills_in_the_middle_of_encoding_leave_no_trace_in_the_result(
    ray_cluster: LocalCluster, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 of the encoder's process, which Ray starts anew; and the loss of half of the files, as after
    the death of a job, which is started again: the bytes are those of an unbroken run."""
    folder = tmp_path / "pictures"
    add_pictures(folder, range(600))
    config = configured(tiny_model, folder, tmp_path, "data.encode_batch_size=4")
    took: list[float] = []
    watching = ray_cluster, tmp_path / "encoded", took
    watcher = threading.Thread(target=kill_encoder_once, args=watching)
    watcher.start()
    broken = prepare(config)
    watcher.join()
    assert took, "the encoder was not seen at work"
    files = files_of(broken)

    lost = sorted(files)[::2]
    for name in lost:
        broken.cache.delete(name)
    capsys.readouterr()
    begun = time.time()
    assert files_of(prepare(config)) == files
    first = min(Path(broken.cache.path, name).stat().st_mtime for name in lost) - begun
    assert rows_encoded(capsys) == sum(part["rows"] for part in broken.all_parts if part["file"] in lost)
    again = sum(part["rows"] for part in broken.all_parts if part["file"] in lost)
    record_fault("kill -9 of the encoder's process", recovery_s=took[0], lost="a part, encoded again")
    record_fault("half of the encoded files vanish", recovery_s=first, lost=f"{again} rows, encoded again")

    shutil.rmtree(tmp_path / "encoded")
    assert files_of(prepare(config)) == files


def kill_encoder_once(cluster: LocalCluster, cache: Path, took: list[float]) -> None:
    """Kill the encoder's process as soon as it has written its first part; adds the seconds to the next
    part."""
    import psutil

    def parts() -> set[Path]:
        return set(cache.rglob("*.parquet"))

    deadline, killed, before = time.monotonic() + 120, 0.0, set[Path]()
    while not took and time.monotonic() < deadline:
        time.sleep(0.02)
        if killed:
            if parts() - before:
                took.append(time.monotonic() - killed)
            continue
        if not parts():
            continue
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            if line.startswith("ray::") and "EncodePart" in line and not killed:
                if process.environ().get("RAY_ADDRESS") != cluster.gcs_address:
                    continue  # another Ray's on this machine
                os.kill(process.pid, signal.SIGKILL)
                killed, before = time.monotonic(), parts()


def test_buckets_and_variants(ray_cluster: LocalCluster, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    shapes = {"wide": (128, 64), "square": (80, 80), "tall": (60, 120)}
    rows = []
    for number in range(30):
        for index, (shape, size) in enumerate(shapes.items()):
            noisy(3 * number + index, size).save(folder / f"{shape}-{number}.png")
            rows.append({"file_name": f"{shape}-{number}.png", "text": f"{shape} {number}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = prepare(
        configured(
            tiny_model,
            folder,
            tmp_path,
            "data.buckets=true",
            "data.augmentation.variants=2",
            "data.augmentation.flip=0.5",
            "data.augmentation.crop=0.5",
        )
    )
    assert set(dataset.manifest.buckets) == {"88x48", "64x64", "48x88"}
    assert dataset.num_rows("train") == 2 * dataset.manifest.train == dataset.manifest.rows_an_epoch
    for part in dataset.parts("train"):
        read = pq.read_table(dataset.cache.open_input(part["file"]))
        width, height = map(int, part["bucket"].split("x"))
        shape = {"88x48": "wide", "64x64": "square", "48x88": "tall"}[part["bucket"]]
        assert {text.split()[0] for text in read["text"].to_pylist()} == {shape}
        tensors = read_tensors(read, ["latents_mean", "latents_logvar", "prompt_embeds"])
        assert tensors["latents_mean"].shape == (part["rows"], 4, height // 8, width // 8)
        assert tensors["latents_mean"].dtype == np.uint16  # the bits of bfloat16
        variants = tensors["latents_mean"].reshape(part["rows"] // 2, 2, -1)
        assert (variants[:, 0] != variants[:, 1]).any(axis=1).mean() > 0.4
        for original, target in zip(*conditioning(read), strict=True):
            assert tuple(original) == shapes[shape][::-1] and tuple(target) == (height, width)
    over = dataset.manifest.buckets["64x64"]
    assert over.steps * 4 + over.rows_over == over.rows


def conditioning(table: Any) -> tuple[list[list[int]], list[list[int]]]:
    values = read_tensors(table, ["conditioning"])["conditioning"].tolist()
    return [row[:2] for row in values], [row[4:] for row in values]


def test_four_photos_of_a_subject_are_enough(
    ray_cluster: LocalCluster, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "subject"
    (folder / "class_data_dir").mkdir(parents=True)
    for number in range(4):
        noisy(number).save(folder / f"{number}.jpg", quality=95)
        noisy(50 + number).save(folder / "class_data_dir" / f"{number}.png")
    prompts = {"instance_prompt": "a photo of sks dog", "class_prompt": "a photo of a dog"}
    (folder / "dataset_info.json").write_text(json.dumps(prompts))
    dataset = prepare(configured(tiny_model, folder, tmp_path))
    assert (dataset.manifest.train, dataset.manifest.class_) == (4, 4)
    assert dataset.manifest.held_out is False
    assert len(dataset.pictures("validation", 10)) == len(dataset.pictures("test", 10)) == 4
    assert members(dataset, "train") == {"a photo of sks dog"}
    assert members(dataset, "class") == {"a photo of a dog"}


def test_a_mixture_of_a_bucket_and_a_folder_prepared_into_a_bucket(
    ray_cluster: LocalCluster, tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    from cluster.storage import Storage

    remote = tmp_path / "remote"
    remote.mkdir()
    for number, caption in enumerate(captions()[:24]):
        draw(caption, number).save(remote / f"{number}.webp", lossless=True)
        (remote / f"{number}.txt").write_text(caption)
    with s3_server("set") as server:
        Storage.open(server.address("")).upload(remote, "source")
        sources = [{"path": server.address("source"), "weight": 3}, {"path": str(pictures), "weight": 1}]
        dataset = prepare(
            configured(
                tiny_model,
                pictures,
                tmp_path,
                "data.source=null",
                f"data.sources={json.dumps(sources)}",
                f"storage={server.address('runs')}",
                "data.cleaning.duplicates=ignore",
            )
        )
        assert [source.rows for source in dataset.manifest.source] == [24, 48]
        shares = [source.share for source in dataset.manifest.source]
        assert shares == pytest.approx([0.75, 0.25], abs=0.01)
        assert dataset.manifest.rows_an_epoch > dataset.num_rows("train"), "rows of the smaller one repeat"
        assert dataset.storage.uri.startswith("s3://") and members(dataset, "train")


def test_bare_pictures_are_captioned_once_and_the_captions_are_in_the_rows(
    ray_cluster: LocalCluster, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray_jobs.config import CaptioningConfig
    from ray_jobs.review.captions import open_captions
    from ray_jobs.weights.captioner import Captioner
    from tests.tiny_captioners import blip

    folder, model = tmp_path / "bare", blip(tmp_path / "blip")
    folder.mkdir()
    for number in range(30):
        noisy(number).save(folder / f"{number:03d}.png")
    shutil.copy(folder / "000.png", folder / "twin.png")
    (folder / "001.txt").write_text("my own")

    def config(*overrides: str) -> Config:
        options = f"{{model: {model}, trigger: sks, max_tokens: 12}}"
        return configured(tiny_model, folder, tmp_path / "runs", f"data.captioning={options}", *overrides)

    dry_run(config())
    assert f"{model} will caption 29 pictures" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "written_captions").exists()
    dataset = prepare(config())
    assert "captioned 29 pictures of 30 (29 now, 0 before), e.g. 000.png: 'sks, " in capsys.readouterr().out
    alone = Captioner(CaptioningConfig(model=str(model), max_tokens=12))
    expected = {f"sks, {written.text}" for written in alone.write([noisy(n) for n in range(30) if n != 1])}
    found = members(dataset, "train") | members(dataset, "validation") | members(dataset, "test")
    assert found == expected | {"my own"} and len(expected) > 1
    assert dataset.manifest.captions.written == 29
    prepare(config())
    assert "unchanged, skipped" in capsys.readouterr().out

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs/written_captions").rglob("*.par*")}
    noisy(40).save(folder / "040.png")
    larger = prepare(config("data.resolution=128", "data.captioning.trigger=ohwx"))
    assert "captioned 30 pictures of 31 (1 now, 29 before)" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {text.replace("ohwx", "sks") for text in members(larger, "train")} & expected

    listed = (tmp_path / "runs/tiny/dataset/captions.jsonl").read_text()
    captions = open_captions(config("data.captioning.trigger=ohwx"))
    [item] = [each for each in captions.items if each.name == "000.png"]
    captions.save(item, "my own cat")
    corrected = prepare(config("data.captioning.trigger=ohwx"))
    assert "captioned 29 pictures of 31 (0 now, 29 before)" in capsys.readouterr().out
    assert "my own cat" in set().union(
        *(members(corrected, split) for split in ("train", "validation", "test"))
    )
    prepare(config("data.captioning.trigger=ohwx"))
    assert "unchanged, skipped" in capsys.readouterr().out

    (folder / "001.txt").unlink()
    (folder / "metadata.jsonl").write_text(listed.replace("ohwx", "my"))
    edited = prepare(configured(tiny_model, folder, tmp_path / "runs", "name=edited"))
    assert edited.manifest.rejected == {} and edited.manifest.captions.written == 0
    assert any(text.startswith("my, ") for text in members(edited, "train"))


def test_streamed_rows_have_their_written_captions(
    ray_cluster: LocalCluster, tiny_model: Path, tmp_path: Path
) -> None:
    from ray_jobs.data.feeding.streaming import GatherWindow, Live, StreamSettings, _windows
    from tests.tiny_captioners import blip

    folder, model = tmp_path / "bare", blip(tmp_path / "blip")
    folder.mkdir()
    for number in range(8):
        noisy(number).save(folder / f"{number:03d}.png")
    config = configured(
        tiny_model,
        folder,
        tmp_path,
        f"data.captioning={{model: {model}, trigger: sks, max_tokens: 12}}",
        "data.encode=stream",
    )
    dataset = prepare(config)
    import ray

    assert dataset.live is not None
    live: Live = ray.get(dataset.live)
    order = StreamSettings(config, 4, 1, ()).order([part.record() for part in live.parts], 100)
    rows = _windows(order, 1, 2).flat_map(GatherWindow(live, order, 1)).take_all()
    texts = [text for row in rows for text in row["text"]]
    assert len(texts) == 8 and all(text.startswith("sks, ") for text in texts)
