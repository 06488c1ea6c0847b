"""Balance: distances by hand, a classifier of transformers, and what the report says."""

from pathlib import Path

import pytest
import torch

from ray_jobs.config import ConfigError, load_config
from ray_jobs.metrics.balance import by_chance, shares, total_variation
from ray_jobs.publishing.balance import shares_of
from ray_jobs.report.measures import balance_section
from ray_jobs.run.records import Balance
from ray_jobs.weights.feature_networks import check_networks
from ray_jobs.weights.image_classifier import ImageClassifier
from tests.tiny_models import image_classifier

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
FOUND = Balance(
    classifier="faces",
    prompts=2,
    pictures=20,
    data={"a": 50, "b": 50},
    base={"a": 22, "b": 18},
    winner={"a": 36, "b": 4},
    shares=shares_of({"a": 50, "b": 50}, {"a": 22, "b": 18}, {"a": 36, "b": 4}),
    base_distance=0.05,
    distance=0.4,
    by_chance=0.07,
    at_most=0.16,
)


def test_distances_by_hand() -> None:
    assert shares({"a": 3, "b": 1}) == {"a": 0.75, "b": 0.25}
    # 1/2 (|0.75 - 0.5| + |0.25 - 0| + |0 - 0.5|)
    assert total_variation({"a": 3, "b": 1}, {"a": 2, "c": 2}) == pytest.approx(0.5)
    assert total_variation({"a": 1}, {"a": 7}) == 0


def test_chance_explains_the_distance_of_a_few_pictures_and_not_that_of_many() -> None:
    data = {"a": 100_000, "b": 100_000}
    # Of n pictures the share of one label has the mean deviation sqrt(2 / pi) / (2 sqrt(n)).
    mean, most = by_chance(data, 100)
    assert mean == pytest.approx((2 / torch.pi) ** 0.5 / 20, rel=0.1)
    assert most == pytest.approx(1.96 / 20, rel=0.15)
    assert by_chance(data, 10_000)[1] < most / 8


def test_a_classifier_says_what_pictures_show_by_its_own_names(tmp_path: Path) -> None:
    classifier = ImageClassifier(str(image_classifier(tmp_path / "classifier")))
    pictures = torch.randint(
        0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    labels = classifier.labels(pictures)
    assert len(labels) == 6 and set(labels) <= {"dark", "bright"}
    assert classifier.labels(pictures[:1]) == labels[:1]
    from transformers import AutoModelForImageClassification, ViTImageProcessorPil

    model = AutoModelForImageClassification.from_pretrained(tmp_path / "classifier").eval()
    given = ViTImageProcessorPil.from_pretrained(tmp_path / "classifier")(list(pictures), return_tensors="pt")
    with torch.no_grad():
        numbers = model(**given).logits.argmax(dim=1).tolist()
    assert labels == [("dark", "bright")[number] for number in numbers]


def test_what_is_no_classifier_is_told_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    settings = [f"evaluate.balance.classifier={tmp_path}", 'evaluate.balance.prompts=["a face"]']
    with pytest.raises(ConfigError, match="evaluate.balance.classifier"):
        check_networks(load_config(DEMO, settings).evaluate)
    with pytest.raises(ConfigError, match="balance.classifier needs balance.prompts"):
        load_config(DEMO, settings[:1])
    with pytest.raises(ConfigError, match="changes nothing without balance.classifier"):
        load_config(DEMO, settings[1:])


def test_the_report_shows_the_model_beside_the_data_and_the_base() -> None:
    page = balance_section(FOUND)
    assert "90% (77% to 96%)" in page and "55% (40% to 69%)" in page and "50% (40% to 60%)" in page
    assert "more than chance explains" in page and "note alert" in page
    like = balance_section(FOUND | {"winner": {"a": 21, "b": 19}, "distance": 0.03})
    assert "which chance explains" in like and "alert" not in like
    assert balance_section(None) == ""
