"""Where a version's code came from, as its tag says."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ray_jobs.registry import provenance

FILE = "ray_jobs/registry/provenance.py"


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The code runs from a folder without history, and its user's folder is another one."""
    for folder in ("copy", "home"):
        (tmp_path / folder / FILE).parent.mkdir(parents=True)
        shutil.copy(provenance.__file__, tmp_path / folder / FILE)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "copy" / FILE))
    monkeypatch.setenv("DIFFRAY_HOME", str(tmp_path / "home"))
    return tmp_path / "copy"


def commit(folder: Path) -> str:
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return git(folder, "rev-parse", "HEAD")


def test_a_checkout_is_named_by_its_commit_and_a_changed_one_is_marked(copy: Path) -> None:
    head = commit(copy)
    git(copy, "tag", "-a", "v9", "-m", "nine")
    assert provenance.code_version() == head
    (copy / FILE).write_text("changed")
    assert provenance.code_version() == f"{head}-dirty"


def test_a_job_in_a_copy_is_named_by_the_checkout_it_was_copied_from(copy: Path) -> None:
    head = commit(copy.parent / "home")
    assert provenance.code_version() == head


def test_the_history_of_a_folder_that_holds_other_things_is_not_taken(copy: Path) -> None:
    (copy.parent / "home" / FILE).unlink()
    (copy.parent / "home" / "notes").write_text("a user's own repository")
    commit(copy.parent / "home")
    # What is named instead depends on whether the package is installed.
    assert provenance.code_version().startswith(("diffray 0", "unknown: "))
