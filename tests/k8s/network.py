"""Who may open a connection to whom, by the NetworkPolicies of an overlay.

A pod that any policy of a direction chooses is closed in that direction, but for what one of its policies
allows; a connection needs both ends' consent (kubernetes.io/docs, Network Policies).
"""

from typing import Any, NamedTuple

from tests.k8s.manifests import render

Labels = dict[str, str]


class End(NamedTuple):
    """A pod, by its labels; `namespace` is None for one of diffray's own."""

    labels: Labels
    namespace: Labels | None = None


def chosen(selector: dict[str, Any], labels: Labels) -> bool:
    """Whether a label selector matches; the empty one matches all."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def _is_peer(peer: dict[str, Any], end: End) -> bool:
    if "namespaceSelector" in peer:
        inside = end.namespace is not None and chosen(peer["namespaceSelector"], end.namespace)
        return inside and chosen(peer.get("podSelector", {}), end.labels)
    return "podSelector" in peer and end.namespace is None and chosen(peer["podSelector"], end.labels)


def _allows(overlay: str, direction: str, pod: Labels, other: End, port: int) -> bool:
    policies = [each["spec"] for each in render(overlay) if each["kind"] == "NetworkPolicy"]
    mine = [
        spec for spec in policies if direction in spec["policyTypes"] and chosen(spec["podSelector"], pod)
    ]
    side = {"Ingress": ("ingress", "from"), "Egress": ("egress", "to")}[direction]
    return not mine or any(
        any(_is_peer(peer, other) for peer in rule[side[1]])
        and ("ports" not in rule or any(each["port"] == port for each in rule["ports"]))
        for spec in mine
        for rule in spec.get(side[0], [])
    )


def may_connect(overlay: str, source: End, target: Labels, port: int) -> bool:
    """Whether `source` may open a TCP connection to a pod of ours."""
    leaves = source.namespace is not None or _allows(overlay, "Egress", source.labels, End(target), port)
    return leaves and _allows(overlay, "Ingress", target, source, port)
