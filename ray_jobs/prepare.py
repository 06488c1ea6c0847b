"""Read pictures and captions, reject bad ones, find duplicates, split, and encode once.

    python -m ray_jobs.prepare --config configs/demo.yaml
    python -m ray_jobs.prepare --config configs/demo.yaml --dry-run

Writes `<storage>/<run>/dataset/`: `index/` (measures of every picture), `rows/` (the same in few files),
`rejected.jsonl`, `duplicates.jsonl`, `parts.json` and, last, `manifest.json`. Latents and embeddings go to
`<storage>/encoded/`, which all runs share. With unchanged inputs the stage is skipped; otherwise only new
pictures are scanned and encoded. For DreamBooth the base model first draws missing class pictures to
`<storage>/class_pictures/`. `--dry-run` stops before encoding and writes `dataset/preview.html`: what would
be kept, and what would be rejected and why.
"""

import argparse

from ray_jobs.config import Config
from ray_jobs.data.preparation import dry_run, prepare
from ray_jobs.planning.settled import settled
from ray_jobs.run.command_line import run_stage


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="stop before encoding and show what would be rejected"
    )


def _run(config: Config, arguments: argparse.Namespace) -> None:
    config = settled(config)
    if arguments.dry_run:
        dry_run(config)
    else:
        prepare(config)


def main(given: list[str] | None = None) -> None:
    run_stage(__doc__, _run, _arguments, name="prepare", given=given)


if __name__ == "__main__":
    main()
