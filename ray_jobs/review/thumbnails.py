"""Pictures of a run, reduced for a page."""

import io
import threading
from collections import OrderedDict

from ray_jobs.config import Config
from ray_jobs.data.sources.folders import Folder
from ray_jobs.pictures.reading import Rejected, read_picture
from ray_jobs.review.captions import Captions, Listed

SIDES = (320, 2048)  # longer sides in pixels: of a thumbnail, and of a picture that is opened
READ_AHEAD = (
    24  # pictures of a table or tar file that are read at once, since reading one reads those before it
)
KEPT = 512  # thumbnails in memory


class Pictures:
    """Reader of the pictures of `captions`, safe for threads."""

    def __init__(self, config: Config, captions: Captions) -> None:
        self.config, self.captions = config, captions
        self._kept: OrderedDict[int, bytes | None] = OrderedDict()
        self._lock = threading.Lock()

    def jpeg(self, number: int, side: int) -> bytes | None:
        """Return a picture as JPEG with sides of at most `side` pixels; None if it cannot be read."""
        item = self.captions.items[number]
        if isinstance(self.captions.sources[item.source], Folder):
            return self._read([item], side)[item.row]
        if side != SIDES[0]:
            return self._read([item], side)[item.row]
        with self._lock:
            if number not in self._kept:
                self._read_ahead(number)
            self._kept.move_to_end(number)
            return self._kept[number]

    def _read_ahead(self, number: int) -> None:
        items = self.captions.items
        ahead = [
            each
            for each in range(number, min(number + READ_AHEAD, len(items)))
            if items[each].piece is items[number].piece
        ]
        found = self._read([items[each] for each in ahead], SIDES[0])
        self._kept |= {each: found[items[each].row] for each in ahead}
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def _read(self, items: list[Listed], side: int) -> dict[int, bytes | None]:
        """Read pictures of one piece, by their rows."""
        source, found = self.captions.sources[items[0].source], dict[int, bytes | None]()
        for sample in source.read(items[0].piece, {item.row for item in items}):
            found[sample.row] = None if sample.problem else self._reduced(sample.data, side)
        return dict.fromkeys((item.row for item in items), None) | found

    def _reduced(self, data: bytes, side: int) -> bytes | None:
        settings, buffer = self.config.data, io.BytesIO()
        limit = settings.cleaning.max_pixels
        try:
            picture = read_picture(data, background=settings.background, max_pixels=limit, at_least=side)
        except Rejected:
            return None
        picture.image.thumbnail((side, side))
        picture.image.save(buffer, format="JPEG", quality=85)
        return buffer.getvalue()
