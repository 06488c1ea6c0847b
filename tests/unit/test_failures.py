"""What is told of workers that die, out of Ray's own errors."""

from pathlib import Path

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from cluster.storage import Storage
from ray_jobs.data.encoding.cache_files import DamagedPart
from ray_jobs.training.failures import FailureReporter
from tests.unit.test_checkpoint import write

NODE = "The actor died because its node has died. Node Id: 4f"
PROCESS = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"


def died(reason: str) -> WorkerHealthCheckFailedError:
    context = ActorDiedErrorContext(
        error_message=reason, node_ip_address="10.77.0.3", pid=77, actor_id=bytes(16), owner_id=bytes(28)
    )
    return WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError(context))


def test_who_died_and_where_it_goes_on_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell = FailureReporter("lr-0.001", lambda: [Storage.open(str(tmp_path))], 2, None)
    tell.after_exception(None, {0: died(PROCESS), 1: RuntimeError("gloo:\nConnection closed by peer")})
    write(tmp_path, 2)
    write(tmp_path, 4)
    write(tmp_path, 6, ranks=1)
    tell.after_exception(None, {1: died(NODE)})
    tell.after_exception(None, {1: died(NODE)})
    assert capsys.readouterr().out.splitlines() == [
        "lr-0.001: worker 0 died: its process is gone (process 77 on 10.77.0.3); worker 1 failed: Connection "
        "closed by peer; starting again: there is no whole checkpoint yet",
        "lr-0.001: worker 1 died: its node is gone (process 77 on 10.77.0.3); "
        "going on from step 4 at the latest",
        "lr-0.001: worker 1 died: its node is gone (process 77 on 10.77.0.3); given up: "
        "train.max_failures is spent",
    ]


def test_damaged_data_end_the_training_since_another_start_would_meet_them_too(tmp_path: Path) -> None:
    line = (
        "an encoded file is damaged: /a.parquet was renamed to a.damaged; run the same command again to "
        "encode it anew"
    )
    tell = FailureReporter("lr-0.001", lambda: [Storage.open(str(tmp_path))], 2, None)
    with pytest.raises(DamagedPart, match=line):
        tell.after_exception(None, {0: RuntimeError(f"RayTaskError:\nDamagedPart: {line}")})
