"""Ray Train workers that stand for many tests: to start a group takes most of a minute."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Function = Callable[[dict[str, Any]], None]


def run_inside(
    function: Function, loop: dict[str, Any], *, num_workers: int, folder: Path, name: str
) -> None:
    """Run a train function on Ray Train workers; a failure ends it."""
    import ray.train
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        function,
        train_loop_config=loop,
        scaling_config=ray.train.ScalingConfig(num_workers=num_workers),
        run_config=ray.train.RunConfig(name=name, storage_path=str(folder)),
    ).fit()


class Tasks:
    """An actor that hands every worker the same functions, one after the other."""

    def __init__(self, num_workers: int) -> None:
        self.waiting: list[asyncio.Queue[tuple[Function, dict[str, Any]] | None]] = [
            asyncio.Queue() for _ in range(num_workers)
        ]
        self.ended: asyncio.Queue[None] = asyncio.Queue()

    async def run(self, function: Function, loop: dict[str, Any]) -> None:
        """Returns when all workers have ended it."""
        self._give((function, loop))
        for _ in self.waiting:
            await self.ended.get()

    async def stop(self) -> None:
        self._give(None)

    def _give(self, task: tuple[Function, dict[str, Any]] | None) -> None:
        for queue in self.waiting:
            queue.put_nowait(task)

    async def take(self, rank: int) -> tuple[Function, dict[str, Any]] | None:
        return await self.waiting[rank].get()

    async def end(self) -> None:
        self.ended.put_nowait(None)


def take_tasks(loop: dict[str, Any]) -> None:
    """The train function of a standing group."""
    import ray
    import ray.train

    tasks, rank = loop["tasks"], ray.train.get_context().get_world_rank()
    while task := ray.get(tasks.take.remote(rank)):
        function, arguments = task
        function(arguments)
        ray.train.get_all_reported_checkpoints()  # returns when they are whole
        ray.get(tasks.end.remote())


class Workers:
    """A group of workers that runs one function after the other.

    Attributes:
        checkpoints: the folder in which the checkpoints that they report come to lie.
    """

    def __init__(self, num_workers: int, folder: Path) -> None:
        import ray
        import ray.train.torch  # here: pytest looks over all modules while the thread below would import

        self.checkpoints = folder / "run"
        self.tasks = ray.remote(Tasks).options(num_cpus=0).remote(num_workers)
        settings: dict[str, Any] = {"num_workers": num_workers, "folder": folder, "name": "run"}
        self.pool = ThreadPoolExecutor(1)
        self.group = self.pool.submit(run_inside, take_tasks, {"tasks": self.tasks}, **settings)

    def run(self, function: Function, loop: dict[str, Any]) -> None:
        """Run `function` on every worker. One that fails ends the whole group, and this raises why."""
        import ray

        ended = self.tasks.run.remote(function, loop)
        while not ray.wait([ended], timeout=0.5)[0]:
            if self.group.done():
                self.group.result()
        ray.get(ended)

    def stop(self) -> None:
        self.tasks.stop.remote()
        self.pool.shutdown()
