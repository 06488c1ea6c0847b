"""Deliver finished images: record them, count them, and offer some to the candidate in shadow mode."""

import asyncio
import base64
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from serving.feedback.schemas import Generation, new_image_id
from serving.feedback.store import FeedbackStore
from serving.messages import Picture, RoutedRequest, label
from serving.schemas import AdapterChoice, ImageData, ImageRequest
from serving.service.metrics import Metrics
from serving.service.picture_links import PictureLinks
from serving.service.request_context import RequestContext
from serving.service.routing import Catalogue
from serving.service.shadow import Shadow, Shadowed


def choices_of(routed: RoutedRequest) -> list[AdapterChoice] | None:
    """Return the adapters of a request as its answer names them."""
    chosen = zip(routed.adapters, routed.request.adapters, strict=True)
    return [AdapterChoice(name=label(each), scale=scaled.scale) for each, scaled in chosen] or None


class Delivery:
    """Delivery of all finished images.

    Args:
        shadow_share: fraction of the champion's images that the candidate generates too, 0 to 1.
        links: store of the pictures that clients fetch by an address.
        public_url: of the application, behind a proxy; None: as each client reached it.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        feedback: FeedbackStore,
        metrics: Metrics,
        shadow: Shadow,
        shadow_share: float,
        links: PictureLinks,
        public_url: str | None,
    ) -> None:
        self.catalogue, self.feedback, self.metrics = catalogue, feedback, metrics
        self.shadow, self.shadow_share = shadow, shadow_share
        self.links, self.public_url = links, public_url
        self._recording = ThreadPoolExecutor(4, "recording")  # may block on the database and the storage

    async def deliver(
        self,
        request: ImageRequest,
        requests: list[RoutedRequest],
        pictures: list[Picture],
        context: RequestContext,
    ) -> list[ImageData]:
        """Record finished images, and return them as sent to the client.

        Args:
            request: the client's.
            context: facts about the HTTP request.

        Raises:
            APIError: 503, the images cannot be recorded, or not stored for their addresses.
        """
        facts = {
            "created": time.time(),
            "user": request.user,
            "key_id": context.key,
            "role": context.alias or "other",
        }
        records = [
            Generation.model_validate(
                {**each.parameters(picture.size), **facts, "seconds": time.time() - each.asked}
            )
            for each, picture in zip(requests, pictures, strict=True)
        ]
        by_url = request.response_format == "url"
        base = f"{self.public_url.rstrip('/')}/" if self.public_url else context.base_url
        addressed = list(zip(requests, pictures, strict=True)) if by_url else []
        urls = await asyncio.get_running_loop().run_in_executor(
            self._recording, self._keep, records, addressed
        )
        data = []
        for number, (each, picture) in enumerate(zip(requests, pictures, strict=True)):
            if picture.waited_s is not None:
                self.metrics.first_step(context.model, context.version, picture.waited_s)
            data.append(
                ImageData(
                    id=each.image_id,
                    b64_json=None if by_url else base64.b64encode(picture.file).decode(),
                    url=base + urls[number] if by_url else None,
                    seed=each.request.seed,
                )
            )
            candidate = self.catalogue.candidate
            drawn_by_champion = label(each.version) == label(self.catalogue.champion)
            if candidate and drawn_by_champion and random.random() < self.shadow_share:
                again = each._replace(
                    version=candidate,
                    request=replace(each.request, previews=0),
                    image_id=new_image_id(),
                    fused=False,
                )
                self.shadow.offer(Shadowed(each.image_id, each, picture.file, again))
        return data

    def _keep(
        self, generations: list[Generation], addressed: list[tuple[RoutedRequest, Picture]]
    ) -> list[str]:
        """Record how images were generated, and store those that clients fetch by an address.

        Return the addresses, below the application's.
        """
        urls = [
            self.links.store(each.image_id, picture.file, each.output.format) for each, picture in addressed
        ]
        for each in generations:
            self.feedback.record(each)
        return urls
