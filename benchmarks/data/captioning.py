"""Captions: the stage of prepare against transformers' model in a loop over the files.

Both read, decode and caption the same JPEGs with the same weights on one thread of arithmetic; decoding is
another process of the stage's. The model is a BLIP of random weights, whose captions are all as long as
allowed. Starts are not counted: the stage captions a quarter of the pictures, and then all of them; what that
takes longer is what the others took. (Ray Data hands captions on in blocks of many batches, so that the time
between them tells nothing.)
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.data.measuring import in_fresh_process
from benchmarks.data.pictures import configured, photograph, write_folder
from cluster.connect import joined
from cluster.local import local_cluster
from cluster.storage import Storage
from ray_jobs.config import CaptioningConfig, LocalConfig
from ray_jobs.data.encoding.captioning import captioning_digest, write_captions
from ray_jobs.data.preparation import examine, open_sources

COUNTS = {"smoke": 32, "full": 192}
BATCH = 16
MAX_TOKENS = 16
SIDE = 224  # pixels
TOWER = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}


def run(size: str) -> dict[str, Any]:
    from tests.tiny_captioners import blip

    count = COUNTS[size]
    with tempfile.TemporaryDirectory(prefix="diffray-benchmark-") as name:
        folder = Path(name)
        for each, name in ((count, "pictures"), (count // 4, "some")):
            write_folder(folder / name, each, photograph)
            (folder / name / "metadata.jsonl").unlink()
        blip(folder / "blip", SIDE, TOWER)
        figures: dict[str, Any] = {
            "diffray": stage_speed(folder, count),
            "loop of batches": in_fresh_process(loop, folder, BATCH),
            "loop": in_fresh_process(loop, folder, 1),
        }
    for name, speed in figures.items():
        print(f"{name:>15}: {speed:6.2f} pictures a second", flush=True)
    ratio = figures["diffray"] / figures["loop"]
    batched = figures["diffray"] / figures["loop of batches"]
    print(f"ratio: {ratio:.2f} of the loop's pictures a second, {batched:.2f} of that in batches", flush=True)
    return {"pictures": count, "batch_size": BATCH, **figures, "ratio": ratio, "batched_ratio": batched}


def stage_speed(folder: Path, count: int) -> float:
    """Pictures a second of the product's stage."""
    some, whole = (in_fresh_process(stage, folder, name) for name in ("some", "pictures"))
    return (count - count // 4) / (whole - some)


def stage(folder: Path, pictures: str) -> float:
    """Seconds of the product's stage, with its start."""
    config = configured(
        folder / pictures,
        folder / f"runs of {pictures}",
        f"data.captioning={{model: {folder / 'blip'}, max_tokens: {MAX_TOKENS}}}",
        f"data.encode_batch_size={BATCH}",
        "data.cleaning.duplicates=ignore",
    )
    dataset = Storage.open(config.storage).child("dataset")
    with local_cluster(LocalConfig(num_cpus=4)) as cluster, joined(cluster.gcs_address):
        sources = open_sources(config)
        entries, decisions = examine(config, sources, dataset)
        begin = time.monotonic()
        write_captions(
            config,
            sources,
            entries,
            dataset.child("index"),
            decisions,
            captioning_digest(config),
            dataset,
            lambda done, whole: None,
        )
        return time.monotonic() - begin


def loop(folder: Path, batch: int) -> float:
    """Pictures a second of the model alone, `batch` pictures at a time; the first batch is not counted."""
    import torch
    from transformers import AutoModelForImageTextToText

    from ray_jobs.weights.captioner import CaptionInputs

    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(folder / "blip").eval()
    settings = CaptioningConfig(model=str(folder / "blip"))
    inputs = CaptionInputs(settings, folder / "blip")
    paths = sorted((folder / "pictures").glob("*.jpg"))
    begin = 0.0
    for start in range(0, len(paths), batch):
        pictures = [Image.open(path).convert("RGB") for path in paths[start : start + batch]]
        with torch.no_grad():
            output = model.generate(
                **inputs(pictures), do_sample=False, num_beams=1, max_new_tokens=MAX_TOKENS
            )
        inputs.processor.tokenizer.batch_decode(output, skip_special_tokens=True)
        begin = begin or time.monotonic()
    return (len(paths) - batch) / (time.monotonic() - begin)
