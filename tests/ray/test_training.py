"""Ray Train workers with a real DeepSpeed engine: sharded, exact, resumable."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.connect import LocalCluster
from cluster.storage import Storage
from ray_jobs.config import Config, load_config
from ray_jobs.data.dataset import Dataset
from ray_jobs.prepare import prepare
from ray_jobs.train import build_trainer
from ray_jobs.training.checkpoint import SERIES, find_rungs

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
            *overrides,
        ],
    )


def run_inside(function: Any, loop: dict[str, Any], *, num_workers: int, folder: Path, name: str) -> None:
    """Run a train function on Ray Train workers."""
    import ray.train
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        function,
        train_loop_config=loop,
        scaling_config=ray.train.ScalingConfig(num_workers=num_workers),
        run_config=ray.train.RunConfig(name=name, storage_path=str(folder)),
    ).fit()


def train_variants(
    variants: dict[str, Config],
    dataset: Dataset,
    folder: Path,
    *,
    num_workers: int,
    name: str,
    steps: int = 20,
) -> dict[str, list[float]]:
    """So many steps of each variant, one after the other on the same workers; the losses of each."""

    def train_all(loop: dict[str, Any]) -> None:
        import torch

        from ray_jobs.training.loop import LoopSettings, Training

        torch.set_num_threads(1)
        for number, config in enumerate(loop["variants"].values()):
            # Each ends at another step, so that each writes a checkpoint of its own.
            settings = LoopSettings(config, loop["dataset"], "trial", [loop["steps"] + number])
            Training(settings, torch.device("cpu"), None).run()

    loop = {"variants": variants, "dataset": dataset, "steps": steps}
    run_inside(train_all, loop, num_workers=num_workers, folder=folder, name=name)
    found = {}
    for number, variant in enumerate(variants):
        series = json.loads((folder / name / f"step-{steps + number:08d}" / SERIES).read_text())
        found[variant] = [row["loss"] for row in series][:steps]
    return found


def state_at(folder: Path) -> dict[str, Any]:
    """All tensors that the ranks stored in a checkpoint."""
    from safetensors.torch import load_file

    return {
        f"{path.name} {name}": tensor
        for path in sorted((folder / "state").iterdir())
        for name, tensor in load_file(path).items()
    }


def kill_a_worker_after(checkpoint: Path) -> threading.Thread:
    """A thread that kills one training worker without warning once a checkpoint is whole."""

    def watch() -> None:
        while not (checkpoint / "complete-0001-of-0002").exists():
            time.sleep(0.02)
        workers = [each for each in psutil.process_iter() if "RayTrainWorker" in " ".join(each.cmdline())]
        workers[0].kill()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_the_losses_do_not_depend_on_the_zero_stage_the_number_of_workers_or_the_micro_batches(
    ray_cluster: LocalCluster, tiny_model: Path, picture_folder: Path, tmp_path: Path
) -> None:
    def config(**train: Any) -> Config:
        overrides = [f"train.{name}={value}" for name, value in train.items()]
        plain = ["train.method=full", "train.learning_rate=1e-3", "search.ladder=[20]", *overrides]
        return tiny_config(tiny_model, picture_folder, tmp_path, *plain)

    dataset = prepare(config())
    stages = {f"2 workers, stage {stage}": config(zero_stage=stage) for stage in range(4)}
    found = train_variants(stages, dataset, tmp_path, num_workers=2, name="two")
    ones = {"1 worker": config(), "1 worker, 3 + 1 pictures": config(micro_batch_size=3)}
    found |= train_variants(ones, dataset, tmp_path, num_workers=1, name="one")
    fours = {"4 workers": config(), "4 workers, 4 for 5": config(batch_size=5)}
    found |= train_variants(fours, dataset, tmp_path, num_workers=4, name="four")
    del found["4 workers, 4 for 5"]  # other batches, other losses: it only has to run
    expected = found["1 worker"]
    assert max(expected) > min(expected) > 0
    for variant, losses in found.items():
        assert losses == pytest.approx(expected, abs=1e-4), variant


def test_a_training_whose_worker_is_killed_ends_with_the_very_same_state(
    ray_cluster: LocalCluster, tiny_model: Path, picture_folder: Path, tmp_path: Path
) -> None:
    import torch

    def config(ladder: str) -> Config:
        settings = ["train.lora.dropout=0.2", "train.zero_stage=3", "train.precision=bf16"]
        return tiny_config(tiny_model, picture_folder, tmp_path, f"search.ladder={ladder}", *settings)

    dataset = prepare(config("[80]"))
    train_variants({"unbroken": config("[80]")}, dataset, tmp_path, num_workers=2, name="unbroken", steps=80)
    run = Storage.open(f"{tmp_path}/tiny").child("train")
    trial = Path(run.path) / "lr-0.0001"
    killer = kill_a_worker_after(trial / "step-00000004")
    build_trainer(config("[4,80]"), dataset, callbacks=[]).fit()
    killer.join()
    assert [rung.metrics["step"] for rung in find_rungs(run)["lr-0.0001"]] == [4, 80]
    series = json.loads((trial / "step-00000080" / SERIES).read_text())
    assert [row["step"] for row in series] == list(range(5, 81))
    expected = state_at(tmp_path / "unbroken" / "step-00000080")
    found = state_at(trial / "step-00000080")
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
