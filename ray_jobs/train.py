"""Train once on the prepared rows, with Ray Train workers and DeepSpeed.

    python -m ray_jobs.train --config configs/demo.yaml --set train.learning_rate=1e-3

Climbs `search.ladder` at `train.learning_rate` and writes a checkpoint at each rung to
`<storage>/<run>/train/<trial>/`. An interrupted run resumes from its last checkpoint.
"""

from typing import Any

from ray_jobs.config import Config
from ray_jobs.console import say
from ray_jobs.console.board import watched_board
from ray_jobs.data.preparation import prepare
from ray_jobs.planning.checks import checked
from ray_jobs.run.command_line import run_stage
from ray_jobs.run.folder import RunFolder
from ray_jobs.training.tracking import opened_store, tracked
from ray_jobs.training.trainer import build_trainer, check_diverged, training_name


def train(config: Config) -> Any:
    """Run the stage: prepare if needed, then train; return Ray Train's result."""
    with opened_store(config):
        dataset = prepare(config, check=checked(config, "train"))
    config = config.with_ladder(dataset.manifest.rows_an_epoch)
    few, many = config.train.min_workers, config.train.max_workers
    workers = f"{few} to {many}" if config.train.is_elastic else str(few)
    name, digest = training_name(config), dataset.manifest.digest
    say(
        "train",
        f"{name}: {workers} workers, "
        f"ZeRO stage {config.train.zero_stage}, {config.train.method}, rungs {config.search.ladder}",
    )
    with watched_board() as board, tracked(config, {name: config}, digest, lambda: []):
        result = build_trainer(config, dataset, name=name, board=board).fit()
    check_diverged(RunFolder.of(config).training(name))
    metrics = result.metrics or {}
    say(
        "train",
        f"done: step {metrics.get('step')}, loss {metrics.get('train_loss', float('nan')):.4f}, "
        f"{metrics.get('images_per_second', 0):.0f} images/s; checkpoint {result.checkpoint.path}",
    )
    return result


if __name__ == "__main__":
    run_stage(__doc__, train, name="train")
