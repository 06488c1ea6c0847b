"""A PostgreSQL server of this machine with an empty database."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil


def programs() -> Path | None:
    """Return the folder of PostgreSQL's programs on the PATH, else of Debian's newest version, else None."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    versions = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((path.parent for path in versions), key=lambda folder: int(folder.parent.name), default=None)


@contextmanager
def postgresql_server(programs: Path) -> Iterator[str]:
    """Run a server while the block does, and yield its database's URL."""
    with PostgreSQL.made(programs) as server:
        yield server.url


class PostgreSQL:
    """A server that can be killed and started again.

    It listens on a socket in a folder of its own, so no port can be taken, and ends with this process.
    PostgreSQL refuses to run as root; there it runs as `nobody`.

    Args:
        programs: folder of PostgreSQL's programs.
        folder: holds the data.
    """

    def __init__(self, programs: Path, folder: str) -> None:
        self.url = f"postgresql+psycopg://diffray@/postgres?host={folder}"
        self._programs, self._folder = programs, folder
        self._own = ["setpriv", "--pdeathsig", "INT"]
        if os.geteuid() == 0:
            shutil.chown(folder, "nobody")
            self._own += ["--reuid", "nobody", "--clear-groups"]
        made = f"--pgdata {folder}/data --username diffray --auth trust --encoding UTF8 --no-sync".split()
        command = [*self._own, str(programs / "initdb"), *made]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        self.process: subprocess.Popen[bytes] | None = None

    @classmethod
    @contextmanager
    def made(cls, programs: Path) -> Iterator["PostgreSQL"]:
        """Run a server while the block does, unless it is killed there."""
        with tempfile.TemporaryDirectory(prefix="postgresql-") as folder:
            server = cls(programs, folder)
            server.start()
            try:
                yield server
            finally:
                if server.process is not None:
                    server.process.send_signal(signal.SIGINT)  # as `pg_ctl stop -m fast`
                    server.process.wait()

    def start(self) -> None:
        """Start the server, also after it was killed."""
        settings = {"listen_addresses": "", "unix_socket_directories": self._folder, "fsync": "off"}
        data, log = Path(self._folder, "data"), Path(self._folder, "log")
        command = [*self._own, str(self._programs / "postgres"), "-D", str(data)]
        command += [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        state = data / "postmaster.pid"
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, stderr=file, cwd=self._folder)
        while not (state.exists() and "ready" in state.read_text()):
            assert self.process.poll() is None, log.read_text()
            time.sleep(0.02)

    def kill(self) -> None:
        """End the server and all its processes, as a power loss does."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        for each in children:
            with suppress(psutil.NoSuchProcess):  # some end with their parent
                each.kill()
        self.process = None
        Path(self._folder, "data", "postmaster.pid").unlink()
