"""Control of real pictures: the demo's model learns to follow edges of emoji that it never saw."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from cluster.local import LocalCluster
from ray_jobs.config import Config
from ray_jobs.pipeline import pipeline

ROOT = Path(__file__).parents[2]


@pytest.mark.journeys
@pytest.mark.timeout(1800)
def test_held_out_pictures_follow_their_edges(ray_cluster: LocalCluster, tmp_path: Path) -> None:
    given = {
        "name": "edges",
        "storage": str(tmp_path / "runs"),
        "data": {
            "source": str(ROOT / "examples" / "fluent-emoji"),
            "resolution": 64,
            "cleaning": {"duplicates": "keep"},
            "control": {"kind": "edges"},
        },
        "model": {"base": str(ROOT / "models" / "emoji-base")},
        "train": {"method": "controlnet", "num_workers": 2, "batch_size": 16},
        "search": {"learning_rates": [5e-4], "ladder": [100, 400]},
        "evaluate": {
            "num_actors": 1,
            "inference_steps": 10,
            "guidance_scale": 2.0,
            "num_samples": 64,
            "second_network": None,
            "memorisation_pictures": 0,
        },
        "publish": {"model_name": "edges"},
    }
    config = Config.model_validate(given)
    pipeline(config, Namespace(fresh=False))
    run = tmp_path / "runs" / "edges"
    winner = json.loads((run / "winner.json").read_text())
    assert (winner["ranked_by"], winner["step"]) == ("control", 400)
    before, after = (
        (winner[f"{of}test_disagreement"], winner[f"{of}test_disagreement_error"]) for of in ("base_", "")
    )
    assert after[0] + 3 * after[1] < before[0] - 3 * before[1]
    assert after[0] < 0.8 * before[0]
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "disagreement with control images of the test split" in report
