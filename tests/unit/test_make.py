"""`make setup` takes a Python that diffray runs on, and nothing is left to compile after it."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("python3.13", "python3.12", "python3.11", "python3")


def make(folder: Path, pythons: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make where the machine's Pythons are these: a name, and what its program does."""
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "requirements.lock").write_text("torch==2.13.0\n")
    (folder / "bin").mkdir()
    for name in NAMES:
        program = folder / "bin" / name
        program.write_text(f"#!/bin/sh\n{pythons.get(name, 'exit 127')}\n")
        program.chmod(0o755)
    environment = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin"}
    command = ["make", *arguments, ".venv/complete"]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


RUNS = f'exec {sys.executable} "$@"'


@pytest.mark.parametrize(
    ("pythons", "taken"),
    [
        # A pyenv shim without a version of that name is there, and fails.
        ({"python3.12": RUNS, "python3.11": RUNS}, "python3.12"),
        ({"python3.13": RUNS, "python3.12": RUNS, "python3.11": RUNS}, "python3.13"),
        ({"python3": RUNS}, "python3"),
    ],
)
def test_the_newest_python_that_runs_is_taken(pythons: dict[str, str], taken: str, tmp_path: Path) -> None:
    assert f"\t{taken} -m venv --clear .venv\n" in make(tmp_path, pythons, "-n").stdout


def test_set_up_leaves_the_command_beside_python(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for package in ("diffray", "cluster", "ray_jobs", "serving"):
        (tmp_path / package).symlink_to(ROOT / package)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "requirements.lock").touch()
    (tmp_path / ".venv" / "complete").touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    subprocess.run(["make", ".venv/bin/diffray"], cwd=tmp_path, check=True, timeout=60)
    command = [str(tmp_path / ".venv" / "bin" / "diffray"), "config", "explain", "train.lora.rank"]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("train.lora.rank: rank of the update\n"), done.stderr


def test_a_python_that_is_named_is_taken(tmp_path: Path) -> None:
    done = make(tmp_path, {"python3.13": RUNS, "python3.11": RUNS}, "-n", "PYTHON=python3.11")
    assert "\tpython3.11 -m venv --clear .venv\n" in done.stdout


def test_without_a_python_that_fits_one_line_says_so(tmp_path: Path) -> None:
    done = make(tmp_path, {})
    assert done.returncode == 2
    assert "error: Python 3.11, 3.12 or 3.13 is needed: make setup PYTHON=..." in done.stdout
    assert not (tmp_path / ".venv").exists()


def test_the_python_of_the_environment_stays(tmp_path: Path) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    done = make(tmp_path, {"python3.13": RUNS}, "-n")
    assert "python3.13" not in done.stdout


@pytest.mark.parametrize(("failing", "parts"), [("", 2), ("not ray", 1), ("ray and", 2)])
def test_both_parts_of_the_tests_run_unless_the_first_fails_and_the_time_is_told(
    failing: str, parts: int, tmp_path: Path
) -> None:
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    scripts = ("ray_jobs/weights/fetch.py",)
    models = (".cache/inception-2015-12-05.pt", ".cache/efficientnet-lite0.safetensors")
    for name in (*scripts, ".venv/complete", *models, ".venv/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$@"\ncase "$*" in *"-m {failing or "nothing"}"*) exit 1; esac\n')
    python.chmod(0o755)
    # Without what `make test` tells the makes below it: they would print the folders that they enter.
    environment = {
        name: value for name, value in os.environ.items() if "MAKE" not in name and name != "MFLAGS"
    }
    done = subprocess.run(
        ["make", "test"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    *lines, total = done.stdout.splitlines()
    assert sum(line.startswith("-m pytest") for line in lines) == parts
    assert re.fullmatch(r"make test took \d+ seconds", total)
    assert done.returncode == (2 if failing else 0)


def test_the_lock_is_for_every_python_that_the_project_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11,<3.14"
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pinned = [re.split(r"==| ;", line)[0] for line in lines if not line.startswith("#")]
    assert pinned == sorted(set(pinned))  # one version each, whatever the Python
    assert not any("python_" in line.partition(";")[2].replace("platform_python_", "") for line in lines)


def test_every_module_of_the_environment_is_compiled() -> None:
    """What set-up left to compile would be compiled in each start, where PYTHONDONTWRITEBYTECODE is set."""
    import ray

    packages = Path(ray.__file__).parents[1]
    for name in ("ray/dashboard", "torch/nn", "sympy/core", "diffusers/models", "transformers/models/clip"):
        sources = list((packages / name).rglob("*.py"))
        cached = {path.name.split(".")[0] for path in (packages / name).rglob("*.pyc")}
        assert sources
        assert {source.stem for source in sources} <= cached


@pytest.mark.skipif("PYTHONPYCACHEPREFIX" in os.environ, reason="bytecode lies elsewhere")
def test_bytecode_is_written_although_the_user_forbids_it(tmp_path: Path) -> None:
    """By the very line of the Makefile."""
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    line = re.search(r"\$\(BIN\)/python (-m compileall -q) \$\(OWN\)", recipe)
    assert line
    (tmp_path / "module.py").write_text("x = 1\n")
    command = [sys.executable, *line[1].split(), str(tmp_path)]
    subprocess.run(command, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}, check=True)
    assert list(tmp_path.rglob("module.*.pyc"))
