"""The loop of a worker group that trains several trials of a search together."""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

import torch

from cluster.storage import Storage
from ray_jobs.config import Config
from ray_jobs.data.encoding.shapes import square_latents, square_references
from ray_jobs.run.folder import RunFolder
from ray_jobs.training.checkpoint import REPORTED, folder_of, step_of
from ray_jobs.training.loop import (
    POLL_S,
    LoopSettings,
    TrainingRun,
    input_maker,
    resumed_from,
    set_up_worker,
)
from ray_jobs.training.monitor import Diverged
from ray_jobs.training.packed_steps import PackedInputs, Pieces, accumulate, rehearse
from ray_jobs.training.rehearsal import (
    blank,
    halved_when_it_does_not_fit,
    held_rows,
    rehearsed,
    rows_at_once,
    smaller,
)
from ray_jobs.training.setup import build_engines, build_pack, exporter
from ray_jobs.training.startup import StartUp
from ray_jobs.training.state import load_weights
from ray_jobs.training.steps import InputsAhead

PACK = "pack"  # in messages that concern all trainings of a pack


@dataclass(frozen=True)
class PackSettings:
    """Settings that the driver passes to every worker of a pack.

    Attributes:
        config: the configuration of the search.
        queue: handle of a PackQueue.
        board: handle of a ProgressBoard.
    """

    config: Config
    queue: Any
    board: Any

    @property
    def folder(self) -> Storage:
        """Folder of all trainings, Ray Train's of the pack."""
        return RunFolder.of(self.config).trainings

    def tell(self, line: str) -> None:
        self.board.post.remote(f"{PACK}/{line}", line)


def train_packs(loop: dict[str, PackSettings]) -> None:
    """Train what the queue has until it is closed; Ray Train calls this on every worker."""
    import ray
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    settings = loop["settings"]
    train = settings.config.train
    device, startup = set_up_worker(train, settings.tell)
    context = ray.train.get_context()
    is_first, world_size = context.get_world_rank() == 0, context.get_world_size()
    rows = broadcast_from_rank_zero(held_rows(settings.folder) if is_first else None)
    group = uuid4().hex
    pack: PackedTraining | None = None
    started: StartUp | None = startup  # None from the second pack on: it waits for trials before
    while True:
        taken: tuple[Any, bool] | None = None
        if is_first:
            found: list[LoopSettings] | None = ray.get(settings.queue.take.remote(group))
            # Rank 0 decides for all ranks what to resume from.
            resumed = [(each.with_rows(rows), each.resume_from()) for each in found or []]
            taken = ray.put(resumed), found is None
        [reference, closed] = broadcast_from_rank_zero(taken)
        if closed:
            return
        plan: list[tuple[LoopSettings, Storage | None]] = ray.get(reference)
        if started:
            started.done("trials")
        fits = partial(
            halved_when_it_does_not_fit,
            trial=settings.folder,
            name=_each_of(plan),
            world_size=world_size,
            tell=settings.tell,
            lower="search.pack or train.micro_batch_size",
        )
        if pack is None or not pack.holds(plan):
            pack = None
            _free(device)
            with fits(plan[0][0].config.train):
                pack = PackedTraining(settings, plan, device, started or StartUp())
            started = None
        with fits(pack.trainings[0].train):  # what a rehearsal has made of it
            pack.run([each for each, _ in plan])


def _each_of(trainings: Sequence[object]) -> str:
    return f"{PACK}, each of {len(trainings)} trials"


def _free(device: torch.device) -> None:
    """Free the memory of a pack that is no longer used: its layers refer to themselves."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class PackedTraining:
    """One worker's part of trainings that share a base, their rows and each pass.

    Args:
        plan: settings of the trainings, and checkpoints to resume or start from.
    """

    def __init__(
        self,
        settings: PackSettings,
        plan: Sequence[tuple[LoopSettings, Storage | None]],
        device: torch.device,
        startup: StartUp,
    ) -> None:
        import ray.train

        context = ray.train.get_context()
        self.settings, self.rank = settings, context.get_world_rank()
        configs = [each.config for each, _ in plan]
        pipeline, self.pack = build_pack(configs, str(device))
        members = list(self.pack.members.values())
        with ExitStack() as stack:
            resumed = [stack.enter_context(resumed_from(checkpoint)) for _, checkpoint in plan]
            for member, found in zip(members, resumed, strict=True):
                if found:
                    load_weights(found.shards, member.all_trained)
            exports = [
                exporter(config, pipeline, member, self.rank)
                for config, member in zip(configs, members, strict=True)
            ]
            makers = [
                input_maker(own, pipeline, member, device)
                for (own, _), member in zip(plan, members, strict=True)
            ]
            self.inputs = PackedInputs(makers, [own.dataset.without_fold for own, _ in plan])
            startup.done("model")
            self.engines = build_engines(self.pack, configs, context.get_world_size(), device)
            self.trainings = [
                TrainingRun(own, maker, engine, export, found, startup, folder=own.trial_id)
                for (own, _), maker, engine, export, found in zip(
                    plan, makers, self.engines, exports, resumed, strict=True
                )
            ]
        if device.type == "cuda" and configs[0].train.may_halve:
            self._rehearse(device)
        startup.done("engine")

    def _rehearse(self, device: torch.device) -> None:
        """Lower `micro_batch_size` to what every rank's memory holds of all trainings at once.

        All ranks must call this.
        """
        first = self.trainings[0]
        config, maker = first.settings.config, self.inputs.makers[0]
        shape, references = square_latents(config), square_references(config)

        def try_rows(rows: int) -> None:
            rehearse(self.pack, self.engines, self.inputs, blank(maker, shape, rows, references))

        most = rows_at_once(first.train, first.world_size)
        found = rehearsed(first.train, try_rows, first.world_size, device)
        if (rows := rows_at_once(found, first.world_size)) < most:
            for training in self.trainings:
                training.train = training.train.model_copy(update={"micro_batch_size": rows})
            if self.rank == 0:
                self.settings.tell(smaller(_each_of(self.trainings), rows, most))

    def holds(self, plan: Sequence[tuple[LoopSettings, Storage | None]]) -> bool:
        """Return whether what is in memory is what these trainings would resume from."""
        held = {each.settings.trial_id: each.done for each in self.trainings}
        return all(
            held.get(each.trial_id) == (step_of(checkpoint) if checkpoint else 0) for each, checkpoint in plan
        )

    def run(self, plan: Sequence[LoopSettings]) -> None:
        """Train each of the planned trainings to the end of its ladder, unless it leaves the queue."""
        named = {each.trial_id: each for each in plan}
        active = []
        for number, training in enumerate(self.trainings):
            own = named.get(training.settings.trial_id)
            if own is None:
                continue
            training.settings, training.meter.ladder = own, own.ladder
            if self.rank == 0 and training.done in own.ladder:  # in case the report was lost with its workers
                self.settings.queue.rung_saved.remote(own.trial_id, training.done)
            if training.done >= own.ladder[-1]:
                continue
            training.start()
            active.append(number)
        if not active:
            return
        steps = range(
            min(self.trainings[number].done for number in active) + 1,
            max(self.trainings[number].settings.ladder[-1] for number in active) + 1,
        )
        with InputsAhead(self.inputs.begin, self._rows(active, steps), steps) as inputs:
            for step in steps:
                with ExitStack() as stack:
                    for number in active:
                        stack.enter_context(self.trainings[number].meter.waiting())
                    pieces = next(inputs)
                # Those that have resumed from a later step wait for it.
                if taking := [number for number in active if self.trainings[number].done == step - 1]:
                    active = self._step(step, pieces, taking, active)
                    active = self._without_stopped(step, taking, active)
                if not active:
                    return

    def _rows(self, active: Sequence[int], steps: range) -> Iterator[list[Pieces]]:
        """Yield the pieces of each step, of each stream that active trainings read; all ranks must call this.

        Batches of all streams have as many rows, and so as many pieces.
        """
        readers = {self.inputs.streams[number]: number for number in reversed(active)}
        streams = {number: self.trainings[readers[number]].stream(steps) for number in sorted(readers)}
        for of_step in zip(*streams.values(), strict=True):
            yield [dict(zip(streams, pieces, strict=True)) for pieces in zip(*of_step, strict=True)]

    def _step(self, step: int, pieces: Any, taking: list[int], active: list[int]) -> list[int]:
        """Take a step of some trainings; return those of the active ones that have further steps."""
        ended = set()
        for number in taking:
            training = self.trainings[number]
            training.enter(step)
            training.engine.set_hyperparameters(training.stage, step)
        shares = accumulate(self.pack, self.engines, self.inputs, pieces, taking, step=step, rank=self.rank)
        for number, share in zip(taking, shares, strict=True):
            training = self.trainings[number]
            try:
                training.leave(step, training.finish(step, training.stage, share))
            except Diverged as error:
                training.give_up(error)
                if self.rank == 0:
                    self.settings.queue.diverged.remote(training.settings.trial_id)
                ended.add(number)
                continue
            if step == training.settings.ladder[-1]:
                ended.add(number)
        return [number for number in active if number not in ended]

    def _without_stopped(self, step: int, taken: list[int], active: list[int]) -> list[int]:
        """Return the trainings that go on after a step; all ranks must call this.

        Where `search.wait_for_scores` is set, that of a rung is waited for.

        Args:
            taken: those of which it was a step.
        """
        import ray
        from ray.train.collective import broadcast_from_rank_zero

        trainings = [self.trainings[number] for number in active]
        paused = [
            self.trainings[number]
            for number in taken
            if number in active
            and self.trainings[number].settings.wait_for_scores
            and step in self.trainings[number].settings.ladder[:-1]
        ]
        looked = any([self._looked(each) for each in trainings])
        if not (paused or looked):
            return active
        stay: list[int] | None = None
        if self.rank == 0:
            names = ray.get(self.settings.queue.names.remote())
            while any(
                each.settings.trial_id in names
                and not each.settings.trial.child(folder_of(step)).exists(REPORTED)
                for each in paused
            ):
                time.sleep(POLL_S)
                names = ray.get(self.settings.queue.names.remote())
            stay = [number for number in active if self.trainings[number].settings.trial_id in names]
        for each in paused:
            each.meter.go_on()
        found: list[int] = broadcast_from_rank_zero(stay)
        return found

    def _looked(self, training: TrainingRun) -> bool:
        looked, training.meter.looked = training.meter.looked, False
        return looked
