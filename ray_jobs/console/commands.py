"""The commands that a person runs, as `diffray NAME` or `python -m MODULE`, and the parser of each."""

import argparse
import re
import sys
from pathlib import Path
from textwrap import dedent

PROGRAM = "diffray"

COMMANDS = {
    "pipeline": "ray_jobs.pipeline",
    "prepare": "ray_jobs.prepare",
    "train": "ray_jobs.train",
    "search": "ray_jobs.search",
    "evaluate": "ray_jobs.evaluate",
    "publish": "ray_jobs.publish",
    "compare": "ray_jobs.compare",
    "versions": "ray_jobs.versions",
    "ui": "diffray.ui.command",
    "config": "diffray.configuration",
    "plan": "cluster.plan",
    "checks": "ray_jobs.checks",
    "captions": "ray_jobs.captions",
    "pretrain": "ray_jobs.pretrain",
    "submit": "cluster.submit",
    "serve": "serving.command",
    "rollout": "serving.rollout",
    "keys": "serving.keys",
    "import": "ray_jobs.import_weights",
    "export": "ray_jobs.export_weights",
    "feedback": "serving.export",
    "study": "diffray.study",
    "update": "diffray.update",
    "networks": "ray_jobs.weights.fetch",
    "comfyui": "ray_jobs.weights.comfyui",
    "clean": "diffray.clean",
    "completion": "diffray.completion",
}
"""Modules by the name of their command; `main` of each takes the arguments and returns an exit code."""

_IN_TEXT = re.compile(r"python -m ([\w.]+)")


def as_module(command: list[str]) -> list[str]:
    """Return a command line with `python -m MODULE` in place of `diffray NAME`; any other unchanged."""
    if command[:1] == [PROGRAM] and len(command) > 1 and command[1] in COMMANDS:
        return ["python", "-m", COMMANDS[command[1]], *command[2:]]
    return command


def command_parser(text: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help ends with the examples of a module.

    Args:
        text: the module's docstring. Its indented paragraphs are the examples; the first names the module.
    """
    paragraphs = dedent(text or "").strip("\n").split("\n\n")
    examples = [each for each in paragraphs if each.startswith("    ")]
    named = _IN_TEXT.search("\n".join(examples))
    assert named, "the docstring of a command gives an example"
    description = "\n\n".join(each for each in paragraphs if each not in examples)
    return argparse.ArgumentParser(
        prog=_as_invoked(named[0]),
        description=_as_invoked(description),
        epilog=_as_invoked("\n".join(["examples:", *examples])),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _as_invoked(text: str) -> str:
    """Return a text that names commands by `python -m`, as the user invoked this one."""
    if not _is_command():
        return text
    names = {module: f"{PROGRAM} {name}" for name, module in COMMANDS.items()}
    return _IN_TEXT.sub(lambda found: names.get(found[1], found[0]), text)


def _is_command() -> bool:
    """Return whether this process is `diffray` or `python -m diffray`."""
    program = Path(sys.argv[0])
    return PROGRAM in (program.name, program.parent.name if program.name == "__main__.py" else "")
