"""Alert rules and Prometheus' configuration, by promtool; and the runbook beside them."""

import itertools
import json
import re

import yaml
from conftest import ROOT, run

PROMETHEUS = ROOT / "deploy/prometheus"


def alerts():
    """Every alert rule by name."""
    groups = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def test_promtool_accepts_rules_and_configuration(tmp_path):
    for name in ("alerts.yaml", "prometheus.yaml"):
        (tmp_path / name).write_text((PROMETHEUS / name).read_text())
    (tmp_path / "targets.json").write_text('[{"targets": ["127.0.0.1:7701"]}]')
    for what, name in (("rules", "alerts.yaml"), ("config", "prometheus.yaml")):
        result = run("promtool", "check", what, tmp_path / name)
        assert result.code == 0, result.stderr
        assert "WARNING" not in result.stdout


def test_the_rules_pass_their_unit_tests():
    result = run("promtool", "test", "rules", PROMETHEUS / "rules_test.yaml")
    assert result.code == 0, result.stdout + result.stderr


def test_the_unit_tests_see_a_changed_threshold(tmp_path):
    (tmp_path / "rules_test.yaml").write_text((PROMETHEUS / "rules_test.yaml").read_text())
    rules = (PROMETHEUS / "alerts.yaml").read_text()
    (tmp_path / "alerts.yaml").write_text(rules.replace("> 0.01", "> 0.5"))
    assert run("promtool", "test", "rules", tmp_path / "rules_test.yaml").code != 0


def test_every_alert_fires_in_a_unit_test():
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yaml").read_text())["tests"]
    fired = {
        case["alertname"]
        for test in tests
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert fired == set(alerts())


def test_every_alert_has_a_runbook_line_that_names_its_metrics():
    readme = (ROOT / "deploy/README.md").read_text()
    lines = {m[1]: m[0] for m in re.finditer(r"^\| `?(Coppice\w+)`? \|.*$", readme, re.MULTILINE)}
    assert set(lines) == set(alerts())
    for name, rule in alerts().items():
        cells = [cell.strip() for cell in lines[name].strip("|").split("|")]
        assert len(cells) == 4 and all(cells), lines[name]
        metrics = set(re.findall(r"\b(coppice_\w+?|up)(?:_bucket|_count)?\b", rule["expr"]))
        assert metrics & set(re.findall(r"`(\w+)", cells[2])), f"{name}: want one of {metrics}"


def test_panels_of_the_dashboard_have_queries_and_do_not_overlap():
    panels = json.loads((ROOT / "deploy/grafana/coppice.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 20
    for panel in panels:
        assert panel["type"] == "row" or all(target["expr"] for target in panel["targets"])
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24

    def apart(a, b):
        return (
            a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        )  # fmt: skip

    for one, other in itertools.combinations(panels, 2):
        assert apart(one["gridPos"], other["gridPos"]), (one["title"], other["title"])
