"""The command `diffray`: one subcommand for each module that a person runs.

    diffray pipeline --config configs/demo.yaml

A subcommand takes the arguments of its module and passes them on as they are, so `diffray train ...` and
`python -m ray_jobs.train ...` are the same. A module is imported only when it is run: the list of all takes
neither PyTorch nor Ray.
"""

import ast
import sys
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from ray_jobs.console import columns
from ray_jobs.console.commands import COMMANDS, PROGRAM
from ray_jobs.console.troubleshooting import Help, help_link

FOOT = f"""
{PROGRAM} COMMAND --help tells more, with examples. Each command is also a module: python -m MODULE.
What an error means, and what a run warns of: {help_link(Help.REFUSALS)}

examples:
    {PROGRAM} pipeline --config configs/demo.yaml
    {PROGRAM} config explain train.lora.rank
    {PROGRAM} completion bash"""


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand, and return its exit code; 2 if there is none of that name."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        fix = f"did you mean {near[0]}?" if near else f"{PROGRAM} --help lists them"
        print(f"error: {PROGRAM}: no command {name}; {fix}", file=sys.stderr)
        return 2
    return import_module(COMMANDS[name]).main(rest) or 0


def overview() -> str:
    """Return the help of the command: every subcommand with its module's first sentence."""
    rows = [(f"  {name}", summary(module)) for name, module in COMMANDS.items()]
    head = [f"usage: {PROGRAM} COMMAND [arguments]", "", "commands:"]
    return "\n".join([*head, *columns(rows), FOOT])


def summary(module: str) -> str:
    """Return the first paragraph of a module's docstring on one line, without importing the module."""
    spec = find_spec(module)
    assert spec and spec.origin, module
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    return " ".join((text or "").split("\n\n")[0].split())
