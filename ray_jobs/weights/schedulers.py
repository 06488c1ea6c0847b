"""The scheduler that may be stored beside weights."""

import json
from pathlib import Path
from typing import Any

from ray_jobs.diffusion.protocols import Scheduler

SCHEDULER = "scheduler"  # folder name, as in every pipeline; beside LoRA weights only if needed
CONFIG = "scheduler_config.json"


def has_scheduler(folder: Path) -> bool:
    """Return whether the weights in a folder have their own scheduler beside them."""
    return (folder / SCHEDULER / CONFIG).is_file()


def scheduler_class(folder: Path) -> str:
    """Return the class name of the scheduler in a folder."""
    return str(json.loads((folder / SCHEDULER / CONFIG).read_text(encoding="utf-8"))["_class_name"])


def load_scheduler(folder: Path) -> Scheduler:
    """Load the scheduler beside weights.

    Raises:
        ValueError: diffusers has no scheduler class of the name in its file.
    """
    import diffusers

    name = scheduler_class(folder)
    kind: Any = getattr(diffusers, name, None)
    if diffusers.SchedulerMixin not in getattr(kind, "__mro__", ()):
        raise ValueError(f"{folder / SCHEDULER / CONFIG}: {name} is not a scheduler of diffusers")
    return kind.from_pretrained(folder, subfolder=SCHEDULER)
