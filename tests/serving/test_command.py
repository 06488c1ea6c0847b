"""What the serve command checks before Ray starts."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_jobs.config import Config
from serving.command import free_port, held_port, main


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_in_use_stops_with_one_line_and_code_2(
    config: Config,
    registered: object,
    taken_port: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert main(["--config", str(file), "--set", f"serve.port={taken_port}"]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"error: serve.port: {taken_port} is in use")
    assert "--set serve.port=" in line


def test_asking_takes_a_free_port_instead(taken_port: int) -> None:
    port = free_port("127.0.0.1", taken_port, else_any=True)
    assert port not in (0, taken_port)


HOLDING = """
import sys
from serving.command import held_port
with held_port("127.0.0.1", int(sys.argv[1])) as port:
    print(port, flush=True)
    sys.stdin.read()
"""


def test_of_two_commands_that_start_at_once_the_second_is_refused(
    config: Config, registered: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing listens yet; later both would, and Linux would give each a part of the requests."""
    command = [sys.executable, "-c", HOLDING, "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout and first.stdin
        port = int(first.stdout.readline())
        file = tmp_path / "config.yaml"
        file.write_text(config.to_yaml())
        assert main(["--config", str(file), "--set", f"serve.port={port}"]) == 2
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"error: serve.port: {port} is being taken by another command")
        with held_port("127.0.0.1", port, else_any=True) as other:
            assert other not in (0, port)
        first.stdin.close()
        assert first.wait() == 0
    with held_port("127.0.0.1", port) as again:
        assert again == port


def test_nothing_published_yet_stops_with_the_command_to_run(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert main(["--config", str(file), "--set", f"storage={tmp_path}/empty"]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert "run the pipeline first" in line
