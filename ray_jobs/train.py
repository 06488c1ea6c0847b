"""Train once on the prepared rows, with Ray Train workers and DeepSpeed.

    python -m ray_jobs.train --config configs/demo.yaml --set train.learning_rate=1e-3

Climbs `search.ladder` at `train.learning_rate` and writes a checkpoint at each rung to
`<storage>/<run>/train/<trial>/`. With `search.patience` an evaluator measures the validation loss of each
rung, and the training stops after so many rungs without an improvement. An interrupted run resumes from its
last checkpoint.
"""

from ray_jobs.config import Config
from ray_jobs.console import say
from ray_jobs.console.board import watched_board
from ray_jobs.data.preparation import prepare
from ray_jobs.planning.checks import checked
from ray_jobs.planning.settled import settled
from ray_jobs.run.command_line import run_stage
from ray_jobs.run.folder import RunFolder
from ray_jobs.training.checkpoint import Rung, rungs_of
from ray_jobs.training.tracking import opened_store, tracked
from ray_jobs.training.trainer import build_trainer, check_diverged, training_name
from ray_jobs.tuning.early_stopping import ValidationCallback, validated


def train(config: Config) -> Rung:
    """Run the stage: prepare if needed, then train; return the best rung by validation loss, or the last."""
    config = settled(config)
    with opened_store(config):
        dataset = prepare(config, check=checked(config, "train"))
    config = config.with_ladder(dataset.rows_an_epoch)
    few, many = config.train.min_workers, config.train.max_workers
    workers = f"{few} to {many}" if config.train.is_elastic else str(few)
    name, digest = training_name(config), dataset.manifest.digest
    say(
        "train",
        f"{name}: {workers} workers, "
        f"ZeRO stage {config.train.zero_stage}, {config.train.method}, rungs {config.search.ladder}",
    )
    with watched_board() as board, validated(config, dataset, name, board) as validation:
        trainer = build_trainer(
            config,
            dataset,
            name=name,
            board=board,
            callbacks=[ValidationCallback(validation)] if validation else [],
            wait_for_scores=config.search.wait_for_scores and validation is not None,
        )
        rows = validation.rung_rows if validation else list
        with tracked(config, {name: config}, digest, rows):
            validation.fit(trainer) if validation else trainer.fit()
    folder = RunFolder.of(config).training(name)
    check_diverged(folder)
    last = rungs_of(folder)[-1]
    say(
        "train",
        f"done: step {last.step}, loss {last.progress.train_loss:.4f}, "
        f"{last.progress.images_per_second:.0f} images/s; checkpoint {last.uri}",
    )
    return validation.best() if validation else last


def main(given: list[str] | None = None) -> None:
    run_stage(__doc__, train, name="train", given=given)


if __name__ == "__main__":
    main()
