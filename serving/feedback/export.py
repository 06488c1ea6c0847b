"""Export of feedback: pairs for preference training, and liked images for fine-tuning."""

import io
import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from cluster.storage import Storage
from ray_jobs.config import ConfigError
from serving.feedback.replay import Replayer, Unavailable
from serving.feedback.schemas import Generation
from serving.feedback.store import ALWAYS, FeedbackStore, Period, Rated, Vote

PREFERENCES = "preferences"
METADATA = "metadata.jsonl"
REPORT = "export.json"
IMAGES = "images"  # folder of reproduced images beside the pairs
DRAWN_AT_ONCE = 4

# Fields of a generation that reproduce its image; not the requester, nor the time.
PARAMETERS = (
    "image_id",
    "model",
    "version",
    "adapter",
    "adapters",
    "negative_prompt",
    "seed",
    "steps",
    "guidance_scale",
    "guidance_interval",
    "size",
)


LeftOut = Counter[str]
"""Number of items left out of the export, by reason."""


@dataclass(frozen=True)
class ExportReport:
    """Content of export.json.

    Attributes:
        kind: `pairs` or `pictures`.
        count: number of exported items.
        left_out: number of items left out, by reason.
    """

    kind: str
    count: int
    left_out: dict[str, int]


class Pair(NamedTuple):
    """Two images of the same prompt, one of which is preferred.

    Attributes:
        source: `vote`: they were compared side by side; `rating`: one key rated one up and the other down.
        people: number of keys that agree, minus those that disagree.
    """

    chosen: Generation
    rejected: Generation
    source: str
    people: int

    def row(self) -> dict[str, object]:
        """Return the exported row."""
        return {
            "prompt": self.chosen.prompt,
            "chosen": _parameters(self.chosen),
            "rejected": _parameters(self.rejected),
            "source": self.source,
            "people": self.people,
        }


def _parameters(generation: Generation) -> dict[str, object]:
    return {name: getattr(generation, name) for name in PARAMETERS}


def voted_pairs(votes: Iterable[Vote], known: dict[str, Generation], left_out: LeftOut) -> list[Pair]:
    """Return one pair, the majority's choice, for every two images that were compared."""
    balance: Counter[tuple[str, str]] = Counter()
    for vote in votes:
        first, second = sorted((vote.winner_id, vote.loser_id))
        balance[first, second] += 1 if vote.winner_id == first else -1
    pairs = []
    for (first, second), people in balance.items():
        one, other = known[first], known[second]
        if one.prompt != other.prompt:
            left_out["a vote between pictures of different prompts"] += 1
        elif people == 0:
            left_out["a pair with as many votes for either picture"] += 1
        else:
            chosen, rejected = (one, other) if people > 0 else (other, one)
            pairs.append(Pair(chosen, rejected, "vote", abs(people)))
    return pairs


def rated_pairs(ratings: Iterable[Rated], known: dict[str, Generation], left_out: LeftOut) -> list[Pair]:
    """Pair images of one prompt that one key rated +1 and -1: each image in one pair, the oldest first.

    All combinations would give prompts with many ratings a quadratic weight.
    """
    rated: dict[tuple[str, str], dict[int, list[Generation]]] = {}
    for each in ratings:
        if each.rating:
            generation = known[each.image_id]
            sides = rated.setdefault((each.key_id, generation.prompt), {1: [], -1: []})
            sides[each.rating].append(generation)
    pairs = []
    for sides in rated.values():
        good, bad = (sorted(sides[side], key=_age) for side in (1, -1))
        pairs += [Pair(*both, "rating", 1) for both in zip(good, bad, strict=False)]
        if alone := abs(len(good) - len(bad)):
            left_out["a rating without an opposite one of the same key and prompt"] += alone
    return pairs


def _age(generation: Generation) -> tuple[float, str]:
    return generation.created, generation.image_id


def export_preferences(
    store: FeedbackStore,
    out: Storage,
    replayer: Replayer | None,
    file_format: str,
    period: Period = ALWAYS,
) -> ExportReport:
    """Write the pairs, with their images if there is a `replayer`.

    Args:
        period: when the feedback was given.
    """
    left_out: LeftOut = Counter()
    votes, ratings = store.votes(period), store.ratings(period)
    images = {each.image_id for each in ratings}
    images |= {image for vote in votes for image in (vote.winner_id, vote.loser_id)}
    known = {each.image_id: each for each in store.generations(sorted(images))}
    votes = [vote for vote in votes if _has_records(vote[:2], known, left_out)]
    ratings = [each for each in ratings if _has_records(each[:1], known, left_out)]
    pairs = voted_pairs(votes, known, left_out) + rated_pairs(ratings, known, left_out)
    pairs.sort(key=lambda pair: (_age(pair.chosen), _age(pair.rejected), pair.source))
    rows = [pair.row() for pair in pairs]
    if replayer:
        drawn = _draw({each.image_id: each for pair in pairs for each in pair[:2]}, out, IMAGES, replayer)
        rows = []
        for pair in pairs:
            reasons = [reason for each in pair[:2] if (reason := drawn[each.image_id])]
            if reasons:
                left_out[f"a pair whose picture could not be drawn: {reasons[0]}"] += 1
                continue
            files = {
                f"{side}_image": f"{IMAGES}/{getattr(pair, side).image_id}.png"
                for side in ("chosen", "rejected")
            }
            rows.append(pair.row() | files)
    _write_rows(out, rows, file_format)
    return _report(out, "pairs", len(rows), left_out)


def export_training(
    store: FeedbackStore, out: Storage, replayer: Replayer, period: Period = ALWAYS
) -> ExportReport:
    """Write liked images and their captions."""
    left_out: LeftOut = Counter()
    found = _sums(store, period, left_out)
    for total in found.values():
        if total <= 0:
            left_out["a picture that was not rated good on the whole"] += 1
    wanted = [each for each, total in found.items() if total > 0]
    count = _write_captioned(wanted, out, replayer, left_out)
    return _report(out, "pictures", count, left_out)


def export_ratings(
    store: FeedbackStore, out: Storage, replayer: Replayer, period: Period = ALWAYS
) -> ExportReport:
    """Write images that more keys rated +1 than -1 to `liked/`, others to `disliked/`, with captions."""
    left_out: LeftOut = Counter()
    found, count = _sums(store, period, left_out), 0
    for total in found.values():
        if not total:
            left_out["a picture with as many good as bad ratings"] += 1
    for name, sign in (("liked", 1), ("disliked", -1)):
        wanted = [each for each, total in found.items() if total * sign > 0]
        count += _write_captioned(wanted, out.child(name), replayer, left_out)
    return _report(out, "pictures", count, left_out)


def _sums(store: FeedbackStore, period: Period, left_out: LeftOut) -> dict[Generation, int]:
    """Return the sum of the ratings of each rated image, the oldest image first."""
    ratings = store.ratings(period)
    known = {each.image_id: each for each in store.generations(sorted({each.image_id for each in ratings}))}
    sums: Counter[str] = Counter()
    for each in ratings:
        if _has_records(each[:1], known, left_out):
            sums[each.image_id] += each.rating
    return {known[image]: sums[image] for image in sorted(sums, key=lambda image: _age(known[image]))}


def _has_records(images: Iterable[str], known: dict[str, Generation], left_out: LeftOut) -> bool:
    """Return whether it is still recorded how images were drawn; count it otherwise."""
    if all(image in known for image in images):
        return True
    left_out["feedback on a picture whose record was deleted"] += 1
    return False


def _write_captioned(wanted: list[Generation], out: Storage, replayer: Replayer, left_out: LeftOut) -> int:
    """Write images with their captions, and return their number."""
    drawn = _draw({each.image_id: each for each in wanted}, out, "", replayer)
    rows = []
    for generation in wanted:
        if reason := drawn[generation.image_id]:
            left_out[f"a picture that could not be drawn: {reason}"] += 1
        else:
            rows.append({"file_name": f"{generation.image_id}.png", "text": generation.prompt})
    out.write_lines(METADATA, rows)
    return len(rows)


def _draw(
    wanted: dict[str, Generation], out: Storage, folder: str, replayer: Replayer
) -> dict[str, str | None]:
    """Reproduce images in `folder`, unless they are there already. Return by image id the reason for a
    missing image, or None."""
    place = out.child(folder) if folder else out

    def draw(generation: Generation) -> str | None:
        name = f"{generation.image_id}.png"
        try:
            if not (place.exists(name) and replayer.objection(generation, place.read_bytes(name)) is None):
                place.write_bytes(name, replayer.draw(generation))
        except Unavailable as error:
            return str(error)
        return None

    with ThreadPoolExecutor(DRAWN_AT_ONCE) as pool:
        return dict(zip(wanted, pool.map(draw, wanted.values()), strict=True))


def _write_rows(out: Storage, rows: list[dict[str, object]], file_format: str) -> None:
    if file_format == "jsonl":
        out.write_lines(f"{PREFERENCES}.jsonl", rows)
        return
    import pyarrow as pa
    from pyarrow import parquet

    if not rows:
        raise ConfigError("--format parquet: there are no pairs, and so no columns; take jsonl")
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), buffer)
    out.write_bytes(f"{PREFERENCES}.parquet", buffer.getvalue())


def _report(out: Storage, kind: str, count: int, left_out: LeftOut) -> ExportReport:
    report = ExportReport(kind, count, dict(sorted(left_out.items())))
    content = {kind: count, "left_out": report.left_out}
    out.write_text(REPORT, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return report
