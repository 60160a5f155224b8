"""The Helm chart, rendered by Helm itself: valid for Kubernetes, strict about values, consistent with the daemon."""

import copy
import json
import re
import shutil

import jsonschema
import kubernetes_validate
import pytest
import yaml
from conftest import CHART, ROOT, VALUES, run

OLDEST_KUBERNETES = "1.30"  # as Chart.yaml says
CRDS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "tests/deploy/crds").glob("*")}
WORKLOADS = ("StatefulSet", "Deployment")
# Everything on: each template has something to say.
EVERYTHING = """
monitoring: {podMonitor: {enabled: true}, rules: {enabled: true}, dashboard: {enabled: true}}
autoscaling: {enabled: true}
trustTenantHeader: true
image: {pullSecrets: [{name: registry}]}
serviceAccount: {annotations: {owner: rl}}
networkPolicy: {extraEgress: [{to: [{ipBlock: {cidr: 10.0.0.0/8}}]}]}
"""


@pytest.fixture(scope="module", params=VALUES)
def values(request):
    """Each of the two values files."""
    return ("--values", CHART / request.param)


@pytest.fixture
def everything(tmp_path):
    """Arguments that turn every feature on."""
    path = tmp_path / "everything.yaml"
    path.write_text(EVERYTHING)
    return ("--values", path)


def find(manifests, kind, name):
    """The one manifest of this kind and name."""
    (found,) = [m for m in manifests if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


def pods(manifests):
    """Pod templates by the name of their workload."""
    return {
        m["metadata"]["name"]: m["spec"]["template"] for m in manifests if m["kind"] in WORKLOADS
    }


def problem(manifest, version):
    """What a cluster would object to, or None."""
    try:
        if manifest["kind"] in CRDS:
            jsonschema.validate(manifest, CRDS[manifest["kind"]])
        else:
            kubernetes_validate.validate(manifest, version, strict=True)
    except (kubernetes_validate.ValidationError, jsonschema.ValidationError) as error:
        return f"{manifest['kind']} {manifest['metadata']['name']}: {error}"
    return None


def test_helm_lints_the_chart(helm, values, everything):
    for args in (values, (*values, *everything)):
        result = helm.lint(*args)
        assert result.code == 0, result.stdout
        assert "0 chart(s) failed" in result.stdout and "WARNING" not in result.stdout


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, kubernetes_validate.latest_version()])
def test_every_manifest_is_valid_for_kubernetes(helm, values, everything, version):
    for args in (values, (*values, *everything), (*values, "--set", "router.enabled=false")):
        manifests = helm.render(*args)
        assert [problem(m, version) for m in manifests] == [None] * len(manifests)
    assert {m["kind"] for m in helm.render(*values, *everything)} == {
        "StatefulSet", "Deployment", "Service", "ServiceAccount", "NetworkPolicy", "ConfigMap",
        "PodDisruptionBudget", "PodMonitor", "PrometheusRule", "ScaledObject",
    }  # fmt: skip


def test_a_bare_cluster_has_every_kind_that_the_values_files_ask_for(helm, values):
    assert {m["kind"] for m in helm.render(*values)} & set(CRDS) == set()


@pytest.mark.parametrize(
    ("switch", "kind"),
    [
        ("monitoring.podMonitor.enabled", "PodMonitor"),
        ("monitoring.rules.enabled", "PrometheusRule"),
        ("autoscaling.enabled", "ScaledObject"),
    ],
)
def test_each_switch_needs_the_crd_that_the_readmes_and_notes_name(helm, values, switch, kind):
    manifests = helm.render(*values, "--set", f"{switch}=true")
    (custom,) = [m for m in manifests if m["kind"] in CRDS]
    assert custom["kind"] == kind
    assert problem(custom, OLDEST_KUBERNETES) is None
    group = custom["apiVersion"].split("/")[0]
    (row,) = [s for s in (CHART / "README.md").read_text().splitlines() if f"| `{switch}`" in s]
    assert f"`{kind.lower()}s.{group}`" in row
    value = switch.removesuffix(".enabled")
    for text in (helm.notes(*values).stdout, (ROOT / "deploy/README.md").read_text()):
        assert value in text and kind in text


def test_the_validation_sees_a_misspelt_field(helm, values, everything):
    for manifest in helm.render(*values, *everything):
        if manifest["kind"] in ("ConfigMap", "ServiceAccount"):
            continue
        broken = copy.deepcopy(manifest)
        broken["spec"]["misspelt"] = 1
        assert "misspelt" in problem(broken, OLDEST_KUBERNETES)


def test_the_oldest_kubernetes_is_the_one_the_chart_asks_for():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"].startswith(f">={OLDEST_KUBERNETES}.")


def objects(schema, path=()):
    """Paths of all objects of the schema that list their fields."""
    if "properties" in schema:
        yield path, schema
        for name, field in schema["properties"].items():
            yield from objects(field, (*path, name))


def test_a_misspelt_value_is_refused_at_every_level(helm):
    schema = json.loads((CHART / "values.schema.json").read_text())
    validator = jsonschema.Draft7Validator(schema)
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    assert not list(validator.iter_errors(defaults))
    paths = [path for path, _ in objects(schema)]
    assert len(paths) > 20
    for path in paths:
        broken = copy.deepcopy(defaults)
        target = broken
        for name in path:
            target = target.setdefault(name, {})
        target["misspelt"] = "x"
        assert any("misspelt" in error.message for error in validator.iter_errors(broken)), path
    for typo in ("replica.count=2", "replicas.flags.kv_byte=1GiB", "drain.timeout=3"):
        result = helm.template("--values", CHART / VALUES[0], "--set", typo)
        assert result.code != 0 and "additional properties" in result.stderr, typo


def test_every_default_is_in_the_schema_and_the_other_way_round():
    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    open_ended = {"flags", "resources"}  # maps whose entries have no default
    for path, part in objects(schema):
        if path and path[-1] in open_ended | {"requests", "limits"}:
            continue
        target = defaults
        for name in path:
            target = target[name]
        assert set(part["properties"]) - {"global"} == set(target), path


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.geometry=tiny-llama", "want exactly one of path and geometry"),
        ("model.path=", "want exactly one of path and geometry"),
        ("model.volume.emptyDir.medium=Memory", "want one of volume and copyFrom, got both"),
        ("model.copyFrom.image=", "want volume or copyFrom beside path, got neither"),
        ("model.path=/elsewhere/model", "does not match pattern"),
    ],
)
def test_a_model_that_cannot_be_found_is_refused_with_the_reason(helm, setting, message):
    result = helm.template("--values", CHART / "values-cpu.yaml", "--set", setting)
    assert result.code != 0
    assert message in result.stderr


def test_pods_are_confined(helm, values):
    for template in pods(helm.render(*values)).values():
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False  # they would set COPPICE_PORT
        assert spec["securityContext"]["runAsNonRoot"] is True
        for container in spec["containers"] + spec.get("initContainers", []):
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]


def test_probes_tell_loading_and_busy_from_broken(helm, values):
    file_values = yaml.safe_load(values[1].read_text())
    for name, template in pods(helm.render(*values)).items():
        (container,) = template["spec"]["containers"]
        assert container["readinessProbe"]["grpc"] == {"port": 7700}
        assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
        if name == "coppice":
            probe = container["startupProbe"]
            assert probe["grpc"] == {"port": 7700}
            covered = probe["periodSeconds"] * probe["failureThreshold"]
            assert covered >= file_values["loading"]["timeoutSeconds"]


@pytest.mark.parametrize(("propagation", "timeout"), [(5, 120), (1, 0), (30, 3600)])
def test_the_grace_period_covers_the_drain(helm, propagation, timeout):
    flags = (f"drain.propagationSeconds={propagation}", f"drain.timeoutSeconds={timeout}")
    manifests = helm.render("--values", CHART / "values-gpu.yaml", "--set", ",".join(flags))
    for template in pods(manifests).values():
        (container,) = template["spec"]["containers"]
        assert container["lifecycle"]["preStop"] == {"sleep": {"seconds": propagation}}
        assert f"--drain_timeout_s={timeout}" in container["args"]
        # The drain, 5 s for the step that runs, and what it takes to end the process.
        assert template["spec"]["terminationGracePeriodSeconds"] >= propagation + timeout + 10


def test_selectors_meet_exactly_the_pods_they_are_for(helm, values, everything):
    manifests = helm.render(*values, *everything)
    labels = {name: t["metadata"]["labels"] for name, t in pods(manifests).items()}

    def selected(selector):
        return {name for name, have in labels.items() if selector.items() <= have.items()}

    for name, want in (("coppice", "coppice-router"), ("coppice-replicas", "coppice")):
        assert selected(find(manifests, "Service", name)["spec"]["selector"]) == {want}
    for name in ("coppice", "coppice-router"):
        budget = find(manifests, "PodDisruptionBudget", name)
        assert selected(budget["spec"]["selector"]["matchLabels"]) == {name}
        policy = find(manifests, "NetworkPolicy", name)
        assert selected(policy["spec"]["podSelector"]["matchLabels"]) == {name}
    monitor = find(manifests, "PodMonitor", "coppice")["spec"]
    assert selected(monitor["selector"]["matchLabels"]) == {"coppice", "coppice-router"}
    router_only = find(manifests, "NetworkPolicy", "coppice")["spec"]["ingress"][0]["from"]
    assert [selected(peer["podSelector"]["matchLabels"]) for peer in router_only] == [
        {"coppice-router"}
    ]
    assert find(manifests, "StatefulSet", "coppice")["spec"]["serviceName"] == "coppice-replicas"
    target = find(manifests, "ScaledObject", "coppice")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("StatefulSet", "coppice")


def test_an_upgrade_changes_no_field_that_kubernetes_holds_fixed(helm, values, tmp_path):
    next_chart = shutil.copytree(CHART, tmp_path / "coppice")
    text = (CHART / "Chart.yaml").read_text()
    (next_chart / "Chart.yaml").write_text(text.replace("ersion: 0.1.0", "ersion: 0.2.0"))
    rendered = run(helm.binary, "template", "coppice", next_chart, "--namespace", "rl", *values)
    after = [document for document in yaml.safe_load_all(rendered.stdout) if document]
    before = helm.render(*values)
    may_change = {"replicas", "template", "updateStrategy", "persistentVolumeClaimRetentionPolicy"}
    old, new = (find(each, "StatefulSet", "coppice")["spec"] for each in (before, after))
    assert old["template"] != new["template"]  # the new image
    assert {k: v for k, v in old.items() if k not in may_change} == {
        k: v for k, v in new.items() if k not in may_change
    }
    old, new = (find(each, "Deployment", "coppice-router")["spec"] for each in (before, after))
    assert old["selector"] == new["selector"]


def test_without_a_router_the_service_leads_to_the_replicas(helm, values):
    manifests = helm.render(*values, "--set", "router.enabled=false")
    selector = find(manifests, "Service", "coppice")["spec"]["selector"]
    assert selector["app.kubernetes.io/component"] == "replica"
    policy = find(manifests, "NetworkPolicy", "coppice")["spec"]["ingress"][0]
    assert policy["from"] == [{"podSelector": {}}]
    assert not [m for m in manifests if m["metadata"]["name"].endswith("-router")]


def test_the_autoscaler_owns_the_number_of_replicas(helm, values):
    for enabled in ("true", "false"):
        manifests = helm.render(*values, "--set", f"autoscaling.enabled={enabled}")
        spec = find(manifests, "StatefulSet", "coppice")["spec"]
        assert ("replicas" in spec) == (enabled == "false")


def test_rules_and_dashboard_in_the_cluster_are_those_of_the_repository(helm, values, everything):
    manifests = helm.render(*values, *everything)
    rules = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text())
    assert find(manifests, "PrometheusRule", "coppice")["spec"] == rules
    dashboard = find(manifests, "ConfigMap", "coppice-dashboard")["data"]["coppice.json"]
    assert json.loads(dashboard) == json.loads((ROOT / "deploy/grafana/coppice.json").read_text())


def daemon_flags(coppiced):
    """Names of all flags in --help."""
    shown = run(coppiced, "--help")
    assert shown.code == 0
    return set(re.findall(r"^  --(\w+)  \(", shown.stdout, re.MULTILINE))


# Set by the chart from values of its own, or of no use in a pod.
CHARTS_OWN = {
    "role", "model", "model_geometry", "host", "port", "http_port", "port_file",
    "trust_tenant_header", "checkpoint_dir", "replicas", "replica_dns", "leader", "drain_timeout_s",
    "help", "version",
}  # fmt: skip


def schema_flags(component):
    """Names that `flags` of the component may have."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    return set(schema["properties"][component]["properties"]["flags"]["properties"])


def test_every_flag_of_the_daemon_can_be_set(coppiced):
    both = schema_flags("replicas") | schema_flags("router")
    assert daemon_flags(coppiced) - CHARTS_OWN == both


def test_the_daemon_accepts_the_flags_of_the_chart(helm, values, everything, coppiced):
    templates = pods(helm.render(*values, *everything))
    for template in templates.values():
        (container,) = template["spec"]["containers"]
        # With --help the daemon checks each flag and its range, and ends.
        result = run(coppiced, *container["args"], "--help")
        assert result.code == 0, result.stderr
    (container,) = templates["coppice"]["spec"]["containers"]
    assert {env["name"] for env in container["env"]} == {"COPPICE_THREADS"}
    assert "threads" in daemon_flags(coppiced)


def test_numbers_reach_the_daemon_as_they_were_written(helm, values, tmp_path):
    (tmp_path / "numbers.yaml").write_text(
        "replicas: {flags: {max_train_rows: 2048000, kv_fraction: 0.85, deterministic: true}}"
    )
    manifests = helm.render(*values, "--values", tmp_path / "numbers.yaml")
    (container,) = pods(manifests)["coppice"]["spec"]["containers"]
    for arg in ("--max_train_rows=2048000", "--kv_fraction=0.85", "--deterministic=true"):
        assert arg in container["args"]


def test_the_notes_say_how_to_connect(helm, values):
    notes = helm.notes(*values, "--namespace", "rl").stdout
    assert "coppice.rl.svc:7700" in notes and "There is no authentication" in notes


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ("replicas.count=1", False),
        ("replicas.count=2", True),
        ("replicas.count=1,autoscaling.enabled=true", True),
    ],
)
def test_the_notes_say_how_to_train(helm, values, settings, warned):
    notes = helm.notes(*values, "--set", settings).stdout
    assert ("to train, set replicas.count=1 and autoscaling.enabled=false" in notes) == warned
