"""Write diffray/options.json: what can follow each command, read from the commands' own parsers.

    python -m scripts.command_options

Completion reads the file, since the parsers themselves come with imports of PyTorch and Ray.
"""

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

from ray_jobs.console.commands import COMMANDS

FILE = Path(__file__).parents[1] / "diffray" / "options.json"


class _Found(BaseException):
    """Carries the parser of a command past whatever handles its errors."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(name: str) -> argparse.ArgumentParser:
    """Return the parser that a command's `main` makes; imports its module, and runs nothing of it."""

    def stop(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        raise _Found(parser)

    with patch.object(argparse.ArgumentParser, "parse_known_args", stop):
        try:
            import_module(COMMANDS[name]).main([])
        except _Found as found:
            return found.parser
    raise AssertionError(f"{name} parses no arguments")


def options() -> dict[str, list[str]]:
    """Return the words that can follow a command, as `keys` or `keys add`: options, subcommands, choices."""
    found: dict[str, list[str]] = {}
    for name in COMMANDS:
        _collect(name, parser_of(name), found)
    return found


def _collect(name: str, parser: argparse.ArgumentParser, found: dict[str, list[str]]) -> None:
    words: list[str] = []
    found[name] = words
    for action in parser._actions:
        words += [option for option in action.option_strings if option.startswith("--")]
        if not action.option_strings and action.choices:
            words += map(str, action.choices)
        if isinstance(action, argparse._SubParsersAction):
            for below, inner in action.choices.items():
                _collect(f"{name} {below}", inner, found)


def text() -> str:
    """Return the file's content, one command per line."""
    lines = [f"  {json.dumps(name)}: {json.dumps(words)}" for name, words in options().items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
