"""Show a configuration with all its defaults, check it, or explain a field.

    python -m diffray.configuration show --config configs/demo.yaml
    python -m diffray.configuration check --config my.yaml --set train.batch_size=8
    python -m diffray.configuration explain train.lora.rank

Nothing is started, and neither data nor model is looked at: `plan` does that. A wrong setting gives one line
and exit code 2.
"""

import sys

from ray_jobs.config import Config, ConfigError, add_config_arguments, load_config
from ray_jobs.config.described import DescribedSection, find
from ray_jobs.console import columns, complain, show
from ray_jobs.console.commands import command_parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and return its exit code: 2 for a configuration error."""
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, purpose in (
        ("show", "print every setting, with those that are not in the file"),
        ("check", "read the file and say whether its settings go together"),
    ):
        add_config_arguments(commands.add_parser(command, help=purpose, description=purpose))
    purpose = "print what a field is, what it takes, its default, and what changes with it"
    explain = commands.add_parser("explain", help=purpose, description=purpose)
    explain.add_argument("field", help="a field or a section, for example train.lora.rank")
    options = parser.parse_args(arguments)
    try:
        if options.command == "explain":
            show(explained(options.field))
            return 0
        config = load_config(options.config, options.overrides)
        show(config.to_yaml().rstrip() if options.command == "show" else checked(options.config, config))
    except ConfigError as error:
        return complain(error)
    return 0


def checked(path: str, config: Config) -> str:
    """Return the line that says what a configuration without errors is."""
    return f"{path}: no errors; run {config.name}: {config.train.method} of {config.model.base}"


def explained(name: str) -> str:
    """Return a field, or a section with its fields, in words.

    Raises:
        ConfigError: there is none of that name; names the nearest.
    """
    found = find(name)
    if isinstance(found, DescribedSection):
        rows = [(f"  {each.own_name}", each.default.strip("`") or "required") for each in found.fields]
        return "\n".join([f"{found.name}: {found.text}", *columns(rows)])
    effects = [f"{effect.word}: {effect.meaning}" for effect in found.effects]
    rows = [
        ("takes", found.values),
        ("default", found.default.strip("`") or "none; the field is required"),
        *(("affects", each) for each in effects),
    ]
    return "\n".join([f"{found.name}: {found.text}", *columns([(f"  {a}", b) for a, b in rows])])


if __name__ == "__main__":
    sys.exit(main())
