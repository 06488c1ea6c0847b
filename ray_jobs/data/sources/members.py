"""Which members of a WebDataset's tar file belong together.

The convention splits a base name at its first dot: `x.jpg`, `x.seg.png` and `x.txt` are one sample, of key x.
So it takes `IMG_1.0.png` and `IMG_1.1.png` for two parts of one sample, which camera and export programs do
not mean. Here a name is key, middle and suffix (`IMG_1`, `0`, `png`), and of consecutive members of one key

- those without a middle make a sample,
- those of one middle that follow each other and have a picture and a caption make one, too,
- a picture with a middle but without a caption of its own is another picture of the sample (a mask, a depth
  map) if that has one; the sample's picture, if it is the only one; and else a picture without a caption.

A sample takes its first picture, first .txt and first .json. Nothing is passed over: what is no part of a
sample is counted, and named if it is a picture. At most two samples and a picture are in memory.
"""

import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ray_jobs.data.sources.listing import PICTURE_SUFFIXES

TEXTS = ("txt", "json")


@dataclass
class Group:
    """Members of a tar that make one row.

    Attributes:
        parts: "picture", "txt", "json" -> the member's name and content.
        problem: reason and detail, where the row is no sample.
    """

    parts: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    problem: tuple[str, str] | None = None

    @property
    def has_caption(self) -> bool:
        return any(kind in self.parts for kind in TEXTS)

    @property
    def is_sample(self) -> bool:
        return "picture" in self.parts and self.has_caption


def split_name(name: str) -> tuple[str, str, str]:
    """The key, the middle and the suffix of a member: `a/x.seg.PNG` -> `a/x`, `seg`, `png`.

    A hidden file has no key, and a file without a dot no suffix.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, rest = base.partition(".")
    middle, _, suffix = rest.rpartition(".")
    return (folder + slash + stem if stem else ""), middle, suffix.lower()


class Grouping:
    """Sorts the members of a tar, as they come, into rows.

    Args:
        content: reads a member; asked only for what a row can need.
        others: counts the members that are no part of a row, by suffix.
    """

    def __init__(self, content: Callable[[tarfile.TarInfo], bytes], others: Counter[str]) -> None:
        self._content, self._others = content, others
        self._key = ""
        self._plain, self._sub, self._middle = Group(), Group(), ""
        self._extra = list[tuple[str, bytes]]()  # pictures without a caption; the first one's content

    def add(self, member: tarfile.TarInfo) -> Iterator[Group]:
        """Take the next member; yields the rows that it ends."""
        key, middle, suffix = split_name(member.name)
        kind = "picture" if f".{suffix}" in PICTURE_SUFFIXES else suffix
        if not key or kind not in ("picture", *TEXTS) or member.isdir():
            if not member.isdir():
                self._others["hidden" if not key else f".{suffix}" if suffix else "without a suffix"] += 1
            return
        if key != self._key:
            yield from self.end()
            self._key = key
        if middle and middle != self._middle:
            yield from self._end_sub()
            self._middle = middle
        if not member.isreg():
            yield Group({kind: (member.name, b"")}, ("unusable_link", "a link in the tar"))
            return
        group = self._sub if middle else self._plain
        if kind not in group.parts:
            group.parts[kind] = (member.name, self._content(member))
        elif kind == "picture":
            self._extra.append((member.name, b""))
        else:
            self._others[f".{suffix}"] += 1

    def whole(self) -> Iterator[Group]:
        """Yield the rows that are whole where a damaged tar breaks off."""
        yield from (group for group in (self._sub, self._plain) if group.is_sample)

    def end(self) -> Iterator[Group]:
        """Yield the rows of the key that ends here."""
        yield from self._end_sub()
        plain, extra = self._plain, self._extra
        self._plain, self._extra, self._key = Group(), [], ""
        if "picture" not in plain.parts and plain.has_caption and len(extra) == 1 and extra[0][1]:
            plain.parts["picture"], extra = extra[0], []
        if plain.parts:
            yield plain
        for name, _ in extra:
            problem = ("missing_caption", f"no .txt or .json of the same name beside {name}")
            if "picture" in plain.parts:
                problem = ("other_member", f"another picture of {plain.parts['picture'][0]}")
            yield Group({"picture": (name, b"")}, problem)

    def _end_sub(self) -> Iterator[Group]:
        sub, self._sub, self._middle = self._sub, Group(), ""
        if "picture" in sub.parts and not sub.has_caption:
            name, content = sub.parts["picture"]
            self._extra.append((name, b"" if self._extra else content))
        elif sub.parts:
            yield sub
