"""Kubernetes' restricted Pod Security Standard, and what this project asks for beyond it.

Source: kubernetes.io/docs/concepts/security/pod-security-standards, profile Restricted.
"""

from collections.abc import Iterator
from typing import Any

from tests.k8s.manifests import Pod

VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}


def faults(pod: Pod) -> Iterator[str]:
    """A sentence for everything that the standard refuses in a pod, or the project's own rules."""
    spec = pod.spec
    context = spec.get("securityContext", {})
    if any(spec.get(field) for field in ("hostNetwork", "hostPID", "hostIPC")):
        yield "shares the host's namespaces"
    if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
        yield "may run as root"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "has no seccomp profile"
    for volume in spec.get("volumes", []):
        if not VOLUMES & set(volume):
            yield f"volume {volume['name']} is of a kind that is not allowed"
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"volume {volume['name']} may fill the node's disk"
    if spec.get("automountServiceAccountToken") is not False:
        yield "gets a service account's token"
    if spec.get("enableServiceLinks") is not False:
        yield "gets the addresses of services as variables (MLFLOW_PORT), which programs take for settings"
    for container in pod.containers:
        for fault in container_faults(container):
            yield f"{container['name']} {fault}"


def container_faults(container: dict[str, Any]) -> Iterator[str]:
    """The same of a container, or of Ray's autoscaler, whose options have no more than this of one."""
    context = container.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False:
        yield "may gain privileges"
    if context.get("privileged") or context.get("capabilities") != {"drop": ["ALL"]}:
        yield "keeps capabilities"
    if context.get("readOnlyRootFilesystem") is not True:
        yield "can write to its image"
    if "memory" not in container.get("resources", {}).get("limits", {}):
        yield "has no limit of memory"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield "takes a port of the host"
