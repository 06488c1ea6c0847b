#!/usr/bin/env bash
# pyarrow deletes all that a folder of Google's storage holds, and then says that there was no such folder.
# usage: findings/gcs_delete_dir.sh     (needs python3 with pip and venv, and a network; half a minute)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    pyarrow==25.0.1 gcp-storage-emulator==2026.7.19
cat > "$work/serve.py" <<'PYTHON'
import sys

from gcp_storage_emulator.server import create_server

server = create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket")
server.start()
print("up", flush=True)
sys.stdin.read()
server.stop()
PYTHON
"$work/venv/bin/python" - "$work/serve.py" <<'PYTHON'
import socket
import subprocess
import sys

import pyarrow
from pyarrow import fs

print(f"pyarrow {pyarrow.__version__}, against gcp-storage-emulator 2026.7.19")
print("The guess: delete_dir takes any folder that get_file_info calls a Directory, on gs:// as on s3://.")
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
command = [sys.executable, sys.argv[1], str(port)]
server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
server.stdout.readline()
google = fs.GcsFileSystem(anonymous=True, scheme="http", endpoint_override=f"127.0.0.1:{port}")


def outcome(folder: str) -> tuple[str, str, str]:
    """What the folder is before, what delete_dir says, and what its file is afterwards."""
    with google.open_output_stream(f"{folder}/file") as stream:
        stream.write(b"content")
    kind = google.get_file_info(folder).type.name
    try:
        google.delete_dir(folder)
        said = "nothing"
    except FileNotFoundError as error:
        said = f"FileNotFoundError: {str(error)[:60]}..."
    return kind, said, google.get_file_info(f"{folder}/file").type.name


plain = outcome("bucket/plain")
google.create_dir("bucket/marked")
marked = outcome("bucket/marked")
for name, (kind, said, left) in {"written to only": plain, "made by create_dir first": marked}.items():
    print(f"a folder that was {name}: get_file_info: {kind}; delete_dir says {said}; its file: {left}")
print(
    "The behaviour: delete_dir deletes the objects below, then the empty object `folder/` that create_dir writes. "
    "open_output_stream writes none, so a program that writes a/b/c and deletes a/b fails after its work is done."
)
server.stdin.close()
server.wait()
same = (
    plain[0] == marked[0] == "Directory"
    and plain[1].startswith("FileNotFoundError")
    and marked[1] == "nothing"
    and plain[2] == marked[2] == "NotFound"
)
sys.exit(0 if same else "the behaviour has changed")
PYTHON
