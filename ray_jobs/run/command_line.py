"""Command line shared by all stages: configuration, connection, errors."""

import argparse
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from cluster.connect import connect
from cluster.lease import held
from cluster.watch import watched
from ray_jobs.config import Config, ConfigError, add_config_arguments, home, load_config
from ray_jobs.console import complain, quiet_logs, show
from ray_jobs.console.commands import command_parser
from ray_jobs.run.folder import RunFolder

FULL = ("No space left on device", "Disk quota exceeded", "QuotaExceeded")
"""Messages of an operating system or S3 store that is full; Ray's errors contain them as text."""

DENIED = ("Permission denied", "Read-only file system", "ACCESS_DENIED", "AccessDenied")
"""Their messages to a user without write permission."""


JOB_COPIES = "working_dir_files"
"""Folder of Ray in which each job on a cluster has its copy of the code; deleted once the job is done."""


def require_lasting(config: Config) -> None:
    """Raise ConfigError if the results would lie in a job's copy of the code, and be deleted with it."""
    storage = config.storage
    if "://" not in storage and JOB_COPIES in (home() / Path(storage).expanduser()).parts:
        raise ConfigError(
            f"storage: {storage}: this job runs in a copy of the code, which is deleted after it, and the "
            "results with it; give s3://..., gs://... or an absolute path on a disk that every node has"
        )


def refusal(config: Config, error: object) -> ConfigError | None:
    """Return a ConfigError for the user to fix if a store caused `error` by refusing something; else None."""
    lines = str(error).splitlines()
    for line in lines:
        if full := next((told for told in FULL if told in line), None):
            where = f"{config.storage}, or a node's temporary folder"
            fix = "free some space and run the same command again; it resumes"
            return ConfigError(f"storage: {where}: {full}: {fix}")
        if any(told in line for told in DENIED):
            said = " ".join(line.split())[:300]
            fix = "give the user of the run permission to read it and to write to storage"
            return ConfigError(f"storage ({config.storage}), data.source or model.base: {said}: {fix}")
    return None


def damage_message(error: object) -> str | None:
    """Return the message of the DamagedPart that caused an error, or None.

    An error from another process contains it only as text.
    """
    found = re.search("an encoded file is damaged: .* command again to encode it anew", str(error))
    return found and found.group()


def run_stage(
    description: str | None,
    stage: Callable[..., object],
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    name: str = "search",
    given: list[str] | None = None,
) -> None:
    """Parse the arguments, join or start Ray, run `stage`, exit.

    `stage` is called with the configuration, and also with the parsed arguments if it adds its own.

    `name` tells which actors the stage starts, for which the cluster must have room. `given` are the
    arguments; None: those of this process.

    At most one driver works on a run at a time. The exit code is 2, with one line, for an error that the user
    must fix; 1, with one line and the log's name, for a failure; 130 for an interrupt.
    """
    parser = command_parser(description)
    add_config_arguments(parser)
    if add_arguments:
        add_arguments(parser)
    arguments = parser.parse_args(given)
    try:
        config = load_config(arguments.config, arguments.overrides)
        require_lasting(config)
    except ConfigError as error:
        sys.exit(complain(error))
    log = quiet_logs()
    show(f"framework logs: {log} and Ray's session folder")
    try:
        with connect(config, name) as nodes, watched(config, nodes, name), held(RunFolder.of(config).root):
            stage(config, arguments) if add_arguments else stage(config)
    except ConfigError as error:
        sys.exit(complain(error))
    except KeyboardInterrupt:
        show("stopped")
        sys.exit(130)
    except Exception as error:
        if damage := damage_message(error):
            sys.exit(complain(ConfigError(f"storage: {damage}")))
        traceback.print_exc()
        if refused := refusal(config, error):
            sys.exit(complain(refused))
        last = " ".join(str(error).strip().splitlines()[-1:])
        show(f"error: {type(error).__name__}: {last[:500]} (full log: {log})")
        sys.exit(1)
