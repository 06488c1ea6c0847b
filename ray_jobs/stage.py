"""The command line that every stage shares: configuration, connection, errors."""

import argparse
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.connect import connect
from ray_jobs.config import ConfigError, add_config_arguments, load_config

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def quiet_logs() -> Path:
    """Send this process's framework logs and warnings to a file, so that the terminal shows progress.

    The file descriptor of stderr is turned too, since native code writes there.
    """
    descriptor, name = tempfile.mkstemp(prefix="diffray-", suffix=".log")
    sys.stderr.flush()
    os.dup2(descriptor, 2)
    os.close(descriptor)
    logging.basicConfig(filename=name, level=logging.INFO, format=LOG_FORMAT)
    logging.captureWarnings(True)
    return Path(name)


def run_stage(
    description: str | None,
    stage: Callable[..., Any],
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:
    """Parse the arguments, join or start Ray, run `stage`, exit.

    `stage` is called with the configuration, and with the parsed arguments where it adds its own.

    Exit code 2 and one line for what the user must mend; 1, one line and the log's name for a failure.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    if add_arguments:
        add_arguments(parser)
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
    except ConfigError as error:
        sys.exit(_complain(error))
    log = quiet_logs()
    print(f"framework logs: {log} and Ray's session folder", flush=True)
    try:
        with connect(config):
            stage(config, arguments) if add_arguments else stage(config)
    except ConfigError as error:
        sys.exit(_complain(error))
    except Exception as error:
        traceback.print_exc()
        last = " ".join(str(error).strip().splitlines()[-1:])
        print(f"error: {type(error).__name__}: {last[:500]} (the whole story: {log})", flush=True)
        sys.exit(1)


def _complain(error: ConfigError) -> int:
    print(f"error: {error}", flush=True)
    return 2
