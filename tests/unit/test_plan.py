"""The plan of a run: where actors sit, what fits, what would make it fit, and what it costs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.capacity import Actors, check_resources, search_actors
from cluster.plan import main
from cluster.shape import CPUS_A_GPU, Machine, check_places, parse_nodes, place
from ray_jobs.config import Config, ConfigError
from ray_jobs.console import GIB
from ray_jobs.planning.memory import Model
from ray_jobs.planning.plan import batch_lines, cost_lines, memory_lines, of_known_length, plan

ROOT = Path(__file__).resolve().parents[2]


def a_config(**sections: Any) -> Config:
    return Config.model_validate(
        {
            "name": "planned",
            "data": {"source": "pictures"},
            "model": {"base": str(ROOT / "models" / "emoji-base")},
            "search": {"learning_rates": [1e-3, 1e-4], "ladder": [50, 100]},
        }
        | sections
    )


def test_a_described_cluster_has_the_machines_it_says() -> None:
    first, *_, last = parse_nodes("4x8gpu80, 3x16cpu64")
    assert first == Machine("node 1", 8 * CPUS_A_GPU, 8, 80.0)
    assert last == Machine("node 7", 16, 0, None, 64.0)


def test_a_file_describes_what_a_word_cannot(tmp_path: Path) -> None:
    (tmp_path / "shape.yaml").write_text(yaml.safe_dump([{"count": 2, "cpus": 32, "gpus": 1, "gpu_gib": 24}]))
    assert parse_nodes(str(tmp_path / "shape.yaml"))[1] == Machine("node 2", 32, 1, 24)


@pytest.mark.parametrize("text", ["4x8tpu80", "0x8gpu80", "many", "none.yaml"])
def test_another_description_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ConfigError, match="--nodes .*"):
        parse_nodes(text)


def test_actors_go_where_there_is_room_and_the_others_are_named() -> None:
    machines = [Machine("cpus", 4), Machine("gpus", 4, 2)]
    wanted = [
        Actors("evaluator", "evaluate.num_actors", 3, 1, 0),
        Actors("worker", "train.num_workers", 3, 2, 1),
    ]
    found = place(wanted, machines)
    assert found.held == {"cpus": {"evaluator": 3}, "gpus": {"worker": 2}}
    [left] = found.left_over
    assert left.startswith(
        "1 of 3 workers fit on no machine: each needs 2 CPUs and 1 GPUs free; lower train.num_workers"
    )


def test_two_replicas_share_a_gpu_that_each_takes_half_of() -> None:
    wanted = [Actors("serving replica", "serve.replicas", 2, 1, 0.5)]
    assert not place(wanted, [Machine("one", 4, 1)]).left_over


def test_a_streaming_search_has_encoders_beside_every_trial() -> None:
    config = a_config(
        data={"source": "pictures", "encode": "stream", "encode_workers": 3},
        search={"learning_rates": [1e-3, 1e-4], "ladder": [2], "max_concurrent_trials": 2},
    )
    counts = {each.kind: each.count for each in search_actors(config)}
    assert (counts["trial driver"], counts["training worker"], counts["encoder"]) == (2, 4, 6)


def changes_named(page: str, kind: str) -> list[dict[str, Any]]:
    """The changes of `train` that a page names as `one of` or `together`, one a list's entry."""
    [line] = [line for line in page.splitlines() if line.startswith("does not fit: a rank needs")]
    assert f": {kind} train." in line, line
    return [{"train": yaml.safe_load(each)} for each in line.split(kind)[1].replace("train.", "").split(",")]


def changed(config: Config, *changes: dict[str, Any]) -> Config:
    tree = config.model_dump(mode="json")
    for change in changes:
        tree["train"] |= change["train"]
    return Config.model_validate(tree)


def test_each_single_change_that_is_named_makes_a_rank_fit() -> None:
    config = a_config(train={"method": "full", "use_gpu": True, "zero_stage": 1})
    model = Model(config)  # builds each module once
    needed = model.memory(config.train).device.whole
    machines = [Machine("small", 64, 4, gpu_gib=0.8 * needed / GIB)]
    page, fits = plan(config, machines, None)
    named = changes_named(page, "one of")
    assert not fits and len(named) > 1
    for change in named:
        assert not memory_lines(changed(config, change), model, machines)[1], change


def test_a_worker_that_is_larger_than_any_node_is_refused_though_the_nodes_have_enough_in_all() -> None:
    machines = [Machine("small", 8), Machine("large", 12, memory_gib=64)]
    config = a_config(
        train={"num_workers": 1, "cpus_per_worker": 13},
        search={"learning_rates": [1e-3], "ladder": [2], "max_concurrent_trials": 1},
        evaluate={"num_actors": 1},
    )
    check_resources(config, {"CPU": 20.0})
    with pytest.raises(ConfigError, match=r"^train.cpus_per_worker: .* of 13 CPUs .* is large 12 logical"):
        check_places(config, machines)


def test_more_large_workers_than_the_nodes_have_places_for_are_refused() -> None:
    machines = [Machine("one", 5), Machine("two", 5), Machine("three", 5)]
    config = a_config(
        train={"num_workers": 3, "cpus_per_worker": 3, "batch_size": 12},
        search={"learning_rates": [1e-3], "ladder": [2], "max_concurrent_trials": 1},
        evaluate={"num_actors": 1},
    )
    check_resources(config, {"CPU": 15.0})
    check_places(config, machines)
    with pytest.raises(ConfigError, match=r"^train.num_workers: 3 training workers of 3 CPUs each"):
        check_places(config, [Machine("one", 5), Machine("two", 5), Machine("three", 2), Machine("four", 2)])


def test_what_only_several_changes_together_make_fit_is_named_together() -> None:
    config = a_config(train={"method": "full", "use_gpu": True, "precision": "fp32", "zero_stage": 1})
    machines = [Machine("tiny", 64, 4, gpu_gib=80 / 1024)]
    page, fits = plan(config, machines, None)
    named = changes_named(page, "together")
    assert not fits and len(named) > 1
    assert plan(changed(config, *named), machines, None)[1]


def test_a_frozen_base_on_the_host_is_proposed_together_with_recomputation() -> None:
    config = a_config(train={"use_gpu": True, "precision": "bf16", "micro_batch_size": 1, "num_workers": 1})
    model = Model(config)
    found = model.footprint(config.train)
    least = model.memory(config.train.model_copy(update={"gradient_checkpointing": True})).device.whole
    machines = [Machine("tiny", 64, 1, gpu_gib=(least - found.blocks / 2) / 0.9 / GIB)]
    named = changes_named(plan(config, machines, None)[0], "together")
    assert {"train": {"offload_base": True}} in named
    assert not memory_lines(changed(config, *named), model, machines)[1]


def test_an_epoch_is_known_once_the_data_set_is_prepared(tmp_path: Path) -> None:
    config = a_config(storage=str(tmp_path), train={"batch_size": 8, "num_workers": 2})
    machines = [Machine("one", 64)]
    assert "an epoch: not known before" in plan(config, machines, None)[0]
    (tmp_path / "planned" / "dataset").mkdir(parents=True)
    (tmp_path / "planned" / "dataset" / "manifest.json").write_text(json.dumps({"rows_an_epoch": 200}))
    assert "an epoch: 200 rows = 25.0 steps; a trial: 4.0 epochs" in plan(config, machines, None)[0]


def test_the_length_of_a_training_in_epochs_is_planned_once_the_data_set_is_prepared(tmp_path: Path) -> None:
    search = {"learning_rates": [1e-3, 1e-4]}
    config = a_config(storage=str(tmp_path), train={"batch_size": 8, "epochs": 4}, search=search)
    before = of_known_length(config)
    assert "a trial: 4 epochs; its steps" in batch_lines(before)[-1]
    assert cost_lines(before, 16.0) == ["hours: not known before the data set is prepared"]
    (tmp_path / "planned" / "dataset").mkdir(parents=True)
    (tmp_path / "planned" / "dataset" / "manifest.json").write_text(json.dumps({"rows_an_epoch": 200}))
    after = batch_lines(of_known_length(config))
    assert "a trial: 4.0 epochs" in after[1] and "2 trainings x 100 = 200 steps" in after[2]
    capped = of_known_length(a_config(storage="new", train={"max_steps": 10}, search=search))
    assert "2 trainings x 10 = 20 steps" in batch_lines(capped)[-1]


def test_hours_and_cost_follow_from_speed_steps_workers_and_price() -> None:
    search = {"learning_rates": [1e-3, 1e-4], "ladder": [900], "device_hour_price": 2.5}
    config = a_config(search=search, train={"batch_size": 16, "num_workers": 4})
    hours, cost = cost_lines(config, images_per_second=16.0)
    assert "at most 2.00 of workers, 0.50 on the clock" in hours  # 2 x 900 steps of a second on 4 workers
    assert cost == "cost at 2.5 a worker's hour: at most 5.00"
    short = a_config(search=search | {"max_steps": 450}, train={"batch_size": 16, "num_workers": 4})
    assert "at most 0.50 of workers" in cost_lines(short, images_per_second=16.0)[0]


def test_the_demo_fits_on_two_small_machines_and_the_command_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--config", str(ROOT / "configs" / "demo.yaml"), "--nodes", "2x8cpu16"]) == 0
    page = capsys.readouterr().out
    assert "a step: 16 pictures over 2 workers = at most 8 a worker" in page
    assert page.splitlines()[-1] == "all fits"


def test_a_wrong_model_exits_2_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    demo = str(ROOT / "configs" / "demo.yaml")
    assert main(["--config", demo, "--nodes", "1x8cpu16", "--set", f"model.base={ROOT / 'tests'}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: model.base: ")


def test_the_page_needs_no_ray() -> None:
    program = (
        "import sys; from ray_jobs.planning.plan import plan; from cluster.shape import parse_nodes; "
        "from ray_jobs.config import load_config; "
        f"plan(load_config({str(ROOT / 'configs' / 'demo.yaml')!r}), parse_nodes('1x8cpu16'), None); "
        "sys.exit('ray' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, timeout=120)
