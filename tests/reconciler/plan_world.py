"""A cluster and a mesh as dictionaries, for plans to be carried out in.

``World`` has the rules of an API server that matter here (generations, finalizers, deletion in two
steps), a registry that writes as ``mesh.catalog`` does, and a leader and instances that act when
told. ``reconcile`` is the controller: plan, carry out, plan again. It can be cut before any action,
after which a new controller that remembers nothing goes on.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mesh.core.types import (
    CopyRecord,
    CopyState,
    FailureRecord,
    InstanceRecord,
    InstanceState,
    VModelRecord,
)
from mesh.core.view import ClusterView
from mesh.kserve_status import endpoints_of, name_state
from mesh.manifest import AppliedModel
from mesh.reconciler.plan import (
    FINALIZER,
    Action,
    AddFinalizer,
    Emit,
    Observed,
    Register,
    RemoveFinalizer,
    Retry,
    StorageSecret,
    Unregister,
    WriteStatus,
    plan_orphans,
    plan_service,
)
from mesh.runtime_selection import RuntimeOffer
from mesh.serving_runtime import ModelFormat, ServingRuntime

ISVC, KSP = "InferenceService", "Predictor"
ONNX = RuntimeOffer(ServingRuntime("rt", (ModelFormat("onnx", "", True),), multi_model=True))
ROUNDS_MAX = 8


class Cut(Exception):
    """The controller was killed."""


def isvc(name: str = "n", uri: str = "s3://b/1", **model: object) -> dict[str, Any]:
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": ISVC,
        "metadata": {
            "name": name,
            "annotations": {"serving.kserve.io/deploymentMode": "ModelMesh"},
        },
        "spec": {
            "predictor": {"model": {"modelFormat": {"name": "onnx"}, "storageUri": uri, **model}}
        },
    }


def ksp(name: str = "n", path: str = "s3://b/1") -> dict[str, Any]:
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": KSP,
        "metadata": {"name": name},
        "spec": {"modelType": {"name": "onnx"}, "storage": {"path": path}},
    }


@dataclass
class World:
    resources: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    view: ClusterView = field(default_factory=ClusterView)
    offers: list[RuntimeOffer] = field(default_factory=lambda: [ONNX])
    secret_keys: frozenset[str] | None = frozenset({"k", "default"})
    reachable: bool = True
    take_all: bool = False
    now_ms: int = 1_760_000_000_000
    events: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    writes: int = 0  # to the API server
    last_uid: int = 0

    def __post_init__(self) -> None:
        ready = InstanceRecord("pod-00000000", "h:1", InstanceState.READY, 1, model_types=("onnx",))
        self.view.put_instance(ready)

    # ---- users ----------------------------------------------------------------------------

    def apply(self, resource: dict[str, Any]) -> None:
        """`kubectl apply`."""
        key = (resource["kind"], resource["metadata"]["name"])
        old = self.resources.get(key)
        new = copy.deepcopy(resource)
        metadata = new["metadata"]
        if old is None:
            self.last_uid += 1
            metadata |= {"uid": f"u{self.last_uid}", "generation": 1}
        else:
            known = old["metadata"]
            changed = old["spec"] != new["spec"]
            metadata["generation"] = known["generation"] + changed
            for name in ("uid", "finalizers", "deletionTimestamp"):
                if name in known:
                    metadata[name] = known[name]
            if "status" in old:
                new["status"] = old["status"]
        self.resources[key] = new

    def delete(self, kind: str, name: str) -> None:
        """`kubectl delete`."""
        resource = self.resources.get((kind, name))
        if resource is not None:
            resource["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            self._collect(kind, name)

    def force_off(self, kind: str, name: str) -> None:
        """Somebody takes the finalizer off by hand."""
        resource = self.resources.get((kind, name))
        if resource is not None:
            resource["metadata"].pop("finalizers", None)
            self._collect(kind, name)

    def _collect(self, kind: str, name: str) -> None:
        metadata = self.resources[kind, name]["metadata"]
        if "deletionTimestamp" in metadata and not metadata.get("finalizers"):
            del self.resources[kind, name]

    # ---- the mesh -------------------------------------------------------------------------

    def register(self, applied: AppliedModel) -> None:
        """As ``Catalog.apply``; AssertionError where that would refuse."""
        assert self.reachable
        old = self.view.vmodels.get(applied.name)
        alias, model = applied.alias, applied.model
        if old is None:
            assert applied.name not in self.view.models
            self.view.put_vmodel(replace(alias, awaits_load=True))
        else:
            assert old.owner == alias.owner
            failed = old.failed if old.target_model_id == alias.target_model_id else ""
            target = alias.target_model_id
            moved = replace(old, target_model_id=target, manifest=alias.manifest, failed=failed)
            self.view.put_vmodel(moved)
        self.view.put_model(model)
        self._sweep()

    def unregister(self, name: str, owner: str) -> None:
        assert self.reachable
        alias = self.view.vmodels.get(name)
        if alias is not None and alias.owner == owner:
            self.view.delete_vmodel(name)
            self._sweep()

    def _sweep(self) -> None:
        for model_id in list(self.view.unaliased_models()):
            self.view.delete_model(model_id)
            self.view.delete_copy(model_id, "pod-00000000")
            self.view.delete_failure(model_id, "pod-00000000")

    def load(self, name: str, *, fails: bool = False) -> None:
        """The leader has the target loaded, and switches or tells why not."""
        alias = self.view.vmodels.get(name)
        if alias is None:
            return
        target = alias.target_model_id
        if fails:
            failure = FailureRecord(
                target, "pod-00000000", "INTERNAL", "bad", self.now_ms, self.now_ms + 36_000_000
            )
            self.view.delete_copy(target, "pod-00000000")
            self.view.put_failure(failure)
            if alias.awaits_load or target != alias.active_model_id:
                self.view.put_vmodel(replace(alias, failed="bad"))
            return
        self.view.delete_failure(target, "pod-00000000")
        self.view.put_copy(CopyRecord(target, "pod-00000000", CopyState.LOADED))
        done = replace(alias, active_model_id=target, failed="", awaits_load=False)
        self.view.put_vmodel(done)
        self._sweep()

    def evict(self, name: str) -> None:
        alias = self.view.vmodels.get(name)
        if alias is not None:
            self.view.delete_copy(alias.active_model_id, "pod-00000000")

    # ---- the controller -------------------------------------------------------------------

    def observed(self, kind: str, name: str, warned_generation: int = 0) -> Observed:
        return Observed(
            kind=kind,
            state=name_state(self.view, name, self.now_ms),
            endpoints=endpoints_of("ns"),
            secret=StorageSecret("storage-config", "ns", self.secret_keys),
            now_ms=self.now_ms,
            offers=self.offers,
            registry_reachable=self.reachable,
            take_all=self.take_all,
            warned_generation=warned_generation,
        )

    def plan(self, kind: str, name: str) -> tuple[Action, ...]:
        resource = copy.deepcopy(self.resources.get((kind, name)))
        return plan_service(resource, self.observed(kind, name))

    def orphans(self) -> tuple[Unregister, ...]:
        if not self.reachable:
            return ()
        aliases = list(self.view.vmodels.values())
        return plan_orphans(self.resources.values(), aliases, take_all=self.take_all)

    def reconcile(self, *, cut_before: int | None = None) -> int:
        """Until there is nothing to do; the number of actions. Raises Cut before that action."""
        done = 0
        for _ in range(ROUNDS_MAX):
            acted = False
            for kind, name, action in self._steps():
                if done == cut_before:
                    raise Cut
                self.carry_out(kind, name, action)
                done += 1
                acted = acted or not isinstance(action, Retry | Emit)
            if not acted:
                return done
        raise AssertionError(f"not settled after {ROUNDS_MAX} rounds: {list(self._steps())}")

    def _steps(self) -> Iterator[tuple[str, str, Action]]:
        for action in self.orphans():
            yield ISVC, action.name, action
        names = {name for _, name in self.resources} | set(self.view.vmodels)
        for name in sorted(names):
            for kind in (ISVC, KSP):
                for step in self.plan(kind, name):
                    yield kind, name, step

    def carry_out(self, kind: str, name: str, action: Action) -> None:
        resource = self.resources.get((kind, name))
        match action:
            case Register(applied):
                self.register(applied)
            case Unregister(alias, owner):
                self.unregister(alias, owner)
            case Emit(type_, reason, message):
                self.events[type_, reason, message] += 1
            case Retry():
                pass
            case _:
                assert resource is not None
                self.writes += 1
                self._write(kind, name, resource, action)

    def _write(self, kind: str, name: str, resource: dict[str, Any], action: Action) -> None:
        metadata = resource["metadata"]
        match action:
            case AddFinalizer():
                assert "deletionTimestamp" not in metadata
                assert FINALIZER not in metadata.get("finalizers", [])
                metadata["finalizers"] = [*metadata.get("finalizers", []), FINALIZER]
            case RemoveFinalizer():
                metadata["finalizers"].remove(FINALIZER)
                self._collect(kind, name)
            case WriteStatus(status):
                resource["status"] = copy.deepcopy(status)
            case _:
                raise AssertionError(action)

    # ---- checks ---------------------------------------------------------------------------

    def status(self, kind: str = ISVC, name: str = "n") -> dict[str, Any]:
        status: dict[str, Any] = self.resources[kind, name].get("status", {})
        return status

    def picture(self) -> object:
        """All that is to be the same however one came here."""
        return (
            self.resources,
            {n: replace(a, updated_at_ms=0) for n, a in self.view.vmodels.items()},
            dict(self.view.models),
            set(self.events),
        )

    def alias(self, name: str = "n") -> VModelRecord:
        return self.view.vmodels[name]
