"""Ray Train workers with both engines, DeepSpeed's and the flat one: sharded, exact, resumable."""

import json
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.local import LocalCluster
from cluster.storage import Storage
from ray_jobs.config import Config, load_config
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.data.preparation import prepare
from ray_jobs.train import train
from ray_jobs.training.checkpoint import SERIES, find_rungs, folder_of
from ray_jobs.training.loop import LoopSettings
from ray_jobs.training.trainer import check_diverged
from ray_jobs.tuning.early_stopping import ROWS, Validation
from tests.plain_training import PlainTraining
from tests.record import record_fault
from tests.tiny_models import write
from tests.workers import Workers, run_inside

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def tiny_config(model: Path, pictures: Path, storage: Path, *overrides: str) -> Config:
    """The demo's configuration on the tests' tiny model and pictures."""
    return load_config(
        DEMO,
        [
            "name=tiny",
            f"storage={storage}",
            f"model.base={model}",
            f"data.source={pictures}",
            f"data.resolution={64}",
            "data.validation=0.2",
            "data.test=0.2",
            "train.batch_size=4",
            "train.lora.target_modules=[to_q,to_v]",
            "search.learning_rates=[1.0e-3]",
            "search.ladder=[1,2]",
            "search.scheduler=asha",
            *overrides,
        ],
    )


def train_variants(
    variants: dict[str, Config], dataset: Dataset, folder: Path, workers: Workers, steps: int
) -> dict[str, dict[str, list[float]]]:
    """So many steps of each variant, one after the other on the same workers; loss and norm of each step.

    `folder` then has of each `<variant>.safetensors`, the averaged weights before the last step, and
    `<variant>-<rank>.json`: what `state_bytes` says, the bytes of the gradients that are there after a first
    backward pass, and how many graphs torch.compile has made until then.
    """

    def train_all(loop: dict[str, Any]) -> None:
        import torch
        from safetensors.torch import save_file
        from torch._dynamo.utils import counters

        from ray_jobs.training.flat import Flat
        from ray_jobs.training.loop import LoopSettings, Training
        from ray_jobs.training.memory import state_bytes
        from ray_jobs.training.state import whole

        def gradients(engine: Any) -> int:
            if isinstance(engine, Flat):
                tensors = [chunk.kept for chunk in engine.chunks]
                return sum(tensor.nbytes for tensor in tensors if tensor is not None)
            optimizer, tensors = engine.engine.optimizer, [p.grad for _, p in engine.module.all_trained]
            if engine.stage == 3:
                tensors = [optimizer.grad_partitions_flat_buffer]
            elif hasattr(optimizer, "fp32_groups_gradients_flat"):  # DeepSpeed's BF16_Optimizer
                tensors += optimizer.fp32_groups_gradients_flat
            elif engine.stage:
                kept = [*optimizer.averaged_gradients.values(), *optimizer.all_grad_tensors.values()]
                tensors += [tensor for group in kept for tensor in group or ()]
            storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
            return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

        def watch(training: Any, variant: str, last: int) -> None:
            engine, add = training.engine, training.meter.add
            # DeepSpeed takes gradients over when a piece ends, the flat engine when it updates.
            steps, name = (engine, "update") if isinstance(engine, Flat) else (engine.engine, "step")
            advance = getattr(steps, name)

            def step_and_tell(*sums: torch.Tensor) -> Any:
                told = json.dumps(
                    {
                        "state": state_bytes(engine),
                        "gradients": gradients(engine),
                        "graphs": counters["stats"]["unique_graphs"],
                    }
                )
                Path(loop["folder"], f"{variant}-{training.rank}.json").write_text(told)
                setattr(steps, name, advance)
                return advance(*sums)

            def add_and_keep(step: int, *rest: Any) -> str:
                if step == last:
                    averages = whole(engine, training.ema.averages)
                    if training.rank == 0:
                        save_file(averages, Path(loop["folder"], f"{variant}.safetensors"))
                return str(add(step, *rest))

            setattr(steps, name, step_and_tell)
            training.meter.add = add_and_keep

        torch.set_num_threads(1)
        for variant, config in loop["variants"].items():
            settings = LoopSettings(config, loop["dataset"], "trial", [loop["last"][variant]])
            training = Training(settings, torch.device("cpu"), None)
            watch(training, variant, loop["steps"])
            training.run()

    # Each ends at another step, so that each writes a checkpoint of its own.
    free = (step for step in count(steps) if not (workers.checkpoints / folder_of(step)).exists())
    last = dict(zip(variants, free, strict=False))
    loop = {"variants": variants, "dataset": dataset, "steps": steps, "last": last, "folder": str(folder)}
    workers.run(train_all, loop)
    found = {}
    for variant, step in last.items():
        written = workers.checkpoints / folder_of(step) / SERIES
        if written.exists():
            rows = json.loads(written.read_text())[:steps]
            found[variant] = {kind: [row[kind] for row in rows] for kind in ("loss", "grad_norm")}
    return found


def state_at(folder: Path) -> dict[str, Any]:
    """All tensors that the ranks stored in a checkpoint."""
    from safetensors.torch import load_file

    return {
        f"{path.name} {name}": tensor
        for path in sorted((folder / "state").iterdir())
        for name, tensor in load_file(path).items()
    }


def train_and_die_once(settings: LoopSettings, told: Path) -> Any:
    """A train function whose rank 1 is killed in the middle of writing the second rung's checkpoint.

    Args:
        told: a file that then says which rungs were whole at that moment; beside it, `steps` has a line a
            step that was taken.
    """

    def train_all(loop: dict[str, Any]) -> None:
        import os
        import signal

        import ray.train
        from ray.train.v2._internal.execution.storage import StorageContext

        from ray_jobs.training.checkpoint import find_rungs
        from ray_jobs.training.loop import train_worker
        from ray_jobs.training.monitor import Meter

        add = Meter.add

        def add_and_tell(self: Any, step: int, *rest: Any) -> str:
            if self.rank == 0:
                with told.with_name("steps").open("a") as steps:
                    steps.write(f"{step}\n")
            return add(self, step, *rest)

        persist, doomed = StorageContext.persist_current_checkpoint, folder_of(settings.ladder[1])

        def persist_or_die(self: Any, checkpoint: Any, name: str) -> Any:
            if name != doomed or told.exists() or ray.train.get_context().get_world_rank() == 0:
                return persist(self, checkpoint, name)
            [shard] = Path(checkpoint.path, "state").iterdir()
            written = Path(self.build_checkpoint_path_from_name(name)) / "state" / shard.name
            written.parent.mkdir(parents=True, exist_ok=True)
            written.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
            run = Storage.open(settings.config.storage).child(settings.config.name, "train")
            rungs = find_rungs(run)[settings.trial_id]
            told.write_text(json.dumps([rung.step for rung in rungs]))
            os.kill(os.getpid(), signal.SIGKILL)

        StorageContext.persist_current_checkpoint = persist_or_die
        Meter.add = add_and_tell  # type: ignore[method-assign, assignment]
        train_worker({"settings": settings})

    return train_all


def test_a_training_that_dies_while_it_writes_a_checkpoint_ends_with_the_very_same_state(
    two_workers: Workers, tiny_dataset: Dataset, tiny_model: Path, picture_folder: Path, tmp_path: Path
) -> None:
    from ray.train import WorkerGroupError

    def config(ladder: str) -> Config:
        settings = ["train.lora.dropout=0.2", "train.zero_stage=3", "train.precision=bf16"]
        return tiny_config(tiny_model, picture_folder, tmp_path, f"search.ladder={ladder}", *settings)

    train_variants({"unbroken": config("[8]")}, tiny_dataset, tmp_path, two_workers, steps=8)
    run, told = tmp_path / "tiny" / "train", tmp_path / "rungs.json"
    settings = LoopSettings(config("[2,4,8]"), tiny_dataset, "trial", [2, 4, 8])
    dying = train_and_die_once(settings, told)
    with pytest.raises(WorkerGroupError):
        run_inside(dying, {}, num_workers=2, folder=run, name="trial")
    run_inside(dying, {}, num_workers=2, folder=run, name="trial")  # a driver that is started again
    whole = run / "trial" / folder_of(4) / "complete-0000-of-0002"
    took = whole.stat().st_mtime - told.stat().st_mtime
    steps = (tmp_path / "steps").read_text().split()
    again = len(steps) - len(set(steps))
    lost = f"{again} steps, taken again"
    record_fault("kill -9 of a worker that writes a checkpoint", recovery_s=took, lost=lost)
    assert json.loads(told.read_text()) == [2]  # the half checkpoint of step 4 is none
    rungs = find_rungs(Storage.open(str(run)))["trial"]
    assert [rung.step for rung in rungs] == [2, 4, 8]
    expected = state_at(two_workers.checkpoints / folder_of(8))
    found = state_at(run / "trial" / folder_of(8))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key


def test_losses_averages_and_memory_are_as_the_zero_stage_and_the_number_of_workers_promise(
    two_workers: Workers, tiny_dataset: Dataset, tiny_model: Path, picture_folder: Path, tmp_path: Path
) -> None:
    """Also where the ranks' rows are not equally many, as of three workers for four rows."""
    from safetensors.torch import load_file

    def config(**train: Any) -> Config:
        overrides = [f"train.{name}={value}" for name, value in train.items()]
        plain = ["train.method=full", "train.learning_rate=1e-3", "search.ladder=[8]", *overrides]
        return tiny_config(tiny_model, picture_folder, tmp_path, *plain)

    kinds = [("flat", stage) for stage in range(3)] + [("deepspeed", stage) for stage in range(4)]
    stages = {
        f"2 workers, {engine} {stage}": config(engine=engine, zero_stage=stage, micro_batch_size=1)
        for engine, stage in kinds
    }
    wild = "{steps: 1, learning_rate: 0.9, schedule: constant}"
    stages["diverges"] = config(stages=f"[{{steps: 5, learning_rate: 1e-5}}, {wild}]")
    found = train_variants(stages, tiny_dataset, tmp_path, two_workers, steps=8)
    three_workers = Workers(3, tmp_path)
    found |= train_variants({"3 workers": config()}, tiny_dataset, tmp_path, three_workers, steps=8)
    three_workers.stop()
    assert "diverges" not in found
    with pytest.raises(RuntimeError, match=r"the loss .* at step ([789]|1\d); none was saved.*learning rate"):
        check_diverged(Storage.open(f"{tmp_path}/tiny/train/trial"))

    plain = PlainTraining(config(), tiny_dataset)
    expected = plain.run(7)
    averages = {name: values.clone() for name, values in plain.ema.averages.items()}
    expected += plain.run(8, first=8)
    assert max(expected) > min(expected) > 0
    for variant, steps in found.items():
        assert steps["loss"] == pytest.approx(expected, abs=1e-4), variant
        assert steps["grad_norm"] == pytest.approx(plain.norms, rel=1e-3), variant
        for name, values in load_file(tmp_path / f"{variant}.safetensors").items():
            torch.testing.assert_close(values, averages[name], rtol=0, atol=1e-4)

    whole = sum(values.nbytes for values in averages.values())
    largest = max(values.nbytes for values in averages.values())
    halved = {0: (), 1: ("moments",), 2: ("moments", "gradients"), 3: ("moments", "gradients", "parameters")}
    for (engine, stage), rank in product(kinds, range(2)):
        told = json.loads((tmp_path / f"2 workers, {engine} {stage}-{rank}.json").read_text())
        for kind, bytes_unsharded in (("parameters", whole), ("gradients", whole), ("moments", 2 * whole)):
            share = 0.5 if kind in halved[stage] else 1
            assert told["state"][kind] == pytest.approx(share * bytes_unsharded, rel=0.01), (
                engine,
                stage,
                kind,
            )
        # A tensor that lies in both ranks' parts is kept whole.
        assert 0 <= told["gradients"] - told["state"]["gradients"] <= largest, (engine, stage)


def test_ways_of_running_a_training_change_no_loss_and_bf16_only_rounds_it(
    two_workers: Workers, tiny_dataset: Dataset, tiny_model: Path, picture_folder: Path, tmp_path: Path
) -> None:
    """And in bf16, losses and norms of many pieces are those of one. fp16 needs a GPU."""

    def config(**train: Any) -> Config:
        settings = {"method": "full", "batch_size": 16, "learning_rate": 1e-3} | train
        overrides = [f"train.{name}={value}" for name, value in settings.items()]
        return tiny_config(tiny_model, picture_folder, tmp_path, "search.ladder=[4]", *overrides)

    variants = {
        "recomputed": config(gradient_checkpointing=True, zero_stage=3),
        "channels last, optimizer offloaded": config(
            channels_last=True, zero_stage=2, offload_optimizer=True, micro_batch_size=3
        ),
        "all offloaded": config(zero_stage=3, offload_optimizer=True, offload_parameters=True),
        "bf16, 1 at once": config(precision="bf16", zero_stage=2, micro_batch_size=1),
        "bf16, 8 at once": config(precision="bf16", zero_stage=3, micro_batch_size=8),
    }
    found = train_variants(variants, tiny_dataset, tmp_path, two_workers, steps=4)
    plain = PlainTraining(config(), tiny_dataset)
    expected = {"loss": plain.run(4), "grad_norm": plain.norms}
    assert found.keys() == variants.keys()
    for variant, steps in found.items():
        rounded = 0.05 if "bf16" in variant else 1e-3
        for kind, values in steps.items():
            assert values == pytest.approx(expected[kind], rel=rounded), (variant, kind)


def test_a_training_stops_early_names_its_best_checkpoint_and_is_not_trained_on(
    ray_cluster: LocalCluster,
    tiny_model: Path,
    picture_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At a rate that changes nothing the loss does not improve: the last rung is out of reach."""
    settings = ["search.ladder=[1,2,100000]", "train.learning_rate=1e-12", "train.num_workers=1"]
    config = tiny_config(tiny_model, picture_folder, tmp_path, "search.patience=1", *settings)
    best = train(config)
    told = capsys.readouterr().out
    assert "stopped early: no improvement at 1 rungs (search.patience)" in told
    assert "best: step 1, validation loss " in told and best.step == 1
    rows = [json.loads(line) for line in Path(tmp_path, "tiny/train/lr-1e-12", ROWS).read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["checkpoint"] == best.uri
    again = Validation(config, "lr-1e-12", pool=None, board=None)  # type: ignore[arg-type]
    again.fit(None)  # neither measures nor trains
    assert again.has_stopped and again.best() == best


def test_a_compiled_denoiser_trains_as_it_does_without(
    two_workers: Workers, picture_folder: Path, tmp_path: Path
) -> None:
    """A transformer of few layers, which takes the compiler least."""
    base = write("FluxPipeline", tmp_path / "flux")

    def config(compiled: bool) -> Config:
        overrides = ["search.ladder=[2]", f"train.compile={compiled}"]
        return tiny_config(base, picture_folder, tmp_path, *overrides)

    variants = {"plain": config(False), "compiled": config(True)}
    found = train_variants(variants, prepare(config(False)), tmp_path, two_workers, steps=2)
    graphs = [json.loads((tmp_path / f"{each}-0.json").read_text())["graphs"] for each in variants]
    assert graphs[0] == 0 < graphs[1]
    for kind, values in found["compiled"].items():
        assert values == pytest.approx(found["plain"][kind], rel=1e-3), kind
