"""Names of trials, derived from their settings.

A trial's settings are a plain dict keyed by full setting names (`train.learning_rate`, `train.lora.rank`).
`Config.with_settings` turns it into the trial's configuration.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping

from ray_jobs.config import LEARNING_RATE

LONGEST = 160  # characters of a name; folder names extend it, and a file name may have 255 bytes
LONGEST_TEXT = 32  # characters of a value that is not a number
WORD = re.compile(rf"(?=.{{1,{LONGEST_TEXT}}}$)[a-z][a-z0-9.]*(_[a-z0-9.]+)*")
NO_WORDS = ("inf", "nan", "none", "true", "false")  # equal other values' names except for letter case
HEX = 10  # digits of the digest that distinguishes values whose text does not


def trial_id(settings: Mapping[str, object]) -> str:
    """Return a trial's name, which is the same in every attempt; a resumed run finds its state by it.

    Example: {"train.learning_rate": 1e-3, "train.lora.rank": 8} gives `lr-0.001_rank-8`. Different values of
    the same setting names give different names. Names consist of letters, digits and `._+-`, so that folders,
    URIs and MLflow accept them unchanged. They have at most `LONGEST` characters, and no two differ in letter
    case only.
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


def value_text(value: object) -> str:
    """Format a value for use in a name, one-to-one.

    Numbers are as short as possible without loss. True, False and None keep their names. Lower-case words
    have `-` for `_`. Other values become a readable hint and a digest.
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
    """Replace each run of characters other than ASCII letters, digits and `others` with a hyphen."""
    return re.sub(rf"[^A-Za-z0-9{re.escape(others)}]+", "-", text).strip("-")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:HEX]
