"""What is refused before a run begins, because a later stage could not do it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import plan
from ray_jobs.checks import main
from ray_jobs.config import Config, ConfigError
from ray_jobs.planning.checks import check_stages

SPACE = {"train.lora.target_modules": [["to_q"], ["to_x"]]}


def config_of(base: Path, *, resolution: int = 64, **sections: Any) -> Config:
    given = {
        "name": "checked",
        "data": {"source": "pictures", "resolution": resolution},
        "model": {"base": str(base)},
        "search": {"learning_rates": [1e-3], "ladder": [2]},
    }
    return Config.model_validate(given | sections)


@pytest.fixture(scope="module")
def rescheduled(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny model with another scheduler file."""

    def write(class_name: str, model: Path = tiny_model, **fields: Any) -> Path:
        folder = tmp_path_factory.mktemp("base") / "model"
        shutil.copytree(model, folder)
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", class_name]
        (folder / "model_index.json").write_text(json.dumps(index))
        file = folder / "scheduler" / "scheduler_config.json"
        betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        written = {} if "shift" in fields else betas
        file.write_text(json.dumps({"_class_name": class_name, **written, **fields}))
        return folder

    return write


def test_what_every_stage_can_do_passes(tiny_model: Path, tiny_flux: Path) -> None:
    check_stages(config_of(tiny_model))
    check_stages(config_of(tiny_model, serve={"cache_features": True, "channels_last": True}))
    check_stages(config_of(tiny_model, train={"loss": {"zero_terminal_snr": True}}))
    check_stages(config_of(tiny_flux, serve={"solver": "model"}))


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"evaluate": {"inference_steps": 1001}},
            "evaluate.inference_steps: DPM.* cannot sample in 1001 steps",
        ),
        ({"serve": {"default_steps": 1001, "max_steps": 2000}}, "serve.default_steps: DPM.* in 1001 steps"),
        ({"serve": {"compile": True}}, "serve.compile: .*turn on serve.fuse_champion"),
        ({"resolution": 60}, "data.resolution: 60 is not a multiple of 8"),
        (
            {"data": {"source": "pictures", "captioning": {"model": "./nowhere"}}},
            "data.captioning.model: ./nowhere: neither a folder nor a name of the hub",
        ),
        ({"train": {"lora": {"target_modules": ["to_x"]}}}, "train.lora: unet: .*to_x"),
        (
            {"search": {"learning_rates": [1e-3], "ladder": [2], "space": SPACE}},
            "search.space.train.lora.target_modules: .*to_x",
        ),
    ],
)
def test_what_a_stage_cannot_do_names_its_field(
    tiny_model: Path, sections: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_stages(config_of(tiny_model, **sections))


@pytest.mark.parametrize(
    ("serve", "expected"),
    [
        (
            {"solver": "dpm++"},
            "serve.solver: FlowMatchEulerDiscreteScheduler is for flow matching, which has no dpm",
        ),
        ({"channels_last": True}, "serve.channels_last: FluxTransformer2DModel has almost no convolutions"),
        ({"cache_features": True}, "serve.cache_features: only a UNet with at least two levels"),
    ],
)
def test_a_switch_that_the_base_cannot_have_is_refused(
    tiny_flux: Path, serve: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_stages(config_of(tiny_flux, serve=serve))


def test_a_size_that_cannot_be_packed_is_refused(tiny_flux: Path) -> None:
    with pytest.raises(ConfigError, match="data.resolution: 72 is not a multiple of 16"):
        check_stages(config_of(tiny_flux, resolution=72))


@pytest.mark.parametrize(
    ("class_name", "fields", "expected"),
    [
        ("LCMScheduler", {}, "serve.solver: LCMScheduler cannot be served, .*set serve.solver"),
        ("PNDMScheduler", {}, "serve.solver: PNDMScheduler with skip_prk_steps=False cannot be served"),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++"},
            "serve.solver: .*algorithm_type",
        ),
    ],
)
def test_a_scheduler_that_serving_cannot_step_is_refused_unless_another_one_is_named(
    rescheduled: Callable[..., Path], class_name: str, fields: dict[str, Any], expected: str
) -> None:
    base = rescheduled(class_name, **fields)
    with pytest.raises(ConfigError, match=expected):
        check_stages(config_of(base))
    check_stages(config_of(base, serve={"solver": "dpm++"}))


def test_schedulers_that_hidream_is_published_with_are_served_by_eulers(
    rescheduled: Callable[..., Path], tiny: Callable[[str], Path]
) -> None:
    full = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    for class_name, fields in (("UniPCMultistepScheduler", full), ("FlowMatchLCMScheduler", {"shift": 6.0})):
        base = rescheduled(class_name, tiny("HiDreamImagePipeline"), **fields)
        with pytest.raises(ConfigError, match=f"{class_name} cannot be served, .*set serve.solver to euler"):
            check_stages(config_of(base))
        warnings = check_stages(config_of(base, serve={"solver": "euler"}))
        assert bool(warnings) is (class_name == "FlowMatchLCMScheduler")  # Dev and Fast are distilled


def written(config: Config, folder: Path) -> str:
    file = folder / "config.yaml"
    file.write_text(config.to_yaml())
    return str(file)


def test_the_commands_refuse_it_with_one_line(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(config_of(tiny_model, evaluate={"inference_steps": 1001}), tmp_path)
    assert main(["--config", file]) == 2
    assert plan.main(["--config", file]) == 2
    said = capsys.readouterr()
    for line in (said.out, said.err):
        assert line.startswith("error: evaluate.inference_steps: ") and line.count("\n") == 1
