"""The manifests render, fit the Kubernetes schemas, and fit the code they start.

Schemas find misspelt fields, not a selector that matches no pod, a variable that is no
setting, a budget that lets nobody go or a flow that no policy lets through: the rest of
this file does. What it expects of peers and stores comes from the settings of the rendered pods.
"""

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml

from steward.config.settings import env_name, load, section_of
from steward.telemetry import conventions
from steward.telemetry.catalog import SERVICES
from steward.telemetry.inventory import Kind, rows_by_name
from steward.telemetry.observability import OPS_PORT_NAME, PART_OF
from steward.telemetry.promql import JOB
from steward.testing.manifests import (
    COMPONENT,
    KubectlMissing,
    Manifest,
    Manifests,
    all_workloads,
    container_of,
    containers_of,
    environment_of,
    labels_of,
    of_kind,
    render,
    selects,
    settings_class,
    template_named,
    workloads,
)
from steward.testing.network_policies import Flow, Party, allowed_flows, own_parties

ROOT = Path(__file__).parents[2]
K8S = ROOT / "deploy" / "k8s"
WATCH = ROOT / "deploy" / "observability"
VERSIONS = ("1.32", "1.36")
KEYS = {role: {"steward-control-key"} for role in SERVICES} | {
    "auth": {"steward-control-key", "steward-user-key"}
}
STORED = ("registry", "auth", "log")
COLLECTOR = "steward-otel-collector"
ETCD = "steward-etcd"
OWN_SCHEMAS = ("PodMonitor", "PrometheusRule", "HTTPRoute")
"""Kinds that Kubernetes' schemas don't have; tests below look at them by hand."""

FROM_SECRETS = {
    "STEWARD_REGISTRY_STORE": "etcd://e1:2379,e2:2379,e3:2379/steward",
    "STEWARD_REGISTRY_AUDIT": "postgresql://steward@db/steward",
    "STEWARD_LOG_STORE": "postgresql://steward@db/steward",
    "STEWARD_AUTH_STORE": "postgresql://steward@db/steward",
}
"""What the Secret `steward-stores` holds, as deploy/README.md says."""

CHOICES = {"etcd", "gateway"}
"""Components that no overlay has; they are rendered here."""

STARTS_S = 20
"""How long a registry may take until it stands by, its image pulled."""


def rendered(folder: Path) -> Manifests:
    try:
        return render(folder)
    except KubectlMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["base", "overlays/dev", "overlays/prod", "choice"])
def manifests(request: pytest.FixtureRequest, choice: Manifests) -> Manifests:
    return choice if request.param == "choice" else rendered(K8S / request.param)


@pytest.fixture(scope="module", params=["overlays/dev", "overlays/prod", "choice"])
def overlay(request: pytest.FixtureRequest, choice: Manifests) -> Manifests:
    return choice if request.param == "choice" else rendered(K8S / request.param)


@pytest.fixture(scope="module")
def dev() -> Manifests:
    return rendered(K8S / "overlays/dev")


@pytest.fixture(scope="module")
def prod() -> Manifests:
    return rendered(K8S / "overlays/prod")


@pytest.fixture(scope="module")
def choice(tmp_path_factory: pytest.TempPathFactory) -> Manifests:
    """`prod` with the components that no overlay has."""
    folder = tmp_path_factory.mktemp("choice")
    up = os.path.relpath(K8S, folder.resolve())
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"{up}/overlays/prod"],
        "components": [f"{up}/components/{name}" for name in sorted(CHOICES)],
        "namespace": "steward",
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return rendered(folder)


def known_variables(role: str) -> set[str]:
    return {env_name(role, f.name) for f in dataclasses.fields(settings_class(role)) if f.metadata}


def environment(template: Manifest, manifests: Manifests) -> dict[str, str]:
    return environment_of(template, manifests, FROM_SECRETS)


def settings_of(role: str, template: Manifest, manifests: Manifests) -> Any:
    return load(settings_class(role), [], environment(template, manifests))


def replicas_of(manifest: Manifest, manifests: Manifests) -> int:
    """How many there are at least."""
    for scaler in of_kind(manifests, "HorizontalPodAutoscaler").values():
        if scaler["spec"]["scaleTargetRef"]["name"] == manifest["metadata"]["name"]:
            return int(scaler["spec"]["minReplicas"])
    return int(manifest["spec"]["replicas"])


def ready_of(role: str, replicas: int) -> int:
    """How many of a role are ready when all is well: of registries the one that serves."""
    return 1 if role == "registry" else replicas


def share(value: int | str, of: int, *, up: bool) -> int:
    """A number or percentage as Kubernetes takes it."""
    if isinstance(value, int):
        return value
    exact = int(value.removesuffix("%")) * of / 100
    return math.ceil(exact) if up else math.floor(exact)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_fits_the_schema(manifests: Manifests, version: str) -> None:
    misfits = []
    for manifest in manifests:
        if manifest["kind"] in OWN_SCHEMAS:
            continue
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            misfits.append((manifest["kind"], manifest["metadata"]["name"], error.message))
    assert misfits == []


def test_every_component_is_rendered_by_an_overlay_or_here() -> None:
    used = {
        Path(component).name
        for overlay in K8S.glob("overlays/*/kustomization.yaml")
        for component in yaml.safe_load(overlay.read_text())["components"]
    }
    assert used | CHOICES == {folder.name for folder in K8S.glob("components/*")}


def test_every_service_of_the_system_is_deployed(dev: Manifests, prod: Manifests) -> None:
    def kinds(manifests: Manifests) -> dict[str, str]:
        return {role: manifest["kind"] for role, manifest, _ in workloads(manifests)}

    assert kinds(dev) == {role: "StatefulSet" for role in SERVICES} | {"edge": "Deployment"}
    assert kinds(prod) == {role: "Deployment" for role in SERVICES} | {"agent": "StatefulSet"}
    for manifests in (dev, prod):
        assert len(list(workloads(manifests))) == len(SERVICES)


def test_every_selector_fits_pods_and_those_alone(manifests: Manifests) -> None:
    pods = {m["metadata"]["name"]: labels_of(m) for m in all_workloads(manifests)}
    selectors = [
        (manifest["metadata"]["name"], selector_of(manifest))
        for manifest in manifests
        if manifest["kind"] in ("Service", "PodDisruptionBudget")
    ] + [(m["metadata"]["name"], m["spec"]["selector"]) for m in all_workloads(manifests)]
    assert len(selectors) >= 3 * len(SERVICES)
    for name, selector in selectors:
        assert {pod for pod, labels in pods.items() if selects(selector, labels)} == {name}


def selector_of(manifest: Manifest) -> Manifest:
    selector = manifest["spec"]["selector"]
    return {"matchLabels": selector} if manifest["kind"] == "Service" else selector


def test_selectors_of_policies_monitors_and_spread_fit_pods(prod: Manifests) -> None:
    pods = [labels_of(m) for m in all_workloads(prod)]
    for name, policy in of_kind(prod, "NetworkPolicy").items():
        assert any(selects(policy["spec"]["podSelector"], labels) for labels in pods), name
    for monitor in of_kind(prod, "PodMonitor").values():
        seen = [p.get(COMPONENT) for p in pods if selects(monitor["spec"]["selector"], p)]
        assert sorted(seen) == sorted(SERVICES)


def test_pods_are_spread_over_zones_and_hosts_each_role_by_itself(
    prod: Manifests,
) -> None:
    for _, manifest, template in workloads(prod):
        spread = template["spec"]["topologySpreadConstraints"]
        assert {rule["topologyKey"] for rule in spread} == {
            "topology.kubernetes.io/zone",
            "kubernetes.io/hostname",
        }
        for rule in spread:
            assert selects(rule["labelSelector"], labels_of(manifest))
            assert COMPONENT in rule["matchLabelKeys"]


def test_every_port_has_a_name_and_every_service_port_leads_to_one(
    manifests: Manifests,
) -> None:
    names = {
        m["metadata"]["name"]: {p["name"] for p in container_of(m["spec"]["template"])["ports"]}
        for m in all_workloads(manifests)
    }
    services = of_kind(manifests, "Service")
    assert services.keys() == names.keys()
    for name, service in services.items():
        for port in service["spec"]["ports"]:
            assert port["name"] and port["targetPort"] in names[name]


def test_a_stateful_set_has_the_headless_service_that_it_names(
    manifests: Manifests,
) -> None:
    services = of_kind(manifests, "Service")
    for name, manifest in of_kind(manifests, "StatefulSet").items():
        assert manifest["spec"]["serviceName"] == name
        assert services[name]["spec"]["clusterIP"] == "None"


def test_a_service_before_several_leads_to_those_that_are_ready_alone(
    prod: Manifests,
) -> None:
    for role in (*STORED, "edge"):
        spec = of_kind(prod, "Service")[f"steward-{role}"]["spec"]
        assert "clusterIP" not in spec and "publishNotReadyAddresses" not in spec


def test_every_setting_that_is_set_exists(manifests: Manifests) -> None:
    known = {role: known_variables(role) for role in SERVICES}
    [given] = [m for n, m in of_kind(manifests, "ConfigMap").items() if "settings" in n]
    assert given["data"].keys() <= set().union(*known.values())
    for role, _, template in workloads(manifests):
        own = {variable["name"] for variable in container_of(template)["env"]}
        assert own <= known[role]


def test_the_environment_of_each_container_loads_into_its_settings(
    manifests: Manifests,
) -> None:
    for role, _, template in workloads(manifests):
        assert section_of(settings_class(role)) == role
        settings = settings_of(role, template, manifests)
        assert settings.host == "0.0.0.0" and settings.log_format == "json"
        assert str(settings.data) == "/var/lib/steward"


def test_service_links_are_off_since_they_would_set_variables_of_our_prefix(
    manifests: Manifests,
) -> None:
    for _, _, template in workloads(manifests):
        assert template["spec"]["enableServiceLinks"] is False


def test_ports_of_settings_are_the_ports_of_the_container(manifests: Manifests) -> None:
    for role, _, template in workloads(manifests):
        settings = settings_of(role, template, manifests)
        ports = {p["name"]: p["containerPort"] for p in container_of(template)["ports"]}
        public = {"http": settings.port} if role == "edge" else {"grpc": settings.grpc_port}
        assert ports == {**public, OPS_PORT_NAME: settings.ops_port}
        assert all(ports.values())


def test_peers_are_services_that_exist_with_that_port(manifests: Manifests) -> None:
    services = {
        f"{name}:{port['port']}"
        for name, service in of_kind(manifests, "Service").items()
        for port in service["spec"]["ports"]
    }
    peers = {"agent": ("registry", "log"), "edge": ("registry", "auth"), "log": ("registry",)}
    for role, _, template in workloads(manifests):
        settings = settings_of(role, template, manifests)
        for peer in peers.get(role, ()):
            address = getattr(settings, peer)
            assert address.startswith(f"steward-{peer}:") and address in services


def test_probes_look_at_the_ops_port(manifests: Manifests) -> None:
    for _, _, template in workloads(manifests):
        container = container_of(template)
        probes = {
            probe: container[probe]["httpGet"]
            for probe in ("startupProbe", "livenessProbe", "readinessProbe")
        }
        assert probes == {
            "startupProbe": {"path": "/healthz", "port": OPS_PORT_NAME},
            "livenessProbe": {"path": "/healthz", "port": OPS_PORT_NAME},
            "readinessProbe": {"path": "/readyz", "port": OPS_PORT_NAME},
        }


def test_nothing_runs_as_root_or_can_write_its_image_or_become_more(
    manifests: Manifests,
) -> None:
    for workload in all_workloads(manifests):
        template = workload["spec"]["template"]
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] >= 10_000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers_of(template):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]


def test_a_namespace_refuses_pods_that_may_more(overlay: Manifests) -> None:
    [namespace] = of_kind(overlay, "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for manifest in overlay:
        if manifest is not namespace:
            assert manifest["metadata"]["namespace"] == namespace["metadata"]["name"]


def test_every_pod_has_an_account_of_its_own_that_may_nothing(
    manifests: Manifests,
) -> None:
    accounts = of_kind(manifests, "ServiceAccount")
    used = []
    for workload in all_workloads(manifests):
        pod = workload["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        used.append(pod["serviceAccountName"])
    assert sorted(used) == sorted(accounts)
    for account in accounts.values():
        assert account["automountServiceAccountToken"] is False
    assert not [m["kind"] for m in manifests if "rbac" in m["apiVersion"]]


def test_no_image_is_whatever_is_latest(overlay: Manifests) -> None:
    for workload in all_workloads(overlay):
        for container in containers_of(workload["spec"]["template"]):
            _, _, tag = container["image"].rpartition("/")[2].partition(":")
            assert tag not in ("", "latest"), container["image"]


def test_every_mount_has_its_volume_and_every_volume_is_mounted(
    manifests: Manifests,
) -> None:
    for manifest in all_workloads(manifests):
        template = manifest["spec"]["template"]
        claims = manifest["spec"].get("volumeClaimTemplates", [])
        volumes = [v["name"] for v in template["spec"].get("volumes", [])]
        volumes += [c["metadata"]["name"] for c in claims]
        mounts = {m["name"] for c in containers_of(template) for m in c["volumeMounts"]}
        assert len(volumes) == len(set(volumes))
        assert set(volumes) == mounts


def test_only_auth_gets_the_key_of_user_tokens(manifests: Manifests) -> None:
    for role, _, template in workloads(manifests):
        secrets = {
            source["secret"]["name"]
            for volume in template["spec"]["volumes"]
            for source in volume.get("projected", {}).get("sources", [])
        }
        assert secrets == KEYS[role]
    assert not of_kind(manifests, "Secret"), "keys are never committed"


def test_addresses_of_stores_come_from_a_secret_alone(prod: Manifests) -> None:
    found = set()
    for _, _, template in workloads(prod):
        for variable in container_of(template)["env"]:
            source = variable.get("valueFrom", {}).get("secretKeyRef")
            if source is not None:
                assert source["name"] == "steward-stores" and source["key"] == variable["name"]
                found.add(variable["name"])
    assert found == FROM_SECRETS.keys()
    readme = (ROOT / "deploy/README.md").read_text()
    for name in sorted(found):
        assert f"{name}=" in readme


def test_a_process_with_an_embedded_store_is_one_and_keeps_its_volume(
    overlay: Manifests,
) -> None:
    for role, manifest, template in workloads(overlay):
        claims = manifest["spec"].get("volumeClaimTemplates", [])
        replicas = replicas_of(manifest, overlay)
        store = getattr(settings_of(role, template, overlay), "store", None)
        if role in STORED and store in ("", "sqlite"):
            assert replicas == 1
            [claim] = claims
            assert claim["metadata"]["name"] == "data"
            assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"]
        else:
            assert replicas > 1 and not claims


def test_a_pod_gets_more_time_to_drain_than_its_service_takes(
    manifests: Manifests,
) -> None:
    for role, _, template in workloads(manifests):
        settings = settings_of(role, template, manifests)
        own_ms = sum(
            getattr(settings, field.name)
            for field in dataclasses.fields(settings)
            if field.name.startswith("drain_")
        )
        grace_s = template["spec"]["terminationGracePeriodSeconds"]
        assert grace_s >= own_ms / 1000 + hook_s(template) + 10


def hook_s(template: Manifest) -> int:
    lifecycle = container_of(template).get("lifecycle", {})
    return int(lifecycle.get("preStop", {}).get("sleep", {}).get("seconds", 0))


def test_who_is_found_by_readiness_is_given_up_by_services_before_it_stops(
    prod: Manifests,
) -> None:
    for role, _, template in workloads(prod):
        # Nodes are found by the registry, and told it that they go.
        assert hook_s(template) >= 3 or role == "agent"


def test_every_workload_has_a_budget_that_lets_a_host_be_emptied(
    manifests: Manifests,
) -> None:
    budgets = of_kind(manifests, "PodDisruptionBudget")
    for name, manifest in of_kind(manifests, "Deployment", "StatefulSet").items():
        budget = budgets.pop(name)["spec"]
        replicas = replicas_of(manifest, manifests)
        desired = max(0, replicas - share(budget["maxUnavailable"], replicas, up=True))
        assert ready_of(labels_of(manifest).get(COMPONENT, ""), replicas) - desired >= 1
        assert "unhealthyPodEvictionPolicy" in budget
    assert not budgets


def test_a_rollout_never_waits_for_a_pod_that_will_not_get_ready(
    prod: Manifests,
) -> None:
    for role, manifest, template in workloads(prod):
        if manifest["kind"] != "Deployment":
            continue
        replicas = replicas_of(manifest, prod)
        rolling = manifest["spec"]["strategy"]["rollingUpdate"]
        gone = share(rolling["maxUnavailable"], replicas, up=False)
        surge = share(rolling["maxSurge"], replicas, up=True)
        if ready_of(role, replicas) == replicas:
            assert gone == 0 and surge >= 1, "all new ones get ready, so none need be missed"
        else:
            # The one that serves may go before another is ready, and waits for those that follow.
            assert gone == surge == replicas
            assert hook_s(template) >= STARTS_S
            assert manifest["spec"]["progressDeadlineSeconds"] == 2**31 - 1


def test_edges_are_scaled_by_a_metric_that_they_have_and_by_cpu(
    prod: Manifests,
) -> None:
    [scaler] = of_kind(prod, "HorizontalPodAutoscaler").values()
    spec = scaler["spec"]
    target = of_kind(prod, spec["scaleTargetRef"]["kind"])[spec["scaleTargetRef"]["name"]]
    assert "replicas" not in target["spec"], "an apply would undo what was chosen"
    pods, resource = spec["metrics"]
    metric = rows_by_name()[pods["pods"]["metric"]["name"]]
    assert metric.kind is Kind.GAUGE and metric.service == "edge"
    settings = settings_of("edge", target["spec"]["template"], prod)
    assert int(pods["pods"]["target"]["averageValue"]) <= 0.75 * settings.max_connections
    assert resource["resource"]["name"] == "cpu"
    assert spec["minReplicas"] >= 2


def test_the_scrape_config_finds_every_pod(manifests: Manifests) -> None:
    config = yaml.safe_load((WATCH / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    rules = {rule["source_labels"][0]: rule for rule in job["relabel_configs"]}
    prefix = "__meta_kubernetes_pod_"
    for role, _, template in workloads(manifests):
        labels = template["metadata"]["labels"]
        assert labels["app.kubernetes.io/part-of"] == PART_OF
        assert rules[prefix + "label_app_kubernetes_io_part_of"]["regex"] == PART_OF
        assert role in rules[prefix + "label_app_kubernetes_io_component"]["regex"]
        assert rules[prefix + "container_port_name"]["regex"] in {
            port["name"] for port in container_of(template)["ports"]
        }


def test_the_pod_monitor_scrapes_as_the_scrape_config_does(prod: Manifests) -> None:
    [monitor] = of_kind(prod, "PodMonitor").values()
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == (OPS_PORT_NAME, "/metrics")
    config = yaml.safe_load((WATCH / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    sources = {
        rule["target_label"]: rule["source_labels"]
        for rule in job["relabel_configs"]
        if rule.get("target_label") in ("service", "instance")
    }
    relabelled = {rule["targetLabel"]: rule for rule in endpoint["relabelings"]}
    assert relabelled.pop("job") == {"targetLabel": "job", "replacement": JOB}
    assert {label: rule["sourceLabels"] for label, rule in relabelled.items()} == sources
    assert endpoint["interval"] == config["global"]["scrape_interval"]


def test_rules_and_dashboards_are_those_of_the_catalog(prod: Manifests) -> None:
    rules = of_kind(prod, "PrometheusRule")
    for name in ("alerts", "recordings"):
        wanted = yaml.safe_load((WATCH / f"{name}.yml").read_text())
        assert rules.pop(f"steward-{name}")["spec"] == wanted
    assert not rules
    boards = {
        name: json.loads(text)
        for config in of_kind(prod, "ConfigMap").values()
        if "grafana_dashboard" in config["metadata"].get("labels", {})
        for name, text in config["data"].items()
    }
    assert boards == {p.name: json.loads(p.read_text()) for p in WATCH.glob("dashboards/*.json")}


def test_the_ingress_leads_to_edges_and_keeps_quiet_connections(prod: Manifests) -> None:
    [ingress] = of_kind(prod, "Ingress").values()
    [rule] = ingress["spec"]["rules"]
    [path] = rule["http"]["paths"]
    service = of_kind(prod, "Service")[path["backend"]["service"]["name"]]
    assert service["metadata"]["name"] == "steward-edge"
    ports = {port["name"] for port in service["spec"]["ports"]}
    assert path["backend"]["service"]["port"]["name"] in ports
    edge = next(template for role, _, template in workloads(prod) if role == "edge")
    settings = settings_of("edge", edge, prod)
    assert urlsplit(settings.public_url).hostname == rule["host"]
    assert [tls["hosts"] for tls in ingress["spec"]["tls"]] == [[rule["host"]]]
    for way in ("read", "send"):
        quiet_s = ingress["metadata"]["annotations"][
            f"nginx.ingress.kubernetes.io/proxy-{way}-timeout"
        ]
        assert int(quiet_s) > 4 * settings.heartbeat_seconds


def test_the_route_of_the_gateway_leads_to_edges_and_has_no_time_limit(
    choice: Manifests,
) -> None:
    [route] = of_kind(choice, "HTTPRoute").values()
    assert route["apiVersion"] == "gateway.networking.k8s.io/v1"
    assert route["spec"]["parentRefs"] and route["spec"]["hostnames"]
    [rule] = route["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}
    [backend] = rule["backendRefs"]
    ports = of_kind(choice, "Service")[backend["name"]]["spec"]["ports"]
    assert [port["port"] for port in ports] == [backend["port"]]


def collector_config(manifests: Manifests) -> Manifest:
    [volume] = of_kind(manifests, "DaemonSet")[COLLECTOR]["spec"]["template"]["spec"]["volumes"]
    data = of_kind(manifests, "ConfigMap")[volume["configMap"]["name"]]["data"]
    return dict(yaml.safe_load(data["config.yaml"]))


def test_the_collector_listens_where_it_is_looked_for_and_forgets_what_people_wrote(
    prod: Manifests,
) -> None:
    config = collector_config(prod)
    container = container_of(of_kind(prod, "DaemonSet")[COLLECTOR]["spec"]["template"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert port_of(config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"]) == ports["otlp"]
    assert port_of(config["extensions"]["health_check"]["endpoint"]) == ports["health"]
    assert config["service"]["extensions"] == ["health_check"]
    pipeline = config["service"]["pipelines"]["traces"]
    for part in ("receivers", "processors", "exporters"):
        assert sorted(pipeline[part]) == sorted(config[part])
    actions = config["processors"]["attributes/content"]["actions"]
    assert {a["key"] for a in actions if a["action"] == "delete"} == conventions.CONTENT


def members(manifests: Manifests) -> dict[str, str]:
    """The first members of etcd and their URLs for each other."""
    args = container_of(template_named(ETCD, manifests))["args"]
    [first] = [arg for arg in args if arg.startswith("--initial-cluster=")]
    pairs = (pair.split("=") for pair in first.partition("=")[2].split(","))
    return {name: url for name, url in pairs}


def test_members_of_etcd_are_its_pods_and_the_registries_know_them_all(choice: Manifests) -> None:
    etcd = of_kind(choice, "StatefulSet")[ETCD]
    pods = [f"{ETCD}-{number}" for number in range(etcd["spec"]["replicas"])]
    assert len(pods) % 2 == 1
    assert members(choice) == {pod: f"http://{pod}.{ETCD}:2380" for pod in pods}
    settings = settings_of("registry", template_named("steward-registry", choice), choice)
    hosts = settings.store.removeprefix("etcd://").partition("/")[0].split(",")
    assert hosts == [f"{pod}.{ETCD}:2379" for pod in pods]


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def outsiders(own: dict[str, Party]) -> list[Party]:
    return [
        Party("monitoring", "monitoring"),
        Party("names", "kube-system", (("k8s-app", "kube-dns"),)),
        Party("system", "kube-system"),
        Party("database", address="10.20.30.40"),
        Party("internet", address="203.0.113.9"),
        # Labels are anybody's to choose.
        *(Party(f"false {p.name}", "elsewhere", p.labels) for p in own.values()),
    ]


def needed_flows(manifests: Manifests) -> set[Flow]:
    """The flows that the settings of the pods name."""
    services = of_kind(manifests, "Service")
    needed: set[Flow] = set()
    own = own_parties(manifests)
    for name in own:
        needed |= {(name, "names", "UDP", 53), (name, "names", "TCP", 53)}
    advertised = {}
    for role, manifest, template in workloads(manifests):
        name = manifest["metadata"]["name"]
        settings = settings_of(role, template, manifests)
        needed.add(("monitoring", name, "TCP", settings.ops_port))
        if settings.advertise:
            advertised[name] = settings.grpc_port
        if role == "edge":
            needed |= {(party.name, name, "TCP", settings.port) for party in outsiders(own)}
        for key, value in environment(template, manifests).items():
            if not key.startswith(env_name(role, "")):
                continue
            peer = re.fullmatch(r"(?:http://)?([a-z-]+):(\d+)", value)
            if peer and peer[1] in services:
                [port] = services[peer[1]]["spec"]["ports"]
                assert port["port"] == int(peer[2])
                ports = container_of(template_named(peer[1], manifests))["ports"]
                numbers = {p["name"]: p["containerPort"] for p in ports}
                needed.add((name, peer[1], "TCP", numbers[port["targetPort"]]))
            if value.startswith("etcd://"):
                for host in value.removeprefix("etcd://").partition("/")[0].split(","):
                    service = host.partition(":")[0].partition(".")[2]
                    there = service if service in services else "database"
                    needed.add((name, there, "TCP", port_of(host)))
            if value.startswith("postgresql://"):
                needed.add((name, "database", "TCP", urlsplit(value).port or 5432))
    for node, port in advertised.items():
        # Edges are told where a manager is; the registry dials a node that has gone silent.
        needed |= {(name, node, "TCP", port) for name in ("steward-edge", "steward-registry")}
    if ETCD in own:
        needed |= {(ETCD, ETCD, "TCP", port_of(url)) for url in members(manifests).values()}
    endpoint = collector_config(manifests)["exporters"]["otlp"]["endpoint"]
    needed.add((COLLECTOR, "monitoring", "TCP", port_of(endpoint)))
    return needed


@pytest.mark.parametrize("which", ["prod", "choice"])
def test_policies_let_through_exactly_what_the_settings_name(
    which: str, request: pytest.FixtureRequest
) -> None:
    prod: Manifests = request.getfixturevalue(which)
    needed = needed_flows(prod)
    ports = {(protocol, port) for _, _, protocol, port in needed}
    ports |= {
        ("TCP", port["containerPort"])
        for m in all_workloads(prod)
        for port in container_of(m["spec"]["template"])["ports"]
    } | {("TCP", 22), ("TCP", 443), ("UDP", 4317)}
    allowed = allowed_flows(prod, outsiders(own_parties(prod)), ports)
    assert allowed - needed == set(), "let through, and nobody needs it"
    assert needed - allowed == set(), "needed, and not let through"
