"""The rules of `data.curation.decisions`, one row after the other, each looking at all others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_jobs.config import Config
from ray_jobs.data.curation.cleaning import QUALITY_CHECKS
from ray_jobs.data.curation.decisions import HOLD_OUT_FROM
from ray_jobs.data.curation.judging import fault
from ray_jobs.data.curation.splits import GOLDEN, Shares, _position, even_folds, split_of
from ray_jobs.run.split import SplitName

Row = Mapping[str, Any]  # of the index
MEASURES = ("width", "height", *QUALITY_CHECKS)


@dataclass
class Decided:
    """Decision on a row."""

    reason: str
    matched: int = -1
    split: str = "class"
    fold: int = 0


def alike(one: Row, other: Row, config: Config) -> bool:
    cleaning = config.data.cleaning
    bits = (one["hash"] ^ other["hash"]).bit_count()
    difference = sum(abs(a - b) for a, b in zip(one["colours"], other["colours"], strict=True))
    limit = int(cleaning.duplicate_colour * 48 * 255)
    return bits <= cleaning.duplicate_distance and difference <= limit


def copies(one: Row, other: Row) -> bool:
    return bool((one["hash"], one["colours"]) == (other["hash"], other["colours"]))


class Plain:
    """Decisions on all rows.

    Args:
        known: splits that earlier runs assigned, by digest.
    """

    def __init__(self, rows: Sequence[Row], config: Config, known: Mapping[str, SplitName]) -> None:
        self.rows, self.config, self.known = rows, config, known
        self.found = [Decided(self._reason(row)) for row in rows]
        self.usable = [
            number
            for number, (row, each) in enumerate(zip(rows, self.found, strict=True))
            if not each.reason and row["role"] == "instance"
        ]
        firsts: dict[str, int] = {}
        for number in self.usable:
            firsts.setdefault(rows[number]["digest"], number)
        self.first = {number: firsts[rows[number]["digest"]] for number in self.usable}
        self.pictures = sorted(firsts.values())
        self.split, self.twin = self._own_splits(), dict.fromkeys(self.pictures, -1)
        self.kept = dict.fromkeys(self.pictures, True)
        self.group = {number: number for number in self.pictures}
        if config.data.cleaning.duplicates != "ignore":
            self._near_duplicates()
        self._decide()

    def _reason(self, row: Row) -> str:
        if row["reason"]:
            return str(row["reason"])
        found = fault({name: row[name] for name in MEASURES}, self.config.data.cleaning)
        return found.reason if found else ""

    def _own_splits(self) -> dict[int, SplitName]:
        data = self.config.data
        shares = Shares(data.split_seed, data.validation, data.test)
        digests = {number: self.rows[number]["digest"] for number in self.pictures}
        if not data.stratify:
            return {n: self.known.get(digest) or split_of(digest, shares) for n, digest in digests.items()}
        taken: dict[str, int] = {}
        for number, digest in digests.items():
            stratum = self.rows[number]["stratum"]
            taken[stratum] = taken.get(stratum, 0) + (digest in self.known)
        found: dict[int, SplitName] = {}
        for number, digest in digests.items():
            stratum = self.rows[number]["stratum"]
            if digest in self.known:
                found[number] = self.known[digest]
                continue
            position = (_position(stratum, shares.seed) + taken[stratum] * GOLDEN) % 1
            found[number] = shares.split_at(position)
            taken[stratum] += 1
        return found

    def _near_duplicates(self) -> None:
        rows, mode = self.rows, self.config.data.cleaning.duplicates
        earlier: list[int] = []
        for number in sorted(self.pictures, key=lambda n: (rows[n]["digest"] not in self.known, n)):
            like = [other for other in earlier if alike(rows[other], rows[number], self.config)]
            if same := [other for other in like if copies(rows[other], rows[number])]:
                first = same[0]
                self.twin[number] = first if self.twin[first] < 0 else self.twin[first]
                self.kept[number] = self.kept[first] and mode == "keep"
                self.split[number] = self.split[first]
            else:
                firsts = [
                    n
                    for n in like
                    if not any(copies(rows[n], rows[e]) for e in like if e != n)
                    or n == min((e for e in like if copies(rows[n], rows[e])), key=earlier.index)
                ]
                if deciding := [other for other in firsts if self.kept[other]]:
                    self.twin[number], splits = deciding[0], {self.split[other] for other in deciding}
                    self.kept[number] = mode == "keep" and len(splits) == 1
                    self.split[number] = self.split[deciding[0]]
            together = {self.group[other] for other in like}
            least = min([*together, number], key=lambda n: (rows[n]["digest"] not in self.known, n))
            for each, group in self.group.items():
                if group in together or each == number:
                    self.group[each] = least
            earlier.append(number)

    def _decide(self) -> None:
        data, drop = self.config.data, self.config.data.cleaning.duplicates == "drop"
        held_out = bool(data.validation or data.test) and sum(self.kept.values()) >= HOLD_OUT_FROM
        before: dict[tuple[str, str], int] = {}
        folds = self._folds(held_out)
        for number in self.usable:
            row, first, each = self.rows[number], self.first[number], self.found[number]
            each.split = self.split[first] if held_out else "train"
            each.fold = folds[first] if each.split != "test" else 0
            same = before.setdefault((row["digest"], row["text"]), number)
            if drop and same != number:
                each.reason, each.matched = "duplicate", same
                continue
            if not self.kept[first]:
                each.reason = "near_duplicate" if drop else "near_duplicate_across_splits"
            each.matched = self.twin[first]

    def _folds(self, held_out: bool) -> dict[int, int]:
        data = self.config.data
        if not data.folds:
            return dict.fromkeys(self.pictures, 0)
        names = {number: self.rows[self.group[number]]["digest"] for number in self.pictures}
        if held_out:
            seed = f"{data.split_seed}:fold"
            return {number: int(_position(name, seed) * data.folds) for number, name in names.items()}
        kept = [number for number in self.pictures if self.kept[number]]
        texts = [self.rows[number]["text"] for number in kept]
        dealt = even_folds([names[n] for n in kept], texts, data.split_seed, data.folds)
        return dict.fromkeys(self.pictures, 0) | dict(zip(kept, dealt, strict=True))
