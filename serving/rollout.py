"""Promote or withdraw the candidate, roll back the champion, or compare the two.

    python -m serving.rollout status --config configs/demo.yaml --url http://127.0.0.1:8000
    python -m serving.rollout promote --config configs/demo.yaml
    python -m serving.rollout rollback --config configs/demo.yaml
    python -m serving.rollout withdraw --config configs/demo.yaml

These commands change only the registry's aliases; a running endpoint follows them within seconds.
"""

import argparse
import os
import sys

from pydantic import ValidationError

from ray_jobs.config import ConfigError, add_config_arguments, load_config
from ray_jobs.console import columns, complain, show
from ray_jobs.console.commands import command_parser
from ray_jobs.registry import aliases
from serving.client import KEY_VARIABLE, EndpointError, call
from serving.service.rollout import RolloutStatus, promote, withdraw


def status_of(url: str) -> RolloutStatus:
    """Return what a running endpoint says of its versions. Its admin key is read from the environment.

    Raises:
        EndpointError: it does not answer, or is of another release.
    """
    url = f"{url.rstrip('/')}/v1/rollout"
    try:
        return RolloutStatus.model_validate(call(url, key=os.environ.get(KEY_VARIABLE)))
    except ValidationError:
        raise EndpointError(f"{url}: another version of diffray answers there") from None


def comparison(status: RolloutStatus) -> str:
    """Format the answer of GET /v1/rollout as a table."""
    roles = {status.champion: "champion", status.candidate: "candidate"}
    head = ("version", "", "answers", "errors", "median s", "p95 s", "median s a step")
    rows = []
    for version, each in status.versions.items():
        times = (each.median_s, each.p95_s, each.median_step_s)
        shown = ["–" if seconds is None else f"{seconds:.3g}" for seconds in times]
        rows.append((version, roles.get(version, ""), str(each.answers), str(each.errors), *shown))
    lines = columns([head, *rows])
    for version, scores in status.quality.items():
        line = f"quality: {version}: FID {scores.fid:.1f}"
        if scores.expected_fid is not None:
            line += f" (when published {scores.expected_fid:.1f})"
        for name, score in (("CLIP score", scores.clip_score), ("near copies", scores.near_copies)):
            line += "" if score is None else f", {name} {score:.3g}"
        lines.append(f"{line}, of the last {scores.num_pictures} pictures")
    lines += [
        f"feedback: {each.model}@{each.version} ({each.role}): {each.ups} up, "
        f"{each.downs} down, {each.wins} votes won, {each.losses} lost"
        for each in status.feedback
    ]
    lines += [f"taken out: {version}: {reason}" for version, reason in status.taken_out.items()]
    return "\n".join(lines + ([f"notice: {status.notice}"] if status.notice else []))


def _run(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    name = config.publish.model_name
    if options.command == "promote":
        show(f"version {promote(config, options.version)} is the champion of {name!r}")
    elif options.command == "rollback":
        show(f"version {aliases.rollback(config)} is the champion of {name!r} again")
    elif options.command == "withdraw":
        show(f"version {withdraw(config)} of {name!r} is the candidate no more")
    else:
        show(aliases.status(config))
        if options.url:
            show(comparison(status_of(options.url)))


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and return its exit code: 2 for a configuration error, 1 if the endpoint fails."""
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, purpose in (
        ("status", "the versions; with --url how the running endpoint's compare"),
        ("promote", "make the candidate the champion, whatever its scores"),
        ("rollback", "make the previous version the champion again"),
        ("withdraw", "take the candidate out; the champion answers everyone"),
    ):
        options = commands.add_parser(command, help=purpose, description=purpose)
        add_config_arguments(options)
        if command == "promote":
            options.add_argument("--version", type=int, help="a number that status lists; else the candidate")
        if command == "status":
            options.add_argument("--url", help="of an endpoint; its admin key is read from " + KEY_VARIABLE)
    try:
        _run(parser.parse_args(arguments))
    except ConfigError as error:
        return complain(error)
    except EndpointError as error:
        show(f"error: rollout: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
