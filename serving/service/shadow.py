"""Shadow mode: the candidate repeats requests that the champion has answered, invisibly to the client."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import NamedTuple

from cluster.storage import Storage
from serving.messages import RoutedRequest, label

logger = logging.getLogger("ray.serve")

WAITING = 16  # maximum queued pairs; more are skipped
PARAMETERS_FILE = "parameters.json"  # of a slot
NEXT = "next"  # file with the number of the slot to write next
# Fields of a request, and of its routing, in the file of parameters.
PARAMETERS = (
    "prompt",
    "seed",
    "steps",
    "guidance_scale",
    "negative_prompt",
    "height",
    "width",
    "previews",
    "strength",
    "control_scale",
    "guidance_interval",
)
ROUTING = ("image_id", "scored", "asked", "fused")
KEPT = 200  # pairs of images in the folder; the oldest is overwritten


class Shadowed(NamedTuple):
    """An image that was sent to a client, and the same request for the candidate."""

    picture_id: str
    answered: RoutedRequest
    picture: bytes  # file, as the client got it
    request: RoutedRequest


class Shadow:
    """Generate and store pairs, one at a time, after the answers were sent.

    Args:
        folder: output folder with slots `000/` and so on. Each holds `champion.png`, `candidate.png` (or both
            as .jpeg or .webp), for an edit the initial image as `given`, the references as `reference-0` and
            so on and `mask`, what a ControlNet follows as `control`, and `parameters.json`, which is written
            last. The file `next` holds the slot at which the next process continues.
        draw: function that has one image generated.
        may_draw: function that returns True if the replicas have capacity beside the open requests.
        kept: number of slots.
    """

    def __init__(
        self,
        folder: Storage,
        draw: Callable[[RoutedRequest], Awaitable[bytes]],
        may_draw: Callable[[], bool],
        *,
        kept: int = KEPT,
    ) -> None:
        self.folder, self._draw, self._may_draw, self.kept = folder, draw, may_draw, kept
        self._waiting: asyncio.Queue[Shadowed] = asyncio.Queue(WAITING)
        self.stored = self.passed_over = 0
        self._place: int | None = None  # next slot; None: not yet read from the folder

    def offer(self, pair: Shadowed) -> None:
        """Queue a pair if there is room. Never blocks."""
        if self._waiting.full():
            self.passed_over += 1
        else:
            self._waiting.put_nowait(pair)

    def delete_before(self, time: float) -> None:
        """Delete the pairs of requests before a time, in seconds since 1970; blocks."""
        for name in self.folder.folders():
            try:
                asked = json.loads(self.folder.child(name).read_text(PARAMETERS_FILE))["asked"]
            except FileNotFoundError:  # it is being written
                continue
            if asked < time:
                self.folder.delete(name)

    async def run(self) -> None:
        """Generate and store pairs until cancelled."""
        while True:
            pair = await self._waiting.get()
            while not self._may_draw():
                await asyncio.sleep(0.2)
            try:
                drawn = await self._draw(pair.request)
                await asyncio.to_thread(self._store, pair, drawn)
            except Exception as error:  # a failed pair must not stop the next ones
                self.passed_over += 1
                logger.warning("shadow of %s: %s", pair.picture_id, error)

    def _store(self, pair: Shadowed, drawn: bytes) -> None:
        if self._place is None:
            self._place = int(self.folder.read_text(NEXT)) % self.kept if self.folder.exists(NEXT) else 0
        name = f"{self._place:03d}"
        self.folder.delete(name)
        place = self.folder.child(name)
        place.write_bytes(f"champion.{pair.request.output.format}", pair.picture)
        place.write_bytes(f"candidate.{pair.request.output.format}", drawn)
        if pair.request.image is not None:
            place.write_bytes("given", pair.request.image)
        for number, content in enumerate(pair.request.references):
            place.write_bytes(f"reference-{number}", content)
        if pair.request.mask is not None:
            place.write_bytes("mask", pair.request.mask)
        if pair.request.control is not None:
            place.write_bytes("control", pair.request.control)
        versions = {"champion": label(pair.answered.version), "candidate": label(pair.request.version)}
        request, routed = asdict(pair.request.request), pair.request._asdict()
        parameters = {name: request[name] for name in PARAMETERS} | {name: routed[name] for name in ROUTING}
        place.write_text(PARAMETERS_FILE, json.dumps({"id": pair.picture_id, **versions, **parameters}))
        self.stored += 1
        self._place = (self._place + 1) % self.kept
        self.folder.write_text(NEXT, str(self._place))
