"""Pictures as people bring them. Each writes a source into a new `folder`; returned: of `data.sources`."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.conftest import captions, draw

COUNT = 24
SHAPES = ((72, 72), (96, 64), (64, 96))  # width and height, pixels


def folder_of_shapes(folder: Path) -> dict[str, Any]:
    """Three shapes, with their captions in metadata.jsonl."""
    folder.mkdir()
    lines = []
    for number, caption in enumerate(captions()[:COUNT]):
        name = f"{number:02d}.png"
        draw(caption, number).resize(SHAPES[number % len(SHAPES)]).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return {"path": str(folder)}


def pairs(folder: Path) -> dict[str, Any]:
    """Grey pictures to be coloured, with a second reference for the colours, and a mask of what is drawn."""
    folder.mkdir()
    lines = []
    for number, caption in enumerate(captions()[:COUNT]):
        after = draw(caption, number)
        fields = {"file_name": f"{number:02d}.png", "text": f"colour it: {caption}"}
        fields |= {"before": f"before/{number:02d}.png", "palette": f"palette/{number:02d}.jpg"}
        fields |= {"mask": f"mask/{number:02d}.png"}
        for name, picture in (
            (fields["file_name"], after),
            (fields["mask"], after.convert("L").point(lambda level: 255 * (level < 250))),
            (fields["before"], after.convert("L").convert("RGB")),
            (fields["palette"], after.resize((2, 2)).resize((96, 64))),
        ):
            (folder / name).parent.mkdir(exist_ok=True)
            picture.save(folder / name)
        lines.append(json.dumps(fields) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return {"path": str(folder), "reference_columns": ["before", "palette"], "mask_column": "mask"}


def one_reference(folder: Path) -> dict[str, Any]:
    """The same pictures, to be coloured from the caption alone."""
    return {"path": pairs(folder)["path"], "reference_columns": ["before"]}


def grey(folder: Path) -> dict[str, Any]:
    """The same pictures, which follow control images of their own: themselves without colours."""
    return {"path": pairs(folder)["path"], "control_column": "before"}


def masked(folder: Path) -> dict[str, Any]:
    """The same pictures, with masks of what is drawn, and without references."""
    found = pairs(folder)
    del found["reference_columns"]
    return found


def dreambooth(folder: Path) -> dict[str, Any]:
    """Eight photos without captions; the subject's prompts are in the configuration."""
    folder.mkdir()
    for number, caption in enumerate(captions()[:8]):
        draw(caption, number).resize((96, 72)).save(folder / f"IMG_{number}.jpg", quality=95)
    prompts = {"instance_prompt": "a big red circle", "class_prompt": "a red circle"}
    return {"path": str(folder), **prompts}


def webdataset(folder: Path) -> dict[str, Any]:
    """Two tar files whose members have dots in their names."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard, COUNT, 2):
                _add(tar, f"photo_{number:03d}.v1.0.png", _png(number))
                _add(tar, f"photo_{number:03d}.v1.0.txt", captions()[number].encode())
    return {"path": str(folder)}


def parquet(folder: Path) -> dict[str, Any]:
    """As `datasets.Dataset.to_parquet` writes it (datasets 5.2): a struct of bytes and path, and the features
    in the schema's metadata."""
    folder.mkdir()
    features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    schema = pa.schema(
        {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "text": pa.string()},
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    rows = [
        {"image": {"bytes": _png(number), "path": f"{number}.png"}, "text": captions()[number]}
        for number in range(COUNT)
    ]
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=10)
    return {"path": str(folder)}


def _png(number: int) -> bytes:
    file = io.BytesIO()
    draw(captions()[number], number).save(file, format="PNG")
    return file.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
