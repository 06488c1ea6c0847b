"""A command that Ctrl-C ends, also where the tests run in the background of a shell, whose children ignore
it.

By a program in front of it and not by `preexec_fn`, for which Python forks the process of the tests: threads
of Ray's that hold a lock then hold it for ever.
"""

import sys

HEED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


def interruptible(command: list[str]) -> list[str]:
    """The command, its program with its path, and SIGINT as it is by default."""
    return [sys.executable, "-c", HEED, *command]
