"""The endpoint over HTTP without Ray, with two LoRA versions of a tiny model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from ray_jobs.config import Config
from ray_jobs.registry.digests import weights_digest
from ray_jobs.registry.models import RegisteredModel
from serving.feedback.database import open_database
from serving.feedback.store import FeedbackStore
from tests.serving.conftest import save_adapters
from tests.serving.page_server import page_server

NAME = "served"


@dataclass(frozen=True)
class EndpointHere:
    """A running endpoint, version 1 of whose model is the champion and 2 the candidate."""

    url: str
    client: openai.OpenAI
    store: FeedbackStore
    config: Config
    versions: tuple[RegisteredModel, RegisteredModel]


def config_of(storage: Path, base: Path, **serve: Any) -> Config:
    return Config.model_validate(
        {
            "name": "here",
            "storage": str(storage),
            "data": {"source": "unused"},
            "model": {"base": str(base)},
            "search": {"learning_rates": [1e-3], "ladder": [2]},
            "publish": {"model_name": NAME},
            "serve": {
                "default_steps": 2,
                "allow_anonymous": True,
                "requests_per_minute": 100_000,
                "concurrent_requests": 64,
                **serve,
            },
        }
    )


def version_of(base: Path, folder: Path, number: int) -> RegisteredModel:
    """A LoRA version with random weights, as the registry names it."""
    save_adapters(base, folder, seed=number)
    digest = weights_digest(str(folder))
    return RegisteredModel(NAME, number, str(folder), digest, str(base), None, "lora", {})


@contextmanager
def page_of(
    config: Config, champion: RegisteredModel, candidate: RegisteredModel, folder: Path, **serve: Any
) -> Iterator[str]:
    """The URL of an endpoint that needs no key while the block runs.

    Args:
        folder: takes its feedback.
        serve: settings, beside those of `config`, without its checker and drift.
    """
    serve |= {"keys": None, "allow_anonymous": True, "safety_checker": None, "drift_pictures": 0}
    settings = config.model_copy(update={"serve": config.serve.model_copy(update=serve)})
    store = FeedbackStore(open_database(f"sqlite:///{folder / 'feedback.db'}"))
    try:
        with page_server(settings, champion, candidate, store) as url:
            yield url
    finally:
        store.close()


@contextmanager
def endpoint_here(storage: Path, base: Path, **serve: Any) -> Iterator[EndpointHere]:
    """Serve while the block runs.

    Args:
        storage: an empty folder.
        serve: settings, beside those of `config_of`.
    """
    config = config_of(storage, base, **serve)
    champion, candidate = (version_of(base, storage / "weights" / str(n), n) for n in (1, 2))
    store = FeedbackStore(open_database(f"sqlite:///{storage / 'feedback.db'}"))
    try:
        with (
            page_server(config, champion, candidate, store) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        ):
            yield EndpointHere(url, client, store, config, (champion, candidate))
    finally:
        store.close()
