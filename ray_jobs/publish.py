"""Score the winner once on the test split, register it, and write the report.

    python -m ray_jobs.publish --config configs/demo.yaml

Writes `<storage>/<run>/`: `model/` with its card, `comfyui/`, `samples/`, `winner.json`, `report.html`,
`test_reads.jsonl`. Adds a version to the registry, which becomes the champion if it beats the current one.
The search must have finished. A winner that is already published is skipped, or registered again if
`publish.model_name` or the registry has changed. A run uses its test split once; `--force` uses it again.
"""

import argparse

from safetensors.numpy import save

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError
from ray_jobs.console import say
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.data.preparation import prepare
from ray_jobs.evaluation.pool import SUBJECT_FEATURES, EvaluatorPool, evaluators
from ray_jobs.planning.settled import settled
from ray_jobs.publishing.final_scores import measure_final
from ray_jobs.publishing.pages import write_card, write_comfyui, write_page
from ray_jobs.publishing.remembered import require_remembered
from ray_jobs.publishing.reuse import publish_settings, reuse
from ray_jobs.publishing.test_split_ledger import close_test, open_test
from ray_jobs.publishing.version import paired_with_champion, register_winner, sampled_as
from ray_jobs.registry.beginning import beginning_names
from ray_jobs.registry.digests import digest_of_bytes, weights_digest
from ray_jobs.registry.models import REFERENCE, TEST_FEATURES, check_store
from ray_jobs.report import closed_share, number
from ray_jobs.run.command_line import run_stage
from ray_jobs.run.folder import MODEL, REPORT, RunFolder
from ray_jobs.run.records import CONTROL, KID, MIND, PREFERENCE, SUBJECT, TARGET, VOTES, Winner
from ray_jobs.run.samples import SAMPLES
from ray_jobs.run.split import TEST
from ray_jobs.training.checkpoint import WEIGHTS, damaged, weights_of
from ray_jobs.tuning.results import FINISHED, SearchResult, read_result
from ray_jobs.weights.feature_networks import check_networks
from ray_jobs.weights.schedulers import has_scheduler, scheduler_class


def publish(
    config: Config, dataset: Dataset, pool: EvaluatorPool, found: SearchResult, forced: bool = False
) -> Winner:
    """Run the stage, or reuse its result; return the content of winner.json.

    Args:
        forced: measure on the test split even if this run has already read it.

    Raises:
        ConfigError: the run has read its test split before, the chosen weights are damaged, or the registry
            refuses.
    """
    folder = RunFolder.of(config)
    run = folder.root
    if not forced and (before := reuse(config, dataset.manifest.digest, found.digest)):
        return before
    best = found.winner
    checkpoint = Storage.open(best.checkpoint)
    require_intact(checkpoint)
    weights = weights_of(best.checkpoint)
    digest, data = weights_digest(weights), dataset.manifest.digest
    test_reads = open_test(run, digest, data, forced, lambda: digest_of_bytes(weights))
    final = measure_final(config, dataset, pool, best)
    config = sampled_as(config, best)
    local = Storage.open(weights).local_copy()
    run.upload(local, MODEL)
    makes = config.with_settings(best.settings).train.makes  # which may have been searched
    if makes == "lora":
        say("publish", write_comfyui(config, local, folder))
    winner = final.winner | {"test_reads": test_reads, "begins_from": beginning_names(config)}
    beside = makes != "full" and has_scheduler(local)
    scheduler = scheduler_class(local) if beside else None
    write_card(config, dataset, pool, winner, checkpoint.child(SAMPLES), folder.model, scheduler)
    folder.model.write_bytes(REFERENCE, save(pool.reference(checkpoint)))
    for name in (TEST_FEATURES, *([SUBJECT_FEATURES] if pool.ranked_by(TEST) == SUBJECT else [])):
        folder.model.write_bytes(name, run.read_bytes(name))
    paired = paired_with_champion(config, pool, pool.digests[TEST], folder.model)
    registered = register_winner(config, winner, data, folder.model.uri, paired)
    winner |= {"registry_version": registered.version, "registry_decision": registered.message}
    winner |= {"search_digest": found.digest, "publish_settings": publish_settings(config)}
    write_page(config, dataset, pool, found, winner, final, folder)
    winner.write(run)
    close_test(run, digest, data)
    for line in _outcome(winner):
        say("publish", line)
    say("publish", f"{config.publish.model_name} version {registered.version}, {registered.message}")
    say("publish", f"report: {run.uri}/{REPORT}")
    return winner


def _outcome(winner: Winner) -> list[str]:
    """Describe the scores on the test split: of the share closed first, what else ranked last."""
    share, closed = closed_share(winner), ""
    if share is not None:
        closed = f", {share:.0%} of the way to" if share >= 0 else ", away from"
        closed += " real pictures"
    fid = f"test FID {winner.base_test_fid:.1f} (base) -> {winner.test_fid:.1f}"
    lines = [fid + (f"{closed} ({winner.test_floor_fid:.1f})" if closed else "")]
    if winner.corrected_test is not None:
        before, after = winner.corrected_test
        lines = [
            f"test FID without the bias of few pictures {before:.1f} (base) -> {after:.1f}{closed}"
            + (" (0)" if closed else ""),
            f"{fid} (real pictures: {winner.test_floor_fid:.1f})",
        ]
    if winner.ranked_by == SUBJECT:
        digits, score, error = winner.measure.digits, *winner.value_of("validation_subject")
        unseen = f"over {len(winner.folds)} folds" if winner.folds else "validation"
        base = number(winner.base_validation_subject, digits)
        lines.insert(
            0, f"subject score, {unseen}: {base} (base) -> {number(score, digits, error)} (0 at best)"
        )
    if winner.ranked_by in (KID, MIND, PREFERENCE, TARGET, CONTROL, VOTES):
        name, digits = winner.measure
        base, own = (
            number(winner.value_of(f"{whose}test_{winner.ranked_by}")[0], digits) for whose in ("base_", "")
        )
        lines.append(f"test {name}, which ranked, {base} (base) -> {own}")
    return lines


def require_intact(checkpoint: Storage) -> None:
    """Raise ConfigError if the weights of a rung are not as its training wrote them."""
    if wrong := damaged(checkpoint, WEIGHTS):
        raise ConfigError(
            f"{checkpoint.uri}: damaged: {', '.join(wrong)}; delete that folder and search/{FINISHED}, and "
            "start the run again; training resumes from the checkpoint before"
        )


def _run(config: Config, arguments: argparse.Namespace) -> Winner:
    check_store(config)
    config = settled(config)
    check_networks(config.evaluate)
    require_remembered(config)
    dataset = prepare(config)
    config = config.with_ladder(dataset.rows_an_epoch)
    found = read_result(config, dataset)
    if found is None:
        searched = RunFolder.of(config).search
        raise ConfigError(
            f"{searched.uri}: no finished search of this configuration; run python -m ray_jobs.search"
        )
    with evaluators(config, dataset) as pool:
        return publish(config, dataset, pool, found, forced=arguments.force)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="use the test split again; this is recorded")


def main(given: list[str] | None = None) -> None:
    run_stage(__doc__, _run, _arguments, name="publish", given=given)


if __name__ == "__main__":
    main()
