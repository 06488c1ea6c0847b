"""Two Ray Train workers with a real DeepSpeed engine: sharded, resumable."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.connect import LocalCluster
from cluster.storage import Storage
from ray_jobs.config import Config, load_config
from ray_jobs.prepare import prepare
from ray_jobs.train import build_trainer
from ray_jobs.training.checkpoint import find_rungs

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
            "train.batch_size=2",
            "train.lora.target_modules=[to_q,to_v]",
            "search.learning_rates=[1.0e-3]",
            "search.ladder=[1,2]",
            *overrides,
        ],
    )


def test_every_rank_holds_a_part_of_the_optimizer_state(
    ray_cluster: LocalCluster, tiny_model: Path, picture_folder: Path, tmp_path: Path
) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    def inspect_engine(loop: dict[str, Any]) -> None:
        """A train function that reports what the worker's engine is."""
        import torch

        from ray_jobs.training.engine import build_engine
        from ray_jobs.training.loop import build_model

        torch.set_num_threads(1)
        _, model = build_model(loop["config"])
        engine = build_engine(model, loop["config"].train, 10)
        partition = engine.optimizer.single_partition_of_fp32_groups[0]
        trained = sum(parameter.numel() for _, parameter in model.trained())
        context = ray.train.get_context()
        facts = {
            "engine": type(engine).__name__,
            "optimizer": type(engine.optimizer).__name__,
            "stage": engine.zero_optimization_stage(),
            "partition": partition.numel(),
            "trained": trained,
        }
        Path(loop["folder"], f"rank-{context.get_world_rank()}.json").write_text(json.dumps(facts))

    config = tiny_config(tiny_model, picture_folder, tmp_path)
    TorchTrainer(
        inspect_engine,
        train_loop_config={"config": config, "folder": str(tmp_path)},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(name="inspect", storage_path=str(tmp_path)),
    ).fit()
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for facts in ranks:
        assert facts["engine"] == "DeepSpeedEngine"
        assert facts["optimizer"] == "DeepSpeedZeroOptimizer"
        assert facts["stage"] == 2
        assert facts["partition"] <= facts["trained"] // 2 + 8  # padded to equal parts
    assert sum(facts["partition"] for facts in ranks) >= ranks[0]["trained"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(
    ray_cluster: LocalCluster, tiny_model: Path, picture_folder: Path, tmp_path: Path, method: str
) -> None:
    """LoRA under ZeRO 2, all weights under ZeRO 3: the switch between them is in the configuration."""
    import torch
    from safetensors.torch import load_file

    run = Storage.open(f"{tmp_path}/tiny")
    stage = {"lora": 2, "full": 3}[method]

    def train_to(ladder: str) -> dict[str, torch.Tensor]:
        config = tiny_config(
            tiny_model,
            picture_folder,
            tmp_path,
            f"search.ladder={ladder}",
            f"train.method={method}",
            f"train.zero_stage={stage}",
        )
        build_trainer(config, prepare(config), callbacks=[]).fit()
        last = find_rungs(run.child("train"))["lr-0.0001"][-1]
        return load_file(Path(last.uri) / "ema.safetensors")

    early = train_to("[2]")
    resumed = train_to("[2,4]")
    run.delete("train")
    whole = train_to("[2,4]")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.allclose(value, resumed[name], atol=1e-6), name
    assert any(not torch.allclose(value, early[name], atol=1e-6) for name, value in whole.items())
