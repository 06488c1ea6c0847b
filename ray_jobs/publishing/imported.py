"""Scores of weights that were trained elsewhere, on the test split of a run's data, as of a winner."""

from pathlib import Path

from cluster.storage import Storage
from ray_jobs.config import Config
from ray_jobs.console import say
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.evaluation.pool import EvaluatorPool
from ray_jobs.evaluation.scores import Scores
from ray_jobs.publishing.version import paired_with_champion
from ray_jobs.registry.promotion import Measured, Paired, Result
from ray_jobs.run.folder import IMPORTED, RunFolder
from ray_jobs.run.records import FID, MEASURES
from ray_jobs.run.split import TEST

Scored = tuple[Measured, Paired | None, dict[str, float]]
"""Scores that decide on promotion, their comparison with the champion in pairs, and metrics for MLflow."""


def measure_imported(config: Config, dataset: Dataset, pool: EvaluatorPool, folder: Storage) -> Scored:
    """Measure weights, and the base, on the test split; whether they were trained on it is not known.

    The ledger of the test split has no line of it: no choice of the run depends on these scores.

    Args:
        folder: the weights, where all evaluators reach them; the features of their pictures are added to it.
    """
    pool.load(TEST)
    base, own = pool.score(None, TEST), pool.measure(folder.uri, TEST, None, folder).scores
    say("import", f"base: {base.described()}")
    say("import", f"imported: {own.described()}")
    metrics = {
        name: value
        for name, value in (own.row("test_") | base.row("base_test_")).items()
        if value is not None and name != "test_fid" and not name.endswith("_error")
    }
    paired = paired_with_champion(config, pool, pool.digests[TEST], folder)
    return _measured(own, base, dataset.manifest.digest, pool), paired, metrics


def _measured(own: Scores, base: Scores, data: str, pool: EvaluatorPool) -> Measured:
    values, of_base, origin = own.row(), base.row(), own.origin
    others = {
        name: Result(value, values.get(f"{name}_error"), of_base.get(name))
        for name in MEASURES
        if name != FID and (value := values.get(name)) is not None
    }
    model = origin.get("preference_model")
    return Measured(
        fid=own.fid.value,
        error=own.fid.standard_error,
        num_samples=own.fid.num_samples,
        feature_network=own.fid.feature_network,
        data=data,
        test=pool.digests[TEST],
        base_fid=base.fid.value,
        ranked_by=pool.ranked_by(TEST),
        others=others,
        preference_model=None if model is None else str(model),
    )


def shared_copy(config: Config, local: Path) -> Storage:
    """Copy a local folder to where all evaluators reach it; the caller deletes it once it is registered."""
    run = RunFolder.of(config).root
    run.upload(local, IMPORTED)
    return run.child(IMPORTED)
