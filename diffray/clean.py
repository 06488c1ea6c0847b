"""List what takes space below a storage, and delete what rules do not keep. Without --delete nothing is.

    python -m diffray.clean --config configs/demo.yaml
    python -m diffray.clean --config configs/demo.yaml --keep winner
    python -m diffray.clean --config configs/demo.yaml --keep 3 --all-runs --unused --delete

--keep is for runs whose result is registered: it deletes the states from which their trainings resume, and
with `winner` all weights but the winner's, with a number all but those of so many of the best rungs, with
`rungs` none. Scores, curves, pictures, the dataset and the published model stay. --unused deletes encoded
pictures that no run uses, and this folder's records (.diffray/) of runs that are gone. What a registered
version, another run or a run in use needs is kept.
"""

import argparse
import sys
from contextlib import ExitStack
from itertools import chain

from cluster.lease import held
from diffray.jobs import JOB, Job, names
from diffray.settings import config_of
from diffray.ui import queue
from ray_jobs.config import Config, ConfigError, add_config_arguments, load_config
from ray_jobs.console import columns, complain, human_size, show
from ray_jobs.console.commands import command_parser
from ray_jobs.retention.inventory import Inventory, RunSpace, run_names, take_inventory
from ray_jobs.retention.rules import RUNGS, WINNER, delete, removable, rule
from ray_jobs.run.folder import DATASET, ENCODED, MODEL, RunFolder, SharedFolder
from ray_jobs.training.checkpoint import STATE, WEIGHTS


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and return its exit code: 2 for an error that the user must fix."""
    parser = command_parser(__doc__)
    add_config_arguments(parser)
    add = parser.add_argument
    add("--keep", type=rule, metavar="RULE", help="winner, rungs, or how many of the best rungs keep weights")
    add("--all-runs", action="store_true", help="of all runs of the storage, not only the configuration's")
    add("--unused", action="store_true", help="also what nothing uses: encoded pictures, records of runs")
    add("--delete", action="store_true", help="delete it; without, it is only listed")
    options = parser.parse_args(arguments)
    if options.delete and not (options.keep or options.unused):
        parser.error("--delete: say what, with --keep or --unused")
    try:
        _clean(load_config(options.config, options.overrides), options)
    except ConfigError as error:
        return complain(error)
    return 0


def _clean(config: Config, options: argparse.Namespace) -> None:
    root, own = SharedFolder.of(config).root, config.name
    with ExitStack() as leases:
        refused = set[str]()
        if options.delete:
            for name in run_names(root):
                if options.all_runs or options.unused or name == own:
                    try:
                        leases.enter_context(held(root.child(name)))  # until its files are deleted
                    except ConfigError as error:
                        show(str(error))
                        refused.add(name)
        found = take_inventory(config, refused)
        chosen = [run for run in found.runs if options.all_runs or run.name == own]
        if options.keep and not chosen:
            raise ConfigError(f"name: {root.uri} has no run {own}; correct it, or give --all-runs")
        if not (options.keep or options.unused):
            for line in listed(found):
                show(line)
            return
        paths: dict[str, int] = {}
        for run in chosen if options.keep else []:
            if run.kept_whole:
                show(f"{run.name}: kept whole: {run.kept_whole}")
            paths |= {f"{run.name}/{path}": size for path, size in removable(run, options.keep).items()}
        gone = gone_records() if options.unused else []
        if options.unused:
            # Runs that have begun since may use what no run used; these have the lease before they look.
            begun = sorted({*run_names(root)} - {run.name for run in found.runs})
            unknown = f"{begun[0]} has begun" if begun else found.unused_unknown
            if unknown:
                show(f"{ENCODED}: kept whole: {unknown}")
            else:
                paths |= found.unused
        for line in columns([(human_size(size), path) for path, size in sorted(paths.items())]):
            show(line)
        for job in gone:
            show(f"{job.folder}: its run's folder is gone")
        if options.delete:
            delete(root, paths)
            for job in gone:
                job.forget()
        does = "deleted" if options.delete else "to delete, with --delete"
        show(f"{does}: {human_size(sum(paths.values())).strip()} below {root.uri}")


def listed(found: Inventory) -> list[str]:
    """Return what takes space, as lines."""
    whole = sum(chain(found.shared.values(), *(run.sizes.values() for run in found.runs)))
    lines = [f"{found.root.uri}: {human_size(whole).strip()}"]
    if found.runs:
        head = ("run", "in all", "dataset", "states", "rung weights", "published", "may be freed")
        lines += ["", *columns([head, *(_row(run) for run in found.runs)])]
    lines += ["", *columns([(human_size(size), name) for name, size in sorted(found.shared.items())])]
    unused = f"{human_size(sum(found.unused.values())).strip()} that no run uses (--unused)"
    lines.append(f"of {ENCODED}: {found.unused_unknown or unused}")
    lines += [
        f"{name}: {human_size(size).strip()}, of no version of this registry; delete it by hand if no other "
        "registry has it"
        for name, size in found.unregistered.items()
    ]
    return lines


def _row(run: RunSpace) -> tuple[str, ...]:
    freed = run.kept_whole and f"nothing: {run.kept_whole}"
    if not freed:
        rules = [(keep, human_size(sum(removable(run, keep).values())).strip()) for keep in (RUNGS, WINNER)]
        freed = ", ".join(f"{size} (--keep {keep})" for keep, size in rules)
    states, weights = (sum(run.of_checkpoints(kind).values()) for kind in (STATE, WEIGHTS))
    parts = (sum(run.sizes.values()), run.part(DATASET), states, weights, run.part(MODEL))
    return (run.name, *map(human_size, parts), freed)


def gone_records() -> list[Job]:
    """Return the jobs that were started from this folder and have ended, whose run has no folder any more."""
    return [Job(name) for name in names() if _is_gone(name)]


def _is_gone(name: str) -> bool:
    job = Job(name)
    others = [Job(f"{name}/{path.parent.name}") for path in job.folder.glob(f"*/{JOB}")]
    try:
        if any(each.record and each.status == "running" for each in (job, *others)):
            return False
        if queue.read(name):  # it waits to be started again
            return False
        return not RunFolder.of(config_of(job.started.arguments)).root.exists()
    except ConfigError as error:  # of its configuration or its cluster, which may be there again later
        show(f"{job.folder}: kept: {error}")
        return False


if __name__ == "__main__":
    sys.exit(main())
