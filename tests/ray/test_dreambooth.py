"""Two subjects in one run: the base model draws the class pictures that lack, and training preserves them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFilter
from safetensors.torch import load_file

from cluster.local import LocalCluster
from ray_jobs.config import Config, ConfigError
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.data.preparation import PREVIEW, dry_run, prepare
from ray_jobs.data.subjects import suited_to_subjects
from ray_jobs.evaluation.pool import evaluators
from ray_jobs.metrics.subject import BY_HEART, CLASS_LOST, UNLIKE, VARIETY_LOST
from ray_jobs.run.folder import RunFolder
from ray_jobs.run.split import TEST, Split
from ray_jobs.search import search
from tests.conftest import captions, draw
from tests.plain_training import PlainTraining
from tests.ray.test_packed_search import published_name, workers
from tests.ray.test_prepare import members
from tests.ray.test_training import tiny_config, train_variants
from tests.workers import Workers

CAT, DOG = "a photo of a cat", "a photo of a dog"
SKS_CAT, SKS_DOG = "a photo of sks cat", "a photo of sks dog"


@pytest.fixture(scope="module")
def config(ray_cluster: LocalCluster, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A cat with its prompts in the configuration; a dog with dataset_info.json and one class picture."""
    folder = tmp_path_factory.mktemp("subjects")
    drawn = [draw(caption, number) for number, caption in enumerate(captions()[:9])]
    for name in ("cat", "dog/class_data_dir"):
        (folder / name).mkdir(parents=True)
    for number in range(4):
        drawn[number].save(folder / "cat" / f"{number}.webp", lossless=True)
        drawn[4 + number].save(folder / "dog" / f"{number}.png")
    drawn[8].save(folder / "dog" / "class_data_dir" / "own.png")
    prompts = {"instance_prompt": SKS_DOG, "class_prompt": DOG}
    (folder / "dog" / "dataset_info.json").write_text(json.dumps(prompts))
    cat = {"path": str(folder / "cat"), "instance_prompt": SKS_CAT, "class_prompt": CAT}
    given = tiny_config(
        tiny_model,
        folder,
        folder / "runs",
        "data.source=null",
        f"data.sources={json.dumps([cat, {'path': str(folder / 'dog')}])}",
        "data.num_class_images=3",
        "data.cleaning={min_contrast: null, max_dark: null, max_bright: null, duplicates: ignore}",
        "data.encode_dtype=fp32",
        "train.prior_loss_weight=1",
        "evaluate.inference_steps=2",
        "evaluate.num_actors=1",
        "evaluate.num_samples=8",
        "evaluate.subject_samples=4",
        "evaluate.feature_network={kind: efficientnet-lite0}",
        "evaluate.second_network=null",
        "train.warmup_steps=0",
        "train.epsilon=1.0e-3",  # with Adam's own, rounding moves what has hardly any gradient
        "search.learning_rates=[2.0e-3]",
        "search.ladder=[1,2]",
        "search.pack=auto",
    )
    return suited_to_subjects(given)


@pytest.fixture(scope="module")
def dataset(config: Config) -> Dataset:
    return prepare(config)


def drawn_files(config: Config) -> dict[str, dict[str, Path]]:
    """The class pictures in the storage: prompt to name to file."""
    return {
        json.loads(settings.read_text())["prompt"]: {p.name: p for p in settings.parent.glob("*.png")}
        for settings in Path(config.storage).glob("class_pictures/*/settings.json")
    }


def test_a_dry_run_says_what_would_be_drawn_and_draws_nothing(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run(config.model_copy(update={"storage": str(tmp_path)}))
    out = capsys.readouterr().out
    assert "blurred" not in out and "enlarged" not in out
    assert f"'{CAT}': up to 3 class pictures will be drawn" in out
    assert f"'{DOG}': up to 2 class pictures will be drawn" in out
    assert not (tmp_path / "class_pictures").exists()


def test_photos_that_are_blurred_or_too_small_are_named(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, caption in enumerate(captions()[:4]):
        draw(caption, number).save(photos / f"{number}.png")
    draw(captions()[4], 4).filter(ImageFilter.GaussianBlur(3)).save(photos / "soft.png")
    draw(captions()[5], 5).resize((48, 48)).save(photos / "small.png")
    source = {"path": str(photos), "instance_prompt": SKS_CAT, "class_prompt": CAT}
    data = config.data.model_dump() | {"sources": [source]}
    data["cleaning"]["duplicates"] = "drop"
    config = config.model_copy(
        update={"storage": str(tmp_path / "runs"), "data": type(config.data).model_validate(data)}
    )
    dry_run(config)
    out = capsys.readouterr().out
    assert "photos: small.png is smaller than data.resolution 64 and enlarged" in out
    assert "photos: soft.png is blurred, which the model learns with the subject" in out

    for name in ("1", "2", "3", "soft", "small"):
        shutil.copy(photos / "0.png", photos / f"{name}.png")
    page = RunFolder.of(config).dataset
    page.delete(PREVIEW)
    with pytest.raises(ConfigError, match="1 of 6 photos are left"):
        dry_run(config)
    assert "duplicate" in page.read_text(PREVIEW), "which says why"


def test_the_base_model_draws_exactly_the_class_pictures_that_are_lacking(
    config: Config, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    files = drawn_files(config)
    numbers = ["000000.png", "000001.png", "000002.png"]
    assert {prompt: sorted(found) for prompt, found in files.items()} == {CAT: numbers, DOG: numbers[:2]}
    contents = [path.read_bytes() for found in files.values() for path in found.values()]
    assert len(set(contents)) == 5

    prepare(config)
    assert "class pictures of the base model: 0 drawn, 5 already in storage" in capsys.readouterr().out
    lost = files[CAT]["000001.png"]
    before, others = lost.read_bytes(), {p: p.stat().st_mtime_ns for p in files[CAT].values() if p != lost}
    lost.unlink()
    prepare(config)
    assert "class pictures of the base model: 1 drawn, 4 already in storage" in capsys.readouterr().out
    assert lost.read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in others} == others


def test_class_pictures_have_a_split_of_their_own_and_their_class_prompts(dataset: Dataset) -> None:
    assert (dataset.manifest.train, dataset.manifest.class_) == (8, 6)
    assert members(dataset, "train") == {SKS_CAT, SKS_DOG}
    texts = [row["text"] for row in dataset.read("class", ["text"])]
    assert sorted(texts) == [CAT] * 3 + [DOG] * 3


def test_the_loss_is_that_of_the_subjects_and_lambda_times_that_of_their_classes(
    config: Config, dataset: Dataset, two_workers: Workers, tmp_path: Path
) -> None:
    def with_weight(weight: float) -> Config:
        train = config.train.model_copy(update={"prior_loss_weight": weight})
        return config.model_copy(update={"train": train})

    plain = PlainTraining(with_weight(1.0), dataset)
    texts, _ = plain.batch(1)
    losses = plain.row_losses(1).tolist()
    assert set(texts[:2]) <= {SKS_CAT, SKS_DOG} and set(texts[2:]) <= {CAT, DOG}
    own, prior = sum(losses[:2]) / 2, sum(losses[2:]) / 2
    assert abs(own - prior) > 1e-3  # else it would not matter which rows are weighed
    variants = {str(weight): with_weight(weight) for weight in (1.0, 0.5)}
    two = train_variants(variants, dataset, tmp_path, two_workers, steps=2)
    for weight in (1.0, 0.5):
        seen = two[str(weight)]["loss"]
        assert seen[0] == pytest.approx(own + weight * prior, abs=1e-5)
        assert np.isfinite(seen).all() and len(seen) == 2


def test_a_search_ranks_subjects_over_folds_that_train_together_and_trains_the_winner_on_all(
    ray_cluster: LocalCluster, config: Config, dataset: Dataset
) -> None:
    assert (config.search.rank_by, config.search.folds, config.trials_together) == ("subject", 4, 4)
    assert dataset.manifest.folds == [2, 2, 2, 2]
    before = workers(ray_cluster)
    with evaluators(config, dataset) as pool:
        found = search(config, dataset, pool)
        base = pool.score(None, Split.of_fold(0)).subject
        pool.load(TEST)
        tested = pool.score(found.winner.checkpoint + "/weights", TEST).subject
    assert len(workers(ray_cluster) - before) == 2, "one group for all folds and the last training"

    def assert_trained(checkpoint: str, rows: Dataset) -> None:
        plain = PlainTraining(config.with_settings({"train.learning_rate": 2.0e-3}), rows)
        plain.run(int(checkpoint[-8:]))
        expected = {published_name(name): value for name, value in plain.ema.averages.items()}
        got = load_file(Path(checkpoint, "weights", "pytorch_lora_weights.safetensors"))
        assert got.keys() == expected.keys()
        assert max((got[name] - value).abs().max().item() for name, value in expected.items()) < 1e-5

    # Folds are not compared with each other, so none is stopped.
    reached = sorted((row.fold, row.step) for row in found.measured if row.fold is not None)
    assert reached == [(fold, step) for fold in range(4) for step in (1, 2)]
    for row in found.measured:
        assert row.fold is not None
        assert_trained(row.checkpoint, dataset.leave_out(row.fold))
        assert (row.ranked_by, row.num_samples) == ("subject", 8)
        assert None not in (row.subject_error, row.unlike, row.by_heart, row.class_lost, row.variety_lost)
        assert row.fit_lost is None  # there is no CLIP
    assert_trained(found.winner.checkpoint, dataset.together())
    of_step = [row.score for row in found.measured if row.step == found.winner.step]
    assert found.winner.score == pytest.approx(np.mean(of_step))
    assert base is not None and tested is not None
    assert base.parts[UNLIKE].value == pytest.approx(1)
    assert base.parts[CLASS_LOST].value == pytest.approx(0)  # of the same pictures
    assert set(tested.parts) <= {UNLIKE, BY_HEART, CLASS_LOST, VARIETY_LOST}
