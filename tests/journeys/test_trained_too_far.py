"""A subject that is trained too far on purpose, in the demo's model: an earlier rung wins.

Measured from step 30 to 200: FID falls from 185 to 163 and the training loss from 0.43 to 0.16, but the
subject score rises from 0.57 to 0.79.
"""

from pathlib import Path

import pytest

from cluster.local import LocalCluster
from ray_jobs.config import load_config
from ray_jobs.data.preparation import prepare
from ray_jobs.evaluation.pool import evaluators
from ray_jobs.planning.settled import settled
from ray_jobs.search import search

CONFIG = Path(__file__).parents[2] / "configs" / "dreambooth.yaml"
EARLY, LATE = 30, 200


@pytest.mark.journeys
@pytest.mark.timeout(1800)
def test_the_rung_at_which_a_subject_is_learned_by_heart_loses_though_it_is_nearer_to_the_photos(
    ray_cluster: LocalCluster, tmp_path: Path
) -> None:
    config = settled(
        load_config(
            CONFIG,
            [
                f"storage={tmp_path}",
                f"search.ladder=[{EARLY},{LATE}]",
                "search.learning_rates=[2.0e-3]",
                "search.folds=2",
                "data.folds=2",
                "evaluate.prompts=[]",
            ],
        )
    )
    dataset = prepare(config)
    with evaluators(config, dataset) as pool:
        found = search(config, dataset, pool)
    early, late = sorted(found.rows, key=lambda row: row.step)
    assert found.winner.step == early.step == EARLY and late.step == LATE
    assert early.unlike and early.variety_lost is not None and early.by_heart is not None
    assert late.unlike is not None and late.variety_lost is not None and late.by_heart is not None
    # What a person would go by says that it is better: it is nearer to the photos, and so is its loss.
    assert late.unlike < early.unlike and late.fid < early.fid and late.train_loss < early.train_loss
    # But it draws one picture again and again, or the photos themselves.
    assert late.variety_lost + late.by_heart > early.variety_lost + early.by_heart + 0.1
