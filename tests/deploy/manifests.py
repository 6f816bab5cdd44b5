"""What lies in ``deploy``, read for tests: overlays as kubectl renders them, and single files."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
OVERLAYS: Final = ("single-namespace", "cluster-wide", "external-etcd", "tls")
NAMESPACE: Final = "modelmesh-serving"
CLUSTER_KINDS: Final = frozenset(
    {"CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding", "ClusterServingRuntime"}
)


def documents(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


@functools.cache
def _render(name: str) -> list[dict[str, Any]]:
    ran = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY / name)], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the CRDs are long
    return [one for one in yaml.load_all(ran.stdout, Loader=loader) if one]


def rendered(name: str) -> list[dict[str, Any]]:
    """The objects of a folder of ``deploy``, the same ones each time: change none of them.

    Skips the test where there is no kubectl.
    """
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on the PATH (Debian: kubernetes-client)")
    return _render(name)


def overlay(name: str) -> list[dict[str, Any]]:
    return rendered(f"overlays/{name}")


def pods(objects: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What makes pods (by its name), and the pod's spec."""
    for one in objects:
        if one["kind"] in ("Deployment", "StatefulSet"):
            yield one["metadata"]["name"], one["spec"]["template"]["spec"]
        elif one["kind"] == "ClusterServingRuntime":
            yield one["metadata"]["name"], one["spec"]


def labels_of(objects: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Labels of the pods that Deployments and StatefulSets make."""
    return [
        one["spec"]["template"]["metadata"]["labels"]
        for one in objects
        if one["kind"] in ("Deployment", "StatefulSet")
    ]
