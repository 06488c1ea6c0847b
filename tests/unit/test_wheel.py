"""The wheel: every package with its data, the recipes, and the command, outside of the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ray_jobs.config import load_config
from ray_jobs.config.files import recipes
from ray_jobs.console.commands import COMMANDS

ROOT = Path(__file__).parents[2]
PACKAGES = ("cluster", "configs", "diffray", "ray_jobs", "serving")
KINDS = {".py", ".yaml", ".json", ".html", ".css", ".js", ".svg"}
NOT_READ = {"cluster/aws.yaml", "cluster/runtime_env.yaml"}  # by a person only, in the checkout


def tracked(*paths: str) -> list[str]:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *paths]
    return subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of a copy, since a build leaves its folders where it runs."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked(*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(folder / "source")], check=True, timeout=120)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, "--target", str(folder), str(wheel)], check=True, timeout=120)
    return folder


def run(installed: Path, folder: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_wheel_holds_every_file_that_the_packages_read(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    read = {name for name in tracked(*PACKAGES) if Path(name).suffix in KINDS}
    assert read - inside == NOT_READ
    assert {Path(name).parts[0] for name in inside} == {*PACKAGES, "diffray-0.1.0.dist-info"}


def test_the_command_runs_where_only_the_wheel_is_installed(installed: Path, tmp_path: Path) -> None:
    command = str(installed / "bin" / "diffray")
    done = run(installed, tmp_path, command, "--help")
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    done = run(installed, tmp_path, command, "search", "--help")
    assert done.stdout.startswith("usage: diffray search ") and "examples:\n    diffray search" in done.stdout
    done = run(installed, tmp_path, command, "completion", "bash")
    assert "sdxl-lora" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_recipes_are_named_where_only_the_wheel_is_installed(installed: Path, tmp_path: Path) -> None:
    command = str(installed / "bin" / "diffray")
    (tmp_path / "mine.yaml").write_text("extends: sdxl-lora\nname: mine\n")
    done = run(installed, tmp_path, command, "config", "show", "--config", "mine.yaml")
    assert done.stdout == load_config("sdxl-lora", ["name=mine"]).to_yaml()
    done = run(installed, tmp_path, "-c", "import ray_jobs.config.files as f; print(f.RECIPES, *f.recipes())")
    assert done.stdout.split() == [str(installed / "configs"), *recipes()]
