"""Compare two versions by people who see their images blind, and report what they prefer.

    python -m diffray.study create --config configs/demo.yaml --name spring --url http://127.0.0.1:8000
    python -m diffray.study create --config ... --name spring --url ... --versions 3 5 --count 60
    python -m diffray.study report --config configs/demo.yaml --name spring

create: draws images of both versions (the champion's and the candidate's) for captions of the test split, or
for the lines of `--prompts`, from the same seeds, and prints the page that raters open. Each rater needs an
API key of their own with the scope `feedback`.
report: prints the share of votes for the second version with its 95 % interval, and the raters' agreement
(Krippendorff's alpha), and writes `report.html` and `result.json` beside the images.
"""

import argparse
import base64
import os
import random
import sys
from html import escape
from pathlib import Path

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError, add_config_arguments, load_config
from ray_jobs.console import complain, show
from ray_jobs.console.commands import command_parser
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.metrics.votes import TOLD_APART, votes_needed
from ray_jobs.registry.models import CANDIDATE, CHAMPION, registered
from ray_jobs.report.dataset_page import STYLE
from serving.client import KEY_VARIABLE, EndpointError, call
from serving.feedback.store import FeedbackStore
from serving.feedback.studies import (
    NAME,
    STUDY,
    Item,
    Study,
    StudyResult,
    folder_of,
    read_study,
    result_of,
    votes_of,
    without_metadata,
)
from serving.messages import label

RELIABLE = 0.667  # alpha below which Krippendorff (2004) draws no conclusions from ratings
DRAW_S = 600  # timeout of an image, in seconds


def create(config: Config, options: argparse.Namespace) -> str:
    """Draw a study's images; return the URL of its page.

    Raises:
        ConfigError: there is a study of that name, a version or captions are missing.
        EndpointError: the endpoint does not draw a version.
    """
    if not NAME.fullmatch(options.name):
        raise ConfigError(f"--name: {options.name!r}: give letters, digits, - and _")
    if read_study(config, options.name):
        raise ConfigError(f"--name: there is a study {options.name} already; give another name")
    names = options.versions or [CHAMPION, CANDIDATE]
    labels = [label(registered(config, name)) for name in names]
    if labels[0] == labels[1]:
        raise ConfigError(f"--versions: both are {labels[0]}; give two versions")
    folder, items = folder_of(config, options.name), []
    chosen = random.Random(options.seed)
    for prompt in prompts_of(config, options):
        seed = chosen.randrange(2**31)
        drawn = [_drawn(options.url, label, prompt, seed, folder) for label in labels]
        items.append(Item(prompt=prompt, seed=seed, images=(drawn[0], drawn[1])))
    study = Study(name=options.name, versions=(labels[0], labels[1]), items=items)
    folder.write_text(STUDY, study.model_dump_json(indent=2))
    return f"{options.url.rstrip('/')}/web/study.html?study={options.name}"


def prompts_of(config: Config, options: argparse.Namespace) -> list[str]:
    """Return the prompts of a study: so many at random, each once.

    Raises:
        ConfigError: the file is missing or empty, or the run has no test split.
    """
    if options.prompts:
        try:
            lines = Path(options.prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts: {options.prompts}: {error}") from None
        known = [line.strip() for line in lines if line.strip()]
    elif dataset := Dataset.of_run(config):
        known = dataset.table("test", ["text"])["text"].to_pylist()
    else:
        raise ConfigError(
            f"--prompts: {config.name} in {config.storage} has no prepared test split to take captions from; "
            "name a file of prompts, or prepare the run first"
        )
    different = sorted(set(known))
    if not different:
        raise ConfigError(f"--prompts: {options.prompts or 'the test split'}: there are no prompts")
    return random.Random(options.seed).sample(different, min(options.count, len(different)))


def _drawn(url: str, model: str, prompt: str, seed: int, folder: Storage) -> str:
    """Draw an image, keep it without its metadata, and return its id."""
    body = {"model": model, "prompt": prompt, "seed": seed, "n": 1}
    answer = call(f"{url.rstrip('/')}/v1/images/generations", body, DRAW_S, key=os.environ.get(KEY_VARIABLE))
    [picture] = answer["data"]
    folder.write_bytes(f"{picture['id']}.png", without_metadata(base64.b64decode(picture["b64_json"])))
    return str(picture["id"])


def report(config: Config, options: argparse.Namespace) -> StudyResult:
    """Write a study's result, and return it.

    Raises:
        ConfigError: there is no study of that name.
    """
    study = read_study(config, options.name)
    if study is None:
        raise ConfigError(f"--name: there is no study {options.name}; create it first")
    store = FeedbackStore.open(config)
    try:
        votes = votes_of(study, store.votes())
    finally:
        store.close()
    found, folder = result_of(study, votes), folder_of(config, options.name)
    folder.write_text("result.json", found.model_dump_json(indent=2))
    folder.write_text("report.html", page(study, found, {vote.winner_id for vote in votes}))
    return found


def lines_of(found: StudyResult) -> list[str]:
    """Describe a result for display."""
    first, second = found.versions
    lines = [f"{found.votes} votes by {found.raters} raters on {found.pairs} pairs"]
    if found.share is None or found.interval is None:
        return [*lines, "no votes yet"]
    low, high = found.interval
    lines.append(f"{second} was preferred to {first} in {found.share:.1%} (95 %: {low:.1%} to {high:.1%})")
    if low <= 0.5 <= high:
        needed = votes_needed(TOLD_APART)
        lines.append(
            f"undecided: to tell {TOLD_APART:.0%} from half takes {needed} votes on different prompts"
        )
    if found.alpha is None:
        lines.append("agreement: unknown, as no two raters voted on the same pair, or all alike")
    else:
        weak = "" if found.alpha >= RELIABLE else f", below {RELIABLE}: raters see different things, or guess"
        lines.append(f"agreement: Krippendorff's alpha {found.alpha:.2f}{weak}")
    return lines


def page(study: Study, found: StudyResult, winners: set[str]) -> str:
    """Return the report as HTML: the result, and all pairs with what was preferred at least once marked."""
    rows = []
    for item in study.items:
        pictures = "".join(
            f'<td><img src="{image}.png" alt="{escape(version)}">{" ★" if image in winners else ""}</td>'
            for image, version in zip(item.images, study.versions, strict=True)
        )
        rows.append(f"<tr><td>{escape(item.prompt)}</td>{pictures}</tr>")
    head = "".join(f"<th>{escape(each)}</th>" for each in ("prompt", *study.versions))
    told = "".join(f"<p>{escape(line)}</p>" for line in lines_of(found))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    style = STYLE.read_text(encoding="utf-8")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Study {study.name}</title>'
        f"<style>{style}</style><main><h1>Study {escape(study.name)}</h1>{told}{table}</main></html>"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and return its exit code: 2 for a configuration error, 1 if the endpoint fails."""
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, purpose in (("create", "draw the images"), ("report", "show what raters prefer")):
        options = commands.add_parser(command, help=purpose, description=purpose)
        add_config_arguments(options)
        options.add_argument("--name", required=True, help="name of the study")
        if command == "create":
            options.add_argument("--url", required=True, help=f"of the endpoint; its key is {KEY_VARIABLE}")
            options.add_argument(
                "--versions",
                nargs=2,
                metavar="VERSION",
                help="numbers or aliases; default: champion candidate",
            )
            options.add_argument("--prompts", metavar="FILE", help="one per line; default: the test split")
            options.add_argument("--count", type=int, default=40, help="number of prompts (40)")
            options.add_argument("--seed", type=int, default=0, help="of the choice of prompts and seeds")
    given = parser.parse_args(arguments)
    try:
        config = load_config(given.config, given.overrides)
        if given.command == "create":
            show(f"study: raters open {create(config, given)}")
        else:
            for line in lines_of(report(config, given)):
                show(f"study: {line}")
    except ConfigError as error:
        return complain(error)
    except EndpointError as error:
        show(f"error: study: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
