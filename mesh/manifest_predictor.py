"""The part of a resource that says what the model is: KServe's ``spec.predictor`` of an
InferenceService in both its forms, and the ``spec`` of ModelMesh's own ``Predictor``.

Both become one ``ModelSource``. A wrong field is ``InvalidArgument`` with its path; what is not
acted on is a warning. Whether a runtime's name is acted on is the caller's to say: it is where a
controller looks after the runtimes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from mesh import kserve_fields
from mesh.core.errors import InvalidArgument
from mesh.manifest_annotations import (
    BATCH_LATENCY_MAX_MS,
    BATCH_ROWS_MAX,
    KSERVE_PREFIX,
    SERVING_RUNTIME,
)
from mesh.manifest_fields import Fields, wrong
from mesh.runtime_selection import RuntimeWish

# What KServe's batcher joins when nothing is said.
_KSERVE_ROWS: Final = 32
_GPU: Final = ("required", "preferred")
# The entry of the storage secret for those who name none.
_DEFAULT_KEY: Final = "default"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """``identity`` is what the model id's hash is taken of. ``runtime_at`` is the path of the field
    that names the runtime. ``secret_key``: the entry that the storage secret must have, or ""."""

    wish: RuntimeWish
    path: str
    key: str
    identity: Mapping[str, Any]
    secret_key: str = ""
    runtime_at: str = ""
    min_copies: int = 0
    max_batch_size: int | None = None
    max_batch_latency_ms: int | None = None


@dataclass(frozen=True, slots=True)
class _Storage:
    path: str
    secret_key: str = ""
    schema_path: str = ""
    parameters: Mapping[str, str] | None = None

    @property
    def needed_key(self) -> str:
        """The puller takes the entry ``default`` for a path in no named storage."""
        if self.secret_key or "://" in self.path or "type" in (self.parameters or {}):
            return self.secret_key
        return _DEFAULT_KEY

    def key(self, model_type: str, version: str) -> str:
        """ModelMesh's ``ModelInfo.key``."""
        key: dict[str, Any] = {}
        if self.parameters:
            key["storage_params"] = dict(self.parameters)
        if self.secret_key:
            key["storage_key"] = self.secret_key
        if self.schema_path:
            key["schema_path"] = self.schema_path
        key["model_type"] = {"name": model_type, **({"version": version} if version else {})}
        return json.dumps(key, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


# ---- InferenceService ---------------------------------------------------------------------------


def read_predictor(
    predictor: Fields, annotations: Mapping[str, str], warnings: list[str]
) -> ModelSource:
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
    protocol = _protocol(implementation, warnings)
    runtime, runtime_at = implementation.text("runtime"), implementation.at("runtime")
    if not runtime and SERVING_RUNTIME in annotations:
        runtime, runtime_at = annotations[SERVING_RUNTIME], annotation_path(SERVING_RUNTIME)
    storage = _read_storage(implementation, annotations)
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
    return ModelSource(
        wish=RuntimeWish(model_type, version, protocol, runtime),
        path=storage.path,
        key=storage.key(model_type, version),
        identity={
            k: v for k, v in raw.items() if k not in kserve_fields.COMPONENT and v is not None
        },
        secret_key=storage.needed_key,
        runtime_at=runtime_at,
        # 1 is Kubernetes' default and says nothing; a model may be in no memory at all.
        min_copies=minimum if minimum >= 2 else 0,
        max_batch_size=rows,
        max_batch_latency_ms=wait_ms,
    )


def annotation_path(name: str) -> str:
    return f"metadata.annotations[{name}]"


def _protocol(fields: Fields, warnings: list[str]) -> str:
    protocol = fields.text("protocolVersion", choices=kserve_fields.PROTOCOLS)
    if protocol == "grpc-v1":
        at = fields.at("protocolVersion")
        warnings.append(f"{at}: kept, not acted on: this mesh serves v1 and v2 over REST, v2 gRPC")
    return protocol


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


def _read_storage(implementation: Fields, annotations: Mapping[str, str]) -> _Storage:
    uri = implementation.text("storageUri")
    storage = implementation.optional_fields("storage")
    if (storage is None) == (not uri):
        said = "neither" if storage is None else "both"
        raise InvalidArgument(
            f"{implementation.path}: expected either storageUri or storage (key, path, "
            f"parameters); found {said}"
        )
    secret_key = annotations.get(KSERVE_PREFIX + "secretKey", "")
    schema_path = annotations.get(KSERVE_PREFIX + "schemaPath", "")
    if storage is None:
        scheme, separator, rest = uri.partition("://")
        if not (separator and scheme and rest):
            raise wrong(implementation.at("storageUri"), "a URI such as s3://bucket/path", uri)
        return _Storage(uri, secret_key, schema_path)
    found = _Storage(
        path=storage.text("path", required="the path of the model inside its storage"),
        secret_key=storage.text("key") or secret_key,
        schema_path=storage.text("schemaPath") or schema_path,
        parameters=storage.text_map("parameters"),
    )
    storage.close()
    return found


# ---- Predictor ----------------------------------------------------------------------------------


def read_mesh_predictor(spec: Fields, warnings: list[str]) -> ModelSource:
    """ModelMesh's own kind, with its deprecated fields (``path``, ``schemaPath``, ``storage.s3``,
    ``storage.persistentVolumeClaim``), which mean the same as those that came after them."""
    type_ = spec.fields("modelType", expected="a mapping with a name")
    model_type = type_.text("name", required="the format's name, for example onnx").lower()
    version = type_.text("version")
    type_.close()
    storage = _read_mesh_storage(spec)
    if spec.text("gpu", choices=_GPU):
        warnings.append(
            f"{spec.at('gpu')}: kept, not acted on; the annotation mesh.serving/required-labels "
            "names what instances must have"
        )
    protocol = _protocol(spec, warnings)
    runtime = spec.optional_fields("runtime")
    name = ""
    if runtime is not None:
        name = runtime.text("name", required="the runtime's name")
        runtime.close()
    spec.close()
    return ModelSource(
        wish=RuntimeWish(model_type, version, protocol, name),
        path=storage.path,
        key=storage.key(model_type, version),
        identity={k: v for k, v in spec.raw.items() if v is not None},
        secret_key=storage.needed_key,
        runtime_at=runtime.at("name") if runtime is not None else "",
    )


def _read_mesh_storage(spec: Fields) -> _Storage:
    old_path, old_schema = spec.text("path"), spec.text("schemaPath")
    storage = spec.optional_fields("storage")
    if storage is None:
        if not old_path:
            raise wrong(spec.at("storage"), "a mapping with the path of the model", None)
        return _Storage(old_path, schema_path=old_schema)
    path = _one_of((spec.at("path"), old_path), (storage.at("path"), storage.text("path")))
    key = storage.text("key")
    parameters = storage.text_map("parameters")
    s3 = storage.optional_fields("s3")
    claim = storage.optional_fields("persistentVolumeClaim")
    if s3 is not None:
        secret = s3.text("secretKey", required="the key of the entry in the storage secret")
        key = _one_of((storage.at("key"), key), (s3.at("secretKey"), secret))
        if bucket := s3.text("bucket"):
            named = (f"{storage.at('parameters')}.bucket", parameters.get("bucket", ""))
            parameters["bucket"] = _one_of(named, (s3.at("bucket"), bucket))
        s3.close()
    if not path:
        raise wrong(storage.at("path"), "the path of the model inside its storage", None)
    if claim is not None:
        if s3 is not None or key:
            expected = "nothing beside a storage key"
            raise wrong(storage.at("persistentVolumeClaim"), expected, claim.raw)
        name = claim.text("claimName", required="the name of the claim")
        path = f"pvc://{name}/{path.lstrip('/')}"
        claim.close({"readOnly"})
    new_schema = (storage.at("schemaPath"), storage.text("schemaPath"))
    schema_path = _one_of((spec.at("schemaPath"), old_schema), new_schema)
    storage.close()
    return _Storage(path, key, schema_path, parameters)


def _one_of(*fields: tuple[str, str]) -> str:
    """What the fields (path, value) say, "" when they say nothing. Two must not differ."""
    said = {value: at for at, value in fields if value}
    if len(said) > 1:
        expected = f"only one of {' and '.join(at for at, _ in fields)}, or the same in both"
        raise wrong(fields[0][0], expected, fields[0][1])
    return next(iter(said), "")


def identity_of(
    source: ModelSource, annotations: Mapping[str, str], counted: Collection[str]
) -> dict[str, Any]:
    """What the model is: its source, and the annotations that are part of it."""
    chosen = {name: annotations[name] for name in counted if name in annotations}
    return {**source.identity, "annotations": chosen} if chosen else dict(source.identity)
