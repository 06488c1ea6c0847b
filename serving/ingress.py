"""The ingress: the one process that HTTP requests reach, and that knows champion, candidate and limits."""

import logging
import time

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from ray_jobs.config import Config
from ray_jobs.registry import RegisteredModel
from ray_jobs.registry import champion as look_up
from serving.access import Access
from serving.api import create_api
from serving.feedback import FeedbackStore
from serving.following import warmed_up
from serving.keys import KeyRing
from serving.logs import configure_logging
from serving.order import label
from serving.replicas import Replicas
from serving.service import Service

logger = logging.getLogger("ray.serve")

FRESH_S = 120  # the champion that the application was built with is looked up again after that


@serve.deployment
@serve.ingress()
class Ingress:
    """Follows the registry from its start.

    Args:
        champion: as it was at `built`, seconds since 1970; a process that is started again later looks anew.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: Config, champion: RegisteredModel, built: float, model: DeploymentHandle
    ) -> None:
        configure_logging()
        self.keys = KeyRing.of(config.serve)
        feedback = FeedbackStore.open(config)
        replicas = Replicas(model)
        # The clock that said `built` may be another machine's, and ahead of this one.
        fresh = 0 <= time.time() - built < FRESH_S
        if not fresh:
            champion = _current(config, champion)
        first = await warmed_up(config, champion, replicas)
        await replicas.traits()
        self.service = Service(config, first, replicas, feedback)
        candidates = config.serve.candidate_share or config.serve.shadow_share
        # The first look also leaves the notice that the champion is refused.
        self.service.start(look_now=bool(candidates) or not fresh or first != champion)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        api = create_api(self.service)
        api.add_middleware(
            Access,
            settings=self.service.settings,
            keys=self.keys,
            metrics=self.service.metrics,
            sends_request_id=False,  # Serve's proxy does
        )
        return api


def _current(config: Config, known: RegisteredModel) -> RegisteredModel:
    """The registry's champion, or the one that is known if the registry does not answer."""
    try:
        return look_up(config)
    except Exception as error:  # the endpoint goes on, whatever a registry may answer
        logger.warning("the registry does not answer, so %s is served: %s", label(known), error)
        return known
