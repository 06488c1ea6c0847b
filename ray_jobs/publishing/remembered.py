"""How much a training forgets: scores on the pictures of earlier runs, before and after it.

The pictures are the validation split of each run in `evaluate.remember`, as its prepare left them. What the
run begins from and the winner draw their captions from the same noise. Pictures and features are kept in
`<storage>/<run>/remembered/<earlier run>/before` and `after`.
"""

from ray_jobs.config import Config, ConfigError
from ray_jobs.console import say
from ray_jobs.data.preparation import prepared_by
from ray_jobs.evaluation.actor import BARE
from ray_jobs.evaluation.pool import EvaluatorPool
from ray_jobs.evaluation.scores import FEWEST
from ray_jobs.report import forgotten
from ray_jobs.run.folder import RunFolder
from ray_jobs.run.records import Remembered
from ray_jobs.run.split import Split


def require_remembered(config: Config) -> None:
    """Raise ConfigError unless every run in `evaluate.remember` has pictures to measure on."""
    for run in config.evaluate.remember:
        dataset = prepared_by(config, run)
        if {part["file"] for part in dataset.parts("validation")} - set(dataset.cache.files()):
            raise ConfigError(
                f"evaluate.remember: {run}: its validation pictures are no longer in {dataset.cache.uri}; "
                "run its prepare again"
            )
        if not dataset.manifest.held_out:
            raise ConfigError(
                f"evaluate.remember: {run} held out no pictures, so that it was scored on those that it "
                "trained on; leave it out"
            )


def measure_remembered(
    config: Config, pool: EvaluatorPool, weights: str, guidance_scale: float | None
) -> list[Remembered]:
    """Score what the run begins from and the winner on the pictures of earlier runs; where it begins from an
    adapter, the base without it too.

    Args:
        weights, guidance_scale: of the winner; the other is drawn at `evaluate.guidance_scale`.
    """
    found = []
    for run in config.evaluate.remember:
        split = Split("validation", run=run)
        pool.load(split)
        folder = RunFolder.of(config).remembered(run)
        folder.delete("")
        before, after = folder.child("before"), folder.child("after")
        first, last = pool.score(None, split, before), pool.score(weights, split, after, guidance_scale)
        measure = pool.ranked_by(split)
        one, other = first.row(), last.row()
        told = {
            "before": one[measure],
            "before_error": one[f"{measure}_error"],
            "after": other[measure],
            "after_error": other[f"{measure}_error"],
        }
        if config.model.adapter:  # how far the earlier run had come
            of_base = pool.score(BARE, split).row()
            told |= {"base": of_base[measure], "base_error": of_base[f"{measure}_error"]}
        if config.evaluate.bootstrap and first.fid.num_samples >= FEWEST:
            paired = pool.difference(after, before, split, measure=measure)
            told |= {"change": paired.value, "change_error": paired.standard_error}
        found.append(Remembered.model_validate({"run": run, "measure": measure, **first.origin, **told}))
        say("publish", forgotten(found[-1]))
    return found
