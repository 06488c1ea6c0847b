"""What is deleted once it is old, and what clients are not told."""

import json
from pathlib import Path

import pytest

from cluster.storage import Storage
from ray_jobs.registry.models import RegisteredModel
from serving.messages import Base, RoutedRequest, refusal
from serving.service.shadow import PARAMETERS_FILE, Shadow


def test_pairs_of_shadow_mode_are_deleted_once_they_are_old(tmp_path: Path) -> None:
    async def draw(_: RoutedRequest) -> bytes:
        return b""

    for slot, asked in (("000", 10.0), ("001", 20.0)):
        (tmp_path / slot).mkdir()
        (tmp_path / slot / PARAMETERS_FILE).write_text(json.dumps({"asked": asked}))
    (tmp_path / "002").mkdir()  # being written
    Shadow(Storage.open(str(tmp_path)), draw, lambda: True).delete_before(15.0)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["001", "002"]


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("/home/me/runs/demo/model: not the weights", "model: not the weights"),
        ("/var/cache/copies/9f/adapter.safetensors: is damaged", "adapter.safetensors: is damaged"),
        ("[Errno 2] No such file: '/tmp/a/b.json'", "[Errno 2] No such file: 'b.json'"),
        ("and/or see https://example.com/a/b", "and/or see https://example.com/a/b"),
    ],
)
def test_a_refusal_tells_clients_no_folders(reason: str, told: str) -> None:
    weights = "/home/me/runs/demo/model"
    version = RegisteredModel("served", 3, weights, "9f" * 32, "/models/base", None, "lora", {})
    message = refusal(version, Base("/models/base"), OSError(reason))
    assert message == f"served@3 cannot be served: {told}"
