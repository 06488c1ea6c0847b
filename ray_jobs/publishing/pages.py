"""Pages of a published model: its card, and the run's report."""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from PIL import Image

from cluster.fetched import local_path
from cluster.storage import Storage, slug
from ray_jobs.config import Config
from ray_jobs.console import say
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.diffusion.families import Family, family_of
from ray_jobs.diffusion.families.control import Control, ControlChannels
from ray_jobs.evaluation.actor import Shown
from ray_jobs.evaluation.cross_validation import splits, standard_error
from ray_jobs.evaluation.pool import EvaluatorPool
from ray_jobs.metrics.ranking import enough_samples
from ray_jobs.publishing.final_scores import FinalScores
from ray_jobs.publishing.model_card import PublishedBase, model_card
from ray_jobs.report import PictureRow, Strip, grid_image, write_report
from ray_jobs.run.folder import CAPTIONS, REPORT, RunFolder
from ray_jobs.run.records import Measurement, RungRow, Winner
from ray_jobs.run.samples import SAMPLES
from ray_jobs.run.signs import signs_of
from ray_jobs.run.split import TEST, VALIDATION, Split
from ray_jobs.training.checkpoint import weights_of
from ray_jobs.tuning.guidance import measured_scales
from ray_jobs.tuning.results import SearchResult, spent
from ray_jobs.weights.comfyui import NotForComfyUI, comfyui_file
from ray_jobs.weights.loading import empty_model, has_processor, read_index
from ray_jobs.weights.model_files import variant_name, without_lora_loader
from ray_jobs.weights.model_index import is_modular
from ray_jobs.weights.modular import blocks_name

CARD = "README.md"
CARD_PICTURES = 4  # pictures in the model card


def write_card(
    config: Config,
    dataset: Dataset,
    pool: EvaluatorPool,
    winner: Winner,
    samples: Storage,
    model: Storage,
    scheduler: str | None,
) -> None:
    """Write the model card and its pictures next to the weights."""
    split = shown_split(config)
    names = pool.sample_names(split)[:CARD_PICTURES]
    shown = [(caption, name) for caption, name in zip(pool.captions[split], names, strict=False)]
    shown = [(caption, name) for caption, name in shown if samples.exists(name)]
    for _, name in shown:
        model.write_bytes(f"images/{name}", samples.read_bytes(name))
    card = model_card(
        config=config,
        base=published_base(config),
        winner=winner,
        manifest=dataset.manifest,
        prompt=pool.captions[split][0],
        guidance=guidance_arguments(config),
        pictures=[(caption, f"images/{name}") for caption, name in shown],
        scheduler=scheduler,
    )
    model.write_text(CARD, card)


def published_base(config: Config) -> PublishedBase:
    """Return what the card's program must know of the base model; read from its files."""
    model = config.model
    base, revision = local_path(model.base), model.revision
    index = read_index(base, revision)
    family = family_of(index["_class_name"])
    columns = tuple(config.data.all_sources[0].reference_columns)
    side = config.data.reference_resolution or config.data.resolution
    return PublishedBase(
        on_hub=not Path(base).is_dir(),
        variant=variant_name(base, revision=revision),
        injected=without_lora_loader(base, revision=revision),
        own_area=family.own_area,
        size_arguments=family.size_arguments(config.data.resolution, config.data.resolution),
        references=columns,
        before_drawing=family.before_drawing((side, side)) if columns else (),
        takes_one=family.max_references == 1,
        paints_masks=family.paints_masks,
        torchvision=has_processor(base, revision=revision),
        blocks=blocks_name(index) if is_modular(index) else None,
        control=_followed(config, family),
    )


def _followed(config: Config, family: Family) -> Control | ControlChannels | None:
    if config.train.method == "controlnet":
        return family.control
    return family.control_channels if config.data.has_control else None


def write_comfyui(config: Config, weights: Path, folder: RunFolder) -> str:
    """Write an adapter for ComfyUI; return where it is, or why there is none."""
    try:
        content = comfyui_file(local_path(config.model.base), weights, config.model.revision)
    except NotForComfyUI as error:
        return f"no LoRA file for ComfyUI: {error}"
    name = f"{config.name}.safetensors"
    folder.comfyui.write_bytes(name, content)
    return f"for ComfyUI: {folder.comfyui.uri}/{name}"


def guidance_arguments(config: Config) -> dict[str, object]:
    """Return the arguments with which diffusers' pipeline of the base draws at the run's guidance scale."""
    base, revision = local_path(config.model.base), config.model.revision
    family = family_of(read_index(base, revision)["_class_name"])
    model = empty_model(base, [family.denoiser], revision=revision)
    denoiser = getattr(model, family.denoiser).config
    return family.guidance_arguments(denoiser, config.evaluate.guidance_scale)


def shown_split(config: Config) -> Split:
    """Return the split whose captions are shown; the winner must not have trained on its pictures."""
    return TEST if config.search.folds else VALIDATION


def _strip(pool: EvaluatorPool, found: SearchResult, winner: Winner, base: list[Image.Image]) -> Strip | None:
    """Collect the pictures saved at the winning trial's rungs; None if there are none."""
    split = splits(pool.config)[0]
    names = pool.sample_names(split)
    columns: list[tuple[str, list[Image.Image]]] = []
    for row in _climbed(found, winner):
        samples = Storage.open(row.checkpoint).child(SAMPLES)
        if not all(samples.exists(name) for name in names):
            say("publish", f"{samples.uri}: some are missing, so the report leaves step {row.step} out")
            continue
        columns.append((f"{row.step:,}", _opened(samples.read_bytes(name) for name in names)))
    if not columns:
        return None
    if split != shown_split(pool.config):
        base = _opened(pool.pictures(None, split, len(names)))
    captions = pool.captions[split][: len(names)]
    shown = _shown(pool.shown(split, len(names)))
    return Strip(captions, [("base", base), *columns], f"{winner.step:,}", *shown)


def _climbed(found: SearchResult, winner: Winner) -> list[RungRow]:
    """Return the winning trial's rungs in the order of steps."""
    own = (row for row in found.rows if row.trial_id == winner.trial_id)
    return sorted(own, key=lambda row: row.step)


def _shown(rows: Sequence[Shown]) -> tuple[list[list[Image.Image]], list[Image.Image]]:
    """Return the reference pictures of rows, and their control images; empty where there are none."""
    return [_opened(row.references) for row in rows], _opened(row.control for row in rows if row.control)


def _opened(pngs: Iterable[bytes]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(png)) for png in pngs]


def _control(png: bytes | None) -> Image.Image | None:
    return Image.open(io.BytesIO(png)) if png else None


def _prompts(pool: EvaluatorPool, found: SearchResult, winner: Winner) -> Strip | None:
    """Return the user's own prompts as the base and the winning trial's rungs draw them; None without any.

    What a rung lacks, since prompts were added after the search, is drawn now.
    """
    prompts = pool.config.evaluate.prompts
    if not prompts:
        return None
    columns = [("base", _opened(pool.draw_prompts(None)))]
    for row in _climbed(found, winner):
        drawn = pool.prompts_of(weights_of(row.checkpoint), Storage.open(row.checkpoint))
        columns.append((f"{row.step:,}", _opened(drawn)))
    return Strip(prompts, columns, f"{winner.step:,}", *_shown(pool.shown_with_prompts()))


def _with_copies(pool: EvaluatorPool, found: SearchResult) -> list[RungRow]:
    """Return the candidates with their shares of near copies, with folds the mean over these."""
    shares: dict[tuple[str, int], dict[Split, Measurement]] = {}
    judged = splits(pool.config)
    for split in judged:
        measured = [row for row in found.measured if row.fold == split.fold]
        drawn = [Storage.open(row.checkpoint) for row in measured]
        for row, copies in zip(measured, pool.copies_among(split, drawn), strict=True):
            if copies:
                shares.setdefault(row.place, {})[split] = copies
    rows = []
    for row in found.rows:
        of_row = list(shares.get(row.place, {}).values())
        if len(of_row) == len(judged):
            error = of_row[0].standard_error
            if len(of_row) > 1:
                error = standard_error([each.value for each in of_row])
            row |= {"near_copies": fmean(each.value for each in of_row), "near_copies_error": error}
            row |= {"copies_by_chance": of_row[0].expected_share}
        rows.append(row)
    return rows


def write_page(
    config: Config,
    dataset: Dataset,
    pool: EvaluatorPool,
    found: SearchResult,
    winner: Winner,
    final: FinalScores,
    run: RunFolder,
) -> None:
    """Write the samples as files, and the report that shows them."""
    split = shown_split(config)
    real = dataset.pictures(split.name, len(pool.sample_names(split)))
    count = len(real)
    weights = run.model.uri
    columns = {
        "real": [row["image"] for row in real],
        "base": pool.pictures(None, split, count),
        "winner": pool.pictures(weights, split, count, config.evaluate.guidance_scale),
    }
    captions = [row["text"] for row in real]
    run.samples.delete("")
    for kind, pictures in columns.items():
        for number, (caption, data) in enumerate(zip(captions, pictures, strict=True)):
            run.samples.write_bytes(f"{number}-{slug(caption)}-{kind}.png", data)
    opened = {kind: _opened(column) for kind, column in columns.items()}
    rows = [
        PictureRow(row["text"], own, base, after, _opened(row["references"]), _control(row["control"]))
        for row, own, base, after in zip(real, *opened.values(), strict=True)
    ]
    grid = io.BytesIO()
    grid_image(rows).save(grid, format="PNG")
    run.samples.write_bytes("grid.png", grid.getvalue())
    run.samples.write_text(CAPTIONS, json.dumps(captions, ensure_ascii=False))
    page = write_report(
        winner=winner,
        results=_with_copies(pool, found),
        manifest=dataset.manifest,
        config_yaml=config.to_yaml(),
        rows=rows,
        run_name=config.name,
        split=split.name,
        strip=_strip(pool, found, winner, opened["base"]),
        prompts=_prompts(pool, found, winner),
        memorisation=final.memorisation,
        subjects=final.subjects,
        enough_samples=enough_samples(pool.num_features()),
        spent=spent(config, found.measured, found.computed),
        guidance=measured_scales(pool.config, found.rows),
        signs=signs_of(found.measured, config.evaluate.precision),
    )
    run.root.write_text(REPORT, page)
