"""Make the next version from what people said of the last ones, and leave it to the canary.

    python -m diffray.update --config configs/demo.yaml --draw http://127.0.0.1:8000
    python -m diffray.update --config configs/demo.yaml --draw http://127.0.0.1:8000 --if-due

Exports the feedback since the last update, with images that the endpoint draws again, trains on it from the
champion (`update.train_on`), searches, compares with the champion on the same test split and on held-out
votes, and registers the result as the candidate, or holds it back and says why. With `--if-due` only if there
are `update.after_votes` new votes, or the champion has drifted (`update.after_drift`): for a schedule.

Writes `<storage>/<run>/updates.jsonl` and the runs `<run>-update-1`, `<run>-update-2`, ... An interrupted
update goes on where it stopped. At most one runs at a time.
"""

import argparse
import os
import time
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from cluster.lease import held
from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError
from ray_jobs.config.fields import explain
from ray_jobs.console import say
from ray_jobs.data.curation.decisions import HOLD_OUT_FROM
from ray_jobs.data.votes import needed_text
from ray_jobs.pipeline import pipeline
from ray_jobs.registry.models import CANDIDATE, RegisteredModel, champion
from ray_jobs.run.command_line import run_stage
from ray_jobs.run.folder import RunFolder
from ray_jobs.run.records import Record, Winner
from serving.client import KEY_VARIABLE, EndpointError
from serving.feedback.export import ExportReport, export_preferences, export_ratings, export_training
from serving.feedback.replay import Replayer
from serving.feedback.store import FeedbackStore, Period
from serving.messages import label
from serving.rollout import status_of

UPDATES = "updates.jsonl"


class Round(Record):
    """One update (a line of updates.jsonl).

    Attributes:
        number: from 1.
        since, until: period of its feedback, in seconds since 1970.
        champion: the version that it began from, as name@3.
        run: name of its run.
        feedback: folder of the exported feedback.
        exported: number of votes, or of liked images, with their images.
        version, decision: of the registry; None until the run has published.
    """

    number: int
    since: float
    until: float
    champion: str
    run: str
    feedback: str
    exported: int
    version: int | None = None
    decision: str | None = None

    @property
    def was_released(self) -> bool:
        """Whether its version became the candidate."""
        return (self.decision or "").startswith(CANDIDATE)


def update(config: Config, arguments: argparse.Namespace) -> Round | None:
    """Run an update, or go on with the last one; None if none is due.

    Raises:
        ConfigError: there is no champion, too little feedback, or the endpoint does not answer.
    """
    root = RunFolder.of(config).root
    rounds = read_rounds(root)
    if rounds and rounds[-1].version is None:
        say("update", f"going on with update {rounds[-1].number}, run {rounds[-1].run}")
        return _finish(config, rounds)
    url = arguments.draw or config.update.url
    held_version = champion(config)
    since = rounds[-1].until if rounds else 0.0
    store = FeedbackStore.open(config)
    try:
        period = Period(since, time.time())
        if arguments.if_due:
            why = due(config, count_of(config, store, period), held_version, url)
            if not why:
                return None
            say("update", why)
        begun = _export(config, store, period, held_version, len(rounds) + 1, url)
    finally:
        store.close()
    rounds.append(begun)
    root.write_lines(UPDATES, (each.versioned() for each in rounds))
    return _finish(config, rounds)


def read_rounds(root: Storage) -> list[Round]:
    """Return all updates of a run, the oldest first."""
    return [Round.parse(line, f"{root.uri}/{UPDATES}") for line in root.read_lines(UPDATES)]


def count_of(config: Config, store: FeedbackStore, period: Period) -> int:
    """Return the number of votes in a period, or of images rated good."""
    if config.update.train_on == "votes":
        return len(store.votes(period)) + len(store.ratings(period))
    return len({each.image_id for each in store.ratings(period) if each.rating == 1})


def due(config: Config, count: int, held_version: RegisteredModel, url: str | None) -> str:
    """Return the reason why an update is due, for display; empty, and say so, if none is.

    Args:
        count: of new votes, or of liked images.

    Raises:
        ConfigError: `update.after_drift` needs an endpoint, and there is none, or it does not answer.
    """
    settings = config.update
    if count >= settings.after_votes:
        return f"due: {count} new votes, at least {settings.after_votes} (update.after_votes)"
    if settings.after_drift:
        if url is None:
            raise ConfigError(
                "update.after_drift: the endpoint says if the champion has drifted; give its URL as --draw, "
                "or set update.url"
            )
        try:
            status = status_of(url)
        except EndpointError as error:
            raise ConfigError(f"update.after_drift: {error}") from None
        scores = status.quality.get(label(held_version))
        if scores and scores.expected_fid and scores.fid > settings.after_drift * scores.expected_fid:
            return (
                f"due: the champion's drift FID is {scores.fid:.1f}, {scores.expected_fid:.1f} when published"
            )
    say("update", f"not due: {count} new votes, {settings.after_votes} are waited for (update.after_votes)")
    return ""


def _export(
    config: Config,
    store: FeedbackStore,
    period: Period,
    held_version: RegisteredModel,
    number: int,
    url: str | None,
) -> Round:
    """Export the feedback of a period, and return the round that it begins."""
    if url is None:
        raise ConfigError(
            "--draw: images are not kept, and are drawn again to train on them; give the URL of an endpoint, "
            "or set update.url"
        )
    if (count := count_of(config, store, period)) < HOLD_OUT_FROM:
        raise ConfigError(
            f"update: {count} votes since the last update are too few, and {HOLD_OUT_FROM} are needed; "
            f"{needed_text(config.data.validation)}"
        )
    out = RunFolder.of(config).feedback(number)
    replayer = Replayer(url, os.environ.get(KEY_VARIABLE))
    if config.update.train_on == "liked":
        report = export_training(store, out, replayer, period)
    elif config.train.preference and config.train.preference.loss == "kto":
        report = export_ratings(store, out, replayer, period)
    else:
        report = export_preferences(store, out, replayer, "jsonl", period)
    _tell(report, out)
    if report.count < HOLD_OUT_FROM:
        raise ConfigError(
            f"update: of {count} votes since the last update {report.count} could be exported, and "
            f"{HOLD_OUT_FROM} are needed ({out.uri}/export.json says why others were left out); "
            f"{needed_text(config.data.validation)}"
        )
    return Round(
        number=number,
        since=period.since,
        until=period.until,
        champion=label(held_version),
        run=f"{config.name}-update-{number}",
        feedback=out.uri if "://" in config.storage else out.path,
        exported=report.count,
    )


def _tell(report: ExportReport, out: Storage) -> None:
    say("update", f"{report.count} {report.kind} in {out.uri}")
    for reason, count in report.left_out.items():
        say("update", f"left out: {count} x {reason}")


def _finish(config: Config, rounds: list[Round]) -> Round:
    """Train, search, publish and register the last round."""
    last = rounds[-1]
    # What was held back may have been held back for its votes.
    derived = config_of(config, last, [each for each in rounds[:-1] if each.was_released])
    folder = RunFolder.of(derived).root
    with held(folder):
        pipeline(derived, argparse.Namespace(fresh=False))
    winner = Winner.read(folder)
    ended = last | {"version": winner.registry_version, "decision": winner.registry_decision}
    RunFolder.of(config).root.write_lines(UPDATES, (each.versioned() for each in [*rounds[:-1], ended]))
    say("update", f"update {last.number}: version {ended.version}, {ended.decision}")
    return ended


def config_of(config: Config, last: Round, earlier: Sequence[Round]) -> Config:
    """Return the configuration of a round's run: it begins from its champion.

    Args:
        earlier: rounds before, whose votes the version must not lose.

    Raises:
        ConfigError: the settings do not go with training on feedback.
    """
    given: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    publish = given.get("publish", {}) | {"release": "canary"}
    # What the adapter of the champion decides is not searched.
    space = given["search"].pop("space", {})
    space = {name: each for name, each in space.items() if not name.startswith("train.lora")}
    derived = {
        **given,
        "name": last.run,
        "publish": publish,
        "model": {k: v for k, v in given["model"].items() if k != "adapter_revision"}
        | {"adapter": last.champion},
        "search": given["search"] | ({"space": space} if space else {}),
    }
    if config.update.train_on == "votes":
        preference = given.get("train", {}).get("preference") or {}
        before = [each.feedback for each in earlier]
        votes = {"votes": [last.feedback], **({"earlier": before} if before else {})}
        derived["train"] = given.get("train", {}) | {"preference": {**preference, **votes}}
        derived["search"] = derived["search"] | {"rank_by": "votes"}
    else:
        derived["data"] = _mixed(config, given["data"], last)
    try:
        return Config.model_validate(derived)
    except ValidationError as error:
        raise ConfigError(explain(error, f"update {last.number}", Config)) from None


def _mixed(config: Config, data: dict[str, Any], last: Round) -> dict[str, Any]:
    """Return settings of the data set with the liked images of a round as a further source."""
    own = [each.model_dump(mode="json", exclude_unset=True) for each in config.data.all_sources]
    share = config.update.liked_share
    weights = [each.weight or 1.0 for each in config.data.all_sources]
    sources = [
        each | {"weight": (1 - share) * weight / sum(weights)}
        for each, weight in zip(own, weights, strict=True)
    ]
    rest = {name: value for name, value in data.items() if name not in ("source", "sources")}
    return rest | {"sources": [*sources, {"path": last.feedback, "weight": share, "training_only": True}]}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--draw",
        metavar="URL",
        help=f"running endpoint that draws the images again; default: update.url. Its key is {KEY_VARIABLE}",
    )
    parser.add_argument(
        "--if-due", action="store_true", help="only with enough new votes, or if the champion has drifted"
    )


def main(given: list[str] | None = None) -> None:
    run_stage(__doc__, update, _arguments, given=given)


if __name__ == "__main__":
    main()
