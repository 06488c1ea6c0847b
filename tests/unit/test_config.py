"""A wrong configuration is refused with one line that names the field or file and the fix."""

import argparse
from pathlib import Path

import pytest

from ray_jobs.config import (
    ConfigError,
    add_budget_arguments,
    add_config_arguments,
    load_config,
)

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
OFFLOADS = ["train.use_gpu=true", "train.gradient_checkpointing=true", "train.offload_base=true"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rat=0.1", "train.learning_rat: unknown key; did you mean learning_rate?"),
        ("search.learning_rates=[0]", "search.learning_rates.0"),
        ("train.learning_rate=0", "train.learning_rate"),
        ("evaluate.bootstrap=1", "an error needs at least 2 halves; give 0 (no errors) or at least 2"),
        (
            "evaluate={inception_classes: a.pth, feature_network: {kind: transformers, path: a}}",
            "inception_classes are those of the FID Inception network",
        ),
        ("evaluate.clip_revision=main", "clip_revision needs clip"),
        ("evaluate.second_network={kind: torchscript, name: a}", "sha256 is required with kind: torchscript"),
        (
            "evaluate.second_network={kind: torchscript, sha256: a, name: a}",
            "size is required with kind: torchscript",
        ),
        (
            "evaluate.feature_network={kind: efficientnet-lite0}",
            "second_network: the same as feature_network; choose another, or set it to null",
        ),
        (
            "evaluate.feature_network={revision: main}",
            "evaluate.feature_network: revision: only used with kind",
        ),
        ("evaluate.second_network={name: a}", "name: only used with kind: torchscript; remove it"),
        (
            "evaluate.second_network={interpolation: bicubic}",
            "interpolation: only used with kind: torchscript",
        ),
        (
            "evaluate.second_network={revision: main}",
            "revision: only used with kind: transformers; remove it",
        ),
        ("search.ladder=[10,10]", "ladder must increase"),
        ("search.ladder=[20,10]", "ladder must increase"),
        ("search.ladder=[]", "search.ladder: how long does a training last? Give its rungs, or train.epochs"),
        ("train.epochs=3", "train.epochs and search.ladder both say how long a training lasts; remove one"),
        ("train.max_steps=3", "train.max_steps and search.ladder both say how long a training lasts"),
        ("search.space={train.epochs: [1, 2]}", "train.epochs cannot be searched"),
        (
            "search.space={train.loss.outside_mask: [0.0, 0.5]}",
            "outside_mask: 0.5 changes nothing without mask_column in data.sources",
        ),
        ("search.learning_rates=[0.1,0.1]", "repeats a value"),
        ("search.learning_rates={low: 1.0e-3}", "search.learning_rates.high"),
        ("search.learning_rates={low: 1.0e-3, high: 1.0e-4}", "low: 0.001 must be below high: 0.0001"),
        ("search.learning_rates={low: 1.0e-5, high: 1.0e-3}", "learning_rates: a range needs algorithm"),
        ("search.algorithm=optuna", "num_trials is required with algorithm: optuna"),
        ("search.num_trials=4", "num_trials: algorithm grid runs every combination"),
        ("search.space={train.lora.rank: [8, 0]}", "search.space.train.lora.rank: 0: lora.rank"),
        (
            "search.space={train.lora.rnk: [8]}",
            "search.space.train.lora.rnk: 8: lora.rnk: unknown key; did you mean rank?",
        ),
        ("search.space={train.num_workers: [1, 2]}", "train.num_workers cannot be searched"),
        ("search.space={'train.deepspeed.a(b)': [1]}", "write it like train.lora.rank"),
        ("search.space={data.resolution: [64]}", "data.resolution cannot be searched"),
        ("search.space={train.weight_decay: [0.1, 0.1]}", "space.train.weight_decay repeats a value"),
        ("search.space={train.prior_loss_weight: [1]}", "needs train.prior_loss_weight above 0"),
        ("search.guidance_scales=[0.5]", "search.guidance_scales.0"),
        ("search.folds=1", "one fold leaves nothing to train on"),
        ("search.folds=3", "search.folds: 3 needs data.folds: 3"),
        ("data.validation=0.9", "to leave images for training"),
        ("train.trainable=[attention]", "must be names of groups: ['other']"),
        ("train.groups={other: [x]}", "other is reserved for layers in no group"),
        (
            "train.stages=[{steps: 400},{steps: 1}]",
            "the last stage begins after step 400, but search.ladder ends at",
        ),
        ("train.stages=[{steps: 9, learning_rate: 0.1}]", "every stage sets learning_rate"),
        ("train.num_workers=[4,2]", "must be [min, max]"),
        ("train.batch_size=1", "is less than the number of workers (2)"),
        ("train.dropout=0.1", "dropout: 0.1 needs method: full; adapters have lora.dropout"),
        ("train.offload_parameters=true", "offload_parameters needs zero_stage: 3"),
        ("train.precision=fp16", "fp16 needs use_gpu"),
        ("train.optimizer=adamw_8bit", "train.optimizer: adamw_8bit was removed"),
        (
            "train={engine: deepspeed, stages: [{steps: 5}, {steps: 1, optimizer: lion}]}",
            "stages: optimizer: engine: deepspeed is DeepSpeed's, which has one optimizer to the end",
        ),
        (
            "train={zero_stage: 3, stages: [{steps: 5}, {steps: 1, optimizer: lion}]}",
            "stages: optimizer: zero_stage: 3 is DeepSpeed's",
        ),
        ("train={optimizer: lion, epsilon: 0.1}", "epsilon: 0.1 changes nothing with optimizer: lion"),
        (
            "train.stages=[{steps: 5, optimizer: lion, epsilon: 0.1}, {steps: 1}]",
            "stages.0.epsilon: lion has none; remove it",
        ),
        ("train.prior_loss_weight=-1", "train.prior_loss_weight"),
        ("data.num_class_images=0", "data.num_class_images"),
        ("name=../elsewhere", "name"),
        ("data.bucket_max_aspect_ratio=3", "bucket_max_aspect_ratio: 3.0 changes nothing without buckets"),
        ("data.augmentation.max_degrees=5", "max_degrees: 5.0 changes nothing without rotate; remove it"),
        ("data.augmentation.min_scale=0.5", "min_scale: 0.5 changes nothing without scale"),
        ("data.augmentation.max_hue=0.1", "max_hue: 0.1 changes nothing without colour"),
        (
            "data.cleaning={duplicates: ignore, duplicate_distance: 2}",
            "duplicate_distance: 2 changes nothing with duplicates: ignore",
        ),
        ("serve.rollback_requests=9", "rollback_requests: 9 changes nothing without candidate_share"),
        (
            "train.schedule_cycles=3",
            "schedule_cycles: 3 changes nothing without schedule cosine_with_restarts",
        ),
        ("train.schedule_power=2", "schedule_power: 2.0 changes nothing without schedule polynomial"),
        ("train.decay_share=0.5", "decay_share: 0.5 changes nothing without schedule warmup_stable_decay"),
        ("train.schedule_end=0.5", "schedule_end: 0.5 changes nothing without schedule cosine or"),
        (
            "train={optimizer: lion, stages: [{steps: 2, optimizer: sgd}]}",
            "optimizer: lion changes nothing because every stage of train.stages has its own; remove it",
        ),
        (
            "train={momentum: 0.5, stages: [{steps: 2}, {steps: 2, optimizer: sgd, momentum: 0.8}]}",
            "momentum: 0.5 changes nothing because every stage",
        ),
        (
            "train={warmup_steps: 5, stages: [{steps: 2, schedule: constant}, {steps: 2, warmup_steps: 1}]}",
            "warmup_steps: 5 changes nothing because every stage",
        ),
        ("search.space={train.schedule_power: [1, 2]}", "train.schedule_power changes nothing without"),
        (
            "train.stages=[{steps: 9, schedule: constant, warmup_steps: 2}, {steps: 1}]",
            "constant has no warm-up",
        ),
        (
            "publish.sample_count=999",
            "publish.sample_count: 999 is more than evaluate.num_samples: 128",
        ),
        (f"name={'x' * 101}", "name: String should have at most 100 characters"),
        ("publish.model_name=team/style", "publish.model_name: a model's name has at most 100 letters"),
        ("publish.model_name='style:v2'", "publish.model_name: a model's name has at most 100 letters"),
        ("publish.model_name=it's", "publish.model_name: a model's name has at most 100 letters"),
        ("publish.model_name='..'", "publish.model_name: a model's name has at most 100 letters"),
        ("publish.model_name='a?b#c'", "publish.model_name: a model's name has at most 100 letters"),
        ("publish.model_name='style@2'", "publish.model_name: a model's name has at most 100 letters"),
        ("publish.model_name=' style'", "publish.model_name: a model's name has at most 100 letters"),
        ("publish.model_name=стиль", "publish.model_name: a model's name has at most 100 letters"),
        ("publish.model_name=''", "publish.model_name: a model's name has at most 100 letters"),
        (f"publish.model_name={'x' * 101}", "publish.model_name: a model's name has at most 100 letters"),
        ("publish.model_name=base", "base is reserved: requests use it for the base model"),
        ("serve.models=[team/style]", "serve.models.0"),
        ("serve.drift_pictures=.inf", "serve.drift_pictures"),
        ("serve.request_timeout_s=.inf", "serve.request_timeout_s: Input should be a finite number"),
        ("train.loss.timestep_mean=.nan", "train.loss.timestep_mean: Input should be a finite number"),
        ("data.source=[", "--set data.source=[: not YAML"),
        ("train.num_workers=many", "train.num_workers"),
        ("name.first=x", "is a value, not a section"),
        ("resolution", "section.field=value"),
    ],
)
def test_wrong_settings_name_the_field(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(DEMO, [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["train.engine=deepspeed", "train.zero_stage=0", "train.precision=bf16"],
            "bf16 with DeepSpeed needs zero_stage 1, 2 or 3",
        ),
        (["train.engine=flat", "train.zero_stage=3"], "engine: flat does not have zero_stage: 3"),
        (["train.engine=flat", "train.offload_optimizer=true"], "flat does not have offload_optimizer"),
        (["train.engine=flat", "train.deepspeed={a: 1}"], "flat does not have deepspeed"),
        (["train.zero_stage=0", "train.offload_optimizer=true"], "offload_optimizer needs zero_stage"),
        (["train.offload_base=true"], "offload_base needs use_gpu; on a CPU"),
        ([*OFFLOADS, "train.method=full"], "offload_base: method full trains whole layers; set method: lora"),
        ([*OFFLOADS, "train.zero_stage=3"], "offload_base: zero_stage: 3 is DeepSpeed's"),
        ([*OFFLOADS, "train.offload_optimizer=true"], "offload_base: offload_optimizer is DeepSpeed's"),
        ([*OFFLOADS, "train.engine=deepspeed"], "offload_base: engine: deepspeed is DeepSpeed's"),
        ([*OFFLOADS, "train.checkpoint_every=2"], "gradient_checkpointing: true and checkpoint_every: 1"),
        (
            [*OFFLOADS, "train.gradient_checkpointing=false"],
            "offload_base needs gradient_checkpointing: true",
        ),
        ([*OFFLOADS, "train.compile=true"], "offload_base: compiled blocks keep their weights on the GPU"),
        (["train.schedule=constant", "train.warmup_steps=5"], "schedule constant has no warm-up"),
        (
            ["train.stages=[{steps: 5, schedule: constant, warmup_steps: 2}, {steps: 1}]"],
            "warmup_steps: schedule constant has no warm-up",
        ),
        (
            ["train.stages=[{steps: 5, warmup_steps: 5}, {steps: 1}]"],
            "stages.0.warmup_steps: 5 must be less than the stage's 5 steps",
        ),
        (
            ["train.prior_loss_weight=1", "train.batch_size=1", "train.num_workers=1"],
            "prior_loss_weight: 1 needs a batch_size of at least 2",
        ),
        (
            ["search.algorithm=random", "search.num_trials=3"],
            "num_trials: 3, but the values have 2 combinations",
        ),
        (["search.scheduler=population", "search.learning_rates=[0.1]"], "needs at least two trials"),
        (
            ["search.scheduler=population", "search.space={train.optimizer: [adamw, lion]}"],
            "optimizer: scheduler: population continues trials from each other, with the moments of one",
        ),
        (
            ["search.scheduler=population", "search.algorithm=optuna", "search.num_trials=2"],
            "population changes settings itself",
        ),
        (
            ["search.scheduler=population", "search.folds=2", "data.folds=2"],
            "population cannot be combined with folds",
        ),
        (["search.folds=2", "data.folds=2", "search.guidance_scales=[2]"], "folds leave none"),
        (
            ["search.scheduler=median", "search.reduction_factor=3"],
            "reduction_factor: 3 changes nothing with scheduler: median; remove it",
        ),
        (
            ["train.method=full", "search.space={train.lora.rank: [4, 8]}"],
            "search.space.train.lora.rank changes nothing with train.method: full",
        ),
        (
            ["train.stages=[{steps: 2, weight_decay: 0}]", "search.space={train.weight_decay: [0.1, 0]}"],
            "search.space.train.weight_decay changes nothing because every stage",
        ),
        (["search.folds=2", "data.folds=2", "data.encode=stream"], "folds needs data.encode: cache"),
        (["train.prior_loss_weight=1", "data.buckets=true"], "prior_loss_weight needs data.buckets: false"),
        (["train.prior_loss_weight=1", "data.encode=stream"], "prior_loss_weight needs data.encode: cache"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(DEMO, overrides)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match="nowhere.yaml: no such file"):
        load_config("nowhere.yaml")


def test_text_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [")
    with pytest.raises(ConfigError, match="broken.yaml: not YAML"):
        load_config(broken)


def test_a_configuration_extends_another_section_by_section(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "demo.yaml").write_text(DEMO.read_text())
    (tmp_path / "base" / "small.yaml").write_text(
        "extends: demo.yaml\ntrain: {lora: {rank: 8}, batch_size: 4}"
    )
    variant = tmp_path / "variant.yaml"
    variant.write_text("extends: base/small.yaml\nsearch: {learning_rates: [1e-4]}\ntrain: {batch_size: 2}")
    expected = ["train.lora.rank=8", "train.batch_size=2", "search.learning_rates=[1e-4]"]
    assert load_config(variant) == load_config(DEMO, expected)
    assert load_config(variant, ["train.batch_size=3"]).train.batch_size == 3


@pytest.mark.parametrize(
    ("extends", "expected"),
    [
        ("nowhere.yaml", r"variant\.yaml: extends: .*nowhere\.yaml: no such file; correct the path"),
        ("variant.yaml", r"variant\.yaml: extends: .*variant\.yaml: the files extend each other"),
        ("[demo.yaml]", r"variant\.yaml: extends: \['demo\.yaml'\] is not a path"),
    ],
)
def test_what_cannot_be_extended_is_named(extends: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "variant.yaml").write_text(f"extends: {extends}")
    with pytest.raises(ConfigError, match=expected):
        load_config(tmp_path / "variant.yaml")


def test_a_job_finds_the_configuration_of_the_users_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the embedded Ray it runs in a copy of the code, and its paths are the user's (`home`)."""
    (tmp_path / "demo.yaml").write_text(DEMO.read_text())
    (tmp_path / "mine.yaml").write_text("extends: demo.yaml\nname: mine")
    monkeypatch.setenv("DIFFRAY_HOME", str(tmp_path))
    assert load_config("mine.yaml").name == "mine"


def test_the_resolved_configuration_loads_to_the_same(tmp_path: Path) -> None:
    config = load_config(DEMO, ["train.zero_stage=3", "train.schedule=constant"])
    written = tmp_path / "config.yaml"
    written.write_text(config.to_yaml())
    assert config.train.zero_stage == 3
    assert load_config(written) == config


@pytest.mark.parametrize("path", sorted(DEMO.parent.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("data.source=nowhere", "data.source: nowhere: no such folder"),
        ("evaluate.feature_network=nowhere.pt", "evaluate.feature_network: nowhere.pt: no such file"),
        ("model.base=./nowhere", "model.base: ./nowhere: not a model"),
    ],
)
def test_what_the_stages_read_is_checked_first(override: str, field: str) -> None:
    from ray_jobs.pipeline import check_inputs

    check_inputs(load_config(DEMO))
    with pytest.raises(ConfigError, match=field):
        check_inputs(load_config(DEMO, [override]))


def test_the_budget_can_be_given_on_the_command_line() -> None:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    add_budget_arguments(parser)
    given = ["--config", str(DEMO), "--max-steps", "480", "--max-hours", "1.5", "--set", "seed=7"]
    arguments = parser.parse_args([*given, "--max-cost", "20", "--set", "search.device_hour_price=2.5"])
    config = load_config(arguments.config, arguments.overrides)
    search = config.search
    assert (search.max_steps, search.max_hours, search.max_cost, config.seed) == (480, 1.5, 20, 7)
    cost = parser.parse_args(["--config", str(DEMO), "--max-cost", "20"])
    with pytest.raises(ConfigError, match="max_cost needs device_hour_price"):
        load_config(cost.config, cost.overrides)
    none = parser.parse_args(["--config", str(DEMO)])
    assert none.overrides == [], "what another parsing was given does not stay"
    steps = parser.parse_args(["--config", str(DEMO), "--max-steps", "many"])
    with pytest.raises(ConfigError, match=r"search\.max_steps: .*'many'"):
        load_config(steps.config, steps.overrides)


def test_a_run_is_not_called_what_all_runs_share() -> None:
    from ray_jobs.run.folder import SharedFolder
    from serving.feedback.database import FILE as FEEDBACK

    config = load_config(DEMO, [])
    shared = SharedFolder.of(config)
    folders = [
        shared.encoded("digest"),
        shared.real_features,
        shared.class_pictures("digest"),
        shared.registered("model"),
        shared.artifacts("run"),
    ]
    names = [folder.path.removeprefix(f"{shared.root.path}/").split("/")[0] for folder in folders]
    for name in (*names, "Registry", "mlflow.db", FEEDBACK):
        with pytest.raises(ConfigError, match="name: .* is the name of a folder that all runs share"):
            load_config(DEMO, [f"name={name}"])


@pytest.mark.parametrize("name", ["fluent-emoji-3d", "two words", "v1.2_b+c", "7"])
def test_names_of_models_that_people_give_are_taken(name: str) -> None:
    assert load_config(DEMO, [f"publish.model_name='{name}'"]).publish.model_name == name


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.schedule=polynomial", "train.schedule_power=2", "train.schedule_end=0.1"],
        ["train.schedule_power=2", "search.space={train.schedule: [cosine, polynomial]}"],
        ["train.decay_share=0.5", "train.stages=[{steps: 9, schedule: warmup_stable_decay}, {steps: 1}]"],
        ["train.schedule=polynomial", "search.space={train.schedule_power: [1, 2]}"],
        ["search.space={train.method: [lora, full], train.lora.rank: [4, 8]}"],
        ["data.buckets=true", "data.bucket_max_aspect_ratio=3"],
        ["serve.shadow_share=0.1", "serve.rollback_requests=9"],
        ["search.scheduler=halving", "search.reduction_factor=3"],
        ["search.scheduler=none", "search.reduction_factor=2"],  # which is the default
    ],
)
def test_what_some_trial_or_mode_reads_is_taken(overrides: list[str]) -> None:
    load_config(DEMO, overrides)


def test_a_recipe_is_named_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("extends: sdxl-lora\nname: mine\n")
    (tmp_path / "sdxl-lora").mkdir()  # a bare name means the same wherever it is written
    assert load_config("sdxl-lora") == load_config(DEMO.with_name("sdxl-lora.yaml"))
    assert load_config("mine.yaml") == load_config("sdxl-lora", ["name=mine"])
    with pytest.raises(ConfigError, match=r"^sdxl-lor: no such recipe; did you mean sdxl-lora\? a file "):
        load_config("sdxl-lor")
    (tmp_path / "mine.yaml").write_text("extends: nothing")
    with pytest.raises(
        ConfigError, match=r"mine\.yaml: extends: nothing: no such recipe; there are controlnet, demo, "
    ):
        load_config("mine.yaml")
