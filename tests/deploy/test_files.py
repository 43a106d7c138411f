"""The files of deploy/, checked by the programs that read them and against what the server serves."""

import json
import os
import re
from pathlib import Path

import jsonschema_rs
import pytest
import yaml

from tests.deploy.tools import run_tool
from tests.server.live import live
from tests.server.requests import get, post
from thinkstack.server.run import UNWILLING_SECONDS
from thinkstack.server.settings import ServerSettings

DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
STOP_SECONDS = ServerSettings().drain_seconds + UNWILLING_SECONDS
METRIC = re.compile(r"\bthinkstack_[a-z_]+")
pytestmark = pytest.mark.deploy


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    """The text that a server serves after a few requests."""
    with live(tmp_path_factory.mktemp("metrics"), lambda prompt, index: "It is Paris.") as server:
        post(server)
        post(server, model="nothing")
        return get(server, "/metrics").text


def documents(*paths):
    """The YAML documents of files, by kind."""
    return {each["kind"]: each for path in paths for each in yaml.safe_load_all(path.read_text())}


def queries():
    """(place, PromQL) of dashboard, rules and autoscaler."""
    board = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    found = [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel["targets"]]
    found += [(each["name"], each["query"]) for each in board["templating"]["list"]]
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())
    found += [(rule["alert"], rule["expr"]) for group in rules["groups"] for rule in group["rules"]]
    triggers = documents(DEPLOY / "kubernetes" / "autoscaler.yaml")["ScaledObject"]["spec"]["triggers"]
    return found + [("autoscaler", trigger["metadata"]["query"]) for trigger in triggers]


def test_the_unit_is_right_for_systemd(tmp_path):
    unit = tmp_path / "thinkstack.service"
    text = (DEPLOY / "thinkstack.service").read_text()
    unit.write_text(text.replace("/opt/thinkstack/bin/thinkstack", "/bin/true"))  # systemd looks for the program
    assert run_tool("systemd-analyze", "verify", unit) == ""
    exposure = run_tool("systemd-analyze", "security", "--offline=true", "--no-pager", unit)
    assert float(re.search(r"Overall exposure level for \S+: ([\d.]+)", exposure)[1]) <= 2.0


def test_every_stop_leaves_time_for_running_requests():
    unit = (DEPLOY / "thinkstack.service").read_text()
    assert int(re.search(r"TimeoutStopSec=(\d+)", unit)[1]) > STOP_SECONDS
    server = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["server"]
    assert int(server["stop_grace_period"].removesuffix("s")) > STOP_SECONDS
    pod = documents(*MANIFESTS)["Deployment"]["spec"]["template"]["spec"]
    wait = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > wait + STOP_SECONDS


def test_proxies_refuse_bodies_where_the_server_does():
    size = ServerSettings().max_body_bytes // 2**20
    assert f"client_max_body_size {size}m;" in (DEPLOY / "nginx.conf").read_text()
    assert f"max_size {size}MiB" in (DEPLOY / "Caddyfile").read_text()


def test_caddy_accepts_its_file():
    environment = os.environ | {
        "THINKSTACK_DOMAIN": "chat.example.org",
        "THINKSTACK_SERVER": "10.0.0.1:80",
    }
    words = ("validate", "--adapter", "caddyfile", "--config", DEPLOY / "Caddyfile")
    assert "Valid configuration" in run_tool("caddy", *words, env=environment)


def test_hadolint_finds_nothing_in_the_dockerfile():
    assert run_tool("hadolint", DEPLOY / "Dockerfile") == ""


def test_the_compose_file_fits_the_specification():
    run_tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")


def test_no_file_holds_a_secret():
    for path in (path for path in DEPLOY.rglob("*") if path.is_file()):
        for name, value in re.findall(
            r"(?im)^[\s-]*(\w*(?:password|secret|token|_key))\s*[:=]\s*(\S+)", path.read_text()
        ):
            assert value.startswith(("${", "[", "{", "false")) or name == "metrics_key", f"{path.name}: {name}"


def test_promtool_accepts_rules_configuration_and_the_served_metrics(metrics):
    assert "6 rules found" in run_tool("promtool", "check", "rules", DEPLOY / "prometheus" / "rules.yml")
    run_tool("promtool", "check", "config", "--syntax-only", DEPLOY / "prometheus" / "prometheus.yml")
    assert run_tool("promtool", "check", "metrics", input=metrics) == ""


def test_every_query_names_only_metrics_that_are_served(metrics):
    served = set(re.findall(r"^(thinkstack_[a-z_]+)", metrics, re.MULTILINE))
    assert "thinkstack_requests_total" in served and "thinkstack_time_to_first_token_seconds_bucket" in served
    assert len(queries()) > 20
    unknown = [(place, name) for place, query in queries() for name in METRIC.findall(query) if name not in served]
    assert unknown == []


def test_kubernetes_accepts_the_manifests():
    for path in MANIFESTS:
        run_tool("kubernetes-validate", "--strict", path)


def test_the_pool_has_what_version_1_of_the_extension_requires():
    """inference.networking.k8s.io/v1: selector.matchLabels, targetPorts, and a picker whose Service needs a port."""
    found = documents(*MANIFESTS)
    pool = found["InferencePool"]
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    assert set(pool["spec"]) == {"selector", "targetPorts", "endpointPickerRef"}
    pod = found["Deployment"]["spec"]["template"]
    assert pool["spec"]["selector"] == {"matchLabels": pod["metadata"]["labels"]}
    ports = [port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]]
    assert pool["spec"]["targetPorts"] == [{"number": port} for port in ports]
    picker = pool["spec"]["endpointPickerRef"]
    assert picker["name"] and 1 <= picker["port"]["number"] <= 65_535
    assert picker["failureMode"] in ("FailOpen", "FailClose")
    assert found["HTTPRoute"]["spec"]["rules"][0]["backendRefs"][0]["name"] == pool["metadata"]["name"]


def test_all_manifests_speak_of_the_same_pods():
    found = documents(*MANIFESTS)
    deployment = found["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert found["PodMonitor"]["spec"]["selector"]["matchLabels"] == labels
    scaled = found["ScaledObject"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaled["minReplicaCount"] > found["PodDisruptionBudget"]["spec"]["minAvailable"]


@pytest.mark.parametrize("kind", ["InferencePool", "HTTPRoute", "ScaledObject", "PodMonitor"])
def test_custom_resources_fit_their_definitions(kind):
    """THINKSTACK_CRDS: a folder with the CustomResourceDefinitions as KIND.yaml, from the projects' releases."""
    folder = os.environ.get("THINKSTACK_CRDS")
    if not folder:
        pytest.skip("set THINKSTACK_CRDS to a folder with the CustomResourceDefinitions as KIND.yaml")
    document = documents(*MANIFESTS)[kind]
    definition = yaml.safe_load((Path(folder) / f"{kind}.yaml").read_text())["spec"]
    group, version = document["apiVersion"].split("/")
    assert definition["group"] == group
    (schema,) = [each["schema"]["openAPIV3Schema"] for each in definition["versions"] if each["name"] == version]
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema_rs.validator_for(forbid_unknown(schema)).validate(document)


def forbid_unknown(schema):
    """The schema with additionalProperties=False for objects with known properties."""
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        return {name: forbid_unknown(value) for name, value in schema.items()}
    return [forbid_unknown(each) for each in schema] if isinstance(schema, list) else schema
