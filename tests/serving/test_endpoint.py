"""The endpoint speaks OpenAI's Images API to OpenAI's own client, and draws what diffusers draws."""

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from ray_jobs.config import Config
from ray_jobs.registry import RegisteredModel


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def pixels(picture: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.b64_json)))).astype(int)


def draw(client: openai.OpenAI, prompt: str = "a red apple", **fields: Any) -> Any:
    """images.generate; `steps`, `guidance_scale` and `seed` are not OpenAI's."""
    own = {key: fields.pop(key) for key in ("steps", "guidance_scale", "seed") if key in fields}
    return client.images.generate(prompt=prompt, extra_body=own, **fields)


def test_a_served_picture_is_the_saved_models_in_plain_diffusers(
    client: openai.OpenAI, tiny_model: Path, lora_folder: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    (served,) = draw(client, steps=4, guidance_scale=5.0, seed=11).data
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)

    def plain() -> np.ndarray:
        generator = torch.Generator().manual_seed(11)
        answer = pipeline("a red apple", generator=generator, num_inference_steps=4, guidance_scale=5.0)
        return np.asarray(answer.images[0]).astype(int)

    base = plain()
    pipeline.load_lora_weights(lora_folder)
    assert np.abs(pixels(served) - plain()).max() <= 2
    assert np.abs(pixels(served) - base).max() > 10, "the adapters change nothing"


def test_the_same_seed_draws_the_same_picture_beside_other_requests(client: openai.OpenAI) -> None:
    alone = pixels(draw(client, seed=3).data[0])
    asked = [("a rocket", 1), ("a rocket", 3), ("a red apple", 3), ("a red apple", 4)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda row: draw(client, row[0], seed=row[1]).data[0], asked))
    differences = [np.abs(pixels(answer) - alone).max() for answer in answers]
    assert differences[2] <= 1
    assert min(differences[:2] + differences[3:]) > 2


def test_several_pictures_count_their_seeds_up(client: openai.OpenAI) -> None:
    several = draw(client, n=3, seed=20, size="64x64").data
    assert [picture.seed for picture in several] == [20, 21, 22]
    assert np.abs(pixels(several[2]) - pixels(draw(client, seed=22).data[0])).max() <= 1


def test_without_a_seed_one_is_drawn_and_told(client: openai.OpenAI) -> None:
    first, second = draw(client).data[0], draw(client).data[0]
    assert first.seed != second.seed
    assert np.abs(pixels(first) - pixels(draw(client, seed=first.seed).data[0])).max() <= 1


def test_fields_that_change_nothing_are_accepted(client: openai.OpenAI) -> None:
    neutral = {"quality": "auto", "background": "auto", "size": "auto", "user": "someone"}
    assert draw(client, response_format="b64_json", model="served", **neutral).data


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a" * 1001}, "prompt"),
        ({"n": 9}, "n"),
        ({"size": "1024x1024"}, "size"),
        ({"response_format": "url"}, "response_format"),
        ({"quality": "hd"}, "quality"),
        ({"steps": 0}, "steps"),
        ({"steps": 101}, "steps"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"extra_body": {"stepz": 3}}, "stepz"),
    ],
)
def test_a_bad_request_names_its_field(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        if "extra_body" in fields:
            client.images.generate(prompt="a", **fields)
        else:
            draw(client, **fields)
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"
    assert param in refused.value.message


def test_a_size_that_is_not_the_models_is_told_which_is(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="this model draws 64x64"):
        draw(client, size="128x128")


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        draw(client, model="dall-e-3")
    assert refused.value.code == "model_not_found"


def test_more_requests_than_may_wait_are_turned_away(client: openai.OpenAI, config: Config) -> None:
    def status(seed: int) -> int:
        try:
            draw(client, n=8, steps=20, seed=seed)
        except openai.InternalServerError as error:
            assert error.code == "queue_full"
            return error.status_code
        return 200

    count = 3 * config.serve.max_queued_requests
    with ThreadPoolExecutor(count) as pool:
        statuses = list(pool.map(status, range(count)))
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= config.serve.max_queued_requests
    assert status(0) == 200


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/images/generations", b"{not json", 400),
        ("POST", "/v1/images/generations", b"[]", 400),
        ("POST", "/v1/images/generations", b'{"prompt": "\\ud800"}', 400),
        ("POST", "/v1/images/edits", b"{}", 404),
        ("GET", "/v1/images/generations", None, 405),
    ],
)
def test_every_error_has_openais_shape(
    url: str, method: str, path: str, content: bytes | None, status: int
) -> None:
    answer = httpx.request(
        method, url + path, content=content, headers={"Content-Type": "application/json"}, trust_env=False
    )
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_champion_is_listed_with_its_version(client: openai.OpenAI, registered: RegisteredModel) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("served", "model", "diffray")
    assert model.model_extra == {"version": registered.version, "size": "64x64"}


def test_healthz_answers_once_the_model_is_loaded(url: str) -> None:
    answer = httpx.get(f"{url}/healthz", trust_env=False)
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
