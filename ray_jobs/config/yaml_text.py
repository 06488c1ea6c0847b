"""YAML text to Python values and back, with the numbers of YAML 1.2.

PyYAML 6 follows YAML 1.1, where `1e-4` is a text (a float needs a dot and a signed exponent), `1:30` is the
number 90, `010` is 8, and `2026-01-31` is a date. Here a number is what YAML 1.2 takes for one, as other
programs do, and a date stays a text. A key that stands twice in one mapping is an error, where PyYAML drops
the first of the two. `yes` and `no` still are booleans.
"""

import re
from copy import deepcopy
from functools import lru_cache
from typing import Any

import yaml

INT, FLOAT, TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))
# Underscores between digits are YAML 1.1's, and Python's: 100_000_000.
_DIGITS = r"[0-9](?:_?[0-9])*"
_INT = re.compile(rf"[-+]?{_DIGITS}$|0o[0-7]+$|0x[0-9a-fA-F]+$|0b[01]+$")
_FLOAT = re.compile(
    rf"[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):
    """Reads plain data only: no tag of it makes a Python object."""

    # The other kinds (booleans, null, merge keys) are looked for as before.
    yaml_implicit_resolvers = {  # noqa: RUF012 - the base class declares it so
        first: [(tag, pattern) for tag, pattern in kinds if tag not in (INT, FLOAT, TIMESTAMP)]
        for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping; refuses a key that stands in it twice."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set[tuple[str, str]]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} appears twice in one section; remove one", key.start_mark
                )
            seen.add((key.tag, key.value))
        return node

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """A whole number; leading zeros count for nothing."""
        text = node.value.replace("_", "")
        bases = {"0o": 8, "0x": 16, "0b": 2}
        return int(text, bases.get(text[:2].lower(), 10))


class _Dumper(yaml.SafeDumper):
    """Puts a text in quotes that the loader would take for a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(INT, _INT, list("-+0123456789"))
    _class.add_implicit_resolver(FLOAT, _FLOAT, list("-+.0123456789"))
_Loader.add_constructor(INT, _Loader.construct_int)


def read_yaml(text: str) -> Any:
    """The value that a YAML document holds.

    Raises:
        yaml.YAMLError: it is none, or a key stands twice in a mapping.
    """
    return deepcopy(_parsed(text))  # the caller may change it


@lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    """Parse a document once: hundreds of runs of a page share a few recipes."""
    return yaml.load(text, _Loader)


def write_yaml(value: object) -> str:
    """The YAML document that `read_yaml` reads as `value`, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)
