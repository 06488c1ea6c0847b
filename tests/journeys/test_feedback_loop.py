"""The loop closed, with real parts but for the voters: serve, ask, train, compare, release, take no poison.

A hidden scorer, which likes warm colours, votes with noise through the endpoint. Each of three rounds of
`diffray update` draws, votes, trains from the champion and registers a candidate, which the endpoint promotes
by votes between both. A fourth round, whose votes are reversed, is held back.
"""

import base64
import io
import json
import math
import random
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.local import LocalCluster
from diffray.update import Round, update
from ray_jobs.config import Config, load_config
from ray_jobs.metrics.votes import wilson_interval
from ray_jobs.pipeline import pipeline
from ray_jobs.registry import aliases
from ray_jobs.registry.models import champion, open_client, registered
from ray_jobs.run.folder import RunFolder
from serving.client import call
from serving.command import endpoint, free_port

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "fluent-emoji"
PICTURES, VOTED, BETWEEN, HELD_OUT = 160, 140, 30, 40
PROMOTED_S = 120  # seconds that the endpoint has to promote a candidate
NOISE = 0.5  # of a vote, in standard deviations of the scorer's differences

SETTINGS = [
    *("data.validation=0.2", "data.test=0.35", "publish.model_name=loop"),
    *("train.num_workers=1", "train.batch_size=8", "train.lora.rank=16", "train.lora.alpha=16"),
    *("train.ema_decay=0", "train.warmup_steps=4", "search.pack=off", "search.wait_for_scores=false"),
    *("search.learning_rates=[3.0e-4]", "search.ladder=[10,20,40]", "search.scheduler=none"),
    *("evaluate.num_samples=48", "evaluate.inference_steps=6", "evaluate.num_actors=1"),
    *("evaluate.second_network=null", "evaluate.bootstrap=16", "evaluate.memorisation_pictures=0"),
    'evaluate.feature_network={"kind": "efficientnet-lite0"}',
    *("serve.default_steps=6", "serve.follow_s=1", "serve.candidate_share=0.5"),
    *("serve.promote_feedback=0.05", "serve.requests_per_minute=100000", "publish.sample_count=4"),
    *("update.after_votes=20", 'train.preference={"votes": ["unused"], "beta": 2000}'),
]


def warmth(png: bytes) -> float:
    """What the hidden scorer likes: how much more red than blue there is."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(float) / 255
    return float(pixels[..., 0].mean() - pixels[..., 2].mean())


class Voter:
    """Draws pairs over HTTP, and votes with noise."""

    def __init__(self, url: str, seed: int) -> None:
        self.url, self.random = url, random.Random(seed)

    def draw(self, prompts: Sequence[str], model: str, seed: int) -> list[tuple[str, float]]:
        """Return the id and the score of a picture of each prompt."""

        def one(number: int) -> tuple[str, float]:
            body = {"prompt": prompts[number], "model": model, "seed": seed + number}
            [picture] = call(f"{self.url}/v1/images/generations", body, 300)["data"]
            return picture["id"], warmth(base64.b64decode(picture["b64_json"]))

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(one, range(len(prompts))))

    def prefers(self, one: Sequence[float], other: Sequence[float]) -> list[bool]:
        """Return whether the scorer, with noise, prefers the first of each pair."""
        apart = [a - b for a, b in zip(one, other, strict=True)]
        scale = NOISE * (stdev(apart) or 1.0)
        chances = [1 / (1 + math.exp(-max(-50.0, min(50.0, each / scale)))) for each in apart]
        return [self.random.random() < chance for chance in chances]

    def vote(
        self, one: list[tuple[str, float]], other: list[tuple[str, float]], reversed_: bool = False
    ) -> float:
        """Vote on each pair; return the share of votes for the first."""
        first = self.prefers([score for _, score in one], [score for _, score in other])
        for (a, _), (b, _), wins in zip(one, other, first, strict=True):
            better, worse = (a, b) if wins != reversed_ else (b, a)
            call(f"{self.url}/v1/feedback", {"image_id": better, "over": worse})
        return sum(first) / len(first)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The demo's model and some of its pictures."""
    lines = (DATA / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = [json.loads(line) for line in random.Random(0).sample(lines, PICTURES)]
    folder = tmp_path / "pictures"
    for row in chosen:
        (folder / row["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DATA / row["file_name"], folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in chosen))
    places = [f"storage={tmp_path / 'runs'}", f"data.source={folder}", f"model.base={ROOT}/models/emoji-base"]
    return load_config(ROOT / "configs" / "demo.yaml", [*places, *SETTINGS])


def prompts() -> list[str]:
    """All captions, in random order."""
    rows = (json.loads(line) for line in (DATA / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    return random.Random(1).sample(sorted({row["text"] for row in rows}), 4 * VOTED + BETWEEN + HELD_OUT)


@contextmanager
def served(config: Config, port: int) -> Iterator[str]:
    with endpoint(config, champion(config), port) as url:
        yield url


def promoted(config: Config, version: int) -> bool:
    """Wait until the endpoint has made a version the champion."""
    until = time.monotonic() + PROMOTED_S
    while time.monotonic() < until:
        if champion(config).version == version:
            return True
        time.sleep(1)
    return False


def fid_of(config: Config, version: int) -> tuple[float, float]:
    tags = open_client(config).get_model_version("loop", str(version)).tags
    return float(tags["test_fid"]), float(tags["test_fid_error"])


@pytest.mark.journeys
@pytest.mark.timeout(5400)
def test_three_rounds_of_votes_make_better_champions_and_a_poisoned_one_is_held_back(
    ray_cluster: LocalCluster, config: Config
) -> None:
    plain = config.model_copy(update={"train": config.train.model_copy(update={"preference": None})})
    pipeline(plain, Namespace(fresh=False))
    first = registered(config, "1").version
    if "champion" not in aliases.aliases_of(open_client(config), config):
        aliases.promote(config, first)
    words, told = prompts(), list[dict[str, Any]]()
    held_out, between = words[-HELD_OUT:], words[-HELD_OUT - BETWEEN : -HELD_OUT]
    port = free_port("127.0.0.1", 0)
    with served(config, port) as url:
        voter = Voter(url, seed=7)
        before = voter.draw(held_out, f"loop@{first}", 9_000)
        for number in range(4):
            began, poisoned = time.monotonic(), number == 3
            asked = words[number * VOTED : (number + 1) * VOTED]
            name = f"loop@{champion(config).version}"
            pairs = voter.draw(asked, name, 1_000 * number), voter.draw(asked, name, 100_000 + number)
            voter.vote(*pairs, reversed_=poisoned)
            done = update(config, Namespace(draw=url, if_due=True))
            assert isinstance(done, Round) and done.version and done.decision
            told.append({"round": number + 1, "decision": done.decision, "exported": done.exported})
            if poisoned:
                assert done.decision.startswith("held back"), done.decision
                break
            assert done.decision.startswith("candidate"), done.decision
            ours, theirs = (
                voter.draw(between, f"loop@{done.version}", 5_000),
                voter.draw(between, name, 5_000),
            )
            voter.vote(ours, theirs)
            assert promoted(config, done.version), "the endpoint did not promote the candidate"
            after = voter.draw(held_out, f"loop@{done.version}", 9_000)
            won = voter.prefers([score for _, score in after], [score for _, score in before])
            low, high = wilson_interval(sum(won), len(won))
            fid, error = fid_of(config, done.version)
            told[-1] |= {"share": sum(won) / len(won), "low": low, "high": high, "fid": fid, "error": error}
            told[-1]["seconds"] = round(time.monotonic() - began)
            print(told[-1], flush=True)
    fid, error = fid_of(config, first)
    print(json.dumps({"first": {"fid": fid, "error": error}, "rounds": told}, indent=1))
    for each in told[:3]:
        assert each["low"] > 0.5, "people do not prefer the round's champion to the first"
        assert each["fid"] - fid <= 2 * math.hypot(each["error"], error), "FID is worse"
    assert RunFolder.of(config).root.exists("updates.jsonl")
