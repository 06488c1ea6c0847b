"""Read and correct the captions of a run beside its pictures, here or in another program.

    python -m ray_jobs.captions --config my.yaml --review
    python -m ray_jobs.captions --config my.yaml --export label-studio tasks.json

`--review` serves a page for a browser on this machine until Ctrl-C. Captions are saved in `metadata.jsonl` in
the source's folder; with `data.captioning` in `<storage>/<run>/dataset/captions.jsonl`, once prepare has
written them. The next prepare reads both.

`--export` writes pictures and captions as tasks for Label Studio, as data rows for Labelbox, or as a
`metadata.jsonl`. What comes back from them is a source: `annotations` in `data.sources`.
"""

import sys

from ray_jobs.config import Config, ConfigError, add_config_arguments, load_config
from ray_jobs.console import complain, show
from ray_jobs.console.commands import command_parser
from ray_jobs.review.captions import open_captions
from ray_jobs.review.export import FORMATS, export

PORT = 8300


def _review(config: Config, port: int) -> None:
    from ray_jobs.review.app import serve

    serve(config, port, lambda address: show(f"captions: {address} (Ctrl-C ends it)"))


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code, 2 for an error that the user must fix."""
    parser = command_parser(__doc__)
    add_config_arguments(parser)
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--review", action="store_true", help="serve a page on which captions are corrected")
    ways.add_argument("--export", nargs=2, metavar=("FORMAT", "OUT"), help=f"write {', '.join(FORMATS)}")
    parser.add_argument(
        "--port", type=int, help=f"port of the page on 127.0.0.1 (default {PORT}; 0: a free one)"
    )
    parser.add_argument("--root", help="Label Studio's document root, a folder above the pictures' folder")
    arguments = parser.parse_args(argv)
    if arguments.review and arguments.root is not None:
        parser.error("--root belongs to --export")
    if arguments.export and arguments.port is not None:
        parser.error("--port belongs to --review")
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.review:
            _review(config, PORT if arguments.port is None else arguments.port)
        else:
            format_, out = arguments.export
            for line in export(config, open_captions(config), format_, out, arguments.root):
                show(line)
    except ConfigError as error:
        return complain(error)
    except KeyboardInterrupt:
        show("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
