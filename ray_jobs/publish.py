"""Publish: measure the winner once on the test split, register it, and write the report.

    python -m ray_jobs.publish --config configs/demo.yaml

Writes `<storage>/<run>/`: `model/` with its card, `samples/`, `winner.json`, `report.html`,
`test_reads.jsonl`; the registry gets a version, the champion if it beats the present one. The search must
have finished. With the same winner it is skipped. A run reads its test split once; `--force` reads it again.
"""

import argparse
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.numpy import save

from cluster.fetched import local_path
from cluster.storage import Storage, slug
from ray_jobs.config import Config, ConfigError
from ray_jobs.data.dataset import Dataset
from ray_jobs.diffusion.model_files import variant_name
from ray_jobs.diffusion.schedulers import has_scheduler, scheduler_class
from ray_jobs.digests import digest_of_bytes, weights_digest
from ray_jobs.evaluate import EvaluatorPool, evaluators
from ray_jobs.feature_networks import check_networks
from ray_jobs.final_scores import FinalScores, measure_final, settings_of
from ray_jobs.folds import splits
from ray_jobs.guidance import measured_scales
from ray_jobs.metrics.ranking import enough_samples
from ray_jobs.model_card import model_card
from ray_jobs.prepare import prepare
from ray_jobs.progress import say
from ray_jobs.promotion import Measured, Paired
from ray_jobs.registration import Registered, register
from ray_jobs.registry import REFERENCE, TEST_FEATURES, champion, check_store
from ray_jobs.report import PictureRow, Strip, closed_share, grid_image, headline, write_report
from ray_jobs.samples import SAMPLES
from ray_jobs.search_results import FINISHED, SearchResult, read_result, spent
from ray_jobs.stage import run_stage
from ray_jobs.test_split import close_test, open_test
from ray_jobs.training.checkpoint import WEIGHTS, damaged

WINNER = "winner.json"
REPORT = "report.html"
CARD = "README.md"
# What winner.json takes over from the search.
WINNING = ("trial_id", "learning_rate", "settings", "step", "guidance_scale", "folds")
CARD_PICTURES = 4  # shown in the model's card


def publish(
    config: Config, dataset: Dataset, pool: EvaluatorPool, found: SearchResult, forced: bool = False
) -> dict[str, Any]:
    """Run the stage, or find its result; returns what winner.json holds.

    Args:
        forced: measure on the test split although this run has read it.

    Raises:
        ConfigError: the run has read its test split before, or the registry refuses.
    """
    run = Storage.open(config.storage).child(config.name)
    if run.exists(WINNER) and not forced:
        winner = json.loads(run.read_text(WINNER))
        if winner["search_digest"] == found.digest and run.exists(REPORT):
            say("publish", f"unchanged, skipped: version {winner['registry_version']}")
            _tell_other_measures(config, winner)
            return dict(winner)
    best = found.winner
    checkpoint = Storage.open(best["checkpoint"])
    require_intact(checkpoint)
    weights = checkpoint.child(WEIGHTS).uri
    digest, data = weights_digest(weights), dataset.manifest["digest"]
    test_reads = open_test(run, digest, data, forced, lambda: digest_of_bytes(weights))
    guidance_scale = best.get("guidance_scale")
    final = measure_final(config, dataset, pool, weights, guidance_scale)
    if guidance_scale is not None:
        evaluate = config.evaluate.model_copy(update={"guidance_scale": guidance_scale})
        config = config.model_copy(update={"evaluate": evaluate})
    local = Storage.open(weights).local_copy()
    run.upload(local, "model")
    winner = {name: best[name] for name in WINNING if name in best}
    winner |= {"validation_fid": best["fid"], "validation_fid_error": best.get("fid_error")}
    winner["test_reads"] = test_reads
    winner |= final.numbers
    beside = config.train.method == "lora" and has_scheduler(local)
    scheduler = scheduler_class(local) if beside else None
    _write_card(config, dataset, pool, winner, checkpoint.child(SAMPLES), run.child("model"), scheduler)
    run.child("model").write_bytes(REFERENCE, save(pool.reference(checkpoint)))
    run.child("model").write_bytes(TEST_FEATURES, run.read_bytes(TEST_FEATURES))
    paired = _paired(config, pool, winner, run.child("model"))
    registered = _register(config, winner, data, run.child("model").uri, paired)
    winner |= {"registry_version": registered.version, "registry_decision": registered.message}
    winner["search_digest"] = found.digest
    _write_report(config, dataset, pool, found, winner, final, run)
    run.write_text(WINNER, json.dumps(winner, indent=2) + "\n")
    close_test(run, digest, data)
    share, closed = closed_share(winner), ""
    if share is not None:
        way = f"{share:.0%} of the way to" if share >= 0 else "away from"
        closed = f", {way} real pictures ({winner['test_floor_fid']:.1f})"
    say("publish", f"test FID {winner['base_test_fid']:.1f} (base) -> {winner['test_fid']:.1f}{closed}")
    say("publish", f"{config.publish.model_name} version {registered.version}, {registered.message}")
    say("publish", f"report: {run.uri}/{REPORT}")
    return winner


def require_intact(checkpoint: Storage) -> None:
    """Raise ConfigError if the weights of a rung are other than its training wrote them."""
    if wrong := damaged(checkpoint, WEIGHTS):
        raise ConfigError(
            f"{checkpoint.uri}: damaged: {', '.join(wrong)}; delete that folder and search/{FINISHED}, and "
            "start the run again: it trains on from the checkpoint before"
        )


def _tell_other_measures(config: Config, winner: dict[str, Any]) -> None:
    """Say which settings a published result was not measured with."""
    settings = settings_of(config.evaluate)
    changed = [name for name in settings if winner.get("measure_settings", {}).get(name) != settings[name]]
    if changed:
        fields = ", ".join(f"evaluate.{name}" for name in changed)
        say("publish", f"{fields} changed since it was measured; --force measures again")


def _paired(config: Config, pool: EvaluatorPool, winner: dict[str, Any], model: Storage) -> Paired | None:
    """The winner's difference to the champion, picture by picture; None where the champion drew others, or
    there is none."""
    if not config.evaluate.bootstrap:  # no errors are asked for
        return None
    try:
        held = champion(config)
    except ConfigError:  # no champion yet; of a registry that does not answer `register` tells
        return None
    folder = Storage.open(held.source)
    if held.test_digest != winner["test_digest"] or not folder.exists(TEST_FEATURES):
        return None
    try:
        found = pool.difference(model, folder, "test", TEST_FEATURES)
    except (KeyError, ValueError):  # by another network, or of another number of pictures
        return None
    return Paired(held.version, found.standard_error)


def _register(
    config: Config, winner: dict[str, Any], data: str, source: str, paired: Paired | None
) -> Registered:
    """The winner as a version; `data`: digest of the prepared data."""
    return register(
        config,
        source=source,
        measured=Measured(
            fid=winner["test_fid"],
            error=winner.get("test_fid_error"),
            num_samples=winner["num_samples"],
            feature_network=winner["feature_network"],
            data=data,
            test=winner["test_digest"],
            base_fid=winner["base_test_fid"],
        ),
        paired=paired,
        params={
            "learning_rate": f"{winner['learning_rate']:g}",
            "step": str(winner["step"]),
            **{name: str(value) for name, value in winner.get("settings", {}).items()},
            "guidance_scale": f"{config.evaluate.guidance_scale:g}",
            "method": config.train.method,
            "base": config.model.base,
            "dataset": data,
            "folds": str(config.search.folds),
        },
        metrics=_metrics(winner),
        description=f"{headline(winner)} Card: {CARD} beside the weights.",
    )


def _metrics(winner: dict[str, Any]) -> dict[str, float]:
    """What MLflow shows of a winner: its FIDs, and every other measure on the test split."""
    fids = {name: value for name, value in winner.items() if name.endswith("_fid")}
    others = {slug(each["metric"]): each["value"] for each in winner["measures"]["winner"]}
    return fids | {f"test_{name.replace('-', '_')}": value for name, value in others.items()}


def _write_card(
    config: Config,
    dataset: Dataset,
    pool: EvaluatorPool,
    winner: dict[str, Any],
    samples: Storage,
    model: Storage,
    scheduler: str | None,
) -> None:
    """The model's card and its pictures, beside the weights."""
    base = local_path(config.model.base)
    split = shown_split(config)
    names = pool.sample_names(split)[:CARD_PICTURES]
    shown = [(caption, name) for caption, name in zip(pool.captions[split], names, strict=False)]
    shown = [(caption, name) for caption, name in shown if samples.exists(name)]
    for _, name in shown:
        model.write_bytes(f"images/{name}", samples.read_bytes(name))
    card = model_card(
        config=config,
        base_on_hub=not Path(base).is_dir(),
        variant=variant_name(base, revision=config.model.revision),
        winner=winner,
        manifest=dataset.manifest,
        prompt=pool.captions[split][0],
        pictures=[(caption, f"images/{name}") for caption, name in shown],
        scheduler=scheduler,
    )
    model.write_text(CARD, card)


def shown_split(config: Config) -> str:
    """Whose captions are shown: no picture of theirs may have been trained on."""
    return "test" if config.search.folds else "validation"


def _strip(
    pool: EvaluatorPool, found: SearchResult, winner: dict[str, Any], base: list[Image.Image]
) -> Strip | None:
    """The pictures that are kept of the winning trial's rungs."""
    split = splits(pool.config)[0]
    names = pool.sample_names(split)
    columns: list[tuple[str, list[Image.Image]]] = []
    for row in sorted(found.rows, key=lambda row: int(row["step"])):
        if row["trial_id"] != winner["trial_id"]:
            continue
        samples = Storage.open(row["checkpoint"]).child(SAMPLES)
        if not all(samples.exists(name) for name in names):
            say("publish", f"{samples.uri}: some are missing, so the report leaves step {row['step']} out")
            continue
        pictures: list[Image.Image]
        pictures = [Image.open(io.BytesIO(samples.read_bytes(name))) for name in names]
        columns.append((f"{row['step']:,}", pictures))
    if not columns:
        return None
    if split != shown_split(pool.config):
        base = [Image.open(io.BytesIO(each)) for each in pool.pictures(None, split, len(names))]
    captions = pool.captions[split][: len(names)]
    return Strip(captions, [("base", base), *columns], f"{winner['step']:,}")


def _write_report(
    config: Config,
    dataset: Dataset,
    pool: EvaluatorPool,
    found: SearchResult,
    winner: dict[str, Any],
    final: FinalScores,
    run: Storage,
) -> None:
    """The samples as files, and the page around them."""
    count = min(config.publish.sample_count, config.evaluate.num_samples)
    split = shown_split(config)
    real = dataset.pictures(split, count)
    count = len(real)
    weights = run.child("model").uri
    columns = {
        "real": [row["image"] for row in real],
        "base": pool.pictures(None, split, count),
        "winner": pool.pictures(weights, split, count, config.evaluate.guidance_scale),
    }
    captions = [row["text"] for row in real]
    run.delete("samples")
    for kind, pictures in columns.items():
        for number, (caption, data) in enumerate(zip(captions, pictures, strict=True)):
            run.write_bytes(f"samples/{number}-{slug(caption)}-{kind}.png", data)
    opened: dict[str, list[Image.Image]]
    opened = {kind: [Image.open(io.BytesIO(data)) for data in column] for kind, column in columns.items()}
    rows = [
        PictureRow(caption, *pictures) for caption, *pictures in zip(captions, *opened.values(), strict=True)
    ]
    grid = io.BytesIO()
    grid_image(rows).save(grid, format="PNG")
    run.write_bytes("samples/grid.png", grid.getvalue())
    run.write_text("samples/captions.json", json.dumps(captions, ensure_ascii=False))
    page = write_report(
        winner=winner,
        results=found.rows,
        manifest=dataset.manifest,
        config_yaml=config.to_yaml(),
        rows=rows,
        run_name=config.name,
        split=split,
        strip=_strip(pool, found, winner, opened["base"]),
        memorisation=final.memorisation,
        subjects=final.subjects,
        enough_samples=enough_samples(pool.num_features()),
        spent=spent(config, found.measured, found.computed),
        guidance=measured_scales(pool.config, found.rows),
    )
    run.write_text(REPORT, page)


def _run(config: Config, arguments: argparse.Namespace) -> dict[str, Any]:
    check_store(config)
    check_networks(config.evaluate)
    dataset = prepare(config)
    found = read_result(config, dataset)
    if found is None:
        searched = Storage.open(config.storage).child(config.name, "search")
        raise ConfigError(
            f"{searched.uri}: holds no finished search of this configuration; run python -m ray_jobs.search"
        )
    with evaluators(config, dataset) as pool:
        return publish(config, dataset, pool, found, forced=arguments.force)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="read the test split again; it is recorded")


if __name__ == "__main__":
    run_stage(__doc__, _run, _arguments)
