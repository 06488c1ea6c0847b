"""How the parts measure: our training loop and a rival in turns, and what a step's time goes to."""

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, ParamSpec, Protocol, TypeVar

import torch

from benchmarks.data.pictures import ROOT, configured, smooth, write_folder
from cluster.connect import joined
from cluster.local import local_cluster
from ray_jobs.config import Config, resolve_path
from ray_jobs.data.encoding.tensors import as_torch, read_tensors
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.data.feeding.order import rows_of_rank
from ray_jobs.data.preparation import prepare
from ray_jobs.diffusion.objectives import density
from ray_jobs.diffusion.sampling import encode_prompts
from ray_jobs.training.batch import InputMaker, Piece, Sent, loss_shares
from ray_jobs.training.loop import LoopSettings, Training
from ray_jobs.training.setup import build_model
from ray_jobs.training.steps import InputsAhead
from ray_jobs.weights.loading import load_pipeline

P = ParamSpec("P")
R = TypeVar("R")
SMALL_PICTURES = 96


class Rival(Protocol):
    """A loop that is measured beside ours.

    Attributes:
        causes: its methods whose time is told by itself.
    """

    causes: tuple[str, ...]

    def step(self) -> None: ...


class Clock:
    """Seconds by what they were spent on, wherever a watched method runs."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.began = time.perf_counter()

    def watch(self, owner: Any, **methods: str) -> None:
        """Count the time of `owner`'s methods, each under the name of a cause."""
        for cause, method in methods.items():
            setattr(owner, method, self.timed(cause, getattr(owner, method)))

    def timed(self, cause: str, function: Callable[P, R]) -> Callable[P, R]:
        """The function, its time counted."""

        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[cause] += time.perf_counter() - begin

        return wrapped

    def take(self) -> dict[str, float]:
        """The seconds since the last call, `whole` and by cause; starts anew."""
        now = time.perf_counter()
        taken = {"whole": now - self.began, **self.seconds}
        self.seconds.clear()
        self.began = now
        return taken


class Alternating(Training):
    """The training loop as it is, which lets a rival take as many steps before and after each of its turns.

    While the rival trains, Ray Data goes on filling the buffer of our stream: what its tasks cost is borne by
    both, and the time that ours waits for rows is counted.

    Args:
        rival: made on the same worker, before the first step.
    """

    def __init__(self, settings: LoopSettings, rival: Rival, steps: int) -> None:
        super().__init__(settings, torch.device("cpu"), None)
        self.rival, self.steps = rival, steps
        self.found: dict[str, list[dict[str, float]]] = {"ours": [], "rival": []}
        self.own, self.others = Clock(), Clock()
        self.own.watch(self.inputs, inputs="finish")
        self.own.watch(self.engine, passes="accumulate", optimizer="update")
        self.own.watch(self.meter, meter="add")
        self.own.watch(self, average="_average")
        self.others.watch(rival, **{cause: cause for cause in rival.causes})

    def _inputs(self, steps: range) -> Generator[list[Sent]]:
        rows = self.stream(steps)
        for begin in range(0, len(steps), self.steps):
            if begin:
                self.found["ours"].append(self.own.take())
            self._let_rival()
            self.own.take()
            # Of this turn only: no inputs are made while the rival trains.
            with InputsAhead(self.inputs.begin, rows, steps[begin : begin + self.steps]) as ahead:
                waiting = self.own.timed("wait", lambda: next(ahead, None))
                while (pieces := waiting()) is not None:
                    yield pieces

    def _let_rival(self) -> None:
        self.others.take()
        for _ in range(self.steps):
            self.rival.step()
        self.found["rival"].append(self.others.take())


@dataclass(frozen=True)
class Contest:
    """Ours against a rival: what a worker needs to run it.

    Attributes:
        make_rival: from the configuration and this rank's inputs of a step.
        steps: of a turn.
    """

    config: Config
    make_rival: Callable[[Config, dict[str, Any]], Rival]
    steps: int


def run_contests(
    contests: Mapping[str, Contest], dataset: Dataset, folder: Path, *, num_workers: int, turns: int
) -> dict[str, dict[str, Any]]:
    """Each contest in turn on the same Ray Train workers; what `summary` makes of rank 0's times."""

    def fight(loop: dict[str, Any]) -> None:
        import ray.train

        rank, world_size = (
            ray.train.get_context().get_world_rank(),
            ray.train.get_context().get_world_size(),
        )
        for number, (name, contest) in enumerate(loop["contests"].items()):
            config = contest.config
            torch.set_num_threads(config.train.cpus_per_worker)
            # One step more, before which the rival's last turn is; another number for each contest, so that
            # each writes a checkpoint of its own.
            last = (turns + 1) * contest.steps + 1 + number
            settings = LoopSettings(config, loop["dataset"], "trial", [last])
            rival = contest.make_rival(config, first_inputs(config, loop["dataset"], rank, world_size))
            training = Alternating(settings, rival, contest.steps)
            training.run()
            if rank == 0:
                (loop["folder"] / f"{name}.json").write_text(json.dumps(training.found))

    run_on_workers(
        fight, {"contests": contests, "dataset": dataset, "folder": folder}, num_workers, folder, "contests"
    )
    return {
        name: summary(
            json.loads((folder / f"{name}.json").read_text()),
            batch_size=contest.config.train.batch_size,
            steps=contest.steps,
        )
        for name, contest in contests.items()
    }


def run_on_workers(
    function: Callable[[dict[str, Any]], None],
    loop: dict[str, Any],
    num_workers: int,
    folder: Path,
    name: str,
) -> None:
    """Run a function on Ray Train workers; its files go to `folder`."""
    import ray.train
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        function,
        train_loop_config=loop,
        scaling_config=ray.train.ScalingConfig(num_workers=num_workers),
        run_config=ray.train.RunConfig(name=f"{name}-{num_workers}", storage_path=str(folder)),
    ).fit()


def timed_turns(
    loops: Mapping[str, Callable[[], object]], *, turns: int, steps: int
) -> dict[str, list[float]]:
    """So many steps of each loop in turn, again and again: seconds a step of each turn after the first."""
    found: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(turns + 1):
        for name, step in loops.items():
            begin = time.perf_counter()
            for _ in range(steps):
                step()
            found[name].append((time.perf_counter() - begin) / steps)
    return {name: seconds[1:] for name, seconds in found.items()}


def summary(found: dict[str, list[dict[str, float]]], *, batch_size: int, steps: int) -> dict[str, Any]:
    """Medians over the turns after the first, which warms up: images a second of both, ours over the rival's,
    and milliseconds a step by cause.

    A turn of ours is compared with the mean of the rival's turns before and after it.
    """
    ours, rival = found["ours"], found["rival"]
    ratios = [
        (before["whole"] + after["whole"]) / 2 / own["whole"]
        for own, before, after in list(zip(ours, rival, rival[1:], strict=False))[1:]
    ]
    speeds = {
        name: batch_size * steps / median(turn["whole"] for turn in turns[1:])
        for name, turns in found.items()
    }
    return {
        "ratio": median(ratios),
        "ratios": ratios,
        "images_per_second": speeds,
        "ms_a_step": {name: _causes(turns[1:], steps) for name, turns in found.items()},
    }


def _causes(turns: list[dict[str, float]], steps: int) -> dict[str, float]:
    """Median milliseconds a step by cause, and what is in none of them."""
    rest = [turn["whole"] - sum(s for cause, s in turn.items() if cause != "whole") for turn in turns]
    found = {cause: median(turn.get(cause, 0.0) for turn in turns) for cause in turns[0] if cause != "whole"}
    return {cause: 1e3 * seconds / steps for cause, seconds in (found | {"other": median(rest)}).items()}


def tell(figures: Mapping[str, dict[str, Any]], *, rival: str, of: str) -> None:
    """Print what `run_contests` found: speeds, where the time went, and last the ratios.

    Args:
        rival: what it is called.
        of: whose images a second the ratios are of.
    """
    for name, found in figures.items():
        speeds = found["images_per_second"]
        print(f"{name}: {speeds['ours']:.1f} images a second, {rival} {speeds['rival']:.1f}", flush=True)
        for who, causes in found["ms_a_step"].items():
            told = ", ".join(f"{cause} {ms:.1f}" for cause, ms in causes.items())
            print(f"    {who:>5}, ms a step: {told}", flush=True)
    said = ", ".join(f"{name}: {found['ratio']:.2f}" for name, found in figures.items())
    print(f"ratio: of {of}, {said}", flush=True)


def first_inputs(config: Config, dataset: Dataset, rank: int, world_size: int) -> dict[str, Any]:
    """A rank's share of a batch of prepared rows, as `inputs_of` makes it."""
    names = ["latents_mean", "latents_logvar", "prompt_embeds"]
    table = dataset.table("train", names).slice(0, config.train.batch_size).combine_chunks()
    rows = {name: as_torch(values) for name, values in read_tensors(table, names).items()}
    return inputs_of(config, rows, rank, world_size)


def inputs_of(config: Config, rows: dict[str, torch.Tensor], rank: int, world_size: int) -> dict[str, Any]:
    """What `FineTuning` takes of a rank's share of a batch, drawn as in step 1; and `timesteps`, int64, N."""
    pipeline, model = build_model(config)
    empty_caption = encode_prompts(load_pipeline(resolve_path(config.model.base)), [""])
    maker = InputMaker(
        pipeline.vae,
        model,
        empty_caption,
        torch.device("cpu"),
        seed=config.seed,
        caption_dropout=config.train.caption_dropout,
    )
    batch_size = config.train.batch_size
    mine = list(rows_of_rank(batch_size, world_size, rank))
    share = {name: values[mine] for name, values in rows.items()}
    [piece] = Piece.cut(share, loss_shares(config.train), world_size, rank, 1)
    inputs, _ = maker.make(piece, 1)
    position = density(inputs["draws"].position, model.settings, model.objective.default_sampling)
    return inputs | {"timesteps": model.objective.timesteps(position)}


@contextmanager
def prepared(size: str) -> Iterator[tuple[Config, Dataset, Path]]:
    """The demo on an embedded Ray, its data prepared, and a folder to write to, all for the block's time.

    `small` prepares generated pictures instead of the example's. What is prepared is kept in `runs/`.
    """
    storage = ROOT / "runs" / f"benchmark-{size}"
    source = ROOT / "examples" / "fluent-emoji"
    if size == "small":
        source = storage / "pictures"
        if not source.exists():
            storage.mkdir(parents=True, exist_ok=True)
            write_folder(source, SMALL_PICTURES, smooth)
    config = configured(source, storage)
    with tempfile.TemporaryDirectory(prefix="diffray-benchmark-") as name:
        folder = Path(name)
        with local_cluster(config.local) as cluster, joined(cluster.gcs_address):
            yield config, prepare(config), folder


def changed(config: Config, **train: Any) -> Config:
    """The configuration with other settings of training, checked again."""
    settings = config.model_dump()
    settings["train"] |= train
    return Config.model_validate(settings)
