"""What a job gets of its user's shell: plain variables by Ray, secrets by a module of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.upload import runtime_environment
from cluster.variables import SECRET, secret_modules

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRET:
        monkeypatch.delenv(name, raising=False)


def test_secrets_are_in_the_module_and_not_in_the_runtime_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", 'hf_"quoted"')
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:password@mlflow")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub")
    assert runtime_environment()["env_vars"]["HF_ENDPOINT"] == "https://hub"
    assert not set(SECRET) & set(runtime_environment()["env_vars"])
    with secret_modules() as [folder]:
        program = "import os, cluster; print(os.environ['HF_TOKEN'], os.environ['MLFLOW_TRACKING_URI'])"
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONPATH": f"{Path(folder).parent}:{ROOT}"},
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout == 'hf_"quoted" https://user:password@mlflow\n'
    assert not Path(folder).exists()


def test_without_secrets_there_is_no_module() -> None:
    with secret_modules() as folders:
        assert folders == []
