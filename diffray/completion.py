"""Print a script by which a shell completes commands, options, fields and recipes of `diffray`.

    python -m diffray.completion bash

For bash, put `source <(diffray completion bash)` into ~/.bashrc. For zsh, put the same with zsh into
~/.zshrc, after compinit. For fish, put `diffray completion fish | source` into ~/.config/fish/config.fish.
"""

import json
import sys
from pathlib import Path

from diffray.command import summary
from ray_jobs.config.described import described
from ray_jobs.config.files import recipes
from ray_jobs.console.commands import COMMANDS, PROGRAM, command_parser

OPTIONS = Path(__file__).with_name("options.json")

BASH = """\
_{program}() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
    if [[ $COMP_CWORD -eq 1 ]]; then
        words="{commands}"
    elif [[ $before == --config ]]; then
        COMPREPLY=($(compgen -W "{recipes}" -- "$word") $(compgen -f -- "$word"))
        return
    elif [[ $before == --set ]]; then
        COMPREPLY=($(compgen -S = -W "{fields}" -- "$word"))
        type compopt &>/dev/null && compopt -o nospace
        return
    elif [[ $before == explain ]]; then
        words="{fields}"
    else
        case "${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}}" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _{program} {program}
"""
# Completion by bash's ways needs zsh's own, which not every .zshrc has begun by then.
ZSH = """\
(( $+functions[compdef] )) || {autoload -U compinit && compinit}
autoload -U +X bashcompinit && bashcompinit
"""


def main(arguments: list[str] | None = None) -> int:
    """Print the script."""
    parser = command_parser(__doc__)
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])
    shell = parser.parse_args(arguments).shell
    print(fish() if shell == "fish" else ZSH * (shell == "zsh") + bash(), end="")
    return 0


def _options() -> dict[str, list[str]]:
    """Return the words that can follow a command, as `keys` or `keys add`."""
    found: dict[str, list[str]] = json.loads(OPTIONS.read_text(encoding="utf-8"))
    return found


def _fields() -> list[str]:
    """Return the names of all fields that `--set` takes."""
    names = [field.name for section in described() for field in section.fields]
    return [name for name in names if "[]" not in name]


def bash() -> str:
    """Return the script for bash; zsh runs it too."""
    longest_first = sorted(_options().items(), key=lambda each: -len(each[0].split()))
    cases = [f'            {_pattern(name)}) words="{" ".join(words)}" ;;' for name, words in longest_first]
    return BASH.format(
        program=PROGRAM,
        commands=" ".join(COMMANDS),
        recipes=" ".join(recipes()),
        fields=" ".join(_fields()),
        cases="\n".join(cases),
    )


def _pattern(name: str) -> str:
    """Return the pattern of the first two words: both of `keys add`, or any second one after `keys`."""
    return f'"{name}"' if " " in name else f'"{name} "*'


def fish() -> str:
    """Return the script for fish."""
    fields = " ".join(_fields())
    values = {"--config": f" -r -a '{' '.join(recipes())}'", "--set": f" -x -a '{fields}'"}
    lines = [
        f"-n __fish_use_subcommand -f -a {name} -d {_quoted(summary(COMMANDS[name]))}" for name in COMMANDS
    ]
    for name, words in _options().items():
        condition = "; and ".join(f"__fish_seen_subcommand_from {part}" for part in name.split())
        for word in words:
            option = f"-l {word[2:]}{values.get(word, '')}" if word.startswith("--") else f"-f -a {word}"
            lines.append(f"-n '{condition}' {option}")
    lines.append(f"-n '__fish_seen_subcommand_from explain' -f -a '{fields}'")
    return "".join(f"complete -c {PROGRAM} {line}\n" for line in lines)


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


if __name__ == "__main__":
    sys.exit(main())
