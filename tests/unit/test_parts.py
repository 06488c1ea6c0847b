"""Files of the encoding cache are read as they were written, or not at all."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.storage import Storage
from ray_jobs.data.encoding.cache_files import ASIDE, DamagedPart, read_part, read_schema, write_part
from ray_jobs.run.command_line import damage_message

NAME = "part.parquet"


@pytest.fixture
def cache(tmp_path: Path) -> Storage:
    latents = np.random.default_rng(0).integers(0, 255, (40, 512), dtype=np.uint8)
    rows = pa.table(
        {"text": [f"caption {n}" for n in range(40)], "latents": [row.tobytes() for row in latents]}
    )
    storage = Storage.open(str(tmp_path))
    write_part(storage, NAME, rows)
    return storage


def test_rows_come_back_by_column(cache: Storage) -> None:
    assert read_part(cache, NAME).column_names == ["text", "latents"]
    assert read_part(cache, NAME, ["text"])["text"].to_pylist()[7] == "caption 7"


@pytest.mark.parametrize("cut", [False, True], ids=["a bit turned over", "cut short"])
def test_a_damaged_file_is_named_and_moved_aside(cache: Storage, tmp_path: Path, cut: bool) -> None:
    content = bytearray((tmp_path / NAME).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / NAME).write_bytes(content[:-9] if cut else content)
    for read in (read_part, read_part, read_schema):  # who comes later is told the same
        with pytest.raises(
            DamagedPart, match=f"an encoded file is damaged: {tmp_path}/{NAME} was renamed"
        ) as raised:
            read(cache, NAME)
        assert damage_message(f"a traceback\nof Ray\nDamagedPart: {raised.value}\nmore") == str(raised.value)
    assert cache.files() == [NAME + ASIDE]


def test_a_missing_file_is_no_damage(cache: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        read_part(cache, "other.parquet")
