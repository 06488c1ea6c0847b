"""A source that is for training only leaves the held-out pictures as they are without it."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.storage import Storage
from ray_jobs.config import SourceConfig, load_config
from ray_jobs.data.curation.decisions import decide
from ray_jobs.data.curation.scan import entries
from ray_jobs.run.split import SPLITS
from tests.unit.test_decisions import write_index
from tests.unit.test_sources import opened, write


def noise(seed: int) -> bytes:
    """A picture that is like no other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((64, 64)).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize("duplicates", ["ignore", "keep"])
def test_no_picture_of_it_is_held_out_and_a_twin_of_one_is_set_aside(tmp_path: Path, duplicates: str) -> None:
    own = {f"{n:02d}.png": noise(n) for n in range(40)}
    write(tmp_path / "own", {**own, **{f"{n:02d}.txt": f"cat {n}" for n in range(40)}})
    write(
        tmp_path / "liked",
        {f"{n}.png": noise(100 + n) for n in range(20)} | {f"{n}.txt": f"dog {n}" for n in range(20)},
    )
    settings = ["min_side=1", "min_contrast=null", "max_dark=null", "max_bright=null"]
    base = load_config(
        Path("configs/demo.yaml"),
        [*(f"data.cleaning.{each}" for each in settings), f"data.cleaning.duplicates={duplicates}"],
    )

    def decided(*sources: SourceConfig) -> tuple[np.ndarray, np.ndarray]:
        data = base.data.model_copy(update={"sources": list(sources), "source": None})
        config = base.model_copy(update={"data": data})
        read = [opened(each.path) for each in sources]
        found, place = entries(read, data), tmp_path / str(len(list(tmp_path.iterdir())))
        index, dataset = Storage.open(str(place / "index")), Storage.open(str(place / "dataset"))
        for number, source in enumerate(read):
            write_index(source, [each for each in found if each.source == number], config, index)
        decisions = decide(config, found, index, dataset)
        return decisions.splits.codes, decisions.kept

    of_own, liked = SourceConfig(path=str(tmp_path / "own")), SourceConfig(path=str(tmp_path / "liked"))
    alone, _ = decided(of_own)
    train, test = SPLITS.index("train"), SPLITS.index("test")
    assert (alone == test).any()
    mixed, _ = decided(of_own, liked)
    assert (mixed[40:] != train).any()
    copied = np.flatnonzero(alone == test)[0]
    shutil.copy(tmp_path / "own" / f"{copied:02d}.png", tmp_path / "liked" / "99.png")
    (tmp_path / "liked" / "99.txt").write_text("a twin")
    mixed, kept = decided(of_own, liked.model_copy(update={"training_only": True}))
    assert (mixed[:40] == alone).all() and kept[:40].all()
    assert (mixed[40:][kept[40:]] == train).all()
    assert kept[40:].sum() == 20, "the twin is set aside"
