"""Export feedback on served images as training data.

    python -m serving.export preferences --config configs/demo.yaml --out exports/preferences
    python -m serving.export preferences --config ... --out ... --draw http://127.0.0.1:8000 --key sk-...
    python -m serving.export ratings --config ... --out exports/ratings --draw http://...
    python -m serving.export training --config ... --out exports/liked --draw http://... --key sk-...

preferences: pairs of pictures of one prompt, the preferred and the other one, for preference training.
ratings: liked pictures and others, with their captions, for preference training with `loss: kto`.
training: liked pictures with their captions, as a folder for `data.source`.

Served pictures are not stored; with `--draw` an endpoint draws them again from the recorded settings. The
same database gives the same files. `export.json` lists what was left out and why.
"""

import os
import sys

from cluster.storage import Storage
from ray_jobs.config import ConfigError, add_config_arguments, load_config
from ray_jobs.console import complain, show
from ray_jobs.console.commands import command_parser
from serving.client import KEY_VARIABLE
from serving.feedback.export import export_preferences, export_ratings, export_training
from serving.feedback.replay import Replayer
from serving.feedback.store import FeedbackStore


def main(arguments: list[str] | None = None) -> None:
    """Run the command; a configuration error exits with code 2 and one line of explanation."""
    parser = command_parser(__doc__)
    parser.add_argument("kind", choices=["preferences", "ratings", "training"])
    add_config_arguments(parser)
    parser.add_argument("--out", required=True, help="folder, s3:// or gs://")
    parser.add_argument("--draw", metavar="URL", help="running endpoint that draws the pictures again")
    parser.add_argument("--key", default=os.environ.get(KEY_VARIABLE), help=f"its API key; or {KEY_VARIABLE}")
    parser.add_argument("--format", choices=["jsonl", "parquet"], default="jsonl", help="of preferences")
    given = parser.parse_args(arguments)
    try:
        if given.kind != "preferences" and not given.draw:
            raise ConfigError(f"--draw: {given.kind} needs pictures; give the URL of a running endpoint")
        out = Storage.open(given.out)
        replayer = Replayer(given.draw, given.key) if given.draw else None
        store = FeedbackStore.open(load_config(given.config, given.overrides))
        try:
            if given.kind == "preferences":
                report = export_preferences(store, out, replayer, given.format)
            else:
                assert replayer
                export = export_ratings if given.kind == "ratings" else export_training
                report = export(store, out, replayer)
        finally:
            store.close()
    except ConfigError as error:
        sys.exit(complain(error))
    show(f"export: {report.count} {report.kind} in {out.uri}")
    for reason, number in report.left_out.items():
        show(f"export: left out: {number} x {reason}")


if __name__ == "__main__":
    main()
