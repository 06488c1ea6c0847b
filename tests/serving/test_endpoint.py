"""The endpoint speaks OpenAI's Images API to OpenAI's own client, and draws what diffusers draws."""

import base64
import io
import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import requests
import torch
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from ray_jobs.config import Config
from ray_jobs.registry.models import RegisteredModel
from serving.http.api_keys import add_key
from serving.provenance import read_provenance
from tests.serving.conftest import KEYS, WINDOW, loads, wait_until

CONFORMANCE = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


def _picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, format="PNG")
    return file.getvalue()


PICTURE = _picture()


@pytest.fixture(scope="module")
def client(url: str, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60) as client:
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
        ({"response_format": "png"}, "response_format"),
        ({"quality": "best"}, "quality"),
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


@pytest.mark.parametrize(
    ("size", "reason"),
    [("129x64", "128 pixels per side"), ("64x60", "a multiple of 8"), ("64", "width x height")],
)
def test_a_size_that_cannot_be_drawn_is_told_why(client: openai.OpenAI, size: str, reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as refused:
        draw(client, size=size)
    assert refused.value.param == "size"


def test_other_sizes_than_the_models_own_are_drawn(client: openai.OpenAI) -> None:
    answer = draw(client, size="128x64")
    assert pixels(answer.data[0]).shape == (64, 128, 3)
    assert answer.size == "128x64"


def test_a_negative_prompt_changes_the_picture(client: openai.OpenAI) -> None:
    plain = draw(client, seed=3, guidance_scale=5.0)
    body = {"seed": 3, "guidance_scale": 5.0, "negative_prompt": "a rocket"}
    other: Any = client.images.generate(prompt="a red apple", extra_body=body)
    assert np.abs(pixels(plain.data[0]) - pixels(other.data[0])).max() > 2


def test_every_picture_has_an_id_and_tells_its_version(client: openai.OpenAI) -> None:
    answer = draw(client, n=2)
    ids = [picture.model_extra["id"] for picture in answer.data]
    assert len(set(ids)) == 2
    assert all(re.fullmatch("img-[0-9a-f]{24}", each) for each in ids)
    assert answer.model_extra["model"] == "served@1"


def test_a_stream_shows_unfinished_pictures_and_ends_with_the_one_that_is_drawn_without(
    client: openai.OpenAI,
) -> None:
    whole = draw(client, steps=8, seed=5).data[0]
    body = {"steps": 8, "seed": 5}
    with client.images.generate(
        prompt="a red apple", stream=True, partial_images=3, extra_body=body
    ) as stream:
        events: list[Any] = list(stream)
    *partial, last = events
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 3
    assert [event.partial_image_index for event in partial] == [0, 1, 2]
    assert last.type == "image_generation.completed"
    assert (last.size, last.output_format, last.model_extra["seed"]) == ("64x64", "png", 5)
    assert np.abs(pixels(last) - pixels(whole)).max() <= 1
    assert all(np.abs(pixels(event) - pixels(whole)).max() > 5 for event in partial)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True, "n": 2}, "n"),
        ({"partial_images": 2}, "partial_images"),
        ({"stream": True, "size": "9x9"}, "size"),
    ],
)
def test_a_stream_that_cannot_begin_is_an_answer_with_its_own_status(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a", **fields)
    assert refused.value.param == param


def test_the_base_alone_and_the_version_are_drawn_side_by_side(
    client: openai.OpenAI, tiny_model: Path
) -> None:
    with ThreadPoolExecutor(2) as pool:
        based, tuned = pool.map(lambda name: draw(client, model=name, seed=7).data[0], ["base", "served@1"])
    assert np.abs(pixels(based) - pixels(tuned)).max() > 10
    again = pixels(draw(client, seed=7).data[0])
    assert np.abs(pixels(tuned) - again).max() <= 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_rows(url: str, key: str, stream: bool) -> None:
    body = {"prompt": "a", "steps": 100, "n": 1 if stream else 8, "size": "128x128", "stream": stream}
    body |= {"partial_images": 3} if stream else {}

    def running() -> int:
        return sum(each.running + each.waiting for load in loads() for each in load.engines.values())

    wait_until(lambda: not running())
    pictures = loads()[0].engines["base"].pictures
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        content = json.dumps(body).encode()
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content)}\r\n"
        connection.sendall(
            f"{head}Authorization: Bearer {key}\r\nContent-Type: application/json\r\n\r\n".encode() + content
        )
        wait_until(running)
    wait_until(lambda: not running(), timeout_s=30)
    assert loads()[0].engines["base"].pictures == pictures


def test_an_edit_begins_with_the_picture_that_is_sent(client: openai.OpenAI) -> None:
    files = [base64.b64decode(draw(client, seed=seed, size="128x64").data[0].b64_json) for seed in (1, 9)]

    def edited(file: bytes, **fields: Any) -> Any:
        own = {"strength": 0.5, "steps": 4, "seed": 2}
        return client.images.edit(image=("a.png", file), prompt="a rocket", extra_body=own, **fields)

    first, again, other = (pixels(edited(file).data[0]) for file in (files[0], files[0], files[1]))
    assert first.shape == (64, 64, 3)
    assert np.abs(first - again).max() <= 1
    assert np.abs(first - other).max() > 10
    assert edited(files[0], n=2, size="128x128").size == "128x128"


def test_an_edit_is_streamed_under_its_own_names(client: openai.OpenAI) -> None:
    own = {"strength": 1, "steps": 4}
    with client.images.edit(
        image=("a.png", PICTURE), prompt="a", stream=True, partial_images=1, extra_body=own
    ) as stream:
        assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.parametrize(
    ("image", "fields", "param"),
    [
        (b"no picture", {}, "image"),
        (PICTURE, {"strength": 0}, "strength"),
        (PICTURE, {"n": 9}, "n"),
        (PICTURE, {"mask": "x"}, "mask"),
        (PICTURE, {"mask": b"\xff"}, "mask"),
    ],
)
def test_an_edit_that_cannot_be_made_names_its_field(
    client: openai.OpenAI, image: bytes, fields: dict[str, Any], param: str
) -> None:
    mask = fields.get("mask")
    own = {"mask": ("mask.png", mask)} if isinstance(mask, bytes) else {"extra_body": fields}
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(image=("a.png", image), prompt="a", **own)
    assert refused.value.param == param


def test_an_edit_begins_with_one_picture_also_where_it_is_a_list(client: openai.OpenAI) -> None:
    one, answer = ("a.png", PICTURE), client.images.edit(image=[("a.png", PICTURE)], prompt="a")
    assert answer.data and pixels(answer.data[0]).shape == (64, 64, 3)
    with pytest.raises(openai.BadRequestError, match="2 were sent, and drawing begins with one") as refused:
        client.images.edit(image=[one, one], prompt="a")
    assert refused.value.param == "image"


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        draw(client, model="dall-e-3")
    assert refused.value.code == "model_not_found"


def ask(url: str, path: str, key: str | None = None, **body: Any) -> httpx.Response:
    """GET, or POST where there is a body."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    method = "POST" if body else "GET"
    return httpx.request(method, url + path, json=body or None, headers=headers, timeout=60, trust_env=False)


def test_nobody_draws_without_a_key_or_with_a_wrong_one(url: str) -> None:
    for key in (None, "diffray-00000000-" + "0" * 64):
        answer = ask(url, "/v1/images/generations", key, prompt="a")
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_a_new_key_works_at_once_and_is_held_to_its_scope_and_limits(url: str, storage: Path) -> None:
    key = add_key(storage / KEYS, "little", frozenset({"generate"}), requests_per_minute=2)
    for path in ("/metrics", "/v1/rollout"):
        answer = ask(url, path, key)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_scope")
    answers = [ask(url, "/v1/images/generations", key, prompt="a") for _ in range(3)]
    assert [each.status_code for each in answers] == [200, 200, 429]
    assert 0 < int(answers[2].headers["Retry-After"]) <= 60


def test_a_body_larger_than_is_taken_is_refused(url: str, key: str, config: Config) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    content = b" " * ((config.serve.max_body_mb << 20) + 1)
    answer = httpx.post(f"{url}/v1/images/generations", content=content, headers=headers, trust_env=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def measured(url: str, key: str) -> dict[str, float]:
    """Samples of GET /metrics by name and labels."""
    answer = ask(url, "/metrics", key)
    assert answer.headers["Content-Type"].startswith("text/plain")
    lines = [line.rpartition(" ") for line in answer.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_metrics_count_requests_pictures_and_errors(client: openai.OpenAI, url: str, key: str) -> None:
    answered = 'diffray_request_seconds_count{model="served",status="200",version="1"}'
    names = {
        answered: 1,
        'diffray_answers_total{alias="champion",status="200"}': 1,
        'diffray_first_step_seconds_count{model="served",version="1"}': 2,
        'diffray_rejected_requests_total{reason="invalid_value"}': 1,
        "diffray_pictures_total": 2,
        "diffray_denoiser_steps_total": 6,
    }
    before = measured(url, key)
    draw(client, n=2, steps=3)
    with pytest.raises(openai.BadRequestError):
        draw(client, steps=0)
    after = measured(url, key)
    assert {name: after[name] - before.get(name, 0) for name in names} == names
    assert after["diffray_replicas"] == after["diffray_min_replicas"] == 1
    assert (after["diffray_row_places"], after["diffray_queue_places"]) == (8, 4)


def test_a_request_is_one_line_of_the_log_without_its_prompt(client: openai.OpenAI, ray_cluster: Any) -> None:
    answer = client.images.with_raw_response.generate(
        prompt="a secret apple", extra_headers={"X-Request-ID": "a-request-to-find"}
    )
    assert answer.headers["X-Request-ID"] == "a-request-to-find"

    def written() -> list[str]:
        from ray._private import worker

        logs = Path(worker._global_node.get_logs_dir_path())
        lines = [line for file in logs.glob("worker-*.err") for line in file.read_text().splitlines()]
        return [line for line in lines if '"request_id": "a-request-to-find"' in line]

    (line,) = wait_until(written)
    told = json.loads(line)
    assert (told["path"], told["status"], told["model"], told["n"]) == (
        "/v1/images/generations",
        200,
        "served",
        1,
    )
    assert len(told["key_id"]) == 8 and "secret" not in line


def test_a_rating_counts_for_the_version_that_drew_the_picture(
    client: openai.OpenAI, url: str, key: str
) -> None:
    def tally() -> dict[str, int]:
        rows = ask(url, "/v1/rollout", key).json()["feedback"]
        found = [
            row for row in rows if (row["model"], row["version"], row["role"]) == ("served", 1, "champion")
        ]
        return found[0] if found else {"ups": 0, "wins": 0, "losses": 0}

    before = tally()
    better, worse = (picture.model_extra["id"] for picture in draw(client, n=2).data)
    answer = ask(url, "/v1/feedback", key, image_id=better, rating=1, over=worse, comment="redder")
    assert (answer.status_code, answer.json()["rating"]) == (200, 1)
    after = tally()
    assert [after[name] - before[name] for name in ("ups", "wins", "losses")] == [1, 1, 1]
    unknown = ask(url, "/v1/feedback", key, image_id="img-" + "0" * 24, rating=1)
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "image_not_found")


def test_a_streamed_picture_and_an_edit_can_be_rated(client: openai.OpenAI, url: str, key: str) -> None:
    with client.images.generate(prompt="a", stream=True) as stream:
        events: list[Any] = list(stream)
    edited: Any = client.images.edit(image=("a.png", PICTURE), prompt="a").data
    for name in (events[-1].model_extra["id"], edited[0].model_extra["id"]):
        assert ask(url, "/v1/feedback", key, image_id=name, rating=-1).status_code == 200


def test_a_picture_is_drawn_again_from_what_its_file_says(client: openai.OpenAI) -> None:
    first = draw(client, "a rocket", steps=5, guidance_scale=4.0, size="64x72").data[0]
    facts = read_provenance(base64.b64decode(first.b64_json))
    assert facts is not None
    assert (facts["image_id"], facts["prompt"]) == (first.model_extra["id"], "a rocket")
    own = {name: facts[name] for name in ("seed", "steps", "guidance_scale", "size", "prompt")}
    again = draw(client, model=f"{facts['model']}@{facts['version']}", **own).data[0]
    assert np.abs(pixels(first) - pixels(again)).max() <= 1


def test_what_the_safety_checker_blocks_is_not_sent_nor_are_its_unfinished_pictures(
    client: openai.OpenAI,
) -> None:
    with pytest.raises(openai.BadRequestError, match="blocked size") as refused:
        draw(client, size="72x64")
    assert refused.value.code == "content_policy_violation"
    # Nothing was sent, so that the stream is an answer with its own status.
    with pytest.raises(openai.BadRequestError, match="blocked size"):
        client.images.generate(prompt="a", stream=True, partial_images=3, size="72x64")


def test_drift_of_the_champion_is_told_once_the_window_is_full(
    client: openai.OpenAI, url: str, key: str
) -> None:
    def told() -> float | None:
        draw(client, n=8)
        return measured(url, key).get('diffray_drift_fid{model="served",version="1"}')

    assert wait_until(told, timeout_s=240) > 0
    assert loads()[0].drift["served", 1].num_pictures == WINDOW


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
        ("POST", "/v1/images/edits", b"{}", 400),
        ("POST", "/v1/images/variations", b"{}", 400),
        ("POST", "/v1/images/masks", b"{}", 404),
        ("GET", "/v1/images/generations", None, 405),
    ],
)
def test_every_error_has_openais_shape(
    url: str, key: str, method: str, path: str, content: bytes | None, status: int
) -> None:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    answer = httpx.request(method, url + path, content=content, headers=headers, trust_env=False)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_all_that_may_be_asked_for_is_listed_with_its_version(
    client: openai.OpenAI, registered: RegisteredModel
) -> None:
    listed: dict[str, Any] = {model.id: model for model in client.models.list().data}
    assert {"served", "served@1", "served:champion", "base"} <= set(listed)
    model = listed["served"]
    assert (model.object, model.owned_by) == ("model", "diffray")
    own = {"version": registered.version, "size": "64x64", "references": 0, "masks": False, "control": False}
    assert model.model_extra == own
    assert listed["base"].model_extra["version"] is None
    assert client.models.retrieve("served:champion").id == "served:champion"
    with pytest.raises(openai.NotFoundError, match="'other' is not served"):
        client.models.retrieve("other")


def test_healthz_answers_while_the_process_lives(url: str) -> None:
    answer = httpx.get(f"{url}/healthz", trust_env=False)
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_readyz_names_the_version_that_answers(url: str) -> None:
    answer = httpx.get(f"{url}/readyz", trust_env=False)
    assert (answer.status_code, answer.json()) == (
        200,
        {"status": "ok", "model": "served@1", "notice": None},
    )


def test_what_the_page_links_to_is_there(url: str) -> None:
    page = httpx.get(f"{url}/", trust_env=False).text
    links = {link for link in re.findall(r'(?:href|src)="([^"]+)"', page) if not link.startswith("#")}
    assert {"openapi.json", "web/style.css"} <= links
    assert {link: httpx.get(f"{url}/{link}", trust_env=False).status_code for link in links} == dict.fromkeys(
        links, 200
    )


def test_the_openapi_document_keeps_the_limits_and_gives_examples(url: str, config: Config) -> None:
    document = httpx.get(f"{url}/openapi.json", trust_env=False).json()
    request = document["components"]["schemas"]["ImageRequest"]
    assert request["examples"]
    assert request["properties"]["n"]["maximum"] == config.serve.max_pictures
    assert request["properties"]["prompt"]["maxLength"] == config.serve.max_prompt_length
    assert "422" not in document["paths"]["/v1/images/generations"]["post"]["responses"]
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert document["paths"]["/v1/images/generations"]["post"]["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/healthz"]["get"]


def test_generated_requests_are_answered_as_the_openapi_document_says(url: str, key: str) -> None:
    """schemathesis makes requests up from the document, right ones and wrong ones."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    def fine(case: Any) -> None:
        answer = case.call(base_url=url, timeout=60, session=session)
        case.validate_response(answer, checks=CONFORMANCE)

    session = requests.Session()
    session.trust_env = False
    session.headers["Authorization"] = f"Bearer {key}"
    document = httpx.get(f"{url}/openapi.json", trust_env=False).json()
    operations = list(schemathesis.openapi.from_dict(document).get_all_operations())
    assert len(operations) >= 5
    for found in operations:
        operation = found.ok()
        # What takes nothing cannot be asked wrongly.
        for mode in schemathesis.GenerationMode if operation.body else [schemathesis.GenerationMode.POSITIVE]:
            bounded = settings(
                max_examples=12,
                deadline=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            bounded(given(operation.as_strategy(generation_mode=mode))(fine))()
