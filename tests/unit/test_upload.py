"""What a job takes along to a cluster."""

from pathlib import Path

import pytest

from cluster import upload
from cluster.upload import all_but, with_configuration
from ray_jobs.config import ConfigError


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a recipe, and a user's own folder in it, from which the user calls."""
    root = tmp_path / "checkout"
    for file, text in {
        "configs/demo.yaml": "name: demo",
        "mine/small.yaml": "extends: ../configs/demo.yaml",
        "mine/huge.bin": "",
        "runs/demo/winner.json": "",
    }.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    monkeypatch.setattr(upload, "ROOT", root)
    monkeypatch.chdir(root / "mine")
    return root


def test_the_command_names_the_configuration_as_the_job_finds_it(checkout: Path) -> None:
    command, files = with_configuration(["python", "--config", "small.yaml"], "small.yaml")
    assert command == ["python", "--config", "mine/small.yaml"]
    assert files == [checkout / "mine" / "small.yaml", checkout / "configs" / "demo.yaml"]
    left = sorted(
        str(path.relative_to(checkout)) for path in all_but([*files, checkout / "configs"], checkout)
    )
    assert left == ["mine/huge.bin", "runs"]


def test_a_configuration_on_shared_storage_stays_there(checkout: Path, tmp_path: Path) -> None:
    shared = str(tmp_path / "shared.yaml")
    assert with_configuration(["--config", shared], shared) == (["--config", shared], [])


@pytest.mark.parametrize("text", ["name: mine", "extends: ../elsewhere.yaml"])
def test_one_that_the_cluster_would_not_find_is_refused(checkout: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "elsewhere.yaml").write_text("name: demo")
    given = "../../elsewhere.yaml" if text == "name: mine" else "../own.yaml"
    (checkout / "own.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"--config .*elsewhere\.yaml is outside .*; move it there"):
        with_configuration(["--config", given], given)
