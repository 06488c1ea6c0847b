"""A PostgreSQL server of this machine with an empty database."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def programs() -> Path | None:
    """Return the folder of PostgreSQL's programs on the PATH, else of Debian's newest version, else None."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    versions = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((path.parent for path in versions), key=lambda folder: int(folder.parent.name), default=None)


@contextmanager
def postgresql_server(programs: Path) -> Iterator[str]:
    """Run a server while the block does, and yield its database's URL.

    It listens on a socket in a folder of its own, so no port can be taken, and ends with this process.
    PostgreSQL refuses to run as root; there it runs as `nobody`.
    """
    with tempfile.TemporaryDirectory(prefix="postgresql-") as folder:
        own = ["setpriv", "--pdeathsig", "INT"]
        if os.geteuid() == 0:
            shutil.chown(folder, "nobody")
            own += ["--reuid", "nobody", "--clear-groups"]
        data = f"{folder}/data"
        made = f"--pgdata {data} --username diffray --auth trust --encoding UTF8 --no-sync".split()
        subprocess.run([*own, programs / "initdb", *made], check=True, capture_output=True, cwd=folder)
        settings = {"listen_addresses": "", "unix_socket_directories": folder, "fsync": "off"}
        command = [*own, str(programs / "postgres"), "-D", data]
        command += [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        log, state = Path(folder, "log"), Path(data, "postmaster.pid")
        with log.open("wb") as file, subprocess.Popen(command, stderr=file, cwd=folder) as server:
            try:
                while not (state.exists() and "ready" in state.read_text()):
                    assert server.poll() is None, log.read_text()
                    time.sleep(0.02)
                yield f"postgresql+psycopg://diffray@/postgres?host={folder}"
            finally:
                server.send_signal(signal.SIGINT)  # as `pg_ctl stop -m fast`
