"""What follows from subjects for the search: its score and folds, unless they are given."""

import json
from pathlib import Path

import pytest
from PIL import Image

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.data import subjects
from ray_jobs.data.encoding.subject_words import training_advice
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.data.sources.dreambooth import Subject
from ray_jobs.data.subjects import num_folds, subjects_of, suited_to_subjects
from ray_jobs.run.manifest import Manifest
from ray_jobs.run.split import Split

ROOT = Path(__file__).parents[2]


def photos(folder: Path, num: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"{number}.png")
    return f"{{path: {folder}, instance_prompt: a nch cat, class_prompt: a cat}}"


def configured(*sources: str, **settings: object) -> Config:
    given = [f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in settings.items()]
    demo = ROOT / "configs" / "demo.yaml"
    return load_config(demo, ["data.source=null", f"data.sources=[{', '.join(sources)}]", *given])


def decided(config: Config) -> tuple[str, int, int]:
    found = suited_to_subjects(config)
    return found.search.rank_by, found.search.folds, found.data.folds


def test_a_subject_is_ranked_as_one_over_folds_of_its_photos(tmp_path: Path) -> None:
    assert decided(configured(photos(tmp_path, 9))) == ("subject", 4, 4)
    assert decided(configured(photos(tmp_path / "few", 4))) == ("subject", 2, 2)


def test_enough_photos_are_split_and_need_no_folds(tmp_path: Path) -> None:
    assert decided(configured(photos(tmp_path, 20))) == ("subject", 0, 0)
    assert [num_folds(photos_) for photos_ in (4, 6, 8, 19, 20)] == [2, 3, 4, 4, 0]


def test_what_is_given_stays(tmp_path: Path) -> None:
    source = photos(tmp_path, 8)
    assert decided(configured(source, search__rank_by="kid", search__folds=0)) == ("kid", 0, 0)
    assert decided(configured(source, search__folds=2, data__folds=2)) == ("subject", 2, 2)
    assert decided(configured(source, search__guidance_scales=[1.0, 3.0])) == ("subject", 0, 0)
    assert decided(configured(source, data__encode="stream")) == ("subject", 0, 0)
    resolved = suited_to_subjects(configured(source))
    assert suited_to_subjects(resolved) == resolved


def test_only_sources_with_prompts_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(config: Config) -> list[Subject]:
        raise AssertionError("listed")

    monkeypatch.setattr(subjects, "open_sources", listed)
    photos(tmp_path, 8)
    bare = configured(f"{{path: {tmp_path}}}")
    assert suited_to_subjects(bare) is bare
    (tmp_path / "dataset_info.json").write_text('{"instance_prompt": "a nch cat"}')
    with pytest.raises(AssertionError, match="listed"):
        suited_to_subjects(bare)


def test_photos_among_other_pictures_are_no_subject_run(tmp_path: Path) -> None:
    other = tmp_path / "other"
    photos(other, 8)
    (other / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a square"}\n')
    mixed = photos(tmp_path / "cat", 8), f"{{path: {other}}}"
    assert decided(configured(*mixed)) == ("corrected_fid", 0, 0)
    with pytest.raises(ConfigError, match=r"rank_by: subject needs sources that are subjects, and no others"):
        suited_to_subjects(configured(*mixed, search__rank_by="subject"))


def test_settings_with_which_subjects_fail_are_named(tmp_path: Path) -> None:
    config = configured(
        photos(tmp_path, 8).replace("a cat", "a woman"),
        search__learning_rates=[0.01],
        search__ladder=[200, 400],
    )
    [subject] = subjects_of(config)
    lines = training_advice(config.train, config.search, subject)
    assert [line.split(";")[0] for line in lines] == [
        "each photo is seen 400 times before the first rung (search.ladder: 200)",
        "the lowest of search.learning_rates is 0.01",
        "a person's face soon becomes everybody's",
    ]
    calm = configured(photos(tmp_path, 8), search__learning_rates=[1e-4, 0.01], search__ladder=[80, 160])
    assert training_advice(calm.train, calm.search, subjects_of(calm)[0]) == []


def test_a_fold_of_a_set_that_is_not_split_is_not_trained_on(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    parts = [
        {"split": split, "fold": fold, "source": 0, "bucket": "64x64", "rows": 2, "file": f"{split}{fold}"}
        for split, fold in (("train", 0), ("train", 1), ("class", 0))
    ]
    storage.write_text("parts.json", json.dumps(parts))
    dataset = Dataset(storage, storage, Manifest(train=4, held_out=False, folds=[2, 2]))

    def files(dataset: Dataset, split: str) -> list[str]:
        return [part["file"] for part in dataset.parts(split)]

    for fold in range(2):
        judged = dataset.judged_by(Split.of_fold(fold))
        assert files(judged, "validation") == [f"train{fold}"]
        assert files(judged, "train") == [f"train{1 - fold}"]
        assert files(judged, "class") == ["class0"]
    assert files(dataset, "validation") == files(dataset, "test") == ["train0", "train1"]
    assert files(dataset.together(), "train") == files(dataset.together(), "test") == ["train0", "train1"]
