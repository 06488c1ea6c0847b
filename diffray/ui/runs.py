"""Runs of this folder as the page shows them, read from the records that the API reads.

What has not changed since is read once: hundreds of runs are listed in milliseconds.
"""

import io
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel

from cluster.storage import Storage
from diffray import jobs
from diffray.jobs import JOB, Job
from diffray.progress import best_rung, spent
from diffray.runs import Run
from diffray.shown import charts
from diffray.ui import queue
from diffray.ui.clusters import ENDED, ClusterStates, State
from diffray.ui.pairs import Given, Row, held_out_rows
from ray_jobs.config import Config, ConfigError
from ray_jobs.report.charts import trials_of
from ray_jobs.report.svg import number
from ray_jobs.report.tables import rungs_table
from ray_jobs.run.folder import REPORT, RunFolder
from ray_jobs.run.records import RESULTS, WINNER, RungRow, Winner, read_rows
from ray_jobs.run.samples import PROMPTS, SAMPLES
from ray_jobs.run.series import Losses, LossReader
from ray_jobs.run.signs import signs_of

LOG = 16_384  # bytes of a run's output that the page shows
THUMBNAIL = 256  # longer side of a small picture, in pixels
PICTURES = (SAMPLES, PROMPTS)


class Summary(BaseModel):
    """A run in the list.

    Attributes:
        place: place among those that wait, from 1.
        started: when it was started, or asked for while it waits, in seconds since 1970.
        ended: when it ended, if that is known.
        line: the last line that it printed, or why it is not read.
        measure: name of the score that ranks.
        best: the score of the winner or, before there is one, the lowest, as the page shows it; empty before
            the first rung.
        step: step of that rung.
        rungs: number of measured rungs.
        hours: hours of workers up to the last rung of each training.
        cost: their price; None without `search.device_hour_price`.
    """

    name: str
    state: State
    place: int = 0
    started: float
    ended: float | None = None
    address: str | None = None
    line: str = ""
    base: str = ""
    method: str = ""
    measure: str = ""
    best: str = ""
    step: int = 0
    rungs: int = 0
    hours: float = 0.0
    cost: float | None = None
    published: int | None = None


class Detail(Summary):
    """A run in full.

    Attributes:
        stamp: changes with the rungs and the losses.
        charts, numbers: score and loss over the steps, and all rungs in a table, as HTML; empty if the page
            has them already.
        trials: name and label of every trial, the one with the best rung first.
        winner: step of the winner, a rung of the first of the trials.
        log: the end of what it printed.
        signs: what may be wrong with a training.
        report: whether there is a report.
        configuration: as YAML.
    """

    stamp: str
    charts: str = ""
    numbers: str = ""
    trials: list[tuple[str, str]] = []
    winner: int | None = None
    log: str = ""
    signs: list[str] = []
    report: bool = False
    configuration: str = ""


class Rung(BaseModel):
    """Pictures of a rung: names of files by kind, one of `PICTURES`."""

    step: int
    score: str
    files: dict[str, list[str]]


@dataclass
class _Read:
    """Content of a run's files, each with the stamp that it had."""

    record: tuple[int, int] = (0, 0)
    config: Config | None = None
    problem: str = ""
    results: tuple[int, int] = (0, 0)
    rows: list[RungRow] = field(default_factory=list)
    winner: Winner | None = None
    losses: LossReader | None = None
    pairs: Sequence[Row] = ()
    whole: bool = False  # read after the run had ended


class Runs:
    """Reader of all runs, safe for threads."""

    def __init__(self) -> None:
        self._read: dict[str, _Read] = {}
        self._lock, self._listing = threading.Lock(), threading.Lock()
        self._clusters = ClusterStates()

    def all(self) -> list[Summary]:
        """Return all runs, the newest first."""
        waiting = queue.waiting()
        # A second page waits for what the first one reads, instead of reading it too.
        with self._listing, ThreadPoolExecutor(4) as pool:
            started = list(pool.map(self._summary, [name for name in jobs.names() if name not in waiting]))
        found = [each[0] for each in started if each] + [
            run for name in waiting if (run := waiting_run(name))
        ]
        return sorted(found, key=lambda run: run.started, reverse=True)

    def _summary(self, name: str) -> tuple[Summary, _Read] | None:
        """Return a run that was started, and its files; None if it was deleted meanwhile.

        One that cannot be read is told among the others.
        """
        file = Job(name).folder / JOB
        try:
            return self._looked(Run(name), file)
        except (ConfigError, OSError) as error:
            with suppress(FileNotFoundError):
                line, started = str(error), file.stat().st_mtime
                return Summary(name=name, state="unreached", started=started, line=line), _Read()
            return None

    def _looked(self, run: Run, file: Path) -> tuple[Summary, _Read] | None:
        if (record := run.job.record) is None:
            return None
        state, note = self._clusters.state(run.job, record) if record.address else (run.status, "")
        read = self._files(run, ended=state in ENDED)
        ended = None
        if state != "running":
            with suppress(FileNotFoundError):
                ended = (run.job.folder / "exit").stat().st_mtime
        found = Summary(
            name=run.name,
            state=state,
            started=file.stat().st_mtime,
            ended=ended,
            address=record.address,
            line=note or read.problem or ("" if record.address else run.job.last_line()),
        )
        return (found if read.config is None else found.model_copy(update=_scores(read.config, read))), read

    def detail(self, name: str, seen: str) -> Detail | None:
        """Return a run that was started; None if there is none of that name.

        Args:
            seen: stamp of the charts that the page has.
        """
        if (both := self._summary(name)) is None:
            return None
        run, (summary, read) = Run(name), both
        found = Detail(**summary.model_dump(), stamp="")
        if summary.state != "unreached":
            found.log = run.job.log(LOG)
        if read.config is None:
            return found
        found.configuration = read.config.to_yaml()
        found.report = RunFolder.of(read.config).root.exists(REPORT)
        read.losses = read.losses or LossReader(RunFolder.of(read.config).trainings)
        losses: Losses = {}
        try:
            losses = read.losses.read()
        except OSError as error:
            found.line = str(error)
        found.stamp = f"{read.results[0]:x}-{read.results[1]:x}-{read.losses.files}"
        if (read.rows or losses) and seen != found.stamp:
            found.charts = charts(read.rows, losses)
        ended = summary.state in ENDED
        found.signs = signs_of(read.rows, read.config.evaluate.precision, ended=ended)
        if read.rows:
            best = best_rung(read.config, read.rows, read.winner).trial_id
            found.winner = read.winner.step if read.winner else None
            trials = [(trial, label) for label, trial, _ in trials_of(read.rows)]
            found.trials = sorted(trials, key=lambda each: each[0] != best)
            if found.charts:
                found.numbers = rungs_table(read.rows)
        return found

    def speed(self, config: Config) -> float | None:
        """Return the images per second of one trial in the newest run like this one; None without such a run.

        A run is like it with the same base, method, resolution and number of workers.
        """
        for name in (run.name for run in self.all() if run.rungs):
            read = self._files(Run(name), ended=True)
            if read.config and _work(read.config) == _work(config):
                speeds = [row.images_per_second for row in read.rows if row.images_per_second > 0]
                if speeds:
                    return median(speeds)
        return None

    def rungs(self, name: str, trial: str) -> list[Rung]:
        """Return the pictures that a trial drew at each rung."""
        return [
            Rung(
                step=row.step,
                score=number(row.score, row.measure.digits),
                files={kind: Storage.open(row.checkpoint).child(kind).files() for kind in PICTURES},
            )
            for row in self._rows(name, trial)
        ]

    def picture(self, name: str, trial: str, step: int, kind: str, file: str, *, small: bool) -> bytes | None:
        """Return a picture of a rung as PNG, or reduced to `THUMBNAIL` as JPEG; None if there is none."""
        row = next((each for each in self._rows(name, trial) if each.step == step), None)
        if row is None or kind not in PICTURES or "/" in file or not file.endswith(".png"):
            return None
        try:
            content = Storage.open(row.checkpoint).child(kind).read_bytes(file)
            return _reduced(content) if small else content
        except (FileNotFoundError, UnidentifiedImageError):
            return None

    def given(self, name: str) -> Given:
        """Return how many pictures there are of what the edits at each rung begin with."""
        rows = self._pairs(name)
        return Given(rows=len(rows), references=len(rows[0].references)) if rows else Given()

    def given_picture(self, name: str, number: int, which: str, *, small: bool) -> bytes | None:
        """Return a picture of a held-out row, as `picture` does.

        Args:
            number: the row's, with which the names of its edits begin.
            which: see `Row.picture`.
        """
        rows = self._pairs(name)
        content = rows[number].picture(which) if 0 <= number < len(rows) else None
        return _reduced(content) if content and small else content

    def _pairs(self, name: str) -> Sequence[Row]:
        read = self._files(Run(name), ended=False)
        if not read.pairs and read.config is not None:
            read.pairs = held_out_rows(read.config)
        return read.pairs

    def _rows(self, name: str, trial: str) -> Sequence[RungRow]:
        """Return the rungs of a trial in the order of steps."""
        trials = trials_of(self._files(Run(name), ended=False).rows)
        return next((rungs for _, own, rungs in trials if own == trial), [])

    def _files(self, run: Run, *, ended: bool) -> _Read:
        """Return a run's files, and read those that have changed.

        Args:
            ended: the run writes nothing more, so that what was read from object storage is not looked at.
        """
        file = (run.job.folder / JOB).stat()
        with self._lock:
            former = self._read.get(run.name, _Read())
        read = former if former.record == (stamp := (file.st_mtime_ns, file.st_size)) else _Read(stamp)
        try:
            read.config = read.config or run.config
            folder = RunFolder.of(read.config)
            if not (read.whole and ended) or folder.root.is_local:
                _read_results(folder, read)
            read.whole, read.problem = ended, ""
        except (ConfigError, OSError) as error:
            read.problem = str(error)
        with self._lock:
            self._read[run.name] = read
        return read

    def forget(self, name: str) -> None:
        """Read a run anew, since it was deleted or begun again."""
        with self._lock:
            self._read.pop(name, None)


def _reduced(png: bytes) -> bytes:
    """Return a PNG reduced to `THUMBNAIL`, as JPEG."""
    picture, buffer = Image.open(io.BytesIO(png), formats=["PNG"]).convert("RGB"), io.BytesIO()
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _work(config: Config) -> tuple[object, ...]:
    """Return what the speed of a training follows from, apart from the machine."""
    train = config.train
    return config.model.base, train.method, train.use_gpu, train.min_workers, config.data.resolution


def _read_results(folder: RunFolder, read: _Read) -> None:
    search = folder.search
    file = search.filesystem.get_file_info(f"{search.path}/{RESULTS}")
    stamp = (file.mtime_ns or 0, file.size or 0)
    if stamp != read.results:
        read.rows, read.results = (read_rows(search) if file.is_file else []), stamp
    if read.winner is None and folder.root.exists(WINNER):
        read.winner = Winner.read(folder.root)


def _scores(config: Config, read: _Read) -> dict[str, object]:
    """Return the fields of a `Summary` that come from the run's configuration and rungs."""
    found: dict[str, object] = {"base": config.model.base, "method": config.train.method}
    found |= {"rungs": len(read.rows), "published": read.winner and read.winner.registry_version}
    if read.rows:
        best, (hours, cost) = best_rung(config, read.rows, read.winner), spent(config, read.rows)
        found |= {"measure": best.measure.name, "best": number(best.score, best.measure.digits)}
        found |= {"step": best.step, "hours": hours, "cost": cost}
    return found


def waiting_run(name: str) -> Summary | None:
    """Return a run that waits; None if none of that name does."""
    places = {each: place for place, each in enumerate(queue.waiting(), 1)}
    if (asked := queue.read(name)) is None or name not in places:
        return None
    state: State = "failed" if asked.problem else "waiting"
    return Summary(name=name, state=state, place=places[name], started=asked.asked, line=asked.problem)
