"""Each field of a configuration says what it affects, and every digest is a filter over that."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from cluster.storage import Storage
from ray_jobs.config import Config, Effect, Section, SourceConfig
from ray_jobs.data.curation.assigned import split_settings
from ray_jobs.data.curation.scan import entries
from ray_jobs.data.encoding.class_pictures import SETTINGS, _folder
from ray_jobs.data.encoding.row_keys import RowKeys
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.data.preparation import _content, _inputs
from ray_jobs.data.sources.detection import open_source
from ray_jobs.diffusion.families.codec import TILE
from ray_jobs.publishing.final_scores import settings_of
from ray_jobs.run.manifest import Manifest
from ray_jobs.run.records import RungRow
from ray_jobs.training.trainer import depends_on
from ray_jobs.tuning.results import FINISHED, finished, read_result, search_digest, search_digests
from ray_jobs.weights.loading import LORA_WEIGHTS
from tests.unit.test_sources import caption_files

DATA = Dataset(Storage.open("unused"), Storage.open("unused"), Manifest(content="some rows"))
BEST = RungRow(trial_id="one", step=20, fid=1.0)


def configured(**search: Any) -> Config:
    return Config.model_validate(
        {
            "name": "affects",
            "data": {
                "sources": [{"path": "one"}, {"path": "two", "class_prompt": "a dog"}],
                "augmentation": {"flip": 0.5},
            },
            "model": {"base": "tiny"},
            "train": {"stages": [{"steps": 5}, {"steps": 1, "learning_rate": 0.1}]},
            "search": {"learning_rates": [1e-3], "ladder": [10, 20], **search},
        }
    )


def inputs(config: Config) -> str:
    return _inputs(config, [], "encoders")


def content(config: Config) -> str:
    return _content(config, [], "encoders")


def row_key(config: Config) -> str:
    return RowKeys(config).key("ab", "a cat", (64, 48), 1, "train", True).hex()


def search(config: Config) -> str:
    return search_digest(config, DATA)


def weights(config: Config) -> str:
    return json.dumps(depends_on(config, DATA))


def extent(config: Config) -> str:
    return json.dumps(json.loads(finished(config, DATA, BEST))["extent"])


def measures(config: Config) -> str:
    return json.dumps(settings_of(config.evaluate))


Record = Callable[[Config], str]
# Each record with the sections whose fields are in it by their values, and the effects of these. The data set
# stands for `data` in what comes after it, and the encoders' files for `model` in a row's key.
RECORDS: dict[Record, tuple[tuple[str, ...], set[Effect]]] = {
    row_key: (("seed", "data."), {Effect.ENCODINGS}),
    inputs: (("seed", "data."), {Effect.IMAGES, Effect.ENCODINGS, Effect.DATASET}),
    content: (("seed", "data."), {Effect.ENCODINGS, Effect.DATASET}),
    weights: (("",), {Effect.WEIGHTS}),
    search: (("",), {Effect.WEIGHTS, Effect.SCORES}),
    extent: (("search.",), {Effect.EXTENT}),
    measures: (("evaluate.",), {Effect.PUBLISHING}),
}


def changed(section: Section, prefix: str = "") -> Iterator[tuple[str, tuple[Effect, ...], Any]]:
    """Yield each field by name, with its effects and a copy of the section in which only it differs."""
    for name, field in type(section).model_fields.items():
        path, value = prefix + name, getattr(section, name)
        several = isinstance(value, list) and value and isinstance(value[0], Section)
        if isinstance(value, Section) or several:
            rest = value[1:] if several else []
            for inner, effects, other in changed(value[0] if several else value, f"{path}."):
                yield inner, effects, section.model_copy(update={name: [other, *rest] if several else other})
        else:
            other = another(field.annotation, value)
            yield path, section.effects(name), section.model_copy(update={name: other})


def another(annotation: Any, value: Any) -> Any:
    """A value of the same kind, but not necessarily one that the whole configuration allows."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}-2"
    if isinstance(value, dict):
        return {"other": [1]}
    if isinstance(value, list | tuple):
        return [*value, *value] if value else ["x"]
    kinds = {int: 7, float: 0.5, str: "x", bool: True}
    return next((kinds[kind] for kind in get_args(annotation) if kind in kinds), [])


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("record", RECORDS)
def test_a_record_changes_with_the_fields_that_affect_it_and_no_others(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").mkdir()  # the other value of model.assistant and model.controlnet, whose content is read
    (tmp_path / "x" / LORA_WEIGHTS).write_bytes(b"weights")
    (tmp_path / "x" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    config = configured(max_cost=9.0, device_hour_price=2.0)
    sections, effects = RECORDS[record]
    before, found, expected = record(config), set(), set()
    for path, of_field, other in changed(config):
        if record(other) != before:
            found.add(path)
        if path.startswith(sections) and effects.intersection(of_field):
            expected.add(path)
    if record is inputs:  # the training rows of a step, of which prepare checks that there are enough
        expected |= {"train.batch_size", "train.prior_loss_weight"}
    assert found == expected and found


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("step", ["scan", "split", "class images"])
def test_what_a_step_of_prepare_is_repeated_for_affects_the_data_set(step: str, tmp_path: Path) -> None:
    config = configured().model_copy(update={"storage": str(tmp_path)})
    source = open_source(SourceConfig(path=str(caption_files(tmp_path / "pictures"))), None)
    keys: dict[str, Callable[[Config], str]] = {
        "scan": lambda config: entries([source], config.data)[0].file,
        "split": split_settings,
        "class images": lambda config: _folder(config, "model", "a dog").uri,
    }
    before = keys[step](config)
    found = {
        path: {Effect.IMAGES, Effect.ENCODINGS, Effect.DATASET}.intersection(effects)
        for path, effects, other in changed(config)
        if path != "storage" and keys[step](other) != before
    }
    assert len(found) >= 3 and all(found.values()), found


@pytest.mark.parametrize(
    ("setting", "value"), [("encode_precision", "bf16"), ("resolution", 2048), ("resolution", 65)]
)
def test_class_pictures_that_would_be_others_have_a_folder_of_their_own(
    setting: str, value: Any, tmp_path: Path
) -> None:
    def settings(**data: Any) -> dict[str, Any]:
        config = configured().model_copy(update={"storage": str(tmp_path)})
        config = config.model_copy(update={"data": config.data.model_copy(update=data)})
        found: dict[str, Any] = json.loads(_folder(config, "model", "a dog").read_text(SETTINGS))
        return found

    found, before = settings(**{setting: value}), settings()
    tile = {"tile": TILE} if value == 2048 else {}
    assert found == before | {setting: value} | tile and before.keys().isdisjoint(
        {"tile", "encode_precision"}
    )
    assert len(list(tmp_path.glob("class_pictures/*"))) == 2


def sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
        for field in annotation.model_fields.values():
            yield from sections(field.annotation)
    for each in get_args(annotation):
        yield from sections(each)


@pytest.mark.parametrize("section", dict.fromkeys(sections(Config)))
def test_every_field_says_what_it_affects(section: type[Section]) -> None:
    for name, field in section.model_fields.items():
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        effects = [] if is_section else section.effects(name)
        assert is_section or effects
        assert Effect.NOTHING not in effects or len(effects) == 1, name


def test_a_field_without_an_effect_is_an_error() -> None:
    class Forgetful(Section):
        new: int = 0

    with pytest.raises(AttributeError, match="affects"):
        Forgetful.effects("new")


@pytest.mark.parametrize(
    ("field", "effects"),
    [
        ("seed", [Effect.ENCODINGS, Effect.WEIGHTS]),
        ("data.sources.path", [Effect.IMAGES]),
        ("data.sources.weight", [Effect.DATASET]),
        ("data.augmentation.variants", [Effect.DATASET]),
        ("data.augmentation.flip", [Effect.ENCODINGS]),
        ("data.encode_workers", [Effect.NOTHING]),
        ("train.batch_size", [Effect.WEIGHTS]),
        ("train.micro_batch_size", [Effect.NOTHING]),
        ("train.stages.learning_rate", [Effect.WEIGHTS]),
        ("search.ladder", [Effect.SCORES]),
        ("search.patience", [Effect.EXTENT]),
        ("evaluate.num_actors", [Effect.NOTHING]),
        ("evaluate.batch_size", [Effect.NOTHING]),
        ("evaluate.use_gpu", [Effect.NOTHING]),
        ("data.cleaning.max_rejected", [Effect.NOTHING]),
        ("evaluate.second_network.path", [Effect.SCORES]),
        ("evaluate.clip", [Effect.PUBLISHING]),
        ("serve.port", [Effect.SERVING]),
    ],
)
def test_a_field_affects(field: str, effects: list[Effect]) -> None:
    assert {path: list(found) for path, found, _ in changed(configured())}[field] == effects


def test_the_digests_are_those_of_earlier_releases() -> None:
    """Otherwise everything is encoded, trained and searched again: change a value only if that is meant."""
    config = configured(patience=2)
    jitter = {"max_brightness": 0.1, "max_contrast": 0.1, "max_saturation": 0.1, "max_hue": 0.02}
    augmentation = {"flip": 0.5, "rotate": 0.0, "max_degrees": 10.0, "crop": 0.0, "scale": 0.0}
    augmentation |= {"min_scale": 0.8, "colour": 0.0, **jitter}
    key = [3, "ab", "a cat", [64, 48], "white", "bf16", True, 0, 1, augmentation]
    assert row_key(config) == hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    assert extent(config) == (
        '{"num_trials": null, "guidance_scales": [], "patience": 2, "max_steps": null, "max_hours": null, '
        '"max_cost": null}'
    )
    assert {record.__name__: record(config)[:16] for record in (inputs, content, search)} == {
        "inputs": "ddf2ddc3052aac49",
        "content": "3b098d7ecc260fb6",
        "search": "7cd6728587d15c11",
    }


def test_fields_that_no_longer_affect_a_digest_stand_in_it_with_their_defaults() -> None:
    """And so the results that an earlier release computed with other values are recognised too."""
    config = configured(patience=2)
    cleaning = config.data.cleaning.model_copy(update={"max_rejected": 0.5})
    evaluate = config.evaluate.model_copy(update={"batch_size": 8, "use_gpu": True})
    data = config.data.model_copy(update={"cleaning": cleaning})
    other = config.model_copy(update={"data": data, "evaluate": evaluate})
    for record in (inputs, content, search):
        assert record(other) == record(config)
    assert _inputs(other, [], "encoders", as_before=True)[:16] == "7dde8c88d96408df"
    assert _content(other, [], "encoders", as_before=True)[:16] == "75aaa4d462929a12"
    assert [digest[:16] for digest in search_digests(other, DATA)] == ["7cd6728587d15c11", "efa6086f2a85ed08"]


def test_a_corrected_price_continues_a_search_only_if_it_has_a_budget_of_cost(tmp_path: Path) -> None:
    def priced(price: float, **budget: float) -> Config:
        config = configured(device_hour_price=price, **budget)
        return config.model_copy(update={"storage": str(tmp_path)})

    def finish(content: str) -> str:
        Storage.open(str(tmp_path)).child("affects", "search").write_text(FINISHED, content)
        return hashlib.sha256(content.encode()).hexdigest()

    finish(finished(priced(2.0), DATA, BEST))
    assert read_result(priced(1.0), DATA)
    finish(finished(priced(2.0, max_cost=9.0), DATA, BEST))
    assert read_result(priced(2.0, max_cost=9.0), DATA)
    assert read_result(priced(1.0, max_cost=9.0), DATA) is None
    written = finish(finished(priced(2.0, max_cost=9.0), DATA, BEST, priced=False))  # by earlier releases
    found = read_result(priced(2.0, max_cost=9.0), DATA)
    assert found and found.digest == written
