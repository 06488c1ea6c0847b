"""Two Ray Train workers with a real DeepSpeed engine: sharded."""

import json
from pathlib import Path
from typing import Any

from cluster.connect import LocalCluster
from ray_jobs.config import Config, load_config

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
