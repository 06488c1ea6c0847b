"""Scores are taken on pictures that the weights never saw; and the test split is left to publish."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.storage import Storage
from ray_jobs.compare import look_up
from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.evaluate import _candidates
from ray_jobs.evaluation.cross_validation import held_out, trained_on
from ray_jobs.registry.models import open_client
from ray_jobs.registry.promotion import Measured
from ray_jobs.registry.registration import register
from ray_jobs.run.names import LEARNING_RATE
from ray_jobs.run.split import TEST, VALIDATION, Split, refit_of, unseen_by
from ray_jobs.training.checkpoint import folder_of
from ray_jobs.tuning.trial import Trial
from tests.small_set import FOLDS, small_set

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
IN_FOLDS = [f"data.folds={FOLDS}", f"search.folds={FOLDS}"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_set(Storage.open(str(tmp_path_factory.mktemp("small"))), side=8)


def configured(*overrides: str) -> Config:
    return load_config(DEMO, list(overrides))


def texts(dataset: Dataset, split: str) -> set[str]:
    return {row["text"] for row in dataset.pictures(split, 100)}


@pytest.mark.parametrize(
    ("overrides", "split"),
    [
        ([], VALIDATION),
        ([], TEST),
        *((IN_FOLDS, each) for each in (Split.of_fold(0), Split.of_fold(1), TEST)),
    ],
    ids=str,
)
def test_what_judges_and_what_tells_near_copies_were_never_trained_on(
    dataset: Dataset, overrides: list[str], split: Split
) -> None:
    config = configured(*overrides)
    learnt = texts(trained_on(config, dataset, split), "train")
    for judge in (split, held_out(config, split)):
        judging = texts(dataset.judged_by(judge), judge.name)
        assert judging and not judging & learnt
        if split != TEST:
            assert not judging & texts(dataset, "test"), "publish alone reads it"


def test_near_copies_of_the_published_are_looked_for_among_all_that_it_was_trained_on(
    dataset: Dataset,
) -> None:
    both = texts(dataset, "train") | texts(dataset, "validation")
    assert texts(trained_on(configured(*IN_FOLDS), dataset, TEST), "train") == both


def test_a_training_is_judged_by_what_it_left_out() -> None:
    settings = {LEARNING_RATE: 1e-3}
    for fold in (None, 0, 12):
        trial = Trial.of(settings, [80], fold)
        assert unseen_by(trial.training) == trial.split
    assert str(Split.of_fold(12)) == "fold-12" and trial.training.endswith("_fold-12")
    assert unseen_by(refit_of("lr-0.001")) is None
    assert unseen_by("lr-0.001_schedule-fold-2") == VALIDATION, "a setting's value is no fold"


def checkpoint(config: Config, training: str) -> None:
    folder = Storage.open(config.storage).child(config.name, "train", training, folder_of(80))
    folder.write_text("progress.json", '{"step": 80, "why": "rung", "world_size": 1}')
    folder.write_text("complete-0000-of-0001", "{}")


def test_the_stage_scores_each_checkpoint_on_its_fold_and_no_last_training(tmp_path: Path) -> None:
    config = configured(f"storage={tmp_path}", *IN_FOLDS)
    for training in ("lr-0.001_fold-0", "lr-0.001_fold-1", "lr-0.001_refit"):
        checkpoint(config, training)
    judged = {name: split and str(split) for name, _, split in _candidates(config)}
    assert judged == {
        "base, fold-0": "fold-0",
        "base, fold-1": "fold-1",
        "lr-0.001_fold-0  step 80": "fold-0",
        "lr-0.001_fold-1  step 80": "fold-1",
        "lr-0.001_refit  step 80": None,
    }
    plain = configured(f"storage={tmp_path}", "name=plain")
    checkpoint(plain, "lr-0.001")
    assert [split for _, _, split in _candidates(plain)] == [VALIDATION, VALIDATION]


def published(config: Config, folder: Path) -> None:
    """Register a version whose weights are its name, which nothing here loads."""
    folder.mkdir()
    name = torch.tensor(list(folder.name.encode()), dtype=torch.uint8)
    save_file({"name": name}, folder / "pytorch_lora_weights.safetensors")
    measured = Measured(fid=10.0, error=1.0, num_samples=4, feature_network="n", data="d")
    register(config, source=str(folder), measured=measured, params={"dataset": "d"})


def test_a_version_that_has_trained_on_the_validation_split_is_not_compared_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = configured(f"storage={tmp_path}")
    published(configured(f"storage={tmp_path}", "evaluate.guidance_scale=1.5"), tmp_path / "plain")
    published(configured(f"storage={tmp_path}", *IN_FOLDS), tmp_path / "refitted")
    published(config, tmp_path / "older")
    for tag in ("folds", "guidance_scale"):  # which older releases did not give
        open_client(config).delete_model_version_tag(config.publish.model_name, "3", tag)
    with pytest.raises(ConfigError, match=r"search\.folds: version 2 was trained on the validation pictures"):
        look_up(config, "2")
    assert (look_up(config, "1").guidance_scale, look_up(config, "1").data) == (1.5, "d")
    assert look_up(config, "3").guidance_scale == look_up(config, "base").guidance_scale == 2.0
    with pytest.raises(ConfigError, match=r"search\.folds: version 3 .* python -m ray_jobs\.versions status"):
        look_up(configured(f"storage={tmp_path}", *IN_FOLDS), "3")
