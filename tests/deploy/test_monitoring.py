"""Prometheus' and Grafana's files against each other, docker-compose.yml, and what the server really exports."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator

import httpx
import pytest
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families

from app.api.app import create_app
from app.api.metrics import Metrics
from app.api.worker import WorkerClient
from app.errors import BY_CODE
from app.settings import Settings
from tests.deploy.compose import read_compose
from tests.deploy.dockerfile import ROOT, load, seconds
from tests.fakes import MemoryStore
from tests.harness import Harness, load_backbone

COMPOSE = read_compose()
PROMETHEUS = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
ALERTS = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
SOURCES = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
PROVIDERS = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/memoryllm.yml").read_text())
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/memoryllm.json").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [target for panel in PANELS for target in panel["targets"]]


class Exported:
    """The names in /metrics, and the labels of each, after everything that can happen has happened."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        harness = Harness(load_backbone("two-adapters")[0], store=MemoryStore(), slots=2, warm_bytes=1 << 30)
        text = list(range(3, 23))
        for name in ("a", "b", "c", "a"):
            harness.update(name, text)
            harness.generate(name, text, 3)
        harness.score("b", text, text[:4])
        harness.begin_generate("a", [])
        harness.run()
        metrics = Metrics()
        metrics.worker_stats(harness.engine.stats())
        metrics.requests.labels("/x", "GET", "200").inc()
        metrics.request_seconds.labels("/x").observe(1)
        for histogram in (metrics.first_token, metrics.inter_token, metrics.whole):
            histogram.observe(1)
        self.labels: dict[str, set[str]] = {}
        self.families: set[str] = set()
        self.words: dict[str, str] = {}
        for family in text_string_to_metric_families(metrics.render().decode()):
            # when a counter began, which no panel needs
            if family.name.endswith("_created"):
                continue
            self.families.add(family.name)
            self.words[family.name] = family.documentation
            for sample in family.samples:
                self.labels.setdefault(sample.name, set()).update(sample.labels)


@pytest.fixture(scope="module")
def exported() -> Exported:
    return Exported()


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"memoryllm_\w+", expression))


def labels_in(expression: str) -> Iterator[tuple[str, str]]:
    """Every (metric, label) of the selectors, and of the groupings for all metrics of the expression."""
    for metric, selectors in re.findall(r"(memoryllm_\w+)\{([^}]*)\}", expression):
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selectors):
            yield metric, label
    for grouped in re.findall(r"by \(([^)]*)\)", expression):
        for metric in metrics_in(expression):
            for label in grouped.split(","):
                yield metric, label.strip()


EXPRESSIONS = [target["expr"] for target in TARGETS] + [rule["expr"] for rule in RULES]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_what_is_asked_for_is_exported(expression: str, exported: Exported) -> None:
    for metric in metrics_in(expression):
        assert metric in exported.labels, metric
        if exported.labels[metric] & {"le"}:
            assert "histogram_quantile" in expression
    for metric, label in labels_in(expression):
        assert label in exported.labels[metric], (metric, label)
    assert "memoryllm_" in expression or expression.startswith("up{")
    assert expression.count("(") == expression.count(")")
    # a counter's value says nothing, its rate does
    for counter in re.findall(r"memoryllm_\w+_(?:total|bucket)", expression):
        assert re.search(rf"(rate|increase)\({counter}", expression), counter


def test_every_metric_says_what_it_is(exported: Exported) -> None:
    for name, words in exported.words.items():
        assert words, name
        assert "(worker)" not in words, f"describe {name} in app/api/metrics.py"


def test_every_metric_of_the_server_has_a_panel(exported: Exported) -> None:
    shown = {
        re.sub("_(total|bucket|sum|count)$", "", name)
        for target in TARGETS
        for name in metrics_in(target["expr"])
    }
    assert exported.families - shown == set(), (
        "give these a panel in deploy/grafana/dashboards/memoryllm.json"
    )


def test_legends_name_labels_that_are_there() -> None:
    for target in TARGETS:
        grouped = {
            label.strip() for g in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in g.split(",")
        }
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= grouped


def test_codes_in_alerts_are_the_services() -> None:
    asked = {
        c
        for rule in RULES
        for codes in re.findall(r'code=~?"([^"]+)"', rule["expr"])
        for c in codes.split("|")
    }
    assert asked
    assert asked <= set(BY_CODE)


def test_rates_look_back_far_enough() -> None:
    """A rate needs two samples in its window, one of which may be lost."""
    interval = seconds(PROMETHEUS["global"]["scrape_interval"])
    for rule in RULES:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        for window in re.findall(r"\[(\w+)\]", rule["expr"]):
            assert seconds(window) >= 4 * interval
    for target in TARGETS:
        for window in re.findall(r"(?<=[\w}])\[([^\]]+)\]", target["expr"]):
            assert window == "$__rate_interval" or seconds(window) >= 4 * interval
    assert SOURCES["datasources"][0]["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]


def test_panels_fill_the_page_without_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Now", "Traffic", "Latency", "Scheduler", "Memory tiers", "Store", "Errors"]
    for panel in PANELS:
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references)), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_panels_ask_the_provisioned_source() -> None:
    (source,) = SOURCES["datasources"]
    wanted = {"type": source["type"], "uid": source["uid"]}
    for panel in PANELS:
        assert panel["datasource"] == wanted
        assert all(target["datasource"] == wanted for target in panel["targets"])


def test_grafana_reaches_prometheus_and_finds_the_dashboard() -> None:
    grafana, prometheus = COMPOSE.services["grafana"], COMPOSE.services["prometheus"]
    assert set(grafana.networks) & set(prometheus.networks)
    (port,) = [p.split(":")[2] for p in prometheus.ports]
    assert SOURCES["datasources"][0]["url"] == f"http://prometheus:{port}"
    (provider,) = PROVIDERS["providers"]
    mounts = grafana.mounts()
    assert mounts[provider["options"]["path"]] == "./deploy/grafana/dashboards"
    assert mounts["/etc/grafana/provisioning"] == "./deploy/grafana/provisioning"
    home = grafana.environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/memoryllm.json"
    assert grafana.environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


async def get(path: str) -> httpx.Response:
    transport = httpx.ASGITransport(create_app(Settings(), WorkerClient()))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return await client.get(path)


def test_prometheus_asks_the_server_where_it_answers() -> None:
    service = COMPOSE.services["prometheus"]
    assert service.command is not None
    flags = dict(word.split("=", 1) for word in service.command)
    mounts = service.mounts()
    assert flags["--config.file"] == "/etc/prometheus/prometheus.yml"
    assert mounts["/etc/prometheus"] == "./deploy/prometheus"
    assert mounts[flags["--storage.tsdb.path"]] == "prometheus"
    assert all((ROOT / "deploy/prometheus" / name).exists() for name in PROMETHEUS["rule_files"])
    (job,) = PROMETHEUS["scrape_configs"]
    assert job["job_name"] == "memoryllm"
    (target,) = job["static_configs"][0]["targets"]
    server, _, port = target.partition(":")
    assert set(COMPOSE.services[server].networks) & set(service.networks)
    assert port == load()[1][-1].last("EXPOSE").value
    answer = asyncio.run(get(job["metrics_path"]))
    assert answer.status_code == 200
    assert "memoryllm_http_requests" in answer.text


def test_every_metric_of_the_server_is_in_the_documentation(exported: Exported) -> None:
    told = (ROOT / "docs/operations.md").read_text()
    named = set(re.findall(r"`(?:memoryllm_)?(\w+?)(?:_total)?`", told))
    assert {name.removeprefix("memoryllm_") for name in exported.families} - named == set()
