"""The benchmark of scores that rank: it draws alike for all candidates, and counts choices and regrets."""

from pathlib import Path

import pytest
import torch

from benchmarks.ranking import OF_SETS, OTHERS, REAL, Candidate, Pictures, choices, draw, of_run, rank
from cluster.storage import Storage
from ray_jobs.config import Config
from ray_jobs.data.feeding.dataset import PARTS, Dataset
from ray_jobs.evaluation.actor import Evaluator
from ray_jobs.run.folder import RunFolder, SharedFolder
from ray_jobs.run.manifest import Manifest
from ray_jobs.training.checkpoint import folder_of
from ray_jobs.weights.feature_networks import Networks
from tests.small_set import PICTURES, small_set
from tests.unit.test_corrected import SIZE, VARIANCES, drawn
from tests.unit.test_measures import Colours

COVARIANCE = torch.diag(VARIANCES)


def test_choices_are_counted_and_their_regret_is_that_of_all_pictures() -> None:
    whole = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    scores = torch.tensor([[9.0, 7.0, 8.0], [4.0, 6.0, 5.0], [5.0, 4.0, 3.0], [9.0, 1.0, 2.0]])
    assert choices(scores, whole) == (0.5, (0 + 2 + 1 + 0) / 4)


def test_candidates_that_are_far_apart_are_chosen_rightly_by_all_scores_from_few_pictures() -> None:
    noise = drawn(64, COVARIANCE, 3)
    features = {
        REAL: drawn(96, COVARIANCE, 1),
        OTHERS: drawn(40, COVARIANCE, 2),  # fewer than the 64 pictures, whose correction is of two parts
        "far": noise + 1,
        "near": noise,
        "farther": noise + 2,
    }
    whole, rows = rank(features, [16, 32], draws=3)
    assert set(whole) == set(OF_SETS)
    for scores in whole.values():
        assert scores[1] < scores[0] < scores[2]
    assert abs(whole["corrected_fid"][0] - whole["corrected_fid"][1] - SIZE) < 0.3 * SIZE
    assert [(row.measure, row.pictures) for row in rows] == [(m, size) for size in (16, 32) for m in OF_SETS]
    assert {(row.chooses, row.regret, row.chooses_corrected, row.regret_corrected) for row in rows} == {
        (1, 0, 1, 0)
    }
    assert all(str(row).count("100%") == 2 for row in rows)
    with pytest.raises(ValueError, match="--sizes: 33 is more than half of the 64 pictures"):
        rank(features, [33], draws=1)


def test_the_rungs_of_a_run_draw_the_captions_of_its_validation_pictures(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = Config.model_validate(
        {
            "name": "run",
            "storage": str(tmp_path),
            "data": {"source": "pictures"},
            "model": {"base": str(tiny_model)},
            "search": {"learning_rates": [1e-3], "ladder": [4]},
            "evaluate": {"inference_steps": 1, "batch_size": 4, "second_network": None},
        }
    )
    run, encoders = RunFolder.of(config), "e" * 64
    prepared = small_set(SharedFolder.of(config).encoded(encoders))
    run.dataset.write_text(PARTS, prepared.storage.read_text(PARTS))
    (prepared.manifest | {"encoders": encoders}).write(run.dataset)
    rung = run.training("lr-0.001").child(folder_of(4))
    rung.write_text("progress.json", '{"step": 4, "why": "rung", "world_size": 1}')
    rung.write_text("complete-0000-of-0001", "{}")
    candidates, pictures = of_run(config)
    assert [(each.name, each.guidance_scale) for each in candidates] == [("lr-0.001 at step 4", None)]
    assert candidates[0].weights and candidates[0].weights.startswith(rung.uri)
    kept = [len(part) for part in (pictures.real, pictures.captions, pictures.others)]
    assert kept == [len(PICTURES["validation"])] * 2 + [len(PICTURES["train"])]

    storage = Storage.open(str(tmp_path))
    evaluator = Evaluator(config, Dataset(storage, storage, Manifest()), 1)
    evaluator.networks = Networks(Colours("colours", "0" * 64, torch.device("cpu"), 3))
    bases = [Candidate("base", None, None), Candidate("again", None, 3.0), Candidate("plain", None, 1.0)]
    few = Pictures(pictures.real[:4], pictures.captions[:4], pictures.others[:4])
    found = draw(evaluator, bases, few, 6)
    assert {name: len(each) for name, each in found.items()} == {
        REAL: 4,
        OTHERS: 4,
        "base": 6,
        "again": 6,
        "plain": 6,
    }
    assert torch.equal(found["base"], found["again"]) and not torch.equal(found["base"], found["plain"])
