"""Reproduce a served image by sending its recorded parameters to a running endpoint."""

import base64
import time
from typing import Any

import requests

from ray_jobs.config import ConfigError
from serving.feedback.schemas import Generation
from serving.provenance import read_provenance

TIMEOUT_S = 300
TRIES = 6  # maximum tries of a request that gets 429 or 503
LONGEST_WAIT_S = 60.0
# Provenance fields that must match for the reproduced image to be the rated one.
SAME = (
    "model",
    "version",
    "adapter",
    "adapters",
    "seed",
    "steps",
    "guidance_scale",
    "guidance_interval",
    "size",
)


class Unavailable(Exception):
    """This image cannot be reproduced; the message is the same for the same reason."""


class Replayer:
    """Client of an endpoint that reproduces images.

    Args:
        url: URL of the endpoint, without /v1.
        key: API key with the scope `generate`; None if none is required.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self._url = f"{url.rstrip('/')}/v1/images/generations"
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def draw(self, generation: Generation) -> bytes:
        """Return the PNG of a generation.

        Raises:
            Unavailable: the endpoint refuses, or serves another version than the one recorded.
            ConfigError: nothing answers there or the key is rejected; names --draw or --key.
        """
        given = (generation.strength, generation.num_references, generation.control_scale)
        if any(each is not None for each in given):
            raise Unavailable("it was drawn from pictures that were sent, which are not kept")
        wanted = ("prompt", "seed", "steps", "guidance_scale", "size")
        body = {name: getattr(generation, name) for name in wanted} | {"n": 1}
        version = f"@{generation.version}" if generation.version else ""
        body["model"] = f"{generation.model}{version}"
        if generation.adapters is not None:  # recorded with the beginning of their digests
            adapters = [(str(each["name"]), each["scale"]) for each in generation.adapters]
            body["adapters"] = [{"name": name.partition("#")[0], "scale": s} for name, s in adapters]
        if generation.guidance_interval is not None:
            body["guidance_interval"] = generation.guidance_interval
        if generation.negative_prompt is not None:
            body["negative_prompt"] = generation.negative_prompt
        [picture] = self._ask(body)["data"]
        png = base64.b64decode(picture["b64_json"])
        if objection := self.objection(generation, png):
            raise Unavailable(objection)
        return png

    def objection(self, generation: Generation, png: bytes) -> str | None:
        """Return the reason why a PNG, by its provenance, is not a generation's image; None if it is."""
        facts = read_provenance(png)
        if facts is None:
            return "the endpoint does not tell which version drew it (set serve.provenance: true)"
        for name in SAME:
            actual, recorded = facts.get(name), getattr(generation, name)
            if actual != recorded:
                return f"it was drawn with {name} {recorded}, the endpoint has {actual}"
        return None

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        wait_s = 1.0
        for _ in range(TRIES):
            try:
                answer = requests.post(self._url, json=body, headers=self._headers, timeout=TIMEOUT_S)
            except requests.RequestException as error:
                reason = type(error).__name__
                raise ConfigError(f"--draw: {self._url}: no answer ({reason}); start the endpoint") from None
            if answer.status_code in (401, 403):
                raise ConfigError(f"--key: the endpoint does not accept it: {_message(answer)}")
            if answer.status_code not in (429, 503):
                break
            seconds = answer.headers.get("Retry-After", "")
            time.sleep(min(float(seconds) if seconds.isdecimal() else wait_s, LONGEST_WAIT_S))
            wait_s *= 2
        if answer.status_code != 200:
            raise Unavailable(f"the endpoint answered {answer.status_code}: {_message(answer)}")
        return dict(answer.json())


def _message(answer: requests.Response) -> str:
    """Return the message of an error in OpenAI's format, else the answer's first 200 characters."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]
