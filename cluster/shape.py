"""Cluster shapes (from a description, this machine or a live cluster), and placement of actors on them."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from cluster.capacity import Actors, actors_of, sized
from ray_jobs.config import Config, ConfigError, LocalConfig
from ray_jobs.config.yaml_text import read_yaml

if TYPE_CHECKING:
    from cluster.nodes import Node
    from cluster.preflight import Equipment

CPUS_A_GPU = 12
"""CPUs per GPU of a machine described by its GPUs alone: the least that clouds provide."""


@dataclass(frozen=True)
class Machine:
    """A node.

    Attributes:
        cpus: logical CPUs, as Ray counts them.
        gpu_gib: memory per GPU in GiB; None if unknown.
        memory_gib: host memory in GiB; None if unknown.
    """

    name: str
    cpus: float
    gpus: float = 0
    gpu_gib: float | None = None
    memory_gib: float | None = None

    @property
    def size(self) -> tuple[float, float, float | None, float | None]:
        return self.cpus, self.gpus, self.gpu_gib, self.memory_gib

    def describe(self) -> str:
        parts = [f"{self.name} {self.cpus:g} logical CPUs"]
        if self.memory_gib:
            parts.append(f"{self.memory_gib:,.0f} GiB of memory")
        if self.gpus:
            parts.append(f"{self.gpus:g} GPUs" + (f" of {self.gpu_gib:g} GiB" if self.gpu_gib else ""))
        return ", ".join(parts)


def parse_nodes(text: str) -> list[Machine]:
    """Parse `4x8gpu80` (machines, GPUs each, GiB per GPU), `3x16cpu64` (machines, CPUs each, GiB of memory),
    several separated by commas, or the name of a YAML file that lists {count, cpus, gpus, gpu_gib,
    memory_gib}.

    Raises:
        ConfigError: the text is none of these.
    """
    if text.endswith((".yaml", ".yml")):
        return _numbered(_from_file(text))
    found: list[tuple[int, Machine]] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)x(\d+)(gpu|cpu)(\d+(?:\.\d+)?)?", part.strip())
        if not match or not int(match[1]):
            raise ConfigError(
                f"--nodes {text}: write 4x8gpu80 (4 machines, 8 GPUs of 80 GiB), 3x16cpu64 (3 machines, 16 "
                "CPUs, 64 GiB), several with commas, or name a YAML file"
            )
        count, each, size = int(match[1]), int(match[2]), float(match[4]) if match[4] else None
        machine = (
            Machine("", CPUS_A_GPU * each, each, size)
            if match[3] == "gpu"
            else Machine("", each, 0, None, size)
        )
        found.append((count, machine))
    return _numbered(found)


def _from_file(path: str) -> list[tuple[int, Machine]]:
    try:
        listed = read_yaml(Path(path).read_text(encoding="utf-8"))
        found = []
        for row in listed:
            row = dict(row)
            found.append((int(row.pop("count", 1)), Machine("", **{k: float(v) for k, v in row.items()})))
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(
            f"--nodes {path}: give a list of {{count, cpus, gpus, gpu_gib, memory_gib}}: "
            f"{' '.join(str(error).split())}"
        ) from None
    return found


def _numbered(kinds: Iterable[tuple[int, Machine]]) -> list[Machine]:
    machines = [machine for count, machine in kinds for _ in range(count)]
    return [Machine(f"node {number}", *machine.size) for number, machine in enumerate(machines, 1)]


def embedded(local: LocalConfig) -> list[Machine]:
    """Return this machine with the resources that the embedded Ray would have."""
    from ray._common.utils import get_system_memory

    from cluster.embedded import num_gpus
    from cluster.preflight import probe

    gpus = num_gpus()
    gpu_gib = probe().gpu_gib if gpus else None
    return [Machine("this machine", sized(local).num_cpus, gpus, gpu_gib, get_system_memory() / 2**30)]


def machines_of(nodes: Iterable["Node"], found: Mapping[str, "Equipment"] | None = None) -> list[Machine]:
    """Return the nodes of a running cluster as machines, busy or not.

    Args:
        found: what is known of their GPUs, by name (`cluster.preflight.equipment`).
    """
    found = found or {}
    return [
        Machine(
            node.name,
            node.resources.get("CPU", 0),
            node.resources.get("GPU", 0),
            found[node.name].gpu_gib if node.name in found else None,
            node.resources.get("memory", 0) / 2**30,
        )
        for node in nodes
    ]


@dataclass
class Placed:
    """A placement of actors.

    Attributes:
        held: number of actors by machine and kind.
        left_over: messages about actors that do not fit, with the reason and the fix.
    """

    held: dict[str, dict[str, int]] = field(default_factory=dict)
    left_over: list[str] = field(default_factory=list)


@dataclass
class Free:
    """What is left of a machine: CPUs, and the share of each GPU."""

    cpus: float
    gpus: list[float]

    @staticmethod
    def of(machine: Machine) -> "Free":
        return Free(machine.cpus, [1.0] * int(machine.gpus))

    def take(self, actor: Actors) -> bool:
        """Give an actor what it reserves, if there is room, and return whether there is.

        A share comes from one GPU: like Ray's, the fullest one that has room.
        """
        least = min(actor.gpus, 1.0)
        fitting = [number for number, left in enumerate(self.gpus) if left >= least > 0]
        fitting.sort(key=lambda number: self.gpus[number])
        count = math.ceil(actor.gpus)
        if self.cpus < actor.cpus or len(fitting) < count:
            return False
        self.cpus -= actor.cpus
        for number in fitting[:count]:
            self.gpus[number] = round(self.gpus[number] - least, 4)
        return True


def _start_order(actor: Actors) -> tuple[bool, float, float]:
    return not (actor.kind == "evaluator" and 0 < actor.gpus < 1), -actor.gpus, -actor.cpus


def place(actors: Sequence[Actors], machines: Sequence[Machine]) -> Placed:
    """Place each actor on the first machine with room: evaluators that share GPUs first, which start before
    trainings, then the largest.

    Ray packs training workers likewise, but may choose other machines of the same kind.
    """
    free = {machine.name: Free.of(machine) for machine in machines}
    placed = Placed({machine.name: {} for machine in machines})
    for each in sorted(actors, key=_start_order):
        left = 0
        for _ in range(each.count):
            name = next((name for name, room in free.items() if room.take(each)), None)
            if name is None:
                left += 1
                continue
            placed.held[name][each.kind] = placed.held[name].get(each.kind, 0) + 1
        if left:
            needs = f"{each.cpus:g} CPUs" + (f" and {each.gpus:g} GPUs" if each.gpus else "")
            placed.left_over.append(
                f"{left} of {each.count} {each.kind}{'s' * (each.count > 1)} fit on no machine: "
                f"each needs {needs} free; lower {each.field}, or add machines"
            )
    return placed


def check_places(config: Config, machines: Sequence[Machine], stage: str = "search") -> None:
    """Raise ConfigError if a stage's processes of one kind do not fit on the machines, even alone, or if
    those that share GPUs do not fit together.

    Totals do not show this: a large process may fit on no single node, or on too few, and a share of a GPU
    cannot be put together from the rest of several.
    """
    wanted = actors_of(config, stage)
    _check_shares(wanted, machines)
    for each in wanted:
        if not place([each], machines).left_over:
            continue
        largest = max(machines, key=lambda machine: (machine.gpus * bool(each.gpus), machine.cpus))
        fields = [each.field, "train.cpus_per_worker"] if each.cpus > 1 else [each.field]
        named = fields[-1] if each.cpus > largest.cpus else fields[0]
        takes = f"{each.cpus:g} CPUs" + (f" and {each.gpus:g} GPUs" if each.gpus else "")
        raise ConfigError(
            f"{named}: {each.count} {each.kind}s of {takes} each do not fit on the nodes, the largest of "
            f"which is {largest.describe()}; lower {' or '.join(fields)}, or add larger nodes"
        )


def _check_shares(wanted: Sequence[Actors], machines: Sequence[Machine]) -> None:
    on_gpus = [replace(each, cpus=0) for each in wanted if each.gpus]
    if all(each.gpus == 1 for each in on_gpus) or not place(on_gpus, machines).left_over:
        return
    shares = ", ".join(f"{each.count} {each.kind}s of {each.gpus:g}" for each in on_gpus)
    raise ConfigError(
        f"{on_gpus[0].field.partition('.')[0]}.gpu_share: {shares} do not fit on the GPUs of the nodes: Ray "
        "starts evaluators first and fills one GPU before it takes the next; lower evaluate.num_actors, "
        "evaluate.gpu_share or train.num_workers, or add GPUs"
    )
