"""The settings of a training are looked at on a CPU, without the base model's weights, before it starts."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, load_config
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.diffusion.families import FAMILIES
from ray_jobs.run.manifest import Manifest
from ray_jobs.training.setup import build_model, check_settings
from ray_jobs.training.trainer import depends_on, require_same
from tests.tiny_models import FAMILY_MODELS, write

pytestmark = pytest.mark.slow  # every test builds a model

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def config(base: Path, *overrides: str) -> Config:
    plain = ["train.lora.target_modules=null", *overrides]
    return load_config(DEMO, [f"model.base={base}", *plain])


@pytest.mark.parametrize("model", FAMILY_MODELS)
@pytest.mark.parametrize("method", [["train.lora.use_dora=true"], ["train.method=full"]])
def test_settings_that_suit_the_model_pass_without_its_weights(
    model: str, method: list[str], tmp_path: Path
) -> None:
    base = write(model, tmp_path)
    for weights in base.rglob("*.safetensors"):
        save_file({}, weights)
    check_settings(config(base, *method))
    encoders = config(base, *method, "train.train_text_encoder=true")
    if FAMILIES[model].trainable_encoders:
        check_settings(encoders)
    else:
        with pytest.raises(ValueError, match=f"train.train_text_encoder: {model} has no .*turn it off"):
            check_settings(encoders)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.lora.target_modules=[to_qq]"], r"train\.lora: unet: .*to_qq"),
        (["train.method=full", "train.groups={up: ['*upp*']}"], r"train\.groups\.up: .*upp.* look like"),
        (["train.loss.zero_terminal_snr=true"], r"train\.loss\.zero_terminal_snr"),
        (["train.deepspeed={bf16: {enabled: true}}"], r"train\.deepspeed: bf16: set train\.precision"),
        (["train.deepspeed={bfloat16: {enabled: true}}"], r"bfloat16: set train\.precision"),
        (["train.deepspeed={zero_optimization: {cpu_offload: true}}"], r"set train\.offload_optimizer"),
        (["train.deepspeed={zero_optimization: {stage: 1}}"], r"set train\.zero_stage instead"),
    ],
)
def test_a_setting_that_does_not_suit_the_model_is_named(
    settings: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings(config(write("StableDiffusionXLPipeline", tmp_path), *settings))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            "{train.loss.timestep_mean: [0, 0.5]}",
            r"search\.space\.train\.loss\.timestep_mean: 0\.5: .*uniform",
        ),
        ("{train.lora.target_modules: [[to_q], [to_qq]]}", r"target_modules: \['to_qq'\]: train\.lora: unet"),
    ],
)
def test_a_value_of_the_search_that_does_not_suit_the_model_is_named(
    space: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings(config(write("StableDiffusionXLPipeline", tmp_path), f"search.space={space}"))


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        (['train.groups={cross: ["*attn2*"]}', "train.trainable=[other]"], lambda name: "attn2" not in name),
        (
            ['train.groups={cross: ["*attn2*"], self: ["*attn1*"]}', "train.trainable=[self]"],
            lambda name: "attn1" in name,
        ),
        (['train.groups={text: ["text_encoders*"]}', "train.trainable=[other]"], lambda n: "denoiser." in n),
    ],
)
def test_all_but_some_groups_are_trained(
    settings: list[str], trained: Callable[[str], bool], tiny_model: Path
) -> None:
    settings = ["train.method=full", "train.train_text_encoder=true", *settings]
    check_settings(config(tiny_model, *settings))
    _, model = build_model(config(tiny_model, *settings))
    every = [name for name, _ in model.named_parameters()]
    expected = [name for name in every if trained(name)]
    assert [name for name, _ in model.all_trained] == expected and 0 < len(expected) < len(every)
    assert sum(len(members) for members in model.layer_groups.values()) == len(expected)


def test_a_training_goes_on_with_other_workers_and_a_longer_ladder_but_not_with_another_training(
    tmp_path: Path,
) -> None:
    storage = Storage.open(str(tmp_path))
    dataset = Dataset(storage, storage, Manifest(content="some pictures"))

    def resume(*overrides: str) -> None:
        require_same(storage, depends_on(load_config(DEMO, list(overrides)), dataset))

    resume()
    resume("train.num_workers=[1,4]", "train.zero_stage=3", "train.micro_batch_size=1", "search.ladder=[999]")
    with pytest.raises(ConfigError, match=r"train\.batch_size: 8 now, but .* started with 16; give the run"):
        resume("train.batch_size=8")
    with pytest.raises(ConfigError, match=r"last_step"):
        resume("train.schedule=cosine")
    full = "train.method=full"
    other = Storage.open(str(tmp_path / "dropout"))
    require_same(other, depends_on(load_config(DEMO, [full, "train.dropout=0.1"]), dataset))
    with pytest.raises(ConfigError, match=r"train\.dropout: None now, but .* started with 0\.1"):
        require_same(other, depends_on(load_config(DEMO, [full]), dataset))
