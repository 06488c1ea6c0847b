"""What a store refuses is told from other failures, by the text that it comes with."""

import errno
import os
from typing import Any

import pytest

from ray_jobs.config import Config
from ray_jobs.run.command_line import refusal

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
