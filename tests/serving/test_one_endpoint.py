"""One endpoint on a cluster: another one is refused, and what else is served there goes on."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import ray
import torch
from ray import serve
from ray.serve.config import ProxyLocation

from ray_jobs.config import Config, ConfigError
from ray_jobs.import_weights import imported_adapter, register_imported
from ray_jobs.registry.models import RegisteredModel, champion
from ray_jobs.weights.kohya import kohya_file
from serving.command import PATIENCE, Place, endpoint, free_port, serving_port
from serving.messages import label
from tests.serving import plain_diffusers
from tests.serving.conftest import served, wait_until
from tests.serving.test_endpoint import draw, pixels


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Other:
    """Somebody else's application."""

    def __call__(self) -> str:
        return "hello"


def other() -> serve.Application:
    return Other.bind()  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def stopped(ray_cluster: Any) -> Iterator[None]:
    yield
    serve.shutdown()


def starting(port: int) -> None:
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options={"host": "127.0.0.1", "port": port},
        controller_options={"runtime_env": {"env_vars": PATIENCE}},
    )


def applications() -> set[str]:
    return set(serve.status().applications)


def answers(url: str) -> Callable[[], bool]:
    """Whether somebody else's application answers."""

    def ask() -> bool:
        try:
            return httpx.get(f"{url}/other", timeout=30, trust_env=False).text == "hello"
        except httpx.HTTPError:  # the proxy is not up yet
            return False

    return ask


def test_a_second_endpoint_is_refused_and_the_first_goes_on_beside_what_joined_it(
    config: Config, registered: RegisteredModel
) -> None:
    assert serving_port(config, 8000) is None
    starting_too = ray.remote(num_cpus=0)(Place).options(name="endpoint", namespace="diffray").remote()
    told = "another command is starting an endpoint on this cluster"
    with pytest.raises(ConfigError, match=told), endpoint(config, registered, 8000):
        pass
    ray.kill(starting_too)  # as one that was stopped
    with served(config, registered) as url:
        for port in (free_port("127.0.0.1", 0), int(url.rpartition(":")[2])):
            told = f"this cluster has an endpoint already, at {re.escape(url)}, .*serve.delete\\('diffray'\\)"
            with pytest.raises(ConfigError, match=told), endpoint(config, registered, port):
                pass
        serve.run(other(), name="other", route_prefix="/other")
        ready = httpx.get(f"{url}/readyz", timeout=30, trust_env=False).json()
        assert ready["model"] == label(registered)
    assert applications() == {"other"}
    wait_until(answers(url))


def imported(
    config: Config, tiny_model: Path, lora_folder: Path, file: Path
) -> tuple[Config, RegisteredModel]:
    """An adapter in kohya's form, imported as the first version of a name of its own."""
    file.write_bytes(kohya_file(str(tiny_model), lora_folder))
    publish = config.publish.model_copy(update={"model_name": "imported"})
    serving = config.serve.model_copy(update={"drift_pictures": 0})  # it has no reference for drift
    config = config.model_copy(update={"publish": publish, "serve": serving})
    with imported_adapter(config, [str(file)]) as found:
        register_imported(config, found)
    return config, champion(config)


def test_a_serve_that_runs_already_is_used_at_its_address_only(
    config: Config,
    registered: RegisteredModel,
    tiny_flux: Path,
    tiny_model: Path,
    lora_folder: Path,
    tmp_path: Path,
    key: str,
) -> None:
    """What is served there is an imported adapter of another program; it draws what was trained."""
    port = free_port("127.0.0.1", 0)
    url = f"http://127.0.0.1:{port}"
    starting(port)
    serve.run(other(), name="other", route_prefix="/other")
    assert serving_port(config, port) == serving_port(config, 0) == port
    elsewhere = config.model_copy(update={"serve": config.serve.model_copy(update={"host": "0.0.0.0"})})
    told = f"Ray Serve runs on this cluster already, .*--set serve.host=127.0.0.1 --set serve.port={port}"
    for each, wanted in ((config, 1), (elsewhere, port)):
        with pytest.raises(ConfigError, match=told), endpoint(each, registered, wanted):
            pass

    # What does not fit leaves everything as it is.
    keyless = config.model_copy(update={"serve": config.serve.model_copy(update={"keys": None})})
    with pytest.raises(ConfigError, match="serve.keys"), endpoint(keyless, registered, port):
        pass
    switched = config.model_copy(update={"serve": config.serve.model_copy(update={"channels_last": True})})
    flux = replace(registered, base=str(tiny_flux))
    with pytest.raises(ConfigError, match=r"^serve\.channels_last: "), endpoint(switched, flux, port):
        pass
    assert applications() == {"other"}

    config, version = imported(config, tiny_model, lora_folder, tmp_path / "style.safetensors")
    with endpoint(config, version, port) as at:
        assert at == url and applications() == {"other", "diffray"}
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60) as client:
            [drawn] = draw(client, steps=4, guidance_scale=5.0, seed=11).data
    pipeline = plain_diffusers.load(tiny_model)
    pipeline.load_lora_weights(lora_folder)
    trained = pipeline(
        "a red apple", generator=torch.Generator().manual_seed(11), num_inference_steps=4, guidance_scale=5.0
    )
    assert np.abs(pixels(drawn) - np.asarray(trained.images[0]).astype(int)).max() <= 2
    assert applications() == {"other"}
    wait_until(answers(url))
