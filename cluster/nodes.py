"""The nodes of the cluster that this process has joined, and the check that they share the run's storage."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.storage import Storage
from ray_jobs.config import Config, ConfigError

ANSWER_S = 120
"""Timeout of a check on every node, in seconds: each node may have to start a process first."""


class NoAnswer(ConfigError):
    """A node did not finish a check in time."""


@dataclass(frozen=True)
class Node:
    """A living node: its Ray id, its readable name, and its resources as Ray counts them."""

    identity: str
    name: str
    resources: Mapping[str, float]


def living_nodes() -> list[Node]:
    """Return the living nodes of the cluster, sorted by name."""
    import ray

    found = [
        Node(
            node["NodeID"],
            f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:6]})",
            node["Resources"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(found, key=lambda node: node.name)


def totals(nodes: Sequence[Node]) -> dict[str, float]:
    """Sum the logical CPUs and GPUs of nodes, with `node:` entries, as in `ray.cluster_resources()`."""
    total = {kind: sum(node.resources.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    return total | {name: 1.0 for node in nodes for name in node.resources if name.startswith("node:")}


def described(nodes: Sequence[Node]) -> str:
    """Summarize a cluster's resources in one line."""
    has = {
        kind: sum(node.resources.get(kind, 0) for node in nodes)
        for kind in ("CPU", "GPU", "memory", "object_store_memory")
    }
    return (
        f"{len(nodes)} node{'s' * (len(nodes) != 1)}, {has['CPU']:g} logical CPUs, {has['GPU']:g} GPUs, "
        f"{has['memory'] / 2**30:.1f} GiB of memory, "
        f"{has['object_store_memory'] / 2**30:.1f} GiB of object store"
    )


def check_storage(config: Config, nodes: Sequence[Node]) -> None:
    """Check that each node can write to the run's storage and see the others' files; skipped for one node.

    The tasks reserve no CPU, so a busy cluster answers too. `cluster.watch` checks nodes that join later.

    Raises:
        NoAnswer: a node does not answer.
        ConfigError: a node cannot write, or does not see another node's file.
    """
    if len(nodes) < 2:
        return
    probe = f".probe-{uuid.uuid4().hex[:12]}"
    try:
        errors = _on_each(nodes, _write_marker, config, probe)
        if failed := [f"{name} ({error})" for name, error in errors.items() if error]:
            raise ConfigError(
                f"storage: {config.storage}: cannot be written by {', '.join(failed)}; use a folder, s3:// "
                "or gs:// that every node can write to"
            )
        if said := disagreement(_on_each(nodes, _markers, config, probe), nodes):
            raise ConfigError(f"storage: {config.storage}: {said}")
    finally:
        _on_each(nodes, _clean, config, probe)


def disagreement(seen: Mapping[str, Sequence[str]], nodes: Sequence[Node]) -> str:
    """Describe the first node that misses another node's marker; empty if none does.

    Args:
        seen: identities of the nodes whose markers a node sees, by that node's name.
    """
    for name, there in seen.items():
        unseen = [node.name for node in nodes if node.identity not in there]
        if unseen:
            return (
                f"{name} does not see the files of {unseen[0]}"
                + (f" and {len(unseen) - 1} more nodes" if unseen[1:] else "")
                + "; the folder is local to each node: mount a shared one at the same absolute path on "
                "every node, or use s3:// or gs://"
            )
    return ""


def on_each(
    nodes: Sequence[Node],
    function: Callable[..., Any],
    arguments: Callable[[Node], tuple[Any, ...]],
    unanswered: str,
    **options: Any,
) -> dict[str, Any]:
    """Run a function on every node, and return its results by node name. It reserves nothing.

    Args:
        unanswered: what is wrong with nodes that do not answer; `{}` stands for their names.
        options: further options of the Ray task.

    Raises:
        NoAnswer: a node does not answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0, **options)(function)
    waiting = {
        node.name: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.identity, soft=False)
        ).remote(*arguments(node))
        for node in nodes
    }
    ray.wait(list(waiting.values()), num_returns=len(waiting), timeout=ANSWER_S)
    try:
        return {name: ray.get(found, timeout=0) for name, found in waiting.items()}
    except ray.exceptions.GetTimeoutError:
        late = [name for name, found in waiting.items() if not ray.wait([found], timeout=0)[0]]
        raise NoAnswer(unanswered.format(", ".join(late))) from None


def _on_each(
    nodes: Sequence[Node], function: Callable[..., Any], config: Config, probe: str
) -> dict[str, Any]:
    """Run a step of the storage check on every node, and return its results by node name."""
    unanswered = (
        f"storage: {config.storage}: no answer within {ANSWER_S} s from {{}}; check whether its mount hangs "
        "there"
    )
    return on_each(nodes, function, lambda node: (config, probe, node.identity), unanswered)


def _folder(config: Config, probe: str) -> Storage:
    """Return the probe folder in the run's storage, opened on the node itself as the stages' actors do."""
    return Storage.open(config.storage).child(config.name, probe)


def _write_marker(config: Config, probe: str, identity: str) -> str:
    """Write this node's marker, and return the error message; empty if it succeeds."""
    try:
        _folder(config, probe).write_text(identity, "")
    except OSError as error:
        return " ".join(str(error).split())[:300]
    return ""


def _markers(config: Config, probe: str, identity: str) -> list[str]:
    return _folder(config, probe).files()


def _clean(config: Config, probe: str, identity: str) -> None:
    """Delete the probe folder; several nodes may do so at once if they share it."""
    try:
        _folder(config, probe).delete("")
    except OSError:
        if _folder(config, probe).files():
            raise
