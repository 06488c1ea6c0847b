"""Group the members of a WebDataset tar file into samples.

The convention splits a base name at its first dot: `x.jpg`, `x.seg.png` and `x.txt` are one sample with key
x. It thus treats `IMG_1.0.png` and `IMG_1.1.png` as two parts of one sample, which is not what camera and
export programs mean. Here a name is key, middle and suffix (`IMG_1`, `0`, `png`). Among consecutive members
with one key,

- those without a middle form a sample,
- consecutive ones with the same middle that include a picture and a caption form a sample, too,
- a picture with a middle but without its own caption is an extra picture of the sample (a mask, a depth map)
  if that has one; the sample's picture, if it is the only one; and else a picture without a caption.

A sample takes its first picture, first .txt and first .json. No member is ignored silently: those outside
samples are counted, and named if they are pictures. At most two samples and a picture are in memory.
"""

import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ray_jobs.data.sources.listing import PICTURE_SUFFIXES

TEXTS = ("txt", "json")


@dataclass
class Group:
    """Members of a tar that form one row.

    Attributes:
        parts: "picture", "txt", "json", and for a further picture a dot and its middle -> name and content
            of the member.
        problem: reason and detail, if the row is not a sample.
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
    """Split a member's name into key, middle and suffix: `a/x.seg.PNG` -> `a/x`, `seg`, `png`.

    A hidden file has no key, and a file without a dot has no suffix.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, rest = base.partition(".")
    middle, _, suffix = rest.rpartition(".")
    return (folder + slash + stem if stem else ""), middle, suffix.lower()


class Grouping:
    """Group the members of a tar, in order, into rows.

    Args:
        content: function that reads a member; called only for members that a row may need.
        others: counts by suffix of members that are not part of a row; updated in place.
        optional: True if a picture without a caption is a row; then all pictures of a key are in memory.
        further: middles of the samples' further pictures.
    """

    def __init__(
        self,
        content: Callable[[tarfile.TarInfo], bytes],
        others: Counter[str],
        optional: bool = False,
        further: Sequence[str] = (),
    ) -> None:
        self._content, self._others, self._optional = content, others, optional
        self._further = further
        self._key = ""
        self._plain, self._sub, self._middle = Group(), Group(), ""
        self._extra = list[tuple[str, bytes]]()  # pictures without a caption; the first one's content

    def add(self, member: tarfile.TarInfo) -> Iterator[Group]:
        """Add the next member; yield the rows that it completes."""
        key, middle, suffix = split_name(member.name)
        kind = "picture" if f".{suffix}" in PICTURE_SUFFIXES else suffix
        if not key or kind not in ("picture", *TEXTS) or member.isdir():
            if not member.isdir():
                self._others["hidden" if not key else f".{suffix}" if suffix else "without a suffix"] += 1
            return
        if key != self._key:
            yield from self.end()
            self._key = key
        if kind == "picture" and middle in self._further and member.isreg():
            self._plain.parts.setdefault(f".{middle}", (member.name, self._content(member)))
            return
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
            self._extra.append((member.name, self._content(member) if self._optional else b""))
        else:
            self._others[f".{suffix}"] += 1

    def whole(self) -> Iterator[Group]:
        """Yield the complete rows at the point where a damaged tar breaks off."""
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
        for name, content in extra:
            problem = ("missing_caption", f"no .txt or .json of the same name beside {name}")
            if "picture" in plain.parts:
                problem = ("other_member", f"another picture of {plain.parts['picture'][0]}")
            elif self._optional:
                yield Group({"picture": (name, content)})
                continue
            yield Group({"picture": (name, b"")}, problem)

    def _end_sub(self) -> Iterator[Group]:
        sub, self._sub, self._middle = self._sub, Group(), ""
        if "picture" in sub.parts and not sub.has_caption:
            name, content = sub.parts["picture"]
            self._extra.append((name, content if self._optional or not self._extra else b""))
        elif sub.parts:
            yield sub
