"""The networks that a configuration names: any may rank, and a wrong one is told before anything runs."""

import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_jobs import compare, publish, search
from ray_jobs.config import Config, ConfigError, EvaluateConfig, load_config
from ray_jobs.evaluate import evaluate
from ray_jobs.evaluation.scores import Real, scores_of
from ray_jobs.weights.feature_networks import check_networks, load_first, load_networks
from tests.unit.test_metrics_networks import noise

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
PREPARED: dict[str, Any] = {"name": "means", "size": 8, "mean": (0, 0, 0), "std": (255, 255, 255)}


def configured(**settings: Any) -> EvaluateConfig:
    return EvaluateConfig.model_validate(settings)


def test_what_is_there_is_no_error(dino_folder: Path, clip_folder: Path, script: tuple[Path, str]) -> None:
    check_networks(configured(clip=str(clip_folder)))
    check_networks(configured(second_network={"kind": "transformers", "path": str(dino_folder)}))
    first = {"kind": "torchscript", "path": str(script[0]), "sha256": script[1], **PREPARED}
    check_networks(configured(feature_network=first))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_network": "nowhere.pt"}, r"^evaluate\.feature_network: nowhere\.pt: no such file; `make"),
        ({"feature_network": "CODE"}, r"^evaluate\.feature_network: .* not a known feature network .*`make"),
        ({"second_network": {"path": "no.pt"}}, r"^evaluate\.second_network\.path: no\.pt: no such file; `m"),
        ({"second_network": {"path": "CODE"}}, r"^evaluate\.second_network\.path: .* not a known feature"),
        ({"second_network": {"sha256": "00"}}, r"^evaluate\.second_network\.sha256: .* has 162c.*, not 00;"),
        (
            {"feature_network": {"kind": "torchscript", "path": "CODE", "sha256": "00", **PREPARED}},
            r"^evaluate\.feature_network\.path: .* not a known .* evaluate\.feature_network\.sha256 is",
        ),
        (
            {"feature_network": {"kind": "transformers", "path": "DINO", "sha256": "00"}},
            r"^evaluate\.feature_network\.sha256: .*dino.* has [0-9a-f]{64}, not 00",
        ),
        (
            {"second_network": {"kind": "transformers", "path": "a/b/c"}},
            r"^evaluate\.second_network\.path: a/b/c: neither a folder nor a name of the hub",
        ),
        (
            {"inception_classes": "no.pth"},
            r"^evaluate\.inception_classes: no\.pth: no such file; give pt_incep",
        ),
        (
            {"inception_classes": "CODE"},
            r"^evaluate\.inception_classes: .* not a known .*; give pt_inception",
        ),
        ({"clip": "a/b/c"}, r"^evaluate\.clip: a/b/c: neither a folder nor a name of the hub"),
        ({"clip": "DINO"}, r"^evaluate\.clip: .* is not a CLIPModel; name one, such as"),
        ({"clip": "BARE"}, r"^evaluate\.clip: .*: no safetensors file; no other format is read"),
        ({"clip": "HALF"}, r"^evaluate\.clip: .*: has no config\.json that names a model_type"),
    ],
)
def test_what_is_missing_or_another_one_is_told_with_its_field_and_the_mend(
    settings: dict[str, Any],
    message: str,
    dino_folder: Path,
    clip_folder: Path,
    script: tuple[Path, str],
    tmp_path: Path,
) -> None:
    for name, left_out in (("bare", "*.safetensors"), ("half", "config.json")):
        shutil.copytree(clip_folder, tmp_path / name, ignore=shutil.ignore_patterns(left_out))
    places = {"CODE": script[0], "DINO": dino_folder, "BARE": tmp_path / "bare", "HALF": tmp_path / "half"}

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: placed(each) for name, each in value.items()}
        return str(places.get(value, value)) if isinstance(value, str) else value

    with pytest.raises(ConfigError, match=message):
        check_networks(configured(**placed(settings)))


@pytest.mark.parametrize(
    "stage",
    [
        lambda config: evaluate(config, Namespace(all=False)),
        lambda config: search._run(config, Namespace()),
        lambda config: publish._run(config, Namespace(force=False)),
        lambda config: compare._run(config, Namespace(one="base", other="base")),
    ],
    ids=["evaluate", "search", "publish", "compare"],
)
def test_every_stage_that_measures_looks_first(stage: Callable[[Config], Any], tmp_path: Path) -> None:
    config = load_config(DEMO, [f"storage={tmp_path}", "evaluate.clip=a/b/c"])
    with pytest.raises(ConfigError, match=r"evaluate\.clip: a/b/c"):
        stage(config)
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_a_model_without_pooled_output_is_told_when_it_is_loaded(dino_folder: Path, tmp_path: Path) -> None:
    from transformers import ViTMAEConfig, ViTMAEModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTMAEModel(ViTMAEConfig(image_size=28, patch_size=14, **sizes)).save_pretrained(tmp_path)
    shutil.copy(dino_folder / "preprocessor_config.json", tmp_path)
    chosen = configured(feature_network={"kind": "transformers", "path": str(tmp_path)})
    with pytest.raises(ValueError, match=r"^evaluate\.feature_network\.path: .* has no pooled output"):
        load_first(chosen)


def test_any_network_may_rank_and_its_name_and_digest_are_at_every_number(script: tuple[Path, str]) -> None:
    path, digest = script
    first = {"kind": "torchscript", "path": str(path), "sha256": digest, **PREPARED}
    networks = load_networks(configured(feature_network=first), "cpu")
    assert networks.first.identity == load_first(configured(feature_network=first)).identity
    assert networks.first.identity.startswith("means@sha256:") and networks.first.num_features == 3
    generated, real = (
        {each.identity: each.features(pictures).numpy() for each in networks.ranking}
        for pictures in (noise(6), noise(12)[6:])
    )
    found = scores_of(generated, Real.of(real), networks, resamples=3)
    assert found.fid.feature_network == found.origin["feature_network"] == networks.first.identity
    means = [np.asarray(each[networks.first.identity]).mean(axis=0) for each in (generated, real)]
    assert found.fid.value >= float(((means[0] - means[1]) ** 2).sum())
    assert found.kid is not None and found.kid.feature_network == networks.first.identity
