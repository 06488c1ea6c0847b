"""What a store refuses is told from other failures, by the text that it comes with."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.config import Config, ConfigError
from ray_jobs.run.command_line import refusal, require_lasting

CONFIG = Config.model_validate(
    {
        "name": "demo",
        "storage": "s3://bucket/runs",
        "data": {"source": "pictures"},
        "model": {"base": "model"},
        "search": {"learning_rates": [1e-3], "ladder": [2]},
    }
)

S3 = "When completing multiple part upload for key 'runs/demo' in bucket 'bucket': AWS Error {}"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device: free some space"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "Disk quota exceeded: free some space"),
        (OSError(S3.format("UNKNOWN (HTTP status 403): QuotaExceeded")), "QuotaExceeded: free some space"),
        (OSError(S3.format("ACCESS_DENIED during PutObject operation")), "ACCESS_DENIED during PutObject"),
        (
            PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/runs"),
            "Permission denied: '/runs': give",
        ),
        (RuntimeError("a task died:\n  OSError: [Errno 28] No space left on device\nend"), "free some space"),
    ],
)
def test_a_refusal_is_told_with_what_to_mend(error: Any, said: str) -> None:
    refused = refusal(CONFIG, error)
    assert refused is not None
    assert str(refused).startswith("storage") and "s3://bucket/runs" in str(refused) and said in str(refused)


def test_another_failure_is_none() -> None:
    assert refusal(CONFIG, ValueError("a wrong shape")) is None


def test_results_in_a_jobs_copy_of_the_code_would_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relative, absolute = (CONFIG.model_copy(update={"storage": each}) for each in ("runs", "/mnt/runs"))
    monkeypatch.delenv("DIFFRAY_HOME", raising=False)
    copy = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    copy.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    require_lasting(relative)
    monkeypatch.chdir(copy)
    with pytest.raises(ConfigError, match="storage: runs: this job runs in a copy of the code"):
        require_lasting(relative)
    for config in (absolute, CONFIG, CONFIG.model_copy(update={"storage": "~/runs"})):
        require_lasting(config)
    monkeypatch.setenv("DIFFRAY_HOME", str(tmp_path))  # as on the embedded Ray
    require_lasting(relative)
