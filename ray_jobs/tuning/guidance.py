"""Guidance scales as candidates: they cost samples, but no training.

The best rung of each trial is also measured at each of `search.guidance_scales`, on the same captions and
noise. Writes `<storage>/<run>/search/guidance.jsonl`, one line per measurement.
"""

from typing import Any

from cluster.storage import Storage
from ray_jobs.config import Config
from ray_jobs.console import say
from ray_jobs.evaluation.pool import EvaluatorPool
from ray_jobs.run.folder import RunFolder
from ray_jobs.training.checkpoint import Rung
from ray_jobs.tuning.results import choose, with_error

MEASURED = "guidance.jsonl"

Row = dict[str, Any]


def choose_guidance(config: Config, rows: list[Row], best: Row, pool: EvaluatorPool) -> Row:
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
    lowest: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (row["fid"], row["step"])):
        lowest.setdefault(row["trial_id"], row)
    finalists = [best, *(row for name, row in lowest.items() if name != best["trial_id"])]
    storage = RunFolder.of(config).search
    measured = storage.read_lines(MEASURED)
    for row in finalists:
        for scale in scales:
            wanted = (row["trial_id"], row["step"], scale)
            if not any(
                wanted == (each["trial_id"], each["step"], each["guidance_scale"]) for each in measured
            ):
                measured.append(_measure(row, scale, pool))
                storage.write_lines(MEASURED, measured)
                say(
                    "search",
                    f"{wanted[0]} at step {wanted[1]}, guidance {scale:g}: {with_error(measured[-1])}",
                )
    chosen = {(row["trial_id"], row["step"]): row for row in finalists}
    found = [row | {"guidance_scale": usual} for row in finalists]
    found += [
        chosen[each["trial_id"], each["step"]] | each
        for each in measured
        if (each["trial_id"], each["step"]) in chosen and each["guidance_scale"] in scales
    ]
    return choose(found, pool)


def measured_scales(config: Config, rows: list[Row]) -> list[Row]:
    """Return one row per tried pair of rung and guidance scale, including the default scale.

    Rows are sorted by learning rate, trial and scale.

    Args:
        config: configuration with the guidance scale that the rungs were measured at.
        rows: all rungs.
    """
    storage = RunFolder.of(config).search
    rungs = {(row["trial_id"], row["step"]): row for row in rows}
    wanted = set(config.search.guidance_scales) - {config.evaluate.guidance_scale}
    found = [
        rungs[key] | each
        for each in storage.read_lines(MEASURED)
        if (key := (each["trial_id"], each["step"])) in rungs and each["guidance_scale"] in wanted
    ]
    tried = {(each["trial_id"], each["step"]) for each in found}
    found += [rungs[key] | {"guidance_scale": config.evaluate.guidance_scale} for key in tried]
    return sorted(found, key=lambda row: (row["learning_rate"], row["trial_id"], row["guidance_scale"]))


def _measure(row: Row, scale: float, pool: EvaluatorPool) -> Row:
    rung = Rung(row["checkpoint"], row)
    folder = Storage.open(row["checkpoint"]).child(f"guidance-{scale:g}")
    scores = pool.score(rung.weights, "validation", folder, guidance_scale=scale)
    return {
        "trial_id": row["trial_id"],
        "step": row["step"],
        "guidance_scale": scale,
        "features": folder.uri,
        **scores.row(),
        **scores.origin,
    }
