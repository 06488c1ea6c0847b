"""The training loop that every worker runs: stream rows, take steps, report checkpoints."""

import json
import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cluster.gpus import take_share
from cluster.storage import Storage
from ray_jobs.config import Config, TrainConfig
from ray_jobs.data.encoding.shapes import square_latents, square_references
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.data.feeding.streaming import StreamSettings, batches, split_stream
from ray_jobs.diffusion.pack import Trainable
from ray_jobs.diffusion.protocols import Pipeline
from ray_jobs.run.folder import RunFolder
from ray_jobs.training.bandwidth import slow_network
from ray_jobs.training.batch import InputMaker, Piece, Sent, loss_shares
from ray_jobs.training.checkpoint import (
    REPORTED,
    CheckpointWriter,
    Export,
    Resumed,
    damaged,
    folder_of,
    last_intact,
)
from ray_jobs.training.engine import Engine, pieces_a_step
from ray_jobs.training.flat import Flat, summed_in
from ray_jobs.training.monitor import RUNG, Diverged, Meter
from ray_jobs.training.phases import Stage, stage_at, stages_of
from ray_jobs.training.rehearsal import (
    blank,
    halved_when_it_does_not_fit,
    held_rows,
    rehearsed,
    rows_at_once,
    smaller,
)
from ray_jobs.training.setup import build_engine, build_model, exporter
from ray_jobs.training.startup import StartUp
from ray_jobs.training.state import load_weights
from ray_jobs.training.steps import InputsAhead, Steps
from ray_jobs.training.zero import import_deepspeed

DIVERGED = "diverged.json"
POLL_S = 0.5  # seconds between checks for a rung's score


@dataclass(frozen=True)
class LoopSettings:
    """Settings that the driver passes to every worker: plain values and handles.

    Attributes:
        ladder: steps of the rungs to train to: the configuration's ladder or its beginning. Learning-rate
            schedules end where the full ladder does.
        start: URI of another training's checkpoint to start from, or None.
        board: handle of a ProgressBoard, or None.
        wait_for_scores: pause at each rung except the last until its score has been reported (`REPORTED`).
    """

    config: Config
    dataset: Dataset
    trial_id: str
    ladder: list[int]
    board: Any = None
    start: str | None = None
    wait_for_scores: bool = False

    @property
    def trial(self) -> Storage:
        """Folder of the trial's checkpoints."""
        return RunFolder.of(self.config).training(self.trial_id)

    @property
    def stages(self) -> list[Stage]:
        return stages_of(self.config.train, max(self.config.search.ladder[-1], self.ladder[-1]))

    def resume_from(self) -> Storage | None:
        """Return the checkpoint to resume or start from; None to start from the base model.

        Raises:
            ValueError: the checkpoint to start from is damaged.
        """
        found = last_intact(self.trial, self.tell)
        if found or self.start is None:
            return found
        start = Storage.open(self.start)
        if wrong := damaged(start):
            raise ValueError(f"{start.uri}: damaged: {', '.join(wrong)}; it was written by another training")
        return start

    def with_rows(self, rows: int | None) -> "LoopSettings":
        """Return the settings with `micro_batch_size` at most this; None for no limit."""
        if rows is None:
            return self
        fewest = min(rows, self.config.train.micro_batch_size or rows)
        train = self.config.train.model_copy(update={"micro_batch_size": fewest})
        return replace(self, config=self.config.model_copy(update={"train": train}))

    def tell(self, line: str) -> None:
        logging.getLogger(__name__).warning(line)
        if self.board is not None:
            self.board.post.remote(f"{self.trial_id}/{line}", line)

    @property
    def rows(self) -> tuple[Config, Dataset]:
        """The data set whose rows are trained on, with the configuration that it was prepared with."""
        votes = self.dataset.votes if self.config.train.preference else None
        return (votes.config, votes.dataset) if votes else (self.config, self.dataset)

    def stream(self, world_size: int, columns: tuple[str, ...]) -> StreamSettings:
        """Return the settings of the stream that feeds the steps."""
        train = self.config.train
        return StreamSettings(self.rows[0], train.batch_size, world_size, columns, train.class_rows)


def set_up_worker(train: TrainConfig, tell: Callable[[str], None]) -> tuple[torch.device, StartUp]:
    """Prepare a worker's process; return its device and the stopwatch of its start."""
    startup = StartUp()
    from diffusers import DiffusionPipeline  # noqa: F401  here, to time imports and building apart
    from ray.train.torch import get_device

    device = get_device()
    if not train.flat:
        import_deepspeed(device)
    startup.done("imports")
    torch.set_num_threads(train.cpus_per_worker)
    if train.use_gpu:
        take_share(train.gpu_share, device)
        if slow := slow_network(device):
            tell(slow)
    return device, startup


def train_worker(loop: dict[str, LoopSettings]) -> None:
    """Run a training; Ray Train calls this on every worker."""
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    settings = loop["settings"]
    device, startup = set_up_worker(settings.config.train, settings.tell)
    # Rank 0 decides for all ranks: another one might already see a later checkpoint.
    context, trial = ray.train.get_context(), settings.trial
    is_first = context.get_world_rank() == 0
    last, rows = broadcast_from_rank_zero((settings.resume_from(), held_rows(trial)) if is_first else None)
    settings = settings.with_rows(rows)
    train, world_size = settings.config.train, context.get_world_size()
    fits = partial(
        halved_when_it_does_not_fit,
        trial=trial,
        name=settings.trial_id,
        world_size=world_size,
        tell=settings.tell,
    )
    with fits(train), resumed_from(last) as resumed:
        training = Training(settings, device, resumed, startup)
    with fits(training.train):  # what a rehearsal has made of it
        training.run()


@contextmanager
def resumed_from(checkpoint: Storage | None) -> Iterator[Resumed | None]:
    """Make a checkpoint's files local for a block that reads them."""
    import ray.train

    if checkpoint is None:
        yield None
        return
    with ray.train.Checkpoint(checkpoint.path, checkpoint.filesystem).as_directory() as folder:
        yield Resumed(Path(folder))


def input_maker(
    settings: LoopSettings, pipeline: Pipeline, model: Trainable, device: torch.device
) -> InputMaker:
    """Return the maker of a training's inputs."""
    preference = settings.config.train.preference
    return InputMaker(
        pipeline.vae,
        model,
        settings.dataset.empty_caption(),
        device,
        seed=settings.config.seed,
        caption_dropout=settings.config.train.caption_dropout,
        num_references=settings.rows[0].data.num_references,
        has_masks=settings.rows[0].data.has_masks,
        preference=preference.loss if preference else None,
        has_control=settings.rows[0].data.has_control,
    )


class TrainingRun(Steps):
    """One worker's part of a training, from the beginning or from a checkpoint, whoever builds its model.

    Args:
        export: from `exporter`, made before the engine.
        folder: see `CheckpointWriter`'s `training`.

    Attributes:
        done: the last step that was taken.
        stage: the stage of the current step.
    """

    stage: Stage

    def __init__(
        self,
        settings: LoopSettings,
        inputs: InputMaker,
        engine: Engine,
        export: Export,
        resumed: Resumed | None,
        startup: StartUp,
        folder: str = "",
    ) -> None:
        config, rank = settings.config, engine.rank
        self.settings, self.train, self.world_size = settings, config.train, engine.world_size
        meter = Meter(settings.trial_id, settings.ladder, config.train, settings.board, rank, startup)
        super().__init__(inputs, engine, meter, decay=config.train.ema_decay, rank=rank)
        self.done, self.stages = resumed.step if resumed else 0, settings.stages
        if resumed:
            # The moments are those of the last step's stage; the next step may begin another.
            engine.use_optimizer(stage_at(self.stages, min(self.done, self.stages[-1].last)).optimizer)
            resumed.restore(self.engine, self.ema)
        self.writer = CheckpointWriter(self.engine, self.ema, export, config.to_yaml(), folder)

    def start(self) -> None:
        """Prepare for the first step after `done`."""
        self.stage = stage_at(self.stages, self.done + 1)
        self.engine.enter_stage(self.stage, None)
        self.meter.start(self.engine)

    def enter(self, step: int) -> None:
        """Begin a step."""
        if step > self.stage.last:
            self.stage = stage_at(self.stages, step)
        if step == self.stage.first and step > 1:
            before = self.stages[self.stages.index(self.stage) - 1]
            self.engine.enter_stage(self.stage, before)

    def leave(self, step: int, why: str) -> None:
        """End a step, with a checkpoint if one is due.

        Args:
            why: the result of `take` or `finish`.

        Raises:
            Diverged: on all ranks at once.
        """
        self.done, at_rung = step, step in self.settings.ladder
        if at_rung or why:
            self.writer.save(*self.meter.metrics(RUNG if at_rung else why))

    def stream(self, steps: range) -> Iterator[list[Piece]]:
        """Return this rank's pieces of each step; all ranks must call this."""
        import ray
        from ray.train.collective import broadcast_from_rank_zero

        settings = self.settings
        stream = settings.stream(self.world_size, self.inputs.columns)
        ends = None
        if self.rank == 0:
            split = split_stream(settings.rows[1], stream, first_step=steps[0], last_step=steps[-1])
            ends = [ray.put(split)]  # by reference: a broadcast value must be small
        [reference] = broadcast_from_rank_zero(ends)
        taken = batches(ray.get(reference)[self.rank], rank=self.rank, first_step=steps[0])
        pieces = pieces_a_step(self.train, self.world_size)
        shares, equal = loss_shares(self.train), self.train.compile
        return (Piece.cut(batch, shares, self.world_size, self.rank, pieces, equal=equal) for batch in taken)

    def give_up(self, error: Diverged) -> None:
        """Record the divergence for the driver; a restart from the last checkpoint would diverge again."""
        if self.rank == 0:
            self.settings.trial.write_text(DIVERGED, json.dumps({"reason": str(error)}))


class Training(TrainingRun):
    """One worker's part of a training that has its worker group to itself."""

    def __init__(
        self,
        settings: LoopSettings,
        device: torch.device,
        resumed: Resumed | None,
        startup: StartUp | None = None,
    ) -> None:
        import ray.train

        startup = startup or StartUp()
        context, config = ray.train.get_context(), settings.config
        pipeline, model = build_model(config, str(device))
        if resumed:
            load_weights(resumed.shards, model.all_trained)
        export = exporter(config, pipeline, model, context.get_world_rank())
        inputs = input_maker(settings, pipeline, model, device)
        startup.done("model")
        engine = build_engine(model, config.train, context.get_world_size(), device)
        super().__init__(settings, inputs, engine, export, resumed, startup)
        if isinstance(self.engine, Flat) and device.type == "cuda" and self.train.may_halve:
            self._rehearse(self.engine)
        startup.done("engine")

    def _inputs(self, steps: range) -> Generator[list[Sent]]:
        """Yield the inputs of each step; all ranks must call this."""
        with InputsAhead(self.inputs.begin, self.stream(steps), steps) as ahead:
            yield from ahead

    def _rehearse(self, engine: Flat) -> None:
        """Lower `micro_batch_size` to what the memory of every rank holds; all ranks must call this."""
        config = self.settings.config
        shape, references = square_latents(config), square_references(self.settings.rows[0])

        def rehearse(rows: int) -> None:
            engine.rehearse(*self.inputs.make(blank(self.inputs, shape, rows, references), 0))

        most = rows_at_once(self.train, self.world_size)
        self.train = rehearsed(self.train, rehearse, self.world_size, engine.device)
        if (rows := rows_at_once(self.train, self.world_size)) < most:
            engine.summed_in = summed_in(self.train, self.world_size)
            if self.rank == 0:
                self.settings.tell(smaller(self.settings.trial_id, rows, most))

    def run(self) -> None:
        """Train through the remaining rungs of the ladder."""
        ladder = self.settings.ladder
        if self.done >= ladder[-1]:
            return
        self.start()
        steps = range(self.done + 1, ladder[-1] + 1)
        with closing(self._inputs(steps)) as inputs:
            try:
                for step in steps:
                    self.enter(step)
                    self.leave(step, self.take(step, self.stage, inputs))
                    if self.settings.wait_for_scores and step in ladder[:-1]:
                        self._wait_for_score(step)
            except Diverged as error:
                self.give_up(error)

    def _wait_for_score(self, step: int) -> None:
        """Wait until the rung that was just saved has its score reported; all ranks must call this.

        If the evaluation fails, the wait ends as well: that is an error in the controller, which stops its
        workers. A training that restarts there does not wait for the rung it resumes from, since that rung's
        report may have been lost with the workers.
        """
        from ray.train.collective import broadcast_from_rank_zero

        if self.rank == 0:
            rung = self.settings.trial.child(folder_of(step))
            while not rung.exists(REPORTED):
                time.sleep(POLL_S)
        broadcast_from_rank_zero(None)  # a barrier through Ray: torch's would time out
        self.meter.go_on()
