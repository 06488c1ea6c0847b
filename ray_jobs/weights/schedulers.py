"""The scheduler that may lie beside weights."""

import json
from pathlib import Path
from typing import Any

SCHEDULER = "scheduler"  # the folder, as in every pipeline; beside LoRA weights only where it is needed
CONFIG = "scheduler_config.json"


def has_scheduler(folder: Path) -> bool:
    """Whether weights in a folder are drawn with a scheduler that lies beside them."""
    return (folder / SCHEDULER / CONFIG).is_file()


def scheduler_class(folder: Path) -> str:
    """The name of the class of the scheduler in a folder."""
    return str(json.loads((folder / SCHEDULER / CONFIG).read_text(encoding="utf-8"))["_class_name"])


def load_scheduler(folder: Path) -> Any:
    """The scheduler beside weights.

    Raises:
        ValueError: diffusers has no scheduler of the class that its file names.
    """
    import diffusers

    name = scheduler_class(folder)
    kind: Any = getattr(diffusers, name, None)
    if diffusers.SchedulerMixin not in getattr(kind, "__mro__", ()):
        raise ValueError(f"{folder / SCHEDULER / CONFIG}: {name} is no scheduler of diffusers")
    return kind.from_pretrained(folder, subfolder=SCHEDULER)
