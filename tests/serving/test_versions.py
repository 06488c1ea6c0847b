"""What becomes of a version: candidate, champion, previous; and the way back. A real MLflow on SQLite."""

import hashlib
import json
import shutil
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.models import ModelSignature

from ray_jobs.config import Config, ConfigError
from ray_jobs.registry.aliases import aliases_of, measured_of, promote, rollback, status
from ray_jobs.registry.models import champion, entries, open_client
from ray_jobs.registry.promotion import Measured, Result
from ray_jobs.registry.registration import DECISION, Registered, register
from ray_jobs.run.records import MEASURES
from ray_jobs.versions import main
from tests.serving.test_registry import named, weights

MEASURED = Measured(20.0, 0.5, num_samples=96, feature_network="inception@sha256:7ff4", data="9f" * 32)


@pytest.fixture
def config(config: Config, request: pytest.FixtureRequest) -> Config:
    """A name of its own a test, in the registry that all share."""
    return named(config, request.node.name)


@pytest.fixture
def add(config: Config, tmp_path: Path) -> Any:
    """Publishes: other weights at each number, in the run's one folder."""

    def publish(number: int, fid: float, **changes: Any) -> Registered:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        source = weights(tmp_path / "model", float(number))
        return register(config, source=source, measured=replace(MEASURED, fid=fid, **changes), params={})

    return publish


def aliases(config: Config) -> dict[str, int]:
    return aliases_of(open_client(config), config)


def tags(config: Config, version: int) -> dict[str, str]:
    return dict(open_client(config).get_model_version(config.publish.model_name, str(version)).tags)


def everything(config: Config) -> tuple[Any, ...]:
    """All that the registry knows of a name, when each version was last changed included."""
    client, name = open_client(config), config.publish.model_name
    versions = client.search_model_versions(f"name = '{name}'")
    return aliases(config), [dict(each) for each in versions]


def test_the_first_version_becomes_champion(config: Config, add: Any) -> None:
    assert add(1, 20.0) == Registered(1, ("champion",), "champion: the first version of its name")
    assert aliases(config) == {"champion": 1}


def test_a_first_version_that_does_not_beat_the_base_stays_candidate_until_it_is_promoted(
    config: Config, add: Any
) -> None:
    assert "does not beat the base model's 19.00" in add(1, 20.0, base_fid=19.0).message
    assert aliases(config) == {"candidate": 1}
    with pytest.raises(ConfigError, match="promote a version that stayed candidate"):
        champion(config)
    assert add(2, 18.0, base_fid=19.0).aliases == ("champion",)
    promote(config, 1)
    assert aliases(config)["champion"] == 1


def test_the_score_that_ranked_is_kept_with_a_version_and_decides_between_two(
    config: Config, add: Any
) -> None:
    ranked: dict[str, Any] = {"ranked_by": "corrected_fid", "base_fid": 30.0}
    assert add(1, 20.0, others={"corrected_fid": Result(14.0, 0.5, 25.0)}, **ranked).aliases == ("champion",)
    kept = measured_of(
        client := open_client(config), client.get_model_version(config.publish.model_name, "1")
    )
    assert kept and replace(kept, begins_from="", name="") == replace(
        MEASURED, fid=20.0, others={"corrected_fid": Result(14.0, 0.5, 25.0)}, test=None, **ranked
    )
    message = add(2, 10.0, others={"corrected_fid": Result(15.0, 0.5)}, **ranked).message
    assert "its test corrected FID 15.00 ± 0.50 does not beat the champion's 14.00 ± 0.50" in message
    message = add(3, 21.0, others={"corrected_fid": Result(12.0, 0.5)}, **ranked).message
    assert message == "champion: its test corrected FID 12.00 ± 0.50 beats that of version 1, now previous"
    head, first, *_ = status(config).splitlines()
    assert "ranked by" in head and "corrected FID 12.00 ± 0.50" in first


@pytest.mark.parametrize(("measure", "decides"), [("subject", "FID"), ("target", "distance to the target")])
def test_a_score_that_is_relative_to_the_base_decides_only_between_versions_of_one_base(
    config: Config, add: Any, tmp_path: Path, measure: str, decides: str
) -> None:
    """The distance of edits to their targets has nothing of the base, and the split must be the same."""
    add(1, 20.0, ranked_by=measure, others={measure: Result(0.5)}, test="aa" * 32)
    better: dict[str, Any] = {"ranked_by": measure, "others": {measure: Result(0.4)}}
    assert f"its test {MEASURES[measure].name} 0.4" in add(2, 30.0, test="aa" * 32, **better).message
    assert "cannot be compared" in add(3, 1.0, test="bb" * 32, **better).message
    model = config.model.model_copy(update={"base": "another/base"})
    found = register(
        config.model_copy(update={"model": model}),
        source=weights(tmp_path / "other", 9.0),
        measured=replace(
            MEASURED, fid=10.0, test="aa" * 32, ranked_by=measure, others={measure: Result(0.3)}
        ),
        params={},
    )
    assert f"its test {decides} " in found.message and found.aliases == ("champion",)


def test_versions_of_one_test_split_are_compared_whatever_they_were_trained_on(
    config: Config, add: Any
) -> None:
    add(1, 20.0, test="aa" * 32)
    assert "cannot be compared" in add(2, 1.0, test="bb" * 32, data="00" * 32).message
    assert add(3, 18.0, test="aa" * 32, data="00" * 32).aliases == ("champion",)
    assert champion(config).test_digest == "aa" * 32


def test_a_better_version_becomes_champion_and_the_former_previous(config: Config, add: Any) -> None:
    add(1, 20.0)
    assert add(2, 18.0).message == (
        "champion: its test FID 18.00 ± 0.50 beats that of version 1, now previous"
    )
    assert aliases(config) == {"champion": 2, "previous": 1}


def test_a_version_within_the_error_stays_candidate_and_says_how_to_promote_it(
    config: Config, add: Any
) -> None:
    add(1, 20.0)
    found = add(2, 19.5)
    assert found.aliases == ("candidate",)
    assert (
        "19.50 ± 0.50 does not beat the champion's 20.00 ± 0.50 by more than the error 0.71" in found.message
    )
    assert "python -m ray_jobs.versions promote --config ... --version 2" in found.message
    assert aliases(config) == {"candidate": 2, "champion": 1}


def test_a_version_measured_on_other_data_stays_candidate(config: Config, add: Any) -> None:
    add(1, 20.0)
    assert "cannot be compared" in add(2, 1.0, data="00" * 32).message
    assert champion(config).version == 1


def test_the_newest_version_that_was_not_promoted_is_the_candidate(config: Config, add: Any) -> None:
    for number, fid in ((1, 20.0), (2, 21.0), (3, 22.0)):
        add(number, fid)
    assert aliases(config) == {"candidate": 3, "champion": 1}


def test_publishing_the_same_weights_again_changes_nothing(config: Config, add: Any) -> None:
    add(1, 20.0)
    add(2, 21.0)
    add(3, 10.0)
    before = everything(config)
    for number, fid in ((1, 1.0), (2, 1.0), (3, 1.0)):
        assert add(number, fid).message.startswith("registered before, ")
    assert everything(config) == before


@pytest.mark.parametrize("lost", [["champion", "previous"], ["champion"], []])
def test_an_interrupted_registration_is_finished_by_the_next(
    config: Config, add: Any, lost: list[str]
) -> None:
    """It ended after the version, after `previous` or after `champion`, before its decision was written."""
    add(1, 20.0)
    add(2, 18.0)
    client, name = open_client(config), config.publish.model_name
    client.delete_model_version_tag(name, "2", DECISION)
    if "previous" in lost:
        client.delete_registered_model_alias(name, "previous")
    if "champion" in lost:
        client.set_registered_model_alias(name, "champion", "1")
    assert add(2, 18.0).version == 2
    assert aliases(config) == {"champion": 2, "previous": 1}


def test_a_version_says_where_it_comes_from_and_how_it_is_called(config: Config, add: Any) -> None:
    add(1, 20.0)
    found = tags(config, 1)
    assert found["data_digest"] == "9f" * 32
    assert found["config_digest"] == hashlib.sha256(config.to_yaml().encode()).hexdigest()
    assert (found["feature_network"], found["num_samples"]) == ("inception@sha256:7ff4", "96")
    assert found["code_version"]
    signature = ModelSignature.from_dict(json.loads(found["signature"]))
    assert signature.inputs.input_names() == ["prompt", "seed", "steps", "guidance_scale"]
    [pictures] = signature.outputs.inputs
    side = config.data.resolution
    assert (pictures.shape, pictures.type.name) == ((-1, side, side, 3), "uint8")
    assert champion(config).metrics == {"test_fid": 20.0, "test_fid_error": 0.5}


def test_a_candidate_can_be_promoted_by_hand_and_taken_back(config: Config, add: Any) -> None:
    add(1, 20.0)
    add(2, 21.0)
    promote(config, 2)
    assert aliases(config) == {"champion": 2, "previous": 1}
    promote(config, 2)
    assert aliases(config) == {"champion": 2, "previous": 1}
    assert rollback(config) == 1
    assert aliases(config) == {"champion": 1}


def test_a_second_rollback_does_not_bring_back_what_was_taken_back(config: Config, add: Any) -> None:
    add(1, 20.0)
    add(2, 18.0)
    rollback(config)
    with pytest.raises(ConfigError, match="no version with the alias 'previous'"):
        rollback(config)
    assert champion(config).version == 1


def test_what_no_longer_has_its_weights_is_not_promoted(config: Config, add: Any) -> None:
    add(1, 20.0)
    weights(Path(champion(config).source), 7.0)
    add(2, 18.0)
    for attempt in (lambda: promote(config, 1), lambda: rollback(config)):
        with pytest.raises(ConfigError, match="no longer the weights of version 1"):
            attempt()
    assert aliases(config) == {"champion": 2, "previous": 1}


def test_an_unknown_version_and_an_unpublished_name_are_named(config: Config, add: Any) -> None:
    with pytest.raises(ConfigError, match="run the pipeline first"):
        promote(config, 1)
    add(1, 20.0)
    with pytest.raises(ConfigError, match="has no version 7; see python -m ray_jobs.versions status"):
        promote(config, 7)


def test_the_table_has_each_version_with_its_score_and_aliases(config: Config, add: Any) -> None:
    add(1, 20.0)
    add(2, 18.0)
    add(3, 19.0, error=None)
    head, *rows = (line.split() for line in status(config).splitlines())
    assert head[:4] == ["version", "aliases", "test", "FID"]
    assert [row[:2] for row in rows] == [["3", "candidate"], ["2", "champion"], ["1", "previous"]]
    assert rows[0][2:6] == ["19.00", "FID", "96", "inception@sha256:7ff4"]
    assert rows[1][2:5] == ["18.00", "±", "0.50"]
    assert rows[1][-1] == champion(config).source


def test_the_commands_work_and_end_with_a_code(
    config: Config, add: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(1, 20.0)
    add(2, 21.0)
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml())
    assert main(["promote", "--config", str(file), "--version", "2"]) == 0
    assert main(["rollback", "--config", str(file)]) == 0
    assert main(["status", "--config", str(file)]) == 0
    assert main(["rollback", "--config", str(file)]) == 2
    said = capsys.readouterr().out
    assert "version 2 is the champion" in said and "version 1 is the champion" in said
    assert said.splitlines()[-1].startswith("error: ")


def test_versions_beyond_mlflows_first_page_are_listed(
    config: Config, add: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 4):
        add(number, 20.0 + number)
    whole = MlflowClient.search_model_versions
    monkeypatch.setattr(MlflowClient, "search_model_versions", partialmethod(whole, max_results=1))
    lines = status(config).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["3", "2", "1"]
    name = config.publish.model_name
    assert set(entries(config, [name])[name].versions) == {1, 2, 3}
    assert add(1, 20.0).message.startswith("registered before")
