"""Run a command as a Ray job, on an embedded local Ray or on a cluster, and follow it to its exit code.

    python -m cluster.submit -- python -m ray_jobs.pipeline --config configs/demo.yaml
    python -m cluster.submit --address http://head:8265 -- python -m ray_jobs.pipeline --config ...

A cluster's token is read from --token-file, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
In a terminal, Ctrl-C asks whether to stop the job; a second Ctrl-C, or one without a terminal, stops it.
`--no-wait` exits once the job is submitted. docs/cluster.md shows the same with plain `ray job submit`.
"""

import argparse
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cluster.capacity import check_resources, sized
from cluster.connect import one_line
from cluster.embedded import num_gpus
from cluster.local import local_cluster
from cluster.upload import runtime_environment, with_configuration
from cluster.variables import secret_modules
from ray_jobs.config import ConfigError, add_budget_arguments, home, load_config
from ray_jobs.console.commands import as_module, command_parser
from ray_jobs.console.troubleshooting import Help, help_link

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

NOT_FOUND_S = 60
"""Timeout while a cluster has no free agent for a job, in seconds."""

LOST_S = 300
"""Timeout while the cluster of a followed job is unreachable, in seconds."""

CONNECTION_LOST = 75
"""Exit code if the connection to the cluster was lost for good; the job may still be running."""


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code of the job; 2 for a configuration error, 75 if the connection was lost."""
    options, command = parsed(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(options, command)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        return 130


def _interrupt(*_: Any) -> NoReturn:
    """Treat SIGTERM like Ctrl-C, which stops the job."""
    raise KeyboardInterrupt


def parsed(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this command, and the command that the job runs."""
    parser = command_parser(__doc__)
    parser.add_argument("--address", help="Jobs API of a cluster, http://host:8265; default: embedded Ray")
    parser.add_argument("--token-file", help="file with the cluster's token, and nothing else")
    parser.add_argument("--no-wait", action="store_true", help="print the job's id and exit; needs --address")
    parser.add_argument(
        "--config",
        help="checked before anything starts; its `local` section sizes the embedded Ray; default: the "
        "command's own",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command that the job runs, after --")
    options = parser.parse_args(arguments)
    if "--" in options.command[1:] and options.command[0] != "--":
        parser.error(f"{options.command[0]}: no option of this command; settings of a stage stand behind --")
    command = as_module(options.command[1:] if options.command[:1] == ["--"] else options.command)
    if not command:
        parser.error("give a command after --, as in: -- python -m ray_jobs.pipeline --config FILE")
    if options.no_wait and not options.address:
        parser.error("--no-wait needs --address: the embedded Ray ends with this command")
    if modules_in(command):  # --config=FILE is written as two words, which a path on the cluster can replace
        command = [word for each in command for word in _words(each)]
    if options.config is None:
        after = command.index("--config") + 1 if "--config" in command else len(command)
        options.config = command[after] if after < len(command) else "configs/demo.yaml"
    return options, command


def _words(argument: str) -> list[str]:
    name, equals, value = argument.partition("=")
    return [name, value] if equals and name == "--config" else [argument]


def modules_in(command: list[str]) -> list[str]:
    """Return the modules of diffray that a command runs; empty if it is another program's."""
    return [each for each in command if each.startswith(("ray_jobs.", "serving."))]


def overrides_in(command: list[str]) -> list[str]:
    """Return the configuration overrides in a diffray command, so that they are checked before Ray starts."""
    if not modules_in(command):
        return []
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--set", action="append", dest="overrides", default=[])
    add_budget_arguments(parser)
    return list(parser.parse_known_args(command)[0].overrides)


def stage_in(command: list[str]) -> str:
    """Return the name of the stage that a command runs; empty if it runs none."""
    modules = (each.rpartition(".") for each in modules_in(command))
    return next(("serve" if package == "serving" else name for package, _, name in modules), "")


def _run(options: argparse.Namespace, command: list[str]) -> int:
    config = load_config(options.config, overrides_in(command))
    if options.token_file:
        use_token(options.token_file)
    if options.address:
        with _for_cluster(command, options.config) as (command, environment):
            return run_job(options.address, command, environment, wait=not options.no_wait)
    local = sized(config.local)
    check_resources(config, {"CPU": local.num_cpus, "GPU": num_gpus()}, stage_in(command))
    environment = runtime_environment(local_variables())
    print("starting Ray on this machine", flush=True)
    begun = time.monotonic()
    with local_cluster(local) as cluster:
        took = time.monotonic() - begun
        print(f"framework logs: {cluster.logs}; Ray started in {took:.0f} s", flush=True)
        return run_job(cluster.address, command, environment)


def start_job(address: str, command: list[str], config: str, name: str) -> str:
    """Submit `command` to a cluster, as this module's own command does with --no-wait; return the job's id.

    One of this name that has not ended is returned instead of a second one: whoever started it may have been
    killed before the id was written down.

    Args:
        config: the command's configuration, as the user named it.
        name: beginning of the id; jobs of a name are numbered.

    Raises:
        ConfigError: nothing answers at `address`, or the cluster rejects the token or the upload.
    """
    client, number = connected(address), 1
    while True:
        job = f"{name}-{number}"
        status = job_status(client, job)
        if status is None:
            with _for_cluster(command, config) as (words, environment):
                try:
                    return _submit(client, address, shlex.join(words), environment, job)
                except ConfigError as error:
                    if "already exists" not in str(error):  # submitted by another process since
                        raise
        elif status.is_terminal():
            number += 1
        else:
            return job


def job_status(client: "JobSubmissionClient", job: str) -> "JobStatus | None":
    """Return the status of a job; None if the cluster does not know it, as after a new start."""
    try:
        return client.get_job_status(job)
    except RuntimeError as error:
        if "status code 404" in str(error):
            return None
        raise


@contextmanager
def _for_cluster(command: list[str], config: str) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Yield a command as it finds its configuration on a cluster, and its runtime environment."""
    command, files = with_configuration(command, config)
    with secret_modules() as modules:
        yield command, runtime_environment(files=files) | ({"py_modules": modules} if modules else {})


def use_token(file: str) -> None:
    """Authenticate with the token in a file, in this process and its children.

    Raises:
        ConfigError: the file cannot be read, or is empty.
    """
    path = Path(file).expanduser()
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {file}: cannot be read: {one_line(error)}") from None
    if not token:
        raise ConfigError(f"--token-file {file}: empty; create a token with `ray get-auth-token --generate`")
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def local_variables() -> dict[str, str]:
    """Return the variables of a job on the embedded Ray.

    The job runs in Ray's copy of the code, but with this Python, in the user's own folders, and inherits all
    variables of this process.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {"DIFFRAY_HOME": str(home()), "PATH": path}


def run_job(address: str, command: list[str], runtime_env: dict[str, Any], *, wait: bool = True) -> int:
    """Submit `command`, print its output line by line, and return its exit code.

    KeyboardInterrupt stops the job and is raised again, unless the user at a terminal chooses otherwise.

    Args:
        wait: wait for the job; else print its id and return 0 at once.

    Raises:
        ConfigError: nothing answers at `address`, or the cluster rejects the token or the upload.
    """
    from cluster.follow import ConnectionLost, Follower

    client = connected(address)
    job = _submit(client, address, shlex.join(command), runtime_env)
    if not wait:
        print(f"job {job}; to follow it: ray job logs --follow --address {address} {job}", flush=True)
        return 0
    follower, again = Follower(client, job, LOST_S), f"ray job logs --follow --address {address} {job}"
    while True:
        try:
            return _exit_code(job, follower.follow())
        except ConnectionLost as error:
            print(
                f"error: --address {address}: {error}; the job may still be running; to follow it: {again}",
                file=sys.stderr,
            )
            return CONNECTION_LOST
        except KeyboardInterrupt:
            answer = _ask(job)
            if answer == "leave":
                print(f"the job is still running; to follow it: {again}", flush=True)
                return 130
            if answer == "stop":
                _stop(client, job)
                raise


def connected(address: str) -> "JobSubmissionClient":
    """Return Ray's client of a cluster's Jobs API.

    Raises:
        ConfigError: nothing answers at `address`, or the cluster rejects the token or has another Ray.
    """
    import ray
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they log a dozen lines about the upload
    try:
        client = JobSubmissionClient(address)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ConfigError(f"--address {address}: {one_line(error)}") from None
    there, here = client._server_ray_version, ray.__version__
    if there != here:
        raise ConfigError(
            f"--address {address}: the cluster runs Ray {there} and this machine has {here}; install "
            f"ray[default]=={there} here, or start the cluster with Ray {here}; {help_link(Help.VERSIONS)}"
        )
    return client


def _exit_code(job: str, info: "JobDetails") -> int:
    if info.status == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None:  # the job never ran, so its log is empty
        print(f"error: job {job}: {(info.message or info.status).splitlines()[0]}", file=sys.stderr)
    return info.driver_exit_code or 1


def _ask(job: str) -> str:
    """Ask the user what to do with a job after Ctrl-C: `stop`, `leave` or `follow`. Another Ctrl-C means
    `stop`, and so does an interrupt without a terminal."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return "stop"
    answers = {"s": "stop", "l": "leave", "f": "follow"}
    question = f"\njob {job} is running: [s]top it, [l]eave it running, keep [f]ollowing it? "
    try:
        while True:
            print(question, end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                return "stop"
            if answer := answers.get(line.strip().lower()[:1]):
                return answer
    except KeyboardInterrupt:
        return "stop"


def _stop(client: "JobSubmissionClient", job: str) -> None:
    from cluster.follow import UNREACHED

    print("stopping the job", file=sys.stderr, flush=True)
    try:
        client.stop_job(job)
        with suppress(KeyboardInterrupt):
            while not client.get_job_status(job).is_terminal():
                time.sleep(0.5)
    except UNREACHED as error:
        print(f"error: job {job} may still be running: {one_line(error)}", file=sys.stderr, flush=True)


def _submit(
    client: "JobSubmissionClient",
    address: str,
    entrypoint: str,
    runtime_env: dict[str, Any],
    job: str | None = None,
) -> str:
    """Submit a job and return its id; wait for a cluster that has just started and has no agent yet.

    Args:
        job: its id; None: Ray makes one.
    """
    from ray.exceptions import RayError

    deadline = time.monotonic() + NOT_FOUND_S
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env, submission_id=job)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise ConfigError(f"--address {address}: {one_line(error)}") from None
            time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
