"""Prepare: read pictures and captions, set bad ones aside, find duplicates, split, encode once.

    python -m ray_jobs.prepare --config configs/demo.yaml
    python -m ray_jobs.prepare --config configs/demo.yaml --dry-run

Writes `<storage>/<run>/dataset/`: `index/` (what every picture measures), `rejected.jsonl`,
`duplicates.jsonl`, `parts.json` and, last, `manifest.json`; latents and embeddings go to the encoding cache,
`<storage>/encoded/`, which all runs share. With the same inputs it is skipped; with others, only what is
new is scanned and encoded. For DreamBooth the base model draws missing class pictures first, to
`<storage>/class_pictures/`. `--dry-run` stops before encoding and writes `dataset/preview.html`: what would
be kept, and a contact sheet of what would be set aside and why.
"""

import argparse

from ray_jobs.config import Config
from ray_jobs.data.preparation import dry_run, prepare
from ray_jobs.run.command_line import run_stage


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="stop before encoding and show what would be set aside"
    )


def _run(config: Config, arguments: argparse.Namespace) -> None:
    if arguments.dry_run:
        dry_run(config)
    else:
        prepare(config)


if __name__ == "__main__":
    run_stage(__doc__, _run, _arguments)
