from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LoadRequest(_message.Message):
    __slots__ = ("model_id", "revision", "last_used_at_ms", "priority", "model_record", "pin", "use_score", "reason")
    class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        AWAITED: _ClassVar[LoadRequest.Priority]
        COPY: _ClassVar[LoadRequest.Priority]
        PROACTIVE: _ClassVar[LoadRequest.Priority]
    AWAITED: LoadRequest.Priority
    COPY: LoadRequest.Priority
    PROACTIVE: LoadRequest.Priority
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    MODEL_RECORD_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    USE_SCORE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    revision: int
    last_used_at_ms: int
    priority: LoadRequest.Priority
    model_record: bytes
    pin: bool
    use_score: float
    reason: str
    def __init__(self, model_id: _Optional[str] = ..., revision: _Optional[int] = ..., last_used_at_ms: _Optional[int] = ..., priority: _Optional[_Union[LoadRequest.Priority, str]] = ..., model_record: _Optional[bytes] = ..., pin: _Optional[bool] = ..., use_score: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class LoadResponse(_message.Message):
    __slots__ = ("outcome", "message", "code", "claimed_instance_id", "copy_revision", "size_bytes")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[LoadResponse.Outcome]
        LOADED: _ClassVar[LoadResponse.Outcome]
        CLAIMED_ELSEWHERE: _ClassVar[LoadResponse.Outcome]
        FAILED: _ClassVar[LoadResponse.Outcome]
        REJECTED: _ClassVar[LoadResponse.Outcome]
    UNSPECIFIED: LoadResponse.Outcome
    LOADED: LoadResponse.Outcome
    CLAIMED_ELSEWHERE: LoadResponse.Outcome
    FAILED: LoadResponse.Outcome
    REJECTED: LoadResponse.Outcome
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    CLAIMED_INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    COPY_REVISION_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    outcome: LoadResponse.Outcome
    message: str
    code: int
    claimed_instance_id: str
    copy_revision: int
    size_bytes: int
    def __init__(self, outcome: _Optional[_Union[LoadResponse.Outcome, str]] = ..., message: _Optional[str] = ..., code: _Optional[int] = ..., claimed_instance_id: _Optional[str] = ..., copy_revision: _Optional[int] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class UnloadRequest(_message.Message):
    __slots__ = ("model_id", "reason")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    reason: str
    def __init__(self, model_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class UnloadResponse(_message.Message):
    __slots__ = ("was_here",)
    WAS_HERE_FIELD_NUMBER: _ClassVar[int]
    was_here: bool
    def __init__(self, was_here: _Optional[bool] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("model_id",)
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    def __init__(self, model_id: _Optional[str] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class DecisionsRequest(_message.Message):
    __slots__ = ("model_id", "limit")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    limit: int
    def __init__(self, model_id: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class DecisionsResponse(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...
