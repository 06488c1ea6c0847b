"""Training on votes through Ray: prepared, streamed to one worker and to two, ranked by held-out votes."""

import io
import json
import shutil
from pathlib import Path

import pytest

from cluster.local import LocalCluster
from ray_jobs.config import Config, ConfigError
from ray_jobs.data.preparation import prepare
from ray_jobs.evaluation.pool import evaluators
from ray_jobs.planning.settled import settled
from ray_jobs.publish import publish
from ray_jobs.run.records import VOTES
from ray_jobs.search import search
from tests.conftest import captions, draw
from tests.ray.test_training import tiny_config, train_variants
from tests.tiny_models import image_classifier
from tests.workers import Workers

PAIRS = 30
STEPS = 3


@pytest.fixture(scope="module")
def votes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of votes: of each drawn picture over a later one of the same prompt, and of some again."""
    folder, texts = tmp_path_factory.mktemp("votes"), captions()
    (folder / "images").mkdir()
    rows = []
    for number in range(PAIRS):
        prompt = texts[number % 25]
        for name, seed in (("chosen", number), ("rejected", 100 + number)):
            file = io.BytesIO()
            draw(texts[seed % len(texts)], seed).save(file, format="PNG")
            (folder / "images" / f"{name}-{number}.png").write_bytes(file.getvalue())
        images = {f"{name}_image": f"images/{name}-{number}.png" for name in ("chosen", "rejected")}
        rows.append({"prompt": prompt, **images})
    (folder / "preferences.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def configured(model: Path, pictures: Path, storage: Path, votes: Path, loss: str, *others: str) -> Config:
    preference = f'train.preference={{"votes": ["{votes}"], "loss": "{loss}", "beta": 1000}}'
    return tiny_config(model, pictures, storage, preference, *others)


def test_votes_are_trained_on_alike_by_one_worker_and_by_two(
    two_workers: Workers, tiny_model: Path, picture_folder: Path, votes: Path, tmp_path: Path
) -> None:
    variants, datasets = {}, {}
    for loss in ("dpo", "kto"):
        quick = ["train.learning_rate=0.01", "train.warmup_steps=0"]
        config = configured(tiny_model, picture_folder, tmp_path / loss, votes, loss, *quick)
        datasets[loss] = prepare(config)
        variants[loss] = config
        held = datasets[loss].votes
        assert held
        prompts = {
            split: set(held.dataset.table(split, ["text"])["text"].to_pylist())
            for split in ("train", "validation", "test")
        }
        assert all(prompts.values())
        assert sum(map(len, prompts.values())) == len(set.union(*prompts.values())), "a prompt in two splits"
        rows = sum(held.dataset.num_rows(split) for split in prompts)
        assert rows == (PAIRS if loss == "dpo" else 2 * PAIRS)
    one = Workers(1, tmp_path / "one-worker")
    try:
        for loss, config in variants.items():
            found = [
                train_variants({loss: config}, datasets[loss], tmp_path, workers, STEPS)[loss]["loss"]
                for workers in (one, two_workers)
            ]
            # beta / 2 = 500 times what rounding makes of the difference of two losses.
            assert found[0] == pytest.approx(found[1], abs=500 * 2e-6)
            assert found[0][0] == pytest.approx(0.6931472 if loss == "dpo" else 0.5)
            assert all(abs(later - found[0][0]) > 0.01 for later in found[0][1:])
    finally:
        one.stop()


def test_a_search_over_beta_ranks_by_held_out_votes_and_publishes(
    ray_cluster: LocalCluster, tiny_model: Path, picture_folder: Path, votes: Path, tmp_path: Path
) -> None:
    space = 'search.space={"train.preference.beta": [500, 5000]}'
    short = ["evaluate.inference_steps=2", "evaluate.num_actors=1", "evaluate.num_samples=12"]
    few = ["evaluate.bootstrap=4", "publish.sample_count=2", "train.num_workers=1"]
    classifier = image_classifier(tmp_path / "classifier")
    balance = [f"evaluate.balance.classifier={classifier}", "evaluate.balance.pictures=3"]
    balance += ['evaluate.balance.prompts=["a circle", "a square"]']
    given = [space, *short, *few, *balance]
    config = settled(configured(tiny_model, picture_folder, tmp_path, votes, "dpo", *given))
    assert config.search.rank_by == VOTES
    dataset = prepare(config)
    with evaluators(config, dataset) as pool:
        found = search(config, dataset, pool)
        assert len(found.measured) >= 3
        for row in found.measured:
            assert row.ranked_by == VOTES and row.votes is not None and 0 <= row.votes <= 1
            assert row.votes_error is not None
        winner = publish(config, dataset, pool, found)
    assert winner.base_test_votes == 0.5 and winner.test_votes is not None
    assert winner.ranked_by == VOTES
    drawn = winner.balance
    assert drawn and sum(drawn.winner.values()) == sum(drawn.base.values()) == 6
    assert sum(drawn.data.values()) > 6 and set(drawn.data) <= {"dark", "bright"}
    assert "<h2>Balance</h2>" in (tmp_path / "tiny" / "report.html").read_text()


def test_too_few_votes_are_told_before_anything_is_trained(
    ray_cluster: LocalCluster, tiny_model: Path, picture_folder: Path, votes: Path, tmp_path: Path
) -> None:
    few = Path(shutil.copytree(votes, tmp_path / "few"))
    lines = (votes / "preferences.jsonl").read_text().splitlines(keepends=True)
    (few / "preferences.jsonl").write_text("".join(lines[:12]))
    with pytest.raises(ConfigError, match="12 votes are too few to hold any out"):
        prepare(configured(tiny_model, picture_folder, tmp_path, few, "dpo"))
