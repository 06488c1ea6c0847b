"""Dashboard and alert rules ask for metrics that exist, by labels that these have."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from serving.load import DriftScores, EngineLoad
from serving.service.metrics import ALIASES, REASONS, Metrics
from serving.service.request_context import RequestContext

FOLDER = Path(__file__).parents[2] / "serving" / "monitoring"
RULES = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((FOLDER / "grafana.json").read_text())
TARGETS = [target for panel in DASHBOARD["panels"] for target in panel["targets"]]
QUERIES = [target["expr"] for target in TARGETS] + [rule["expr"] for rule in RULES]


@cache
def exported() -> dict[str, set[str]]:
    """Sample name -> label names, of a server on which everything has happened once."""
    metrics = Metrics(max_queued_requests=1, min_replicas=1)
    metrics.answered(200, 1.0, RequestContext(model="diffray", version=1, alias="champion"))
    metrics.first_step("diffray", 1, 1.0)
    metrics.engines({"a": EngineLoad(*[1] * len(EngineLoad._fields))}, replicas=1)
    metrics.drift("diffray", 1, DriftScores(16, 1.0, 1.0, 1.0, 0.0, 0.0, "network", 0.0))
    families = text_string_to_metric_families(metrics.render().decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_names_existing_metrics_and_their_labels(query: str) -> None:
    names = re.findall(r"\bdiffray_\w+", query)
    assert names and set(names) <= set(exported())
    for name, matchers in re.findall(r"(diffray_\w+)\{([^}]*)\}", query):
        assert set(re.findall(r"(\w+)[=!]", matchers)) <= exported()[name]
    for labels in re.findall(r"by \(([^)]*)\)", query):
        known = {label for name in names for label in exported()[name]}
        assert {label.strip() for label in labels.split(",")} <= known
    for brackets in ("()", "[]", "{}"):
        assert query.count(brackets[0]) == query.count(brackets[1])


@pytest.mark.parametrize("query", QUERIES)
def test_values_of_labels_are_ones_that_are_counted(query: str) -> None:
    assert set(re.findall(r'reason="(\w+)"', query)) <= REASONS
    assert set(re.findall(r'alias="(\w+)"', query)) <= ALIASES
    assert set(re.findall(r'result="(\w+)"', query)) <= {"hit", "miss"}


def test_every_metric_is_on_the_dashboard() -> None:
    shown = set(re.findall(r"\bdiffray_\w+", " ".join(target["expr"] for target in TARGETS)))
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in shown}
    own = {re.sub("_(bucket|sum|count|created)$", "", name) for name in exported()}
    missing = own - families - {re.sub("_total$", "", name) for name in families}
    assert not {name for name in missing if not name.startswith("diffray_process")}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target["expr"])[:40])
def test_legends_name_labels_that_the_query_keeps(target: dict[str, Any]) -> None:
    for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
        grouped = re.findall(r"by \(([^)]*)\)", target["expr"])
        kept = {each.strip() for each in grouped[0].split(",")} if grouped else exported()[target["expr"]]
        assert label in kept


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_a_rule_says_what_is_wrong_and_how_bad_it_is(rule: dict[str, Any]) -> None:
    assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"\d+m", rule["for"]) and rule["labels"]["severity"] in ("page", "ticket")
    assert set(rule["annotations"]) == {"summary", "description"}


def test_panels_lie_side_by_side() -> None:
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]}
    assert len(places) == len(DASHBOARD["panels"]) == len({panel["id"] for panel in DASHBOARD["panels"]})
