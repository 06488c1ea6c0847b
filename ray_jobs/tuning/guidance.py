"""Guidance scales as candidates: they cost samples, but no training.

The best rung of each trial is also measured at each of `search.guidance_scales`, on the same captions and
noise. Writes `<storage>/<run>/search/guidance.jsonl`, one line per measurement: the rung, the scale, and the
scores that replace those of the rung's row.
"""

from cluster.storage import Storage
from ray_jobs.config import Config
from ray_jobs.console import say
from ray_jobs.evaluation.pool import EvaluatorPool
from ray_jobs.run.folder import RunFolder
from ray_jobs.run.records import RungRow, read_rows, write_rows
from ray_jobs.run.split import VALIDATION
from ray_jobs.training.checkpoint import weights_of
from ray_jobs.tuning.results import choose, with_error

MEASURED = "guidance.jsonl"


def choose_guidance(config: Config, rows: list[RungRow], best: RungRow, pool: EvaluatorPool) -> RungRow:
    """Choose the winner among the best rungs of all trials, each at every guidance scale.

    Args:
        rows: all rungs, measured at `evaluate.guidance_scale`.
        best: the winner among them at that scale.

    Returns:
        The winner's row with `guidance_scale` and the scores at that scale; `best` unchanged if there is no
        other scale to try.
    """
    usual = config.evaluate.guidance_scale
    scales = [scale for scale in config.search.guidance_scales if scale != usual]
    if not scales:
        return best
    lowest: dict[str, RungRow] = {}
    for row in sorted(rows, key=lambda row: (row.score, row.step)):
        lowest.setdefault(row.trial_id, row)
    finalists = [best, *(row for name, row in lowest.items() if name != best.trial_id)]
    storage = RunFolder.of(config).search
    measured = read_rows(storage, MEASURED)
    for row in finalists:
        for scale in scales:
            if any((row.place, scale) == (each.place, each.guidance_scale) for each in measured):
                continue
            measured.append(_measure(row, scale, pool))
            write_rows(storage, measured, MEASURED)
            told = with_error(measured[-1])
            say("search", f"{row.trial_id} at step {row.step}, guidance {scale:g}: {told}")
    chosen = {row.place: row for row in finalists}
    found = [row | {"guidance_scale": usual} for row in finalists]
    found += [
        chosen[each.place] | each.fields()
        for each in measured
        if each.place in chosen and each.guidance_scale in scales
    ]
    winner, _ = choose(found, pool)
    return winner


def measured_scales(config: Config, rows: list[RungRow]) -> list[RungRow]:
    """Return one row per tried pair of rung and guidance scale, including the default scale.

    Rows are sorted by learning rate, trial and scale.

    Args:
        config: configuration with the guidance scale that the rungs were measured at.
        rows: all rungs.
    """
    usual = config.evaluate.guidance_scale
    rungs = {row.place: row for row in rows}
    wanted = set(config.search.guidance_scales) - {usual}
    found = [
        rungs[each.place] | each.fields()
        for each in read_rows(RunFolder.of(config).search, MEASURED)
        if each.place in rungs and each.guidance_scale in wanted
    ]
    tried = {each.place for each in found}
    found += [rungs[place] | {"guidance_scale": usual} for place in tried]
    return sorted(found, key=lambda row: (row.learning_rate, row.trial_id, row.guidance_scale or 0.0))


def _measure(row: RungRow, scale: float, pool: EvaluatorPool) -> RungRow:
    folder = Storage.open(row.checkpoint).child(f"guidance-{scale:g}")
    scores = pool.score(weights_of(row.checkpoint), VALIDATION, folder, guidance_scale=scale)
    return RungRow.model_validate(
        {
            "trial_id": row.trial_id,
            "step": row.step,
            "guidance_scale": scale,
            "ranked_by": row.ranked_by,
            "features": folder.uri,
            **scores.row(),
            **scores.origin,
        }
    )
