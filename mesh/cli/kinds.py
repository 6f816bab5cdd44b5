"""The kinds of `mesh get`, `describe` and `delete`, under every name that they go by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from mesh.cli.exits import CommandError, Exit

Form = Literal["models", "instances", "services", "runtimes"]


@dataclass(frozen=True, slots=True)
class Kind:
    """``listed``: what a router's List calls it. ``form``: how its items look. ``resource``: the
    kind of its resources, "" for several or none. ``label``: what stands before a name, as kubectl
    writes it."""

    plural: str
    listed: str
    form: Form
    label: str
    resource: str = ""

    def label_of(self, resource_kind: str) -> str:
        """For one resource of a kind that stands for several."""
        return f"{resource_kind.lower()}.{_GROUP}" if resource_kind else self.label

    @property
    def holds_models(self) -> bool:
        return self.form in ("models", "services")


_GROUP: Final = "serving.kserve.io"
_ISVC: Final = f"inferenceservice.{_GROUP}"
_KINDS: Final = {
    ("models", "model"): Kind("models", "models", "models", _ISVC),
    ("instances", "instance", "pods"): Kind("instances", "instances", "instances", "instance"),
    ("isvc", "inferenceservices", "inferenceservice"): Kind(
        "isvc", "inferenceservices", "services", _ISVC, "InferenceService"
    ),
    ("predictors", "predictor"): Kind(
        "predictors", "predictors", "services", f"predictor.{_GROUP}", "Predictor"
    ),
    ("runtimes", "runtime"): Kind(
        "runtimes", "servingruntimes", "runtimes", f"servingruntime.{_GROUP}"
    ),
    ("servingruntimes", "servingruntime"): Kind(
        "servingruntimes",
        "servingruntimes",
        "runtimes",
        f"servingruntime.{_GROUP}",
        "ServingRuntime",
    ),
    ("clusterservingruntimes", "clusterservingruntime"): Kind(
        "clusterservingruntimes",
        "servingruntimes",
        "runtimes",
        f"clusterservingruntime.{_GROUP}",
        "ClusterServingRuntime",
    ),
}
_BY_NAME: Final = {name: kind for names, kind in _KINDS.items() for name in names}
METAVAR: Final = "models|instances|isvc|predictors|runtimes"


def kind_of(text: str) -> Kind:
    """Raises CommandError."""
    kind = _BY_NAME.get(text.lower().removesuffix(f".{_GROUP}"))
    if kind is None:
        known = METAVAR.replace("|", ", ")
        raise CommandError(f"there is no kind {text!r}: write one of {known}", Exit.USAGE)
    return kind


def model_kind(text: str, verb: str) -> Kind:
    """Raises CommandError unless the kind is one of models."""
    kind = kind_of(text)
    if not kind.holds_models:
        raise CommandError(f"only models can be {verb}: write `model NAME`", Exit.USAGE)
    return kind
