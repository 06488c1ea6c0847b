"""Upload of a job: this repository's code and small data, and the configuration of its run."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from cluster.local import QUIET
from cluster.variables import PLAIN, those_set
from ray_jobs.config import ConfigError
from ray_jobs.config.files import config_file, files_of

ROOT = Path(__file__).resolve().parents[1]

PACKAGES = ["cluster", "diffray", "ray_jobs", "serving", "configs", "examples", "models", "scripts"]
"""Folders of the repository that a job needs; the rest (runs, caches, history) is not uploaded."""

MAX_UPLOAD_MB = 100
"""Maximum upload in MiB; more than this is data, which belongs in storage (Ray's own limit is 512 MiB)."""


def runtime_environment(
    env_vars: dict[str, str] | None = None, files: Collection[Path] = ()
) -> dict[str, Any]:
    """Return Ray's runtime environment: code and small data, and the variables of a run.

    Args:
        env_vars: further environment variables.
        files: files of the repository, outside `PACKAGES`, to upload too.

    Raises:
        ConfigError: the upload is too large.
    """
    sizes = {
        name: sum(path.stat().st_size for path in (ROOT / name).rglob("*") if path.is_file()) / 2**20
        for name in PACKAGES
    }
    if sum(sizes.values()) > MAX_UPLOAD_MB:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ConfigError(
            f"{ROOT / largest}: {sizes[largest]:.0f} MiB of the {sum(sizes.values()):.0f} to upload, but the "
            f"limit is {MAX_UPLOAD_MB}; move data to shared storage and name it in data.source or model.base"
        )
    kept = {*files, *(ROOT / name for name in PACKAGES)}
    return {
        "working_dir": str(ROOT),
        "excludes": [*(f"/{path.relative_to(ROOT)}" for path in all_but(kept, ROOT)), "__pycache__"],
        "env_vars": QUIET | {"PYTHONUNBUFFERED": "1"} | those_set(PLAIN) | (env_vars or {}),
    }


def all_but(kept: Collection[Path], folder: Path) -> Iterator[Path]:
    """Yield the paths below a folder that are neither in `kept` nor contain a path that is."""
    for path in folder.iterdir():
        if path in kept:
            continue
        if any(path in each.parents for each in kept):
            yield from all_but(kept, path)
        else:
            yield path


def with_configuration(command: list[str], config: str) -> tuple[list[str], list[Path]]:
    """Return the command with its configuration's path on the cluster, and the files to upload for it. An
    absolute path outside the repository stays unchanged: it is on shared storage, which every node reads.

    Args:
        config: the job's configuration, as the user named it.

    Raises:
        ConfigError: the configuration, or one that it extends, is neither in the repository nor shared.
    """
    given = Path(config)
    shared = given.is_absolute() and not given.resolve().is_relative_to(ROOT)
    if shared or config not in command:
        return command, []
    files = [each.resolve() for each in files_of(config_file(config))]
    for file in files:
        if not file.is_relative_to(ROOT):
            raise ConfigError(
                f"--config {config}: {file} is outside {ROOT}, which is uploaded to the cluster; move it "
                "there, or give an absolute path on storage that every node reads, for all its files"
            )
    found = str(files[0].relative_to(ROOT))
    return [found if each == config else each for each in command], files
