"""The ingress: the single process that receives HTTP requests and holds champion, candidate and limits."""

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from ray_jobs.config import Config
from ray_jobs.registry.models import RegisteredModel
from serving.feedback.store import FeedbackStore
from serving.http.access import Access
from serving.http.api import create_api
from serving.http.api_keys import KeyRing
from serving.http.logs import configure_logging
from serving.service.registry_watcher import current, is_fresh, warmed_up
from serving.service.replica_client import ReplicaClient
from serving.service.service import Service


@serve.deployment
@serve.ingress()
class Ingress:
    """Serve deployment of the HTTP API; it follows the registry from its start.

    Args:
        champion: the champion at time `built`, in seconds since 1970; a process that is restarted later looks
            it up again.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: Config, champion: RegisteredModel, built: float, model: DeploymentHandle
    ) -> None:
        configure_logging()
        self.keys = KeyRing.of(config.serve)
        feedback = FeedbackStore.open(config)
        replicas = ReplicaClient(model)
        fresh = is_fresh(built)
        champion = current(config, champion, built)
        first = await warmed_up(config, champion, replicas)
        await replicas.traits()
        self.service = Service(config, first, replicas, feedback)
        candidates = config.serve.candidate_share or config.serve.shadow_share
        # The first poll also sets the notice if the champion is refused.
        self.service.start(poll_now=bool(candidates) or not fresh or first != champion)

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
