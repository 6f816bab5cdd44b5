"""How records stand in the store: keys, and the JSON of their values. The only codec there is.

A key is ``<family>/<name>`` or ``<family>/<name>/<instance_id>`` with each name percent-escaped, so
that a name may hold any character. A value is compact JSON. What the key says already is not
repeated in the value, and a field that has its default is left out; ``version`` always stands.
Defaults are therefore part of the schema: a changed default is a new version.

Fields that this version does not know are kept in ``extra`` and written back, so that rewriting a
record loses nothing while adjacent versions run side by side. A value that cannot be understood
raises ``RecordError``, which names the key and the field; whoever reads many records skips it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from typing import Any, Final, Generic, TypeVar
from urllib.parse import quote, unquote

import orjson

from mesh.core.errors import Code, Internal, InvalidArgument
from mesh.core.live_config import check_config
from mesh.core.types import (
    CopyRecord,
    CopyState,
    FailureRecord,
    InstanceRecord,
    InstanceState,
    ModelRecord,
    VModelRecord,
)

LEADER_KEY: Final = "leader"
MODELS_PREFIX: Final = "models/"
VMODELS_PREFIX: Final = "vmodels/"
INSTANCES_PREFIX: Final = "instances/"
COPIES_PREFIX: Final = "copies/"
FAILURES_PREFIX: Final = "failures/"
LAST_USED_PREFIX: Final = "lastused/"
CONFIG_PREFIX: Final = "config/"
ROUTERS_PREFIX: Final = "routers/"  # read and written by router.roster alone
# ``demand/<runtime>``: a request waits for a pod of it. Routers write, the controller reads.
DEMAND_PREFIX: Final = "demand/"

# A key of etcd may be long, but a name beyond this is a mistake, and it is in every message.
MAX_NAME_CHARS: Final = 512

Record = ModelRecord | VModelRecord | InstanceRecord | CopyRecord | FailureRecord
R = TypeVar("R", bound=Record)


class RecordError(Internal):
    """A value in the store that is not what its key promises."""


class Family(Enum):
    """What a key is about: its first segment."""

    MODEL = "models"
    VMODEL = "vmodels"
    INSTANCE = "instances"
    COPY = "copies"
    FAILURE = "failures"
    LAST_USED = "lastused"
    CONFIG = "config"
    LEADER = "leader"


_PAIRED: Final = frozenset({Family.COPY, Family.FAILURE})
_FAMILIES: Final = {family.value: family for family in Family}


@dataclass(frozen=True, slots=True)
class Key:
    """A key taken apart. ``name`` is the model's, alias's or instance's, "" for the leader's."""

    family: Family
    name: str = ""
    instance_id: str = ""  # copies and failures only


def escape(name: str) -> str:
    """One segment of a key. Raises InvalidArgument for a name that cannot be one."""
    if not name:
        raise InvalidArgument("an empty name cannot be a key")
    if len(name) > MAX_NAME_CHARS:
        raise InvalidArgument(
            f"a name of {len(name)} characters is over the limit of {MAX_NAME_CHARS}: "
            f"{name[:40]!r}..."
        )
    try:
        return quote(name, safe="")
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"name {name!r} is not valid Unicode text") from error


def unescape(segment: str) -> str:
    """The name that a segment of a key stands for."""
    return unquote(segment)


def model_key(model_id: str) -> str:
    return MODELS_PREFIX + escape(model_id)


def vmodel_key(name: str) -> str:
    return VMODELS_PREFIX + escape(name)


def instance_key(instance_id: str) -> str:
    return INSTANCES_PREFIX + escape(instance_id)


def copies_prefix(model_id: str) -> str:
    """All copies of one model: what a claim compares."""
    return f"{COPIES_PREFIX}{escape(model_id)}/"


def copy_key(model_id: str, instance_id: str) -> str:
    return f"{COPIES_PREFIX}{escape(model_id)}/{escape(instance_id)}"


def failures_prefix(model_id: str) -> str:
    return f"{FAILURES_PREFIX}{escape(model_id)}/"


def failure_key(model_id: str, instance_id: str) -> str:
    return f"{FAILURES_PREFIX}{escape(model_id)}/{escape(instance_id)}"


def last_used_key(instance_id: str) -> str:
    return LAST_USED_PREFIX + escape(instance_id)


def config_key(name: str) -> str:
    """A live setting: ``policy``, ``type_constraints`` or ``runtimes``."""
    return CONFIG_PREFIX + escape(name)


def demand_key(runtime: str) -> str:
    return DEMAND_PREFIX + escape(runtime)


def parse_key(key: str) -> Key | None:
    """None for a key of no family known here: a newer version's, or somebody else's."""
    parts = key.split("/")
    family = _FAMILIES.get(parts[0])
    if family is None or "" in parts:
        return None
    if family is Family.LEADER:
        return Key(family) if len(parts) == 1 else None
    if len(parts) != (3 if family in _PAIRED else 2):
        return None
    return Key(family, unquote(parts[1]), unquote(parts[2]) if len(parts) == 3 else "")


def key_of(record: Record) -> str:
    """Where a record stands."""
    match record:
        case ModelRecord():
            return model_key(record.model_id)
        case VModelRecord():
            return vmodel_key(record.name)
        case InstanceRecord():
            return instance_key(record.instance_id)
        case CopyRecord():
            return copy_key(record.model_id, record.instance_id)
        case FailureRecord():
            return failure_key(record.model_id, record.instance_id)


# --- values -------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError("expected text")
    return value


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("expected a whole number")
    if value < 0:
        raise ValueError("expected at least 0")
    return value


def _integer_or_none(value: Any) -> int | None:
    return None if value is None else _integer(value)


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise TypeError("expected true or false")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if type(value) is not list or not all(type(item) is str for item in value):
        raise TypeError("expected a list of texts")
    return tuple(value)


def _text_map(value: Any) -> dict[str, str]:
    if type(value) is not dict or not all(type(item) is str for item in value.values()):
        raise TypeError("expected an object of texts")
    return value


def _copy_state(value: Any) -> CopyState:
    return CopyState(value)


def _instance_state(value: Any) -> InstanceState:
    return InstanceState(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, found {type(value).__name__}")
    return float(value)


_Reader = Callable[[Any], Any]
_READER_BY_ANNOTATION: Final[dict[str, _Reader]] = {
    "str": _text,
    "int": _integer,
    "int | None": _integer_or_none,
    "float": _number,
    "bool": _flag,
    "tuple[str, ...]": _texts,
    "Mapping[str, str]": _text_map,
    "CopyState": _copy_state,
    "InstanceState": _instance_state,
}


class _Codec(Generic[R]):
    """Encodes and decodes one kind of record, driven by the fields of its dataclass.

    A field whose type has no reader stops the import: a record cannot grow a field that silently
    would not be checked.
    """

    def __init__(self, record_type: type[R], *, in_key: tuple[str, ...]) -> None:
        self._type = record_type
        self._readers: dict[str, _Reader] = {}
        self._defaults: list[tuple[str, Any]] = []
        self._required: list[str] = []
        self._known: set[str] = {*in_key}
        for item in fields(record_type):
            if item.name in in_key or item.name == "extra":
                continue
            self._known.add(item.name)
            self._readers[item.name] = _READER_BY_ANNOTATION[str(item.type)]
            if item.default_factory is not MISSING:
                self._defaults.append((item.name, item.default_factory()))
            elif item.default is not MISSING:
                self._defaults.append((item.name, item.default))
            else:
                self._required.append(item.name)

    def encode(self, record: R) -> bytes:
        document: dict[str, Any] = {"version": record.version}
        for name in self._required:
            document[name] = _plain(getattr(record, name))
        for name, default in self._defaults:
            value = getattr(record, name)
            if value != default:
                document[name] = _plain(value)
        for name, value in record.extra.items():
            if name not in self._known:
                document[name] = value
        return orjson.dumps(document)

    def decode(self, from_key: dict[str, Any], value: bytes, key: str) -> R:
        document = _document(value, key)
        arguments = from_key
        extra: dict[str, Any] = {}
        readers = self._readers
        for name, raw in document.items():
            reader = readers.get(name)
            if reader is None:
                if name not in self._known:
                    extra[name] = raw
                continue
            try:
                arguments[name] = reader(raw)
            except (TypeError, ValueError) as error:
                raise RecordError(f"{key}: field {name!r} is {raw!r}: {error}") from error
        if extra:
            arguments["extra"] = extra
        try:
            return self._type(**arguments)
        except TypeError:
            missing = [name for name in self._required if name not in arguments]
            raise RecordError(f"{key}: the record lacks {', '.join(missing)}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return dict(value)
    return value


def _document(value: bytes, key: str) -> dict[str, Any]:
    try:
        document = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise RecordError(f"{key}: the value is not JSON: {error}") from error
    if type(document) is not dict:
        raise RecordError(f"{key}: the value is not a JSON object")
    return document


_MODEL: Final = _Codec(ModelRecord, in_key=("model_id",))
_VMODEL: Final = _Codec(VModelRecord, in_key=("name",))
_INSTANCE: Final = _Codec(InstanceRecord, in_key=("instance_id",))
_COPY: Final = _Codec(CopyRecord, in_key=("model_id", "instance_id"))
_FAILURE: Final = _Codec(FailureRecord, in_key=("model_id", "instance_id"))


def encode(record: Record) -> bytes:
    """The value of a record. Its key is ``key_of(record)``."""
    match record:
        case ModelRecord():
            return _MODEL.encode(record)
        case VModelRecord():
            return _VMODEL.encode(record)
        case InstanceRecord():
            return _INSTANCE.encode(record)
        case CopyRecord():
            return _COPY.encode(record)
        case FailureRecord():
            return _FAILURE.encode(record)


def decode_model(model_id: str, value: bytes) -> ModelRecord:
    return _MODEL.decode({"model_id": model_id}, value, MODELS_PREFIX + model_id)


def decode_vmodel(name: str, value: bytes) -> VModelRecord:
    return _VMODEL.decode({"name": name}, value, VMODELS_PREFIX + name)


def decode_instance(instance_id: str, value: bytes) -> InstanceRecord:
    return _INSTANCE.decode({"instance_id": instance_id}, value, INSTANCES_PREFIX + instance_id)


def decode_copy(model_id: str, instance_id: str, value: bytes) -> CopyRecord:
    from_key = {"model_id": model_id, "instance_id": instance_id}
    return _COPY.decode(from_key, value, f"{COPIES_PREFIX}{model_id}/{instance_id}")


def decode_failure(model_id: str, instance_id: str, value: bytes) -> FailureRecord:
    from_key = {"model_id": model_id, "instance_id": instance_id}
    where = f"{FAILURES_PREFIX}{model_id}/{instance_id}"
    record = _FAILURE.decode(from_key, value, where)
    if record.code not in Code.__members__:
        raise RecordError(f"{where}: {record.code!r} is no code of an error")
    return record


def decode(key: str, value: bytes) -> Record | None:
    """The record at ``key``; None where the key holds no record (leader, last use, unknown)."""
    parsed = parse_key(key)
    if parsed is None:
        return None
    match parsed.family:
        case Family.MODEL:
            return decode_model(parsed.name, value)
        case Family.VMODEL:
            return decode_vmodel(parsed.name, value)
        case Family.INSTANCE:
            return decode_instance(parsed.name, value)
        case Family.COPY:
            return decode_copy(parsed.name, parsed.instance_id, value)
        case Family.FAILURE:
            return decode_failure(parsed.name, parsed.instance_id, value)
        case Family.LAST_USED | Family.CONFIG | Family.LEADER:
            return None


# Before a model's id in a blob: its use score, in thousandths. A control character, which no id may
# hold; and a whole number smaller than any instant, so that an older version reads it as the
# ancient last use of a model that it does not know.
_SCORE_MARK: Final = "\x1f"
_SCORE_SCALE: Final = 1_000
# Far beyond any: a half-life of a second makes scores of 2e9.
_SCORE_MAX: Final = 1e12


@dataclass(frozen=True, slots=True)
class Uses:
    """What an instance told of how its models are used, by model id."""

    last_used_at_ms: dict[str, int]  # Unix milliseconds
    scores: dict[str, float]  # of mesh.core.usage


def encode_last_used(
    last_used_at_ms: Mapping[str, int], scores: Mapping[str, float] | None = None
) -> bytes:
    """The blob of ``lastused/<instance_id>``: last uses, and use scores where they are known."""
    document = dict(last_used_at_ms)
    for model_id, score in (scores or {}).items():
        if 0.0 <= score < _SCORE_MAX:  # a number at all, and one that JSON can hold
            document[_SCORE_MARK + model_id] = round(score * _SCORE_SCALE)
    return orjson.dumps(document)


def decode_uses(instance_id: str, value: bytes) -> Uses:
    where = LAST_USED_PREFIX + instance_id
    uses = Uses({}, {})
    for name, told in _document(value, where).items():
        if type(told) is not int:
            raise RecordError(f"{where}: the last use of {name!r} is {told!r}, not a number")
        if name.startswith(_SCORE_MARK):
            uses.scores[name[1:]] = told / _SCORE_SCALE
        else:
            uses.last_used_at_ms[name] = told
    return uses


def encode_config(value: Mapping[str, object]) -> bytes:
    """The value of ``config/<name>``: a JSON object."""
    return orjson.dumps(dict(value))


def decode_config(name: str, value: bytes) -> dict[str, object]:
    """Raises RecordError, also for what makes no sense to placement."""
    where = CONFIG_PREFIX + name
    document = _document(value, where)
    try:
        check_config(name, document)
    except InvalidArgument as error:
        raise RecordError(f"{where}: {error.message}") from error
    return document


def encode_demand(model_id: str, at_ms: int) -> bytes:
    """The value of ``demand/<runtime>``: the model that was asked for last, and when."""
    return orjson.dumps({"model_id": model_id, "at_ms": at_ms})


def decode_demand(runtime: str, value: bytes) -> tuple[str, int]:
    """(the model asked for, Unix milliseconds). Raises RecordError."""
    where = DEMAND_PREFIX + runtime
    document = _document(value, where)
    model_id, at_ms = document.get("model_id"), document.get("at_ms")
    if type(model_id) is not str or type(at_ms) is not int:
        raise RecordError(f"{where}: expected model_id and at_ms; found {document!r:.80}")
    return model_id, at_ms
