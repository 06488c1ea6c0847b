"""A run that was started: what it does, what it has made, and what is done with it."""

import io
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from diffray.endpoints import Endpoint, Pictures
from diffray.jobs import Job, JobFailed, Status, names
from diffray.notebook import Live, is_notebook
from diffray.settings import config_of, overrides
from ray_jobs.config import Config, ConfigError

if TYPE_CHECKING:
    from ray_jobs.run.folder import RunFolder
    from ray_jobs.run.records import RungRow, Winner
    from ray_jobs.run.series import LossReader

SHOWN = 8  # pictures that a notebook shows of a run
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


class Run:
    """A run that was started from this folder, found by its name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.job = Job(name)
        self._losses: LossReader | None = None
        self._frame: tuple[object, str] = (None, "")  # what the curves and pictures were drawn of

    @property
    def config(self) -> Config:
        """Its configuration."""
        return config_of(self.job.started.arguments)

    @property
    def folder(self) -> "RunFolder":
        """Its folder, with all that it writes."""
        from ray_jobs.run.folder import RunFolder

        return RunFolder.of(self.config)

    @property
    def status(self) -> Status:
        """running, finished, failed or stopped."""
        return self.job.status

    def wait(self) -> "Run":
        """Wait until the run ends; an interrupt ends the waiting, not the run.

        A notebook shows its state, score, loss and pictures meanwhile, elsewhere its lines are printed.

        Raises:
            JobFailed: the run failed or was stopped; with its last line.
        """
        live = Live(self.shown) if is_notebook() else None
        for text in self.job.follow():
            if live:
                live.update()
            else:
                print(text, end="", flush=True)
        if live:
            live.update()
        if self.status != "finished":
            raise JobFailed(f"{self.name}: {self.status}: {self.job.last_line()}")
        return self

    @property
    def scores(self) -> "list[RungRow]":
        """Every measured rung until now, in the order of measuring."""
        from ray_jobs.run.records import read_rows

        return read_rows(self.folder.search)

    @property
    def winner(self) -> "Winner | None":
        """The published model and its scores; None until it is published."""
        from ray_jobs.run.records import WINNER, Winner

        root = self.folder.root
        return Winner.read(root) if root.exists(WINNER) else None

    def pictures(self) -> Pictures:
        """Return the pictures that the best rung until now drew of held-out captions; empty before the first.

        They are the winner's once there is one.
        """
        from PIL import Image

        from cluster.storage import Storage
        from diffray.progress import best_rung
        from ray_jobs.run.samples import SAMPLES

        rows = self.scores
        checkpoint = best_rung(self.config, rows, self.winner).checkpoint if rows else ""
        if not checkpoint:
            return Pictures()
        folder = Storage.open(checkpoint).child(SAMPLES)
        names = sorted(folder.files(), key=lambda name: int(name.partition("-")[0]))
        return Pictures(Image.open(io.BytesIO(folder.read_bytes(name)), formats=["PNG"]) for name in names)

    def report(self) -> str:
        """Return the path or address of the report, one HTML page.

        Raises:
            ConfigError: it is not written yet.
        """
        from ray_jobs.run.folder import REPORT

        root = self.folder.root
        if not root.exists(REPORT):
            raise ConfigError(f"{self.name}: no report yet; the run is {self.status}")
        return f"{root.uri}/{REPORT}"

    def promote(self) -> None:
        """Make the run's version the champion, which is served, whatever its scores.

        Raises:
            ConfigError: nothing is published yet.
        """
        from ray_jobs.registry.aliases import promote

        if not (version := self.winner and self.winner.registry_version):
            raise ConfigError(f"{self.name}: nothing published yet; the run is {self.status}")
        promote(self.config, version)

    def stop(self) -> None:
        """Stop the run; the same `fit` resumes it."""
        self.job.stop()

    def require_unneeded(self) -> None:
        """Raise ConfigError if a file in its folder is another run's, or a version's, adapter or base.

        Also if the registry that would know of versions cannot be reached.
        """
        from ray_jobs.retention.inventory import needed_by

        others = []
        for name in names():
            with suppress(ConfigError):  # one that cannot be read cannot be resumed either
                others += [Run(name).config] if name != self.name else []
        if needs := needed_by(self.config, others):
            folder = self.folder.root.uri
            raise ConfigError(f"{self.name}: {needs} needs a file in {folder}; delete that first")

    def delete(self) -> None:
        """Stop the run and its endpoint, and delete its folder and record; registered versions stay.

        Raises:
            ConfigError: as `require_unneeded`. Nothing is stopped then.
        """
        self.require_unneeded()
        for job in (self._endpoint, self.job):
            if job.record:
                job.stop()
        self.folder.root.delete("")
        self.job.forget()

    @property
    def _endpoint(self) -> Job:
        return Job(f"{self.name}/endpoint")

    @property
    def endpoint(self) -> "Endpoint | None":
        """The endpoint that `deploy` started, if it is running."""
        job = self._endpoint
        return Endpoint(job) if job.record and job.status == "running" else None

    def deploy(self, **fields: Any) -> "Endpoint":
        """Serve the champion of the run's model in the background, as `diffray serve` does, and wait until it
        answers. One that is running already is returned.

        Args:
            fields: settings, as for `fit`; most are of `serve`.

        Raises:
            ConfigError: a setting is wrong, nothing is published, the port is in use, or the endpoint of a
                cluster would be reached from its own machine only.
            EndpointError: it does not start; with its last line.
        """
        from ray_jobs.registry.models import NothingPublished, champion
        from serving.command import free_port

        if endpoint := self.endpoint:
            return endpoint
        record = self.job.started
        arguments = list(record.arguments)
        for override in overrides(fields):
            arguments += ["--set", override]
        config = config_of(arguments)
        if not record.address:
            arguments += ["--set", f"serve.port={free_port(config.serve.host, config.serve.port)}"]
        elif config.serve.host in LOCAL_HOSTS or not config.serve.port:
            raise ConfigError(
                f"serve.host, serve.port: {config.serve.host}:{config.serve.port} is not reached from outside"
                f' the cluster; in Python: diffray.run("{self.name}").deploy(serve={{"host": "0.0.0.0", '
                '"port": 8000, "allow_anonymous": False, "keys": FILE}), with a FILE that each node reads; '
                "`diffray keys` makes it"
            )
        own = self.winner and self.winner.registry_version
        try:
            served = champion(config).version
        except NothingPublished:
            if own is None:
                raise
            raise ConfigError(
                f"{self.name}: its version {own} stayed a candidate, and there is no champion to be served; "
                "run.promote() makes it the champion"
            ) from None
        if served != own:
            print(
                f"the champion of {config.publish.model_name} is version {served}, and is served; this run's "
                f"is {own}: run.promote() makes it the champion"
            )
        job = self._endpoint
        job.start("serving.command", arguments, record.address, submit=False)
        endpoint = Endpoint(job)
        endpoint.wait_until_ready()
        return endpoint

    def shown(self) -> tuple[str, str]:
        """Return the run as HTML: its state, score and cost; and its curves, pictures and rungs."""
        from diffray.shown import run_facts, run_frame, run_state
        from ray_jobs.run.series import LossReader
        from ray_jobs.run.signs import signs_of

        status, line = self.status, self.job.last_line()
        try:
            config, rows, winner = self.config, self.scores, self.winner
            self._losses = self._losses or LossReader(self.folder.trainings)
            losses = self._losses.read()
            drawn = (len(rows), self._losses.files, winner is None)
            if self._frame[0] != drawn:
                self._frame = drawn, run_frame(self.name, rows, losses, self.pictures()[:SHOWN])
        except (ConfigError, OSError) as error:  # as of a cluster's storage that this machine does not reach
            return run_state(self.name, status, f"{line}\n{error}", ""), self._frame[1]
        signs = signs_of(rows, config.evaluate.precision, ended=status != "running")
        return run_state(self.name, status, line, run_facts(config, rows, winner), signs), self._frame[1]

    def _repr_html_(self) -> str:
        return "".join(self.shown())

    def __repr__(self) -> str:
        return f"<Run {self.name}: {self.status}>"
