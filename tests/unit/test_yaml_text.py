"""The configuration's YAML: numbers as YAML 1.2 has them, nothing dropped, and back again."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_jobs.config import ConfigError, load_config
from ray_jobs.config.yaml_text import read_yaml, write_yaml

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("2.", 2.0),
        ("-.5e3", -500.0),
        ("1.0e-05", 1e-5),
        ("+3", 3),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("100_000_000", 100_000_000),
        ("1:30", "1:30"),
        ("2026-01-31", "2026-01-31"),
        ("1e-4x", "1e-4x"),
        ("s3://bucket/1e4", "s3://bucket/1e4"),
        ("'1e-4'", "1e-4"),
        ("no", False),
        ("", None),
        ("[1e-4, {low: 1e-5, high: .5}]", [1e-4, {"low": 1e-5, "high": 0.5}]),
        ("{a: &x {b: 1, c: 1e2}, d: {<<: *x, b: 2}}", {"a": {"b": 1, "c": 100.0}, "d": {"b": 2, "c": 100.0}}),
    ],
)
def test_numbers_are_numbers(text: str, value: Any) -> None:
    found = read_yaml(text)
    assert found == value and type(found) is type(value)
    assert read_yaml(write_yaml(value)) == value


@pytest.mark.parametrize("text", ["1e-4", "1e5", "12e4567", "010", "1:30", "2026-01-31", "yes", "~", "0x1F"])
def test_a_text_that_looks_like_another_value_stays_a_text(text: str) -> None:
    for place in (text, [text], {"key": text}, {text: 1}):
        assert read_yaml(write_yaml(place)) == place


def test_a_section_that_stands_twice_is_an_error_and_does_not_drop_the_first(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text(DEMO.read_text() + "\ntrain:\n  batch_size: 8\n")
    with pytest.raises(yaml.YAMLError):
        read_yaml(file.read_text())
    with pytest.raises(ConfigError, match="not YAML: 'train' appears twice in one section") as caught:
        load_config(file)
    assert "\n" not in str(caught.value)


def test_nothing_of_python_is_made() -> None:
    with pytest.raises(yaml.YAMLError):
        read_yaml("!!python/object/apply:os.getcwd []")


def test_every_place_of_a_configuration_reads_the_same_numbers() -> None:
    config = load_config(
        DEMO,
        [
            "train.learning_rate=5e-4",
            "train.betas=[9e-1, 1e-3]",
            "train.deepspeed={gradient_clipping: 1e-1, zero_optimization: {reduce_bucket_size: 5e8}}",
            "search.learning_rates=[1e-3, 2e-4]",
            "search.space={train.weight_decay: [1e-4, 1e-3]}",
            "train.stages=[{steps: 40, weight_decay: 1e-1}, {steps: 1}]",
        ],
    )
    assert config.train.learning_rate == 5e-4 and config.train.betas == (0.9, 1e-3)
    assert config.train.deepspeed == {
        "gradient_clipping": 0.1,
        "zero_optimization": {"reduce_bucket_size": 5e8},
    }
    assert config.search.learning_rates == [1e-3, 2e-4]
    assert config.search.space == {"train.weight_decay": [1e-4, 1e-3]}
    assert config.train.stages[0].weight_decay == 0.1


def test_text_that_a_number_was_taken_from_is_told_to_be_quoted() -> None:
    with pytest.raises(ConfigError, match=r"model\.revision: .* write it in quotes \(it is 1234567\)"):
        load_config(DEMO, ["model.revision=1234567"])
    assert load_config(DEMO, ["model.revision='1e5'"]).model.revision == "1e5"
