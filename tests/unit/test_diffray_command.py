"""The command `diffray`: one subcommand for each module that a person runs, with that module's own parser."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from cluster.submit import parsed
from diffray import command
from ray_jobs.config import load_config
from ray_jobs.console.commands import COMMANDS, as_module
from scripts.command_options import FILE, parser_of, text

ROOT = Path(__file__).parents[2]


def diffray(*arguments: str, folder: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "diffray", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_list_of_commands_needs_neither_torch_nor_ray() -> None:
    program = """
import sys
from diffray.command import main
main(["--help"])
main(["config", "explain", "train.lora.rank"])
heavy = {"torch", "ray", "diffusers", "transformers", "mlflow"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rank of the update" in done.stdout


def test_every_module_that_a_person_runs_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    scripts = {"cluster.embedded", "cluster.forkserver", "cluster.start_worker", "diffray"}  # run by programs
    found = set()
    for top in ("cluster", "diffray", "ray_jobs", "serving"):
        for path in (ROOT / top).rglob("*.py"):
            if '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
                found.add(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__"))
    assert found - scripts == set(COMMANDS.values())
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    for name, module in COMMANDS.items():
        first = (import_module(module).__doc__ or "").strip().splitlines()[0]
        assert any(line.startswith(f"  {name} ") and first in line for line in printed.splitlines()), name


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_parser_of_its_module_with_an_example(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = parser_of(name)
    assert parser.prog == f"python -m {COMMANDS[name]}"
    assert f"python -m {COMMANDS[name]} " in parser.format_help().partition("examples:\n    ")[2]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/diffray"])
    parser = parser_of(name)
    assert parser.prog == f"diffray {name}"
    printed = parser.format_help()
    assert f"diffray {name}" in printed.partition("examples:\n    ")[2] and "python -m" not in printed


def test_arguments_reach_the_module_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr("ray_jobs.versions.main", lambda arguments: given.append(arguments))
    assert command.main(["versions", "status", "--set", "a.b=[1, 2]"]) == 0
    assert given == [["status", "--set", "a.b=[1, 2]"]]


def test_a_wrong_command_gives_one_line_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: diffray: no command trian; did you mean train?\n"
    assert command.main(["xyz"]) == 2
    assert capsys.readouterr().err == "error: diffray: no command xyz; diffray --help lists them\n"


def test_a_submitted_command_is_that_of_its_module() -> None:
    options, words = parsed(["--", "diffray", "pipeline", "--config=sdxl-lora", "--fresh"])
    assert words == ["python", "-m", "ray_jobs.pipeline", "--config", "sdxl-lora", "--fresh"]
    assert options.config == "sdxl-lora"
    assert as_module(["diffray", "--help"]) == ["diffray", "--help"]


def test_the_words_that_completion_knows_are_those_of_the_parsers() -> None:
    assert FILE.read_text(encoding="utf-8") == text(), "python -m scripts.command_options"


def completed(script: str, *words: str) -> list[str]:
    """Return what bash offers for the last of the words."""
    quoted = " ".join(f"'{word}'" for word in words)
    program = (
        f"{script}\nCOMP_WORDS=({quoted})\nCOMP_CWORD={len(words) - 1}\n"
        '_diffray 2>/dev/null\nprintf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_bash_completes_commands_options_fields_and_recipes() -> None:
    script = diffray("completion", "bash").stdout
    assert completed(script, "diffray", "pre") == ["prepare", "pretrain"]
    assert completed(script, "diffray", "keys", "") == ["--help", "add", "list", "revoke"]
    assert completed(script, "diffray", "keys", "add", "--na") == ["--name"]
    assert completed(script, "diffray", "pipeline", "--fr") == ["--fresh"]
    assert completed(script, "diffray", "train", "--config", "sdx") == ["sdxl-dreambooth", "sdxl-lora"]
    assert completed(script, "diffray", "train", "--config", "README") == ["README.md"]
    assert completed(script, "diffray", "train", "--set", "train.lora.ra") == ["train.lora.rank="]
    assert completed(script, "diffray", "config", "explain", "train.lora.ra") == ["train.lora.rank"]
    registered = subprocess.run(
        ["bash", "--norc", "-c", f"{script}\ncomplete -p diffray"], capture_output=True, text=True, check=True
    )
    assert registered.stdout == "complete -o default -F _diffray diffray\n"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_get_every_command(shell: str) -> None:
    script = diffray("completion", shell).stdout
    assert all(name in script for name in (*COMMANDS, "train.lora.rank", "sdxl-lora"))
    assert len(script.splitlines()) > 50 and "\n\n" not in script


def test_config_show_prints_what_a_run_would_have() -> None:
    done = diffray("config", "show", "--config", "sdxl-lora", "--set", "train.lora.rank=4")
    assert done.stdout == load_config(ROOT / "configs" / "sdxl-lora.yaml", ["train.lora.rank=4"]).to_yaml()


def test_config_check_tells_in_one_line(tmp_path: Path) -> None:
    done = diffray("config", "check", "--config", "configs/demo.yaml")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert done.stdout.startswith("configs/demo.yaml: no errors; run demo: lora of ")
    (tmp_path / "mine.yaml").write_text("extends: sdxl-lora\ntrain: {lora: {rnak: 3}}\n")
    done = diffray("config", "check", "--config", "mine.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == (
        "error: mine.yaml: train.lora.rnak: unknown key; did you mean rank? "
        "(docs/configuration.md lists them all)\n"
    )


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("train.lora.rank", "train.lora.rank: rank of the update\n  takes    integer > 0\n  default  16\n"),
        ("num_actors", "evaluate.num_actors: "),
        ("data.sources.path", "data.sources[].path: "),
        ("train.lora", "train.lora: Low-rank adapters (arXiv 2106.09685), by peft.\n  rank            16\n"),
        ("train.learning_rat", "error: train.learning_rat: no such field; did you mean train.learning_rate?"),
        ("use_gpu", "error: use_gpu: no such field; did you mean train.use_gpu or evaluate.use_gpu or "),
        ("wxyz", "error: wxyz: no such field; docs/configuration.md lists them all"),
    ],
)
def test_config_explain_says_what_a_field_is(
    field: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["config", "explain", field]) == (2 if said.startswith("error") else 0)
    assert capsys.readouterr().out.startswith(said)
