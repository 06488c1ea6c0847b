"""Rollouts act on the registry's aliases, and say what they did."""

from pathlib import Path
from typing import Any

import pytest

from ray_jobs.config import Config, ConfigError
from ray_jobs.registry.aliases import aliases_of
from ray_jobs.registry.models import entries, open_client, tracking_uri
from ray_jobs.registry.promotion import Measured
from ray_jobs.registry.registration import register
from serving.rollout import comparison, main
from serving.service.rollout import TAKEN_OUT, RolloutStatus, promote, take_back, withdraw


@pytest.fixture(scope="module")
def rolled(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A model of its own with a champion and two that did worse."""
    import torch
    from safetensors.torch import save_file

    config = config.model_copy(update={"publish": config.publish.model_copy(update={"model_name": "rolled"})})
    for number in (1, 2, 3):
        folder = tmp_path_factory.mktemp("rolled")
        save_file({"weight": torch.full((2,), float(number))}, folder / "pytorch_lora_weights.safetensors")
        measured = Measured(10.0 * number, None, num_samples=9, feature_network="n", data="9f" * 32)
        register(config, source=str(folder), measured=measured, params={})
    return config


@pytest.fixture(autouse=True)
def _as_registered(rolled: Config) -> None:
    """Before each test 1 is the champion and 3 the candidate."""
    client = open_client(rolled)
    for alias in aliases_of(client, rolled):
        client.delete_registered_model_alias("rolled", alias)
    client.set_registered_model_alias("rolled", "champion", "1")
    client.set_registered_model_alias("rolled", "candidate", "3")


def aliases(config: Config) -> dict[str, int]:
    return aliases_of(open_client(config), config)


def test_promoting_makes_the_candidate_the_champion(rolled: Config) -> None:
    assert promote(rolled) == 3
    assert aliases(rolled) == {"champion": 3, "previous": 1}


def test_withdrawing_takes_the_candidate_out_and_notes_why(rolled: Config) -> None:
    assert withdraw(rolled, 3, "errors: 40 %") == 3
    assert aliases(rolled) == {"champion": 1}
    assert open_client(rolled).get_model_version("rolled", "3").tags[TAKEN_OUT] == "errors: 40 %"


def test_a_candidate_that_came_after_is_not_withdrawn(rolled: Config) -> None:
    with pytest.raises(ConfigError, match="no candidate 2"):
        withdraw(rolled, 2, "slow")
    assert aliases(rolled)["candidate"] == 3


def test_without_a_candidate_promoting_asks_for_a_version(rolled: Config) -> None:
    withdraw(rolled)
    with pytest.raises(ConfigError, match="promote --version"):
        promote(rolled)
    with pytest.raises(ConfigError, match="nothing to withdraw"):
        withdraw(rolled)


def test_the_commands_say_what_they_did(
    rolled: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(rolled.to_yaml())
    said = []
    for command in ("promote", "rollback", "rollback", "withdraw"):
        code = main([command, "--config", str(file)])
        said.append((code, capsys.readouterr().out.splitlines()[0]))
    assert said[:2] == [
        (0, "version 3 is the champion of 'rolled'"),
        (0, "version 1 is the champion of 'rolled' again"),
    ]
    assert [code for code, _ in said[2:]] == [2, 2]
    assert main(["status", "--config", str(file), "--url", "http://127.0.0.1:9"]) == 1


def test_the_comparison_is_a_table_with_what_was_taken_out() -> None:
    tally = {"answers": 9, "errors": 1, "median_s": 0.25, "p95_s": 1.5, "median_step_s": None}
    answer: dict[str, Any] = {
        "champion": "m@1",
        "candidate": None,
        "candidate_share": 0.0,
        "versions": {"m@1": tally, "m@2": tally},
        "quality": {
            "m@1": {
                "fid": 12.5,
                "expected_fid": 11.0,
                "clip_score": None,
                "near_copies": 0.01,
                "expected_near_copies": None,
                "num_pictures": 16,
                "feature_network": "n",
                "scored_at": 0.0,
            }
        },
        "feedback": [
            {"model": "m", "version": 2, "role": "candidate", "ups": 3, "downs": 1, "wins": 2, "losses": 0}
        ],
        "taken_out": {"m@2": "latency: 3.0 times"},
        "shadow": {"stored": 0, "passed_over": 0},
        "notice": None,
    }
    status = RolloutStatus.model_validate(answer)
    assert status.model_dump(exclude_defaults=True) == answer
    head, first, second, quality, said, out = comparison(status).splitlines()
    assert head.split()[:1] == ["version"]
    assert first.split() == ["m@1", "champion", "9", "1", "0.25", "1.5", "–"]
    assert second.split() == ["m@2", "9", "1", "0.25", "1.5", "–"]
    expected = "quality: m@1: FID 12.5 (when published 11.0), near copies 0.01, of the last 16 pictures"
    assert quality == expected
    assert said == "feedback: m@2 (candidate): 3 up, 1 down, 2 votes won, 0 lost"
    assert out == "taken out: m@2: latency: 3.0 times"


def test_the_registrys_entries_are_the_versions_and_aliases_of_the_models_asked_for(rolled: Config) -> None:
    found = entries(rolled, ["rolled", "no-such-model"])
    assert set(found) == {"rolled"}
    assert found["rolled"].aliases == {"champion": 1, "candidate": 3}
    assert sorted(found["rolled"].versions) == [1, 2, 3]
    assert "rolled" in entries(rolled, ["*"])


def test_a_registry_that_is_gone_is_named(rolled: Config, tmp_path: Path) -> None:
    gone = rolled.model_copy(update={"storage": str(tmp_path / "gone")})
    with pytest.raises(ConfigError) as refused:
        entries(gone, ["rolled"])
    assert tracking_uri(gone) in str(refused.value)


def test_a_version_from_a_canary_release_becomes_the_candidate_or_is_held_back(
    rolled: Config, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    publish = rolled.publish.model_copy(update={"release": "canary"})
    config = rolled.model_copy(update={"publish": publish})
    decisions = []
    for number, fid in ((11, 30.0), (12, 5.0)):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file({"weight": torch.full((2,), float(number))}, folder / "pytorch_lora_weights.safetensors")
        measured = Measured(fid, None, num_samples=9, feature_network="n", data="9f" * 32)
        registered = register(config, source=str(folder), measured=measured, params={})
        decisions.append((registered.message, aliases(rolled), registered.version))
    held, better = decisions
    assert held[0].startswith("held back: its test FID 30.00 does not beat") and held[1]["candidate"] == 3
    assert better[0] == "candidate: its test FID 5.00 beats that of version 1"
    assert better[1] == {"champion": 1, "candidate": better[2]}


def test_only_the_champion_is_taken_back(rolled: Config) -> None:
    promote(rolled)
    with pytest.raises(ConfigError, match="version 3 is the champion, not 1"):
        take_back(rolled, 1, "votes")
    assert take_back(rolled, 3, "votes") == 1
    assert aliases(rolled) == {"champion": 1}
    assert open_client(rolled).get_model_version("rolled", "3").tags[TAKEN_OUT] == "votes"
