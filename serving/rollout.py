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
from typing import Any

from ray_jobs.config import ConfigError, add_config_arguments, load_config
from ray_jobs.console import columns, complain, show
from ray_jobs.registry import aliases
from serving.client import KEY_VARIABLE, EndpointError, call
from serving.service.rollout import promote, withdraw


def comparison(answer: dict[str, Any]) -> str:
    """Format the answer of GET /v1/rollout as a table."""
    head = ("version", "", "answers", "errors", "median s", "p95 s", "median s a step")
    rows = []
    for version, tally in answer["versions"].items():
        role = next((each for each in ("champion", "candidate") if answer[each] == version), "")
        times = [tally[key] for key in ("median_s", "p95_s", "median_step_s")]
        shown = ["–" if each is None else f"{each:.3g}" for each in times]
        rows.append((version, role, str(tally["answers"]), str(tally["errors"]), *shown))
    lines = columns([head, *rows])
    for version, scores in answer["quality"].items():
        told = f"quality: {version}: FID {scores['fid']:.1f}"
        if scores["expected_fid"] is not None:
            told += f" (when published {scores['expected_fid']:.1f})"
        for name, key in (("CLIP score", "clip_score"), ("near copies", "near_copies")):
            told += "" if scores[key] is None else f", {name} {scores[key]:.3g}"
        lines.append(f"{told}, of the last {scores['num_pictures']} pictures")
    lines += [
        f"feedback: {each['model']}@{each['version']} ({each['role']}): {each['ups']} up, "
        f"{each['downs']} down, {each['wins']} votes won, {each['losses']} lost"
        for each in answer["feedback"]
    ]
    lines += [f"taken out: {version}: {reason}" for version, reason in answer["taken_out"].items()]
    return "\n".join(lines + ([f"notice: {answer['notice']}"] if answer["notice"] else []))


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
            key = os.environ.get(KEY_VARIABLE)
            show(comparison(call(f"{options.url.rstrip('/')}/v1/rollout", key=key)))


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and return its exit code: 2 for a configuration error, 1 if the endpoint fails."""
    parser = argparse.ArgumentParser(
        prog="python -m serving.rollout",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
