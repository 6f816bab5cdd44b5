"""Kubernetes-style resources, as users write them for KServe and ModelMesh, turned into records.

This is an edge: YAML, JSON and dictionaries live here, and what comes out are frozen records. It
reads ``InferenceService`` (serving.kserve.io/v1beta1) unchanged, in both its forms
(``predictor.model`` and the old ``predictor.<framework>``), and lists of them.

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
from dataclasses import dataclass
from typing import Any, Final

import yaml

from mesh import kserve_fields
from mesh.core.errors import InvalidArgument
from mesh.core.names import (
    check_model_id,
    check_namespace,
    check_resource_name,
    concrete_model_id,
)
from mesh.core.types import ModelRecord, VModelRecord
from mesh.manifest_annotations import (
    ANY_NAME,
    BATCH_LATENCY_MAX_MS,
    BATCH_ROWS_MAX,
    IDENTITY,
    KSERVE_PREFIX,
    REVISION,
    annotated,
    flag,
)
from mesh.manifest_fields import Fields, wrong

__all__ = [
    "ANY_NAME",
    "API_VERSION",
    "REVISION",
    "AppliedModel",
    "load_documents",
    "parse_manifests",
    "parse_resource",
]

API_VERSION: Final = "serving.kserve.io/v1beta1"
SUPPORTED_KINDS: Final = ("InferenceService",)
# The owner that ModelMesh's controller gives to the aliases of InferenceServices.
OWNER: Final = "isvc"

# One text; a resource is a few KB, and etcd takes 1.5 MB in a value.
MAX_TEXT_CHARS: Final = 16 * 1024 * 1024
MAX_RESOURCE_CHARS: Final = 1024 * 1024
_MAX_NODES: Final = 100_000  # of one document with its YAML aliases written out
_MAX_DEPTH: Final = 64
# What KServe's batcher joins when nothing is said.
_KSERVE_ROWS: Final = 32


@dataclass(frozen=True, slots=True)
class AppliedModel:
    """What one resource asks for. ``namespace`` is "" when the resource does not say.

    ``alias`` has ``model`` as its active and its target: whoever writes it over an existing alias
    moves only the target. ``warnings`` each begin with a field's path.
    """

    name: str
    namespace: str
    model: ModelRecord
    alias: VModelRecord
    warnings: tuple[str, ...] = ()


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


def parse_resource(resource: Mapping[str, Any], *, now_ms: int = 0) -> AppliedModel:
    """One InferenceService as a dictionary."""
    warnings: list[str] = []
    top = Fields(dict(resource), "", warnings)
    kind = top.text("kind", required=f"one of the kinds {', '.join(SUPPORTED_KINDS)}")
    if kind not in SUPPORTED_KINDS:
        raise InvalidArgument(
            f"kind: expected one of the kinds that this mesh serves "
            f"({', '.join(SUPPORTED_KINDS)}); found {kind!r}"
        )
    top.text("apiVersion", required=API_VERSION, choices=(API_VERSION,))
    metadata = top.fields("metadata", expected="a mapping with a name")
    spec = top.fields("spec", expected="a mapping with a predictor")
    namespace = metadata.text("namespace")
    if namespace:
        check_namespace(namespace, "metadata.namespace")
    annotations = metadata.text_map("annotations")
    name = _check_name(metadata.take("name"), annotations)
    labels = metadata.text_map("labels")
    for silent in kserve_fields.METADATA:
        metadata.take(silent)
    metadata.close()
    predictor = spec.fields("predictor", expected="a mapping with a model")
    spec.close(kserve_fields.SPEC)
    top.take("status")
    top.close()
    about = annotated(annotations, warnings)
    what = _read_predictor(predictor, annotations, warnings)
    model = ModelRecord(
        model_id=concrete_model_id(name, "isvc", what.identity),
        model_type=what.model_type,
        path=what.path,
        key=what.key,
        size_bytes_stated=about.size_bytes,
        min_copies=what.min_copies,
        pinned=about.pinned,
        max_concurrency=about.max_concurrency,
        max_batch_size=_first(about.max_batch_size, what.max_batch_size),
        max_batch_latency_ms=_first(about.max_batch_latency_ms, what.max_batch_latency_ms),
        load_timeout_ms=about.load_timeout_ms,
        idle_unload_ms=about.idle_unload_ms,
        required_labels=about.required_labels,
        preferred_labels=about.preferred_labels,
        auto_delete=True,
        labels=labels,
        created_at_ms=now_ms,
    )
    alias = VModelRecord(
        name=name,
        active_model_id=model.model_id,
        target_model_id=model.model_id,
        owner=OWNER,
        manifest=_as_applied(resource),
        updated_at_ms=now_ms,
    )
    return AppliedModel(name, namespace, model, alias, tuple(warnings))


def _check_name(name: object, annotations: Mapping[str, str]) -> str:
    """A Kubernetes name; any printable one where the resource says that it is not for there."""
    if isinstance(name, str) and flag(annotations, ANY_NAME):
        return check_model_id(name, "metadata.name")
    return check_resource_name(name, "metadata.name")


@dataclass(frozen=True, slots=True)
class _Predictor:
    """What a predictor says. ``identity`` is what the model id's hash is taken of."""

    model_type: str
    path: str
    key: str
    min_copies: int
    max_batch_size: int | None
    max_batch_latency_ms: int | None
    identity: Mapping[str, Any]


def _as_applied(resource: Mapping[str, Any]) -> str:
    """Compact JSON without what the API server wrote."""
    kept = {key: value for key, value in resource.items() if key != "status"}
    metadata = kept.get("metadata")
    if isinstance(metadata, dict) and "managedFields" in metadata:
        kept["metadata"] = {k: v for k, v in metadata.items() if k != "managedFields"}
    text = json.dumps(kept, separators=(",", ":"), ensure_ascii=False)
    if len(text) > MAX_RESOURCE_CHARS:
        raise InvalidArgument(
            f"expected a resource of at most {MAX_RESOURCE_CHARS} characters of JSON; "
            f"found {len(text)}"
        )
    return text


# ---- the predictor ----------------------------------------------------------------------------


def _read_predictor(
    predictor: Fields, annotations: Mapping[str, str], warnings: list[str]
) -> _Predictor:
    forms = [form for form in ("model", *kserve_fields.FRAMEWORKS) if predictor.has(form)]
    if len(forms) != 1:
        expected = f"exactly one of model, {', '.join(kserve_fields.FRAMEWORKS)}"
        said = " and ".join(forms) or "none of them"
        if not forms and predictor.has("containers"):
            said = "only containers, which cannot share a serving pod with other models"
        raise InvalidArgument(f"{predictor.path}: expected {expected}; found {said}")
    form = forms[0]
    implementation = predictor.fields(form)
    version = ""
    model_type = form
    if form == "model":
        model_format = implementation.fields("modelFormat", expected="a mapping with a name")
        model_type = model_format.text("name", required="the format's name, for example onnx")
        version = model_format.text("version")
        model_format.close()
    protocol = implementation.text("protocolVersion", choices=kserve_fields.PROTOCOLS)
    if protocol == "grpc-v1":
        at = implementation.at("protocolVersion")
        warnings.append(f"{at}: kept, not acted on: this mesh serves v1 and v2 over REST, v2 gRPC")
    path, storage = _read_storage(implementation, annotations)
    implementation.close(kserve_fields.MODEL)
    minimum = predictor.integer("minReplicas", minimum=0) or 0
    maximum = predictor.integer("maxReplicas", minimum=0)
    if maximum is not None:
        warnings.append(f"{predictor.at('maxReplicas')}: kept, not acted on")
        if 0 < maximum < minimum:
            raise wrong(predictor.at("maxReplicas"), f"at least minReplicas ({minimum})", maximum)
    rows, wait_ms = _read_batcher(predictor)
    raw = dict(predictor.raw)
    predictor.close(kserve_fields.COMPONENT | kserve_fields.PREDICTOR)
    model_type = model_type.lower()
    key = dict(storage)
    key["model_type"] = {"name": model_type, **({"version": version} if version else {})}
    return _Predictor(
        model_type=model_type,
        path=path,
        key=json.dumps(key, sort_keys=True, separators=(",", ":"), ensure_ascii=False),
        # 1 is Kubernetes' default and says nothing; a model may be in no memory at all.
        min_copies=minimum if minimum >= 2 else 0,
        max_batch_size=rows,
        max_batch_latency_ms=wait_ms,
        identity=_identity(raw, annotations),
    )


def _read_batcher(predictor: Fields) -> tuple[int | None, int | None]:
    """(rows, milliseconds). KServe runs an agent with 32 rows and 5 s for who names neither; here
    rows are joined then as they come, and nobody waits."""
    batcher = predictor.optional_fields("batcher")
    if batcher is None:
        return None, None
    rows = batcher.integer("maxBatchSize", minimum=0)
    if rows is not None and rows > BATCH_ROWS_MAX:
        raise wrong(batcher.at("maxBatchSize"), f"at most {BATCH_ROWS_MAX}", rows)
    wait_ms = batcher.integer("maxLatency", minimum=0)
    if wait_ms is not None and wait_ms > BATCH_LATENCY_MAX_MS:
        raise wrong(batcher.at("maxLatency"), f"at most {BATCH_LATENCY_MAX_MS} ms", wait_ms)
    batcher.close({"timeout"})
    return (_KSERVE_ROWS if rows is None else rows), wait_ms


def _first(one: int | None, other: int | None) -> int | None:
    return other if one is None else one


def _identity(predictor: Mapping[str, Any], annotations: Mapping[str, str]) -> dict[str, Any]:
    """What the model is: see the module's docstring."""
    what = {
        k: v for k, v in predictor.items() if k not in kserve_fields.COMPONENT and v is not None
    }
    chosen = {name: annotations[name] for name in IDENTITY if name in annotations}
    return {**what, "annotations": chosen} if chosen else what


def _read_storage(
    implementation: Fields, annotations: Mapping[str, str]
) -> tuple[str, dict[str, Any]]:
    """(path, the storage's part of ModelMesh's key)"""
    uri = implementation.text("storageUri")
    storage = implementation.optional_fields("storage")
    if (storage is None) == (not uri):
        said = "neither" if storage is None else "both"
        raise InvalidArgument(
            f"{implementation.path}: expected either storageUri or storage (key, path, "
            f"parameters); found {said}"
        )
    key: dict[str, Any] = {}
    secret_key = annotations.get(KSERVE_PREFIX + "secretKey", "")
    schema_path = annotations.get(KSERVE_PREFIX + "schemaPath", "")
    if storage is None:
        scheme, separator, rest = uri.partition("://")
        if not (separator and scheme and rest):
            raise wrong(implementation.at("storageUri"), "a URI such as s3://bucket/path", uri)
        path = uri
    else:
        path = storage.text("path", required="the path of the model inside its storage")
        secret_key = storage.text("key") or secret_key
        schema_path = storage.text("schemaPath") or schema_path
        parameters = storage.text_map("parameters")
        storage.close()
        if parameters:
            key["storage_params"] = parameters
    if secret_key:
        key["storage_key"] = secret_key
    if schema_path:
        key["schema_path"] = schema_path
    return path, key
