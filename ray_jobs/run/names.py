"""Names of trials, made of their settings.

A trial's settings are a plain dict by the settings' full names (`train.learning_rate`, `train.lora.rank`),
which `Config.with_settings` turns into the configuration that it trains with.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ray_jobs.config import LEARNING_RATE

LONGEST = 160  # characters of a name; folders add to it, and a file's name may have 255 bytes
LONGEST_TEXT = 32  # characters of a value that is no number
WORD = re.compile(rf"(?=.{{1,{LONGEST_TEXT}}}$)[a-z][a-z0-9.]*(_[a-z0-9.]+)*")
NO_WORDS = ("inf", "nan", "none", "true", "false")  # which are other values' names, but for letter case
HEX = 10  # digits of a digest that tells values apart where their text does not


def trial_id(settings: Mapping[str, Any]) -> str:
    """A trial's name, the same in every attempt: it is what a resumed run finds its state by.

    Of {"train.learning_rate": 1e-3, "train.lora.rank": 8} it is `lr-0.001_rank-8`. Among settings of the same
    names it is one-to-one. It is made of letters, digits and `._+-`, so that folders, addresses and MLflow
    take it as it is, and has at most `LONGEST` characters; letter case alone tells no two of them apart.
    """
    last = Counter(name.rpartition(".")[2] for name in settings)
    parts = []
    for name, value in settings.items():
        short = name.rpartition(".")[2]
        known = "lr" if name == LEARNING_RATE else short if last[short] == 1 else name.removeprefix("train.")
        parts.append(f"{_plain(known, '._-')}-{value_text(value)}")
    whole = "_".join(parts)
    if len(whole) <= LONGEST:
        return whole
    return f"{whole[: LONGEST - HEX - 1].rstrip('._-')}-{_digest(whole)}"


def value_text(value: Any) -> str:
    """A value as it stands in a name, one-to-one.

    A number as short as it can be without loss; True, False and None; a word of small letters with `-` for
    `_`. All else is a hint for the eye and a digest of the value.
    """
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, int | float):
        number = value + 0  # -0.0 is 0
        short = f"{number:g}" if number else "0"
        return short if float(short) == number else repr(number)
    if isinstance(value, str) and WORD.fullmatch(value) and value not in NO_WORDS:
        return value.replace("_", "-")
    exact = json.dumps(value, sort_keys=True, default=str)
    hint = _plain(value if isinstance(value, str) else exact, ".+")[:LONGEST_TEXT].strip("-.")
    return f"{hint}-{_digest(exact)}".lstrip("-")


def _plain(text: str, others: str) -> str:
    """Text with a hyphen for each run of characters other than ASCII letters, digits and `others`."""
    return re.sub(rf"[^A-Za-z0-9{re.escape(others)}]+", "-", text).strip("-")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:HEX]


def training_of(row: Mapping[str, Any]) -> str:
    """The folder of checkpoints that a row of results.jsonl was measured in."""
    return str(row.get("training", row["trial_id"]))
