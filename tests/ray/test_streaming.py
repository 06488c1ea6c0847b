"""The stream of training rows: one order for any number of workers, found again at any step."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.local import LocalCluster
from ray_jobs.config import Config
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.data.feeding.streaming import StreamSettings, batches, split_stream
from ray_jobs.data.preparation import prepare
from tests.ray.test_prepare import noisy
from tests.ray.test_training import tiny_config

ROWS_A_STEP, LAST_STEP = 8, 30


@pytest.fixture(scope="module")
def config(ray_cluster: LocalCluster, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """60 pictures of two shapes, in buckets."""
    folder = tmp_path_factory.mktemp("streamed")
    rows = []
    for number in range(60):
        noisy(number, (120, 60) if number % 3 == 0 else (80, 80)).save(folder / f"{number}.png")
        kind = "rare" if number % 5 == 0 else "common"
        rows.append({"file_name": f"{number}.png", "text": f"picture {number}", "kind": kind})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny_config(
        tiny_model,
        folder,
        tmp_path_factory.mktemp("runs"),
        "data.buckets=true",
        "data.shuffle_mb=1",
        "data.encode_dtype=fp32",
    )


def read(dataset: Dataset, config: Config, world_size: int, first: int = 1) -> list[dict[str, np.ndarray]]:
    """The rows of each step from `first` on, all ranks' in turn, which read side by side as in training."""
    columns = ("latents_mean", "prompt_embeds")
    settings = StreamSettings(config, ROWS_A_STEP, world_size, columns)
    found: list[list[Any]] = [[] for _ in range(world_size)]
    failed: list[BaseException] = []

    def consume(rank: int, iterator: Any) -> None:
        try:
            found[rank] = list(batches(iterator, rank=rank, first_step=first))
        except BaseException as error:
            failed.append(error)
            raise

    ends = split_stream(dataset, settings, first_step=first, last_step=LAST_STEP)
    threads = [threading.Thread(target=consume, args=pair) for pair in enumerate(ends)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    return [
        {name: np.concatenate([rank[name].numpy() for rank in step]) for name in columns}
        for step in zip(*found, strict=True)
    ]


def same(one: list[dict[str, np.ndarray]], other: list[dict[str, np.ndarray]]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a
    )


def test_one_two_and_four_workers_read_the_same_rows_in_the_same_order(config: Config) -> None:
    dataset = prepare(config)
    alone = read(dataset, config, world_size=1)
    assert [len(step["latents_mean"]) for step in alone] == [ROWS_A_STEP] * LAST_STEP
    assert {step["latents_mean"].shape[1:] for step in alone} == {(4, 8, 8), (4, 6, 11)}
    assert same(alone, read(dataset, config, world_size=2))
    assert same(alone, read(dataset, config, world_size=4))


def test_a_stream_goes_on_at_any_step_exactly_where_another_was(config: Config) -> None:
    dataset = prepare(config)
    whole = read(dataset, config, world_size=2)
    for first in (2, 13, LAST_STEP):
        assert same(whole[first - 1 :], read(dataset, config, world_size=2, first=first))


def test_an_epoch_has_every_training_row_once(config: Config) -> None:
    dataset = prepare(config)
    rows = dataset.num_rows("train")
    captions = dataset.table("train", ["prompt_embeds"])["prompt_embeds"].to_pylist()
    streamed = [
        row.tobytes() for step in read(dataset, config, world_size=1) for row in step["prompt_embeds"]
    ]
    counts = {caption: streamed.count(caption) for caption in set(captions)}
    # Each bucket begins an epoch with what was left of the last one, so counts differ by an epoch at most.
    assert len(counts) == rows
    expected = ROWS_A_STEP * LAST_STEP / rows
    assert min(counts.values()) >= int(expected) - 1 and max(counts.values()) <= int(expected) + 2


def test_streamed_encoding_has_the_order_of_the_cache_and_augments_anew_but_stores_no_training_row(
    config: Config, tmp_path: Path
) -> None:
    # With a window that holds all rows: windows are of so many bytes, which differ between the two.
    data = config.data.model_copy(update={"shuffle_mb": 64, "balance": "kind"})
    config = config.model_copy(update={"data": data, "name": "balanced"})
    stored = prepare(config)
    cached = read(stored, config, world_size=2)
    table = stored.table("train", ["text", "prompt_embeds"]).to_pylist()
    rare = {row["prompt_embeds"] for row in table if int(row["text"].split()[1]) % 5 == 0}
    is_rare = [row.tobytes() in rare for step in cached for row in step["prompt_embeds"]]
    assert len(rare) < 0.4 * len(table) and np.mean(is_rare) == pytest.approx(0.5, abs=0.05)
    augmentation = config.data.augmentation.model_copy(update={"flip": 0.5})
    data = config.data.model_copy(update={"encode": "stream", "augmentation": augmentation})
    live = config.model_copy(update={"data": data, "name": "live", "storage": str(tmp_path)})
    dataset = prepare(live)
    assert {part["split"] for part in dataset.all_parts} == {"validation", "test", "floor"}
    assert dataset.pictures("train", 5) and dataset.pictures("validation", 5)
    versions: dict[bytes, list[bool]] = {}
    for one, other in zip(cached, read(dataset, live, world_size=2), strict=True):
        assert np.array_equal(one["prompt_embeds"], other["prompt_embeds"])
        for caption, encoded, drawn in zip(
            one["prompt_embeds"], one["latents_mean"], other["latents_mean"], strict=True
        ):
            # Encoded in batches of other sizes, so not to the last bit.
            versions.setdefault(caption.tobytes(), []).append(np.allclose(encoded, drawn, atol=1e-4))
    unflipped = [is_plain for seen in versions.values() for is_plain in seen]
    assert 0.35 < np.mean(unflipped) < 0.65
    assert np.mean([0 < np.mean(seen) < 1 for seen in versions.values()]) > 0.6
