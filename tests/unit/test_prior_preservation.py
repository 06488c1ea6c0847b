"""Prior preservation (arXiv 2208.12242, eq. 2): which class pictures are lacking, and how they weigh."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.config import Config, ConfigError, TrainConfig, load_config
from ray_jobs.data.encoding.class_pictures import class_image_counts
from ray_jobs.data.preparation import _inputs, open_sources
from ray_jobs.data.sources.samples import Source
from ray_jobs.training.batch import Piece, loss_shares
from ray_jobs.weights.model_files import model_digest
from tests.unit.test_sources import caption_files, dreambooth, picture, write

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def configured(sources: list[dict[str, Any]], *overrides: str) -> Config:
    chosen = ["data.source=null", f"data.sources={json.dumps(sources)}", "data.num_class_images=3"]
    return load_config(DEMO, [*chosen, "train.prior_loss_weight=1", *overrides])


def cat(folder: Path, **settings: str) -> dict[str, Any]:
    """A source of two pictures that has its prompts from the configuration."""
    write(folder, {"a.png": picture(0), "b.png": picture(1)})
    return {"path": str(folder), "instance_prompt": "a sks cat", **settings}


def test_a_step_of_two_rows_weighs_the_class_row_by_lambda() -> None:
    shares = loss_shares(TrainConfig(batch_size=2, prior_loss_weight=0.5))
    assert shares == [1.0, 0.5]
    batch = {"latents": torch.tensor([[7.0], [9.0]])}
    [piece] = Piece.cut(batch, shares, world_size=1, rank=0, pieces=1)
    assert (piece.places, piece.weights) == ([0, 1], [1.0, 0.5])
    [class_only] = Piece.cut({"latents": batch["latents"][1:]}, shares, world_size=2, rank=1, pieces=1)
    assert (class_only.places, class_only.weights) == ([1], [0.5])


def test_a_step_is_the_mean_of_its_training_rows_and_lambda_times_the_mean_of_its_class_rows() -> None:
    shares = loss_shares(TrainConfig(batch_size=5, prior_loss_weight=0.5))
    assert shares == [1 / 3, 1 / 3, 1 / 3, 0.25, 0.25]


def test_without_prior_preservation_all_rows_weigh_the_same() -> None:
    assert loss_shares(TrainConfig(batch_size=4)) == [0.25] * 4


@pytest.mark.parametrize(("world_size", "num_pieces"), [(1, 1), (1, 3), (2, 1), (3, 2), (4, 2)])
def test_the_pieces_of_all_workers_carry_each_row_of_a_step_once(world_size: int, num_pieces: int) -> None:
    shares = loss_shares(TrainConfig(batch_size=5, prior_loss_weight=0.5))
    total = dict.fromkeys(range(5), 0.0)
    for rank in range(world_size):
        mine = torch.arange(5).tensor_split(world_size)[rank]
        for piece in Piece.cut({"row": mine}, shares, world_size, rank, num_pieces):
            assert piece.rows["row"].tolist() == piece.places
            for place, weight in zip(piece.places, piece.weights, strict=True):
                total[place] += weight
    assert list(total.values()) == shares


def test_each_subject_lacks_what_its_own_class_pictures_leave_and_classes_are_shared(tmp_path: Path) -> None:
    sources = [
        {"path": str(dreambooth(tmp_path / "dog"))},  # two pictures of a dog
        cat(tmp_path / "cat", class_prompt="a cat"),
        cat(tmp_path / "other", class_prompt="a photo of a dog"),  # none of its own
    ]
    config = configured(sources)
    assert class_image_counts(config, open_sources(config)) == {"a photo of a dog": 3, "a cat": 3}
    config = configured(sources[:2])
    assert class_image_counts(config, open_sources(config)) == {"a photo of a dog": 1, "a cat": 3}
    config = configured(sources[:1], "data.num_class_images=2")
    assert class_image_counts(config, open_sources(config)) == {}
    config = configured(sources, "train.prior_loss_weight=0")
    assert class_image_counts(config, open_sources(config)) == {}


def test_every_source_needs_a_class_prompt(tmp_path: Path) -> None:
    captioned = {"path": str(caption_files(tmp_path / "captioned"))}
    for source in (captioned, cat(tmp_path / "cat")):
        config = configured([cat(tmp_path / "dog", class_prompt="a dog"), source])
        expected = f"prior_loss_weight: {source['path']} has no class prompt; give it a class_prompt"
        with pytest.raises(ConfigError, match=expected):
            class_image_counts(config, open_sources(config))


def test_what_the_data_set_depends_on_changes_its_digest_and_nothing_else_does(tmp_path: Path) -> None:
    sources = [{"path": str(dreambooth(tmp_path / "dog"))}]

    def digest(*overrides: str, more: list[Source] | None = None) -> str:
        config = configured(sources, *overrides)
        return _inputs(config, open_sources(config) + (more or []), "encoders")

    before = digest()
    assert digest("train.prior_loss_weight=0.5") == before  # another loss of the same rows
    assert digest("data.num_class_images=2") == before  # the sources tell
    assert digest("train.prior_loss_weight=0") != before  # more training rows a step
    write(tmp_path / "drawn", {"a.png": picture(7), "a.txt": "a dog"})
    drawn = open_sources(configured([{"path": str(tmp_path / "drawn")}]))
    assert digest(more=drawn) != before


def test_the_digest_of_a_model_changes_with_its_denoiser_and_its_scheduler(
    tiny_model: Path, tmp_path: Path
) -> None:
    before = model_digest(str(tiny_model))
    for name in (
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "vae/config.json",
        "model_index.json",
    ):
        copy = tmp_path / name.partition("/")[0]
        shutil.copytree(tiny_model, copy)
        assert model_digest(str(copy)) == before
        (copy / name).write_text((copy / name).read_text() + "\n")
        assert model_digest(str(copy)) != before
