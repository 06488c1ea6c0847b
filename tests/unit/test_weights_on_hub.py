"""Of a model on the hub only the weights that are loaded are fetched, in the variant that there is.

A server of this machine answers as the hub does (https://huggingface.co/docs/hub/api); the client is real.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "a" * 40
FETCH = """
import sys
from ray_jobs.weights.model_files import model_folder, variant_name
folder = model_folder("org/model", without=["text_encoder"])
print(variant_name("org/model"))
print(*sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*") if path.is_file()), sep="\\n")
"""

ASSISTANT = """
from ray_jobs.config import ModelConfig
from ray_jobs.weights.assistant import assistant_file
print(assistant_file(ModelConfig(base="org/model", assistant="org/model{}")))
"""


class Hub(ThreadingHTTPServer):
    """Serves the files of a folder as the repository org/model."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder

    @property
    def files(self) -> list[str]:
        return sorted(
            path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()
        )


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        marks = (f"/org/model/resolve/{COMMIT}/", "/org/model/resolve/main/")
        if path.startswith(marks):
            file = self.server.folder / path.split("/", 5)[5]
            if not file.is_file():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            content = file.read_bytes()
            tag = hashlib.sha256(content).hexdigest()
            return self.answer(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})
        if "/tree/" in path:
            tree = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.server.files]
            return self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        siblings = [{"rfilename": name} for name in self.server.files]
        model = {"id": "org/model", "modelId": "org/model", "sha": COMMIT, "siblings": siblings}
        return self.answer(200, json.dumps(model).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tiny_model: Path, tmp_path: Path) -> Iterator[Hub]:
    """The tiny model: its UNet plain and as fp16, its autoencoder only as fp16, and other formats."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "hub"))
    unet, vae = folder / "unet", folder / "vae"
    (unet / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"x")
    (unet / "diffusion_pytorch_model.bin").write_bytes(b"x")
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "model.ckpt").write_bytes(b"x")
    (folder / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def fetched(hub: Hub, cache: Path, program: str = FETCH) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_weights_that_are_loaded_are_fetched_and_no_others(hub: Hub, tmp_path: Path) -> None:
    done = fetched(hub, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    variant, *files = done.stdout.split()
    assert variant == "fp16"
    assert [name for name in files if not name.endswith((".json", ".txt"))] == [
        "tokenizer/chat_template.jinja",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    assert {"model_index.json", "text_encoder/config.json", "tokenizer/tokenizer.json"} <= set(files)


def test_a_component_without_safetensors_is_named_before_any_weights_are_fetched(
    hub: Hub, tmp_path: Path
) -> None:
    (hub.folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (hub.folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    done = fetched(hub, tmp_path / "cache")
    assert "org/model: unet has weights only as diffusion_pytorch_model.bin" in done.stderr
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_of_an_assistants_repository_one_file_is_fetched(hub: Hub, tmp_path: Path) -> None:
    adapters = hub.folder / "adapters"
    adapters.mkdir()
    (adapters / "v2.safetensors").write_bytes(b"second")
    done = fetched(hub, tmp_path / "cache", ASSISTANT.format("/adapters/v2.safetensors"))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == b"second"
    assert [path.name for path in (tmp_path / "cache").rglob("*.safetensors")] == ["v2.safetensors"]
    several = fetched(hub, tmp_path / "cache", ASSISTANT.format(""))
    assert "model.assistant: org/model: has adapters/v2.safetensors, " in several.stderr
    missing = fetched(hub, tmp_path / "cache", ASSISTANT.format("/v3.safetensors"))
    assert "model.assistant: org/model/v3.safetensors: neither a file" in missing.stderr
