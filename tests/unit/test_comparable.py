"""Numbers are only compared where network and sample count are the same; both travel with each."""

from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Storage
from ray_jobs.config import Config, load_config
from ray_jobs.evaluation.cross_validation import averaged, choose_over_folds
from ray_jobs.evaluation.scores import Scores
from ray_jobs.metrics.score import Score
from ray_jobs.run.records import RungRow, read_rows
from ray_jobs.tuning.results import choose

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
NO_POOL: Any = None  # equal scores, or none of fewer steps: nothing is measured again
OLD = RungRow(trial_id="a", step=80, fid=9.0, seconds=1.0)
NEW = OLD | {"feature_network": "inception@sha256:0", "feature_network_2": "lite@sha256:1", "num_samples": 8}


def test_scores_tell_their_networks_and_their_count() -> None:
    first, second = "inception@sha256:0", Score(3.0, 8, "lite@sha256:1")
    mind = Score(20.0, 8, first, metric="MIND")
    scores = Scores(Score(9.0, 8, first), None, mind, second, None, 1.0, 1.0)
    assert scores.origin == {
        "feature_network": "inception@sha256:0",
        "feature_network_2": "lite@sha256:1",
        "num_samples": 8,
    }
    assert set(scores.origin) <= set(RungRow.model_fields), "else the line of a rung would lose them"


@pytest.mark.parametrize(
    ("field", "other"),
    [("feature_network", "dino@sha256:2"), ("feature_network_2", "dino@sha256:2"), ("num_samples", 96)],
)
def test_rows_of_different_networks_or_counts_are_not_chosen_from(field: str, other: Any) -> None:
    rows = [NEW, NEW | {"step": 160, field: other}]
    with pytest.raises(ValueError, match=f"^{field}: scores of .*{other}"):
        choose(rows, NO_POOL)
    folds = [row | {"fold": fold, "training": f"a_fold-{fold}"} for row in rows for fold in (0, 1)]
    with pytest.raises(ValueError, match=f"^{field}: scores of .*"):
        choose_over_folds(averaged(folds, 2))


def test_folds_of_different_sizes_compare_since_each_candidate_has_them_all() -> None:
    rows = [
        NEW | {"fold": fold, "training": f"a_fold-{fold}", "step": step, "num_samples": 8 + fold}
        for fold in (0, 1)
        for step in (80, 160)
    ]
    found = averaged(rows, 2)
    assert [row.num_samples for row in found] == [17, 17]
    assert choose_over_folds(found).step == 80
    mixed = [row | ({"feature_network": "dino@sha256:2"} if row.fold else {}) for row in rows]
    with pytest.raises(ValueError, match="feature_network: scores of dino.* and inception"):
        averaged(mixed, 2)


def test_results_of_former_versions_without_the_fields_go_on(tmp_path: Path) -> None:
    config: Config = load_config(DEMO, [f"storage={tmp_path}"])
    storage = Storage.open(config.storage).child(config.name, "search")
    storage.write_lines("results.jsonl", [OLD.fields(), OLD.fields() | {"step": 160, "fid": 9.5}])
    rows = [*read_rows(storage), NEW | {"step": 320}]
    assert choose(rows, NO_POOL)[0].step == 80
