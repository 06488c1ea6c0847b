"""What of a published run may be deleted: training states, and weights that a rule does not keep."""

import argparse
from collections.abc import Iterable

from cluster.storage import Storage
from ray_jobs.retention.inventory import Place, RunSpace, Sizes
from ray_jobs.run.folder import TRAININGS
from ray_jobs.training.checkpoint import STATE, WEIGHTS

WINNER, RUNGS = "winner", "rungs"
Rule = str | int


def rule(text: str) -> Rule:
    """Read `--keep`: winner, rungs, or how many of the best rungs keep their weights."""
    if text in (WINNER, RUNGS):
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text}: give winner, rungs, or a number of rungs above 0")


def removable(run: RunSpace, keep: Rule) -> Sizes:
    """Return the folders below a run that a rule does not keep, with their bytes; empty if it is kept whole.

    Every rule gives up the states from which trainings resume. Scores, curves and pictures stay.
    """
    if run.kept_whole:
        return {}
    found = {_path(place, STATE): size for place, size in run.of_checkpoints(STATE).items()}
    kept = _kept(run, keep)
    for place, size in run.of_checkpoints(WEIGHTS).items():
        if keep != RUNGS and place not in kept:
            found[_path(place, WEIGHTS)] = size
    return {path: size for path, size in found.items() if tuple(path.split("/")[1:3]) not in run.needed}


def _kept(run: RunSpace, keep: Rule) -> set[Place]:
    """Return the checkpoints whose weights a rule keeps: in any case the winner's."""
    best = run.ranking[:keep] if isinstance(keep, int) else []
    return {place for candidate in best for place in candidate} | ({run.winner} if run.winner else set())


def _path(place: Place, part: str) -> str:
    return "/".join((TRAININGS, *place, part))


def delete(root: Storage, paths: Iterable[str]) -> None:
    """Delete files and folders below a folder; an interrupted deletion may be repeated."""
    for path in paths:
        root.delete(path)
