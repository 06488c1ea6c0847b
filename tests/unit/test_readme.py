"""The README's commands are the ones that CI runs, and all of them exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def commands(text: str) -> set[str]:
    """The `make` targets that lines of `text` begin with, comments and prompts left out."""
    return set(re.findall(r"^(?:\$ )?make ([a-z-]+)", text, flags=re.MULTILINE))


def code_blocks(markdown: str) -> str:
    fenced: list[str] = re.findall(r"^```\w*\n(.*?)^```", markdown, flags=re.DOTALL | re.MULTILINE)
    return "\n".join(fenced)


README = commands(code_blocks((ROOT / "README.md").read_text(encoding="utf-8")))
CI = commands((ROOT / ".ci" / "run").read_text(encoding="utf-8"))
MAKEFILE = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_ci_runs_commands_of_the_readme() -> None:
    assert {"lint", "test"} == CI
    assert CI <= README


def test_the_readme_names_the_demo() -> None:
    assert "demo" in README


def test_every_make_command_of_the_readme_exists() -> None:
    assert README <= MAKEFILE


def test_set_up_and_ci_take_the_same_path() -> None:
    """A fresh machine needs no other command first: each target sets up what it needs."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in CI | {"demo"}:
        assert re.search(rf"^{target}: setup", makefile, re.MULTILINE), target
