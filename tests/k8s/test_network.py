"""Ray's ports are open inside a cluster only, and the endpoint's to the gateway only."""

import pytest

from tests.k8s.manifests import OVERLAYS, pods, render
from tests.k8s.network import End, Labels, may_connect

GCS, DASHBOARD, CLIENT, SERVE, METRICS = 6379, 8265, 10001, 8000, 8080
RAY_PORTS = (GCS, DASHBOARD, CLIENT)
COMPONENTS = ("interactive", "pipeline", "train", "serving")

STRANGER = End({}, {"kubernetes.io/metadata.name": "default"})
GATEWAY = End({}, {"kubernetes.io/metadata.name": "ingress-nginx", "diffray/gateway": "true"})
ISTIO = End({"gateway.networking.k8s.io/gateway-name": "diffray-serving-gateway"})
OPERATOR = End({}, {"kubernetes.io/metadata.name": "kuberay-system"})
PROMETHEUS = End({}, {"kubernetes.io/metadata.name": "monitoring", "diffray/monitoring": "true"})


def ray(component: str, role: str) -> Labels:
    """The labels of a pod of Ray, taken from the manifests."""
    (labels, *_) = [
        pod.labels
        for pod in pods("gpu")
        if pod.role == role and pod.labels["app.kubernetes.io/component"] == component
    ]
    return labels


def service(component: str) -> Labels:
    return {"app.kubernetes.io/component": component}


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("component", COMPONENTS)
def test_the_nodes_of_a_cluster_reach_each_other(overlay: str, component: str) -> None:
    head, worker = ray(component, "head"), ray(component, "worker")
    for port in (*RAY_PORTS, 30000):
        assert may_connect(overlay, End(worker), head, port)
        assert may_connect(overlay, End(head), worker, port)


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("component", COMPONENTS)
def test_nobody_outside_a_cluster_reaches_its_ports(overlay: str, component: str) -> None:
    others = [End(ray(other, "worker")) for other in COMPONENTS if other != component]
    for source in (STRANGER, GATEWAY, ISTIO, PROMETHEUS, End(service("mlflow")), *others):
        for port in RAY_PORTS:
            assert not may_connect(overlay, source, ray(component, "head"), port), (source, port)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_endpoint_is_reached_from_the_gateway_only(overlay: str) -> None:
    worker = ray("serving", "worker")
    assert may_connect(overlay, GATEWAY, worker, SERVE)
    assert may_connect(overlay, ISTIO, worker, SERVE)
    for source in (STRANGER, PROMETHEUS, End(ray("pipeline", "worker"))):
        assert not may_connect(overlay, source, worker, SERVE), source
    assert not may_connect(overlay, GATEWAY, ray("pipeline", "worker"), SERVE)
    assert not may_connect(overlay, GATEWAY, ray("serving", "head"), SERVE)


def test_the_operator_sees_the_dashboard_and_the_proxies_and_no_more() -> None:
    head = ray("serving", "head")
    assert may_connect("gpu", OPERATOR, head, DASHBOARD)
    assert may_connect("gpu", OPERATOR, ray("serving", "worker"), SERVE)
    assert not may_connect("gpu", OPERATOR, head, CLIENT)
    assert not may_connect("gpu", OPERATOR, head, GCS)


def test_a_job_is_submitted_to_its_own_cluster_only() -> None:
    submitter = End(ray("pipeline", "submitter"))
    assert may_connect("gpu", submitter, ray("pipeline", "head"), DASHBOARD)
    assert not may_connect("gpu", submitter, ray("train", "head"), DASHBOARD)


def test_prometheus_reads_metrics() -> None:
    for component in COMPONENTS:
        for role in ("head", "worker"):
            assert may_connect("gpu", PROMETHEUS, ray(component, role), METRICS)
    assert may_connect("gpu", PROMETHEUS, ray("serving", "head"), SERVE)
    assert not may_connect("gpu", STRANGER, ray("serving", "head"), METRICS)


def test_stores_answer_those_who_need_them() -> None:
    trial, replica, head = (
        End(ray("pipeline", "worker")),
        End(ray("serving", "worker")),
        End(ray("serving", "head")),
    )
    assert may_connect("gpu", trial, service("mlflow"), 5000)
    assert may_connect("gpu", replica, service("mlflow"), 5000)
    assert may_connect("gpu", replica, service("postgresql"), 5432)
    assert may_connect("gpu", End(service("mlflow")), service("postgresql"), 5432)
    assert may_connect("gpu", head, service("redis"), 6379)
    assert not may_connect("gpu", trial, service("redis"), 6379)
    assert not may_connect("gpu", trial, service("postgresql"), 5432)
    for store, port in (("mlflow", 5000), ("postgresql", 5432), ("redis", 6379)):
        assert not may_connect("gpu", STRANGER, service(store), port)


def test_the_update_reaches_what_it_needs_and_its_submitter_the_dashboard_alone() -> None:
    submitter, head = End(service("update")), ray("interactive", "head")
    assert may_connect("gpu", submitter, head, DASHBOARD)
    assert may_connect("gpu", End(head), service("postgresql"), 5432)
    assert may_connect("gpu", End(head), ray("serving", "worker"), SERVE)
    for port in (GCS, CLIENT):
        assert not may_connect("gpu", submitter, head, port)
    assert not may_connect("gpu", submitter, service("postgresql"), 5432)
    assert not may_connect("gpu", submitter, ray("serving", "worker"), SERVE)


def test_the_machines_credentials_are_out_of_reach() -> None:
    policies = [each["spec"] for each in render("gpu") if each["kind"] == "NetworkPolicy"]
    blocks = [
        peer["ipBlock"]
        for spec in policies
        for rule in spec.get("egress", [])
        for peer in rule["to"]
        if "ipBlock" in peer
    ]
    assert blocks == [{"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}]
