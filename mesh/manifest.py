"""Kubernetes-style resources, as users write them for KServe and ModelMesh, turned into records.

This is an edge: YAML, JSON and dictionaries live here, and what comes out are frozen records. It
reads ``InferenceService`` (serving.kserve.io/v1beta1) unchanged, in both its forms
(``predictor.model`` and the old ``predictor.<framework>``), ModelMesh's own ``Predictor``
(serving.kserve.io/v1alpha1), and lists of them. What they say of the model is read in
``mesh.manifest_predictor``.

It writes nothing and loads nothing. A wrong field is ``InvalidArgument`` with the field's full
path, what was expected and what was found. A field that it does not know, or that KServe knows
and this mesh does not act on, is named in a warning and changes nothing else.

The concrete model's id carries a hash of what the model *is*: the predictor's spec without the
fields of scaling and traffic (``kserve_fields.COMPONENT``), and the annotations that choose its
artifact. So a changed ``minReplicas`` loads nothing anew, and a changed ``storageUri`` does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import yaml

from mesh import kserve_fields
from mesh.core.errors import InvalidArgument
from mesh.core.names import (
    Source,
    check_model_id,
    check_namespace,
    check_resource_name,
    concrete_model_id,
)
from mesh.core.types import ModelRecord, VModelRecord
from mesh.manifest_annotations import (
    ANY_NAME,
    IDENTITY,
    REVISION,
    Annotated,
    annotated,
    flag,
)
from mesh.manifest_fields import Fields, wrong
from mesh.manifest_predictor import (
    ModelSource,
    identity_of,
    read_mesh_predictor,
    read_predictor,
)
from mesh.runtime_selection import Chosen, RuntimeWish
from mesh.serving_runtime import runtime_label

__all__ = [
    "ANY_NAME",
    "API_VERSION",
    "OWNERS",
    "OWNER_OF",
    "REVISION",
    "AppliedModel",
    "applied_uid",
    "load_documents",
    "parse_manifests",
    "parse_resource",
]

API_VERSION: Final = "serving.kserve.io/v1beta1"
INFERENCE_SERVICE: Final = "InferenceService"
PREDICTOR: Final = "Predictor"


@dataclass(frozen=True, slots=True)
class _Kind:
    """``owner``: what ModelMesh's controller calls the owner of such a resource's alias, and the
    source of its model. ``counted``: annotations that are part of what the model is."""

    api_version: str
    owner: Source
    expected: str
    counted: tuple[str, ...]


_KINDS: Final = {
    INFERENCE_SERVICE: _Kind(API_VERSION, "isvc", "a mapping with a predictor", IDENTITY),
    PREDICTOR: _Kind(
        "serving.kserve.io/v1alpha1", "ksp", "a mapping with a modelType", (REVISION,)
    ),
}
SUPPORTED_KINDS: Final = tuple(_KINDS)
# Which kind's aliases have that owner.
OWNERS: Final[dict[str, str]] = {known.owner: kind for kind, known in _KINDS.items()}
OWNER_OF: Final[dict[str, str]] = {kind: known.owner for kind, known in _KINDS.items()}
# Where kubectl keeps a second copy of the resource.
_LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"

# One text; a resource is a few KB, and etcd takes 1.5 MB in a value.
MAX_TEXT_CHARS: Final = 16 * 1024 * 1024
MAX_RESOURCE_CHARS: Final = 1024 * 1024
_MAX_NODES: Final = 100_000  # of one document with its YAML aliases written out
_MAX_DEPTH: Final = 64


@dataclass(frozen=True, slots=True)
class AppliedModel:
    """What one resource asks for. ``namespace`` is "" when the resource does not say.

    ``alias`` has ``model`` as its active and its target: whoever writes it over an existing alias
    moves only the target. ``warnings`` each begin with a field's path. ``secret_key`` is the entry
    that the storage secret must have, "" when it needs none. ``uid`` is the API server's, ""
    when the resource does not come from one.
    """

    name: str
    namespace: str
    model: ModelRecord
    alias: VModelRecord
    warnings: tuple[str, ...] = ()
    wish: RuntimeWish = field(default_factory=RuntimeWish)
    secret_key: str = ""
    uid: str = ""

    def on_runtime(self, chosen: Chosen) -> AppliedModel:
        """Only where the runtime's instances are, or, where nobody named it, there if there is
        room."""
        model, label = self.model, runtime_label(chosen.name)
        if chosen.explicit:
            model = replace(model, required_labels=(*model.required_labels, label))
        else:
            model = replace(model, preferred_labels=(*model.preferred_labels, label))
        return replace(self, model=model)


# ---- documents --------------------------------------------------------------------------------


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML as Kubernetes reads it: no dates, and no key twice."""

    yaml_implicit_resolvers: Final = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _construct_mapping(loader: Any, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in seen:
                line = key.start_mark.line + 1
                raise InvalidArgument(f"line {line}: the key {key.value!r} stands here twice")
            seen.add(key.value)
    loader.flatten_mapping(node)
    mapping: dict[Any, Any] = loader.construct_mapping(node, deep=True)
    return mapping


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def load_documents(text: str, where: str = "manifest") -> tuple[dict[str, Any], ...]:
    """The resources of a YAML or JSON text: several documents, and ``List`` kinds taken apart.

    ``where`` (a file's name) begins every error's message. Empty documents are skipped.
    """
    if len(text) > MAX_TEXT_CHARS:
        raise InvalidArgument(f"{where}: expected at most {MAX_TEXT_CHARS} characters")
    try:
        documents = list(yaml.load_all(text, Loader=_Loader))
    except InvalidArgument as error:
        raise InvalidArgument(f"{where}: {error.message}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InvalidArgument(f"{where}: neither YAML nor JSON: {_one_line(error)}") from None
    resources: list[dict[str, Any]] = []
    for number, document in enumerate(documents, start=1):
        at = where if len(documents) == 1 else f"{where}, document {number}"
        if document is not None:
            _check_tree(document, at)
            resources.extend(_unlisted(document, at))
    return tuple(resources)


def _unlisted(document: object, where: str) -> Iterable[dict[str, Any]]:
    if not isinstance(document, dict):
        raise wrong(where, "a resource with apiVersion, kind, metadata and spec", document)
    kind = document.get("kind")
    if not (isinstance(kind, str) and kind.endswith("List") and "items" in document):
        yield document
        return
    items = document["items"]
    if not isinstance(items, list):
        raise wrong(f"{where}: items", "a list of resources", items)
    for index, item in enumerate(items):
        yield from _unlisted(item, f"{where}: items[{index}]")


def _check_tree(document: object, where: str) -> None:
    """Only what JSON can say, of a bounded size: YAML aliases can make a small text huge."""
    nodes = 0
    stack: list[tuple[object, int]] = [(document, 0)]
    while stack:
        value, depth = stack.pop()
        nodes += 1
        if nodes > _MAX_NODES or depth > _MAX_DEPTH:
            raise InvalidArgument(
                f"{where}: expected at most {_MAX_NODES} values nested at most {_MAX_DEPTH} deep "
                "in one document, with YAML aliases written out"
            )
        match value:
            case dict():
                for key in value:
                    if not isinstance(key, str):
                        raise wrong(f"{where}: a key", "a string (put it in quotes)", key)
                stack.extend((inner, depth + 1) for inner in value.values())
            case list():
                stack.extend((inner, depth + 1) for inner in value)
            case float() if not math.isfinite(value):
                raise wrong(f"{where}: a value", "a finite number", value)
            case None | str() | bool() | int() | float():
                pass
            case _:
                raise wrong(f"{where}: a value", "what JSON can say", value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# ---- resources --------------------------------------------------------------------------------


def parse_manifests(
    text: str, *, where: str = "manifest", now_ms: int = 0
) -> tuple[AppliedModel, ...]:
    """Every resource of a text; the first wrong one fails it all."""
    return tuple(parse_resource(r, now_ms=now_ms) for r in load_documents(text, where))


def parse_resource(
    resource: Mapping[str, Any], *, now_ms: int = 0, chooses_runtimes: bool = False
) -> AppliedModel:
    """One resource as a dictionary. ``chooses_runtimes``: the caller acts on a runtime's name,
    which is a warning otherwise."""
    warnings: list[str] = []
    top = Fields(dict(resource), "", warnings)
    kind = top.text("kind", required=f"one of the kinds {', '.join(SUPPORTED_KINDS)}")
    if kind not in SUPPORTED_KINDS:
        raise InvalidArgument(
            f"kind: expected one of the kinds that this mesh serves "
            f"({', '.join(SUPPORTED_KINDS)}); found {kind!r}"
        )
    known = _KINDS[kind]
    top.text("apiVersion", required=known.api_version, choices=(known.api_version,))
    metadata = top.fields("metadata", expected="a mapping with a name")
    spec = top.fields("spec", expected=known.expected)
    namespace = metadata.text("namespace")
    if namespace:
        check_namespace(namespace, "metadata.namespace")
    annotations = metadata.text_map("annotations")
    name = _check_name(metadata.take("name"), annotations)
    labels, uid = metadata.text_map("labels"), metadata.text("uid")
    for silent in kserve_fields.METADATA:
        metadata.take(silent)
    metadata.close()
    top.take("status")
    top.close()
    about = annotated(annotations, warnings, counted=known.counted)
    if kind == INFERENCE_SERVICE:
        predictor = spec.fields("predictor", expected="a mapping with a model")
        spec.close(kserve_fields.SPEC)
        source = read_predictor(predictor, annotations, warnings)
    else:
        source = read_mesh_predictor(spec, warnings)
    if source.wish.runtime and not chooses_runtimes:
        warnings.append(f"{source.runtime_at}: kept, not acted on")
    model = _model(name, known, source, about, annotations, labels, now_ms)
    alias = VModelRecord(
        name=name,
        active_model_id=model.model_id,
        target_model_id=model.model_id,
        owner=known.owner,
        manifest=_as_applied(resource),
        created_at_ms=now_ms,
        updated_at_ms=now_ms,
    )
    return AppliedModel(
        name, namespace, model, alias, tuple(warnings), source.wish, source.secret_key, uid
    )


def _model(
    name: str,
    kind: _Kind,
    source: ModelSource,
    about: Annotated,
    annotations: Mapping[str, str],
    labels: Mapping[str, str],
    now_ms: int,
) -> ModelRecord:
    identity = identity_of(source, annotations, kind.counted)
    return ModelRecord(
        model_id=concrete_model_id(name, kind.owner, identity),
        model_type=source.wish.model_type,
        path=source.path,
        key=source.key,
        size_bytes_stated=about.size_bytes,
        min_copies=source.min_copies,
        pinned=about.pinned,
        max_concurrency=about.max_concurrency,
        max_batch_size=_first(about.max_batch_size, source.max_batch_size),
        max_batch_latency_ms=_first(about.max_batch_latency_ms, source.max_batch_latency_ms),
        load_timeout_ms=about.load_timeout_ms,
        idle_unload_ms=about.idle_unload_ms,
        required_labels=about.required_labels,
        preferred_labels=about.preferred_labels,
        auto_delete=True,
        labels=labels,
        created_at_ms=now_ms,
    )


def applied_uid(manifest: str) -> str:
    """The uid that an API server gave to the resource that was applied so; "" when none did."""
    try:
        resource = json.loads(manifest)
        uid = resource["metadata"]["uid"]
    except (ValueError, KeyError, TypeError):
        return ""
    return uid if isinstance(uid, str) else ""


def _first(one: int | None, other: int | None) -> int | None:
    return other if one is None else one


def _check_name(name: object, annotations: Mapping[str, str]) -> str:
    """A Kubernetes name; any printable one where the resource says that it is not for there."""
    if isinstance(name, str) and flag(annotations, ANY_NAME):
        return check_model_id(name, "metadata.name")
    return check_resource_name(name, "metadata.name")


def _as_applied(resource: Mapping[str, Any]) -> str:
    """Compact JSON without what the API server and kubectl wrote, but with the uid: it tells whose
    the name is, and all else there changes with each write of a status."""
    kept = {key: value for key, value in resource.items() if key != "status"}
    metadata = kept.get("metadata")
    if isinstance(metadata, dict):
        kept["metadata"] = _own_metadata(metadata)
    text = json.dumps(kept, separators=(",", ":"), ensure_ascii=False)
    if len(text) > MAX_RESOURCE_CHARS:
        raise InvalidArgument(
            f"expected a resource of at most {MAX_RESOURCE_CHARS} characters of JSON; "
            f"found {len(text)}"
        )
    return text


def _own_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in metadata.items() if k == "uid" or k not in kserve_fields.METADATA}
    annotations = kept.get("annotations")
    if isinstance(annotations, dict) and _LAST_APPLIED in annotations:
        kept["annotations"] = {k: v for k, v in annotations.items() if k != _LAST_APPLIED}
    return kept
