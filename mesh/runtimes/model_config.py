"""What a model's ``config.pbtxt`` (Triton's description of a model) means here.

The text is read against our own ``ModelConfig``; fields that it does not have are ignored, as they
change nothing in what the model answers. Refused are those that would: ensembles, sequences,
decoupled answers and back ends that no runtime stands for. ``instance_group``'s counts are how many
inferences run at once. What is known and not acted on is a warning: with ``reshape`` clients see
the shape that the model itself has, and ``label_filename`` names no classes. Every fault is a
``LoadFailed`` with the field and what to do, for whoever lays the model out to put the model's name
in front.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mesh.core.errors import LoadFailed
from mesh.formats import CONFIG_PBTXT, FORMATS, is_inside
from mesh.runtimes.api import ModelOptions, TensorSpec, WarmUp
from mesh.runtimes.warm_up import check_warm_ups

# Triton's platform and backend names, to our formats.
_FORMAT_OF_PLATFORM: Final[dict[str, str]] = {
    "onnxruntime_onnx": "onnx",
    "tensorflow_savedmodel": "tensorflow",
    "pytorch_libtorch": "pytorch",
}
_FORMAT_OF_BACKEND: Final[dict[str, str]] = {
    "onnxruntime": "onnx",
    "tensorflow": "tensorflow",
    "pytorch": "pytorch",
    "python": "python",
    # Ours, for who writes a config.pbtxt only for this mesh.
    **{name: name for name in FORMATS},
}
_ELSEWHERE: Final[dict[str, str]] = {
    "ensemble": "an ensemble is a graph of models, which the mesh does not run",
    "fil": "take the line away and say modelFormat xgboost or lightgbm in the resource",
    "tensorrt_plan": "export the model as ONNX",
    "tensorrt": "export the model as ONNX",
    "tensorflow_graphdef": "save the model as a SavedModel",
}
# The same wish, as Triton's back ends for ONNX, PyTorch and TensorFlow call it.
_THREADS: Final = ("intra_op_thread_count", "INTRA_OP_THREAD_COUNT", "TF_NUM_INTRA_THREADS")
_THREADS_MAX: Final = 1024
_INSTANCES_MAX: Final = 1024  # of one group
# One minute; who waits longer for others does not batch, it hangs.
LATENCY_MAX_US: Final = 60_000_000
RANK_MAX: Final = 32
TENSORS_MAX: Final = 1024
# For every value that it skips, protobuf's parser copies the line: a long one takes minutes.
LINE_MAX_CHARS: Final = 16 << 10
WARM_UP_FOLDER: Final = "warmup"


@dataclass(frozen=True, slots=True)
class VersionPolicy:
    """Which version folders are served: the ``latest`` so many, or those that are ``listed``, or
    all of them when neither is said."""

    latest: int | None = None
    listed: tuple[int, ...] | None = None


def read_model_config(text: str, folder: Path) -> tuple[ModelOptions, VersionPolicy]:
    """``folder`` is where the file lies; beside it is the warm-up's data."""
    config = _parse(text)
    kind = _format(config)
    batched = config.HasField("max_batch_size")
    max_batch_size = config.max_batch_size if batched else None
    if max_batch_size is not None and max_batch_size < 0:
        raise _fault("max_batch_size", f"expected at least 0; found {max_batch_size}")
    axis: tuple[int, ...] = (-1,) if max_batch_size else ()
    warm_ups = tuple(
        _warm_up(sample, f"model_warmup[{index}]", bool(axis), folder)
        for index, sample in enumerate(config.model_warmup)
    )
    check_warm_ups(warm_ups, CONFIG_PBTXT)
    options = ModelOptions(
        source=CONFIG_PBTXT,
        format=kind,
        file=_file_name(config.default_model_filename, "default_model_filename"),
        inputs=_tensors(config.input, "input", axis),
        outputs=_tensors(config.output, "output", axis),
        max_batch_size=max_batch_size,
        max_latency_us=_max_latency_us(config, max_batch_size),
        max_concurrency=_max_concurrency(config),
        threads=_threads(config),
        warm_up=warm_ups,
        parameters={key: config.parameters[key].string_value for key in sorted(config.parameters)},
        warnings=tuple(_in_vain(config)),
    )
    return options, _version_policy(config)


def _parse(text: str) -> Any:
    from google.protobuf import text_format

    from protos import oip_pb2

    for number, line in enumerate(text.split("\n"), start=1):
        if len(line) > LINE_MAX_CHARS:
            raise _fault(
                f"line {number}",
                f"expected at most {LINE_MAX_CHARS} characters; found {len(line)}. Break it up",
            )
    config = oip_pb2.ModelConfig()
    try:
        text_format.Parse(text, config, allow_unknown_field=True)
    except Exception as error:  # its parser raises more than it says, for texts that are no such
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        raise LoadFailed(
            f"{CONFIG_PBTXT}: not a model configuration in protobuf's text format: {cause}"
        ) from None
    return config


def _fault(field: str, what: str) -> LoadFailed:
    return LoadFailed(f"{CONFIG_PBTXT}: {field}: {what}")


def _format(config: Any) -> str:
    if config.HasField("ensemble_scheduling"):
        raise _fault("ensemble_scheduling", _ELSEWHERE["ensemble"])
    if config.HasField("sequence_batching"):
        raise _fault("sequence_batching", "models with a state between requests are not served")
    if config.model_transaction_policy.decoupled:
        raise _fault(
            "model_transaction_policy.decoupled",
            "a request has one answer here; take it away if the model answers each request once",
        )
    by_platform = _known(config.platform, "platform", _FORMAT_OF_PLATFORM | _FORMAT_OF_BACKEND)
    by_backend = _known(config.backend, "backend", _FORMAT_OF_BACKEND)
    if by_platform and by_backend and by_platform != by_backend:
        raise _fault(
            "backend", f"{config.backend!r} does not execute the platform {config.platform!r}"
        )
    return by_platform or by_backend


def _known(name: str, field: str, formats: dict[str, str]) -> str:
    if not name or name in formats:
        return formats.get(name, "")
    advice = _ELSEWHERE.get(name, f"known are {', '.join(sorted(formats))}")
    raise _fault(field, f"no runtime of the mesh stands for {name[:100]!r}; {advice}")


def _file_name(name: str, field: str) -> str:
    """A relative path inside the version's folder, "" when it is not said."""
    if not is_inside(name):
        raise _fault(field, f"expected a name inside the version's folder; found {name[:100]!r}")
    return name


def _tensors(tensors: Any, role: str, axis: tuple[int, ...]) -> tuple[TensorSpec, ...]:
    if len(tensors) > TENSORS_MAX:
        raise _fault(role, f"expected at most {TENSORS_MAX}; found {len(tensors)}")
    specs = [_tensor(tensor, f"{role}[{i}]", axis) for i, tensor in enumerate(tensors)]
    names = [spec.name for spec in specs]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise _fault(f"{role}[{index}].name", f"{name!r} stands there twice")
    return tuple(specs)


def _tensor(tensor: Any, field: str, axis: tuple[int, ...]) -> TensorSpec:
    if not tensor.name:
        raise _fault(f"{field}.name", "expected the tensor's name")
    datatype = _datatype(tensor.data_type, f"{field}.data_type")
    own = tensor.HasField("reshape")
    dims = _dims(tensor.reshape.shape, f"{field}.reshape.shape") if own else ()
    if not own:
        dims = _dims(tensor.dims, f"{field}.dims")
    shape = (*axis, *dims)
    return TensorSpec(tensor.name, datatype, shape, any_rank=not shape and not own)


def _datatype(number: int, field: str) -> str:
    from protos import oip_pb2

    if number == oip_pb2.TYPE_INVALID:
        raise _fault(field, "expected a datatype such as TYPE_FP32")
    try:
        name = oip_pb2.DataType.Name(number).removeprefix("TYPE_")
    except ValueError:
        raise _fault(field, f"{number} is no datatype; expected one such as TYPE_FP32") from None
    return "BYTES" if name == "STRING" else name


def _dims(dims: Iterable[int], field: str) -> tuple[int, ...]:
    found = tuple(dims)
    if len(found) > RANK_MAX:
        raise _fault(field, f"expected at most {RANK_MAX} axes; found {len(found)}")
    for axis in found:
        if axis < 1 and axis != -1:
            raise _fault(
                field, f"expected sizes of at least 1, or -1 for a free axis; found {axis}"
            )
    return found


def _max_latency_us(config: Any, max_batch_size: int | None) -> int | None:
    """None where nothing is said of batching: then the mesh waits as it does for every model, for
    at most ``max_batch_size`` rows. (Triton would not batch.)"""
    if not config.HasField("dynamic_batching"):
        return None
    if max_batch_size == 0:
        raise _fault("dynamic_batching", "expected max_batch_size above 0 with it; found 0")
    batching = config.dynamic_batching
    for size in batching.preferred_batch_size:
        if size < 1 or (max_batch_size is not None and size > max_batch_size):
            raise _fault(
                "dynamic_batching.preferred_batch_size",
                f"expected sizes from 1 to max_batch_size; found {size}",
            )
    delay_us = int(batching.max_queue_delay_microseconds)
    if delay_us > LATENCY_MAX_US:
        raise _fault(
            "dynamic_batching.max_queue_delay_microseconds",
            f"expected at most {LATENCY_MAX_US} (a minute); found {delay_us}",
        )
    return delay_us


def _max_concurrency(config: Any) -> int | None:
    """Of all groups together, whatever device each is for; a group that does not say is one."""
    counts = [int(group.count) for group in config.instance_group]
    for index, count in enumerate(counts):
        if not 0 <= count <= _INSTANCES_MAX:
            raise _fault(
                f"instance_group[{index}].count", f"expected 0 to {_INSTANCES_MAX}; found {count}"
            )
    return sum(count or 1 for count in counts) if any(counts) else None


def _in_vain(config: Any) -> Iterator[str]:
    for role, tensors in (("input", config.input), ("output", config.output)):
        for index, tensor in enumerate(tensors):
            field = f"{CONFIG_PBTXT}: {role}[{index}]"
            if tensor.HasField("reshape"):
                dims, shape = list(tensor.dims), list(tensor.reshape.shape)
                yield (
                    f"{field}.reshape has no effect: clients see {tensor.name!r} as the model has "
                    f"it, {shape}, and not as {dims}"
                )
            if role == "output" and tensor.label_filename:
                yield (
                    f"{field}.label_filename has no effect: there is no classification extension, "
                    f"clients get the numbers of {tensor.name!r}"
                )


def _threads(config: Any) -> int | None:
    for key in _THREADS:
        if key not in config.parameters:
            continue
        text = config.parameters[key].string_value.strip()
        if not (text.isascii() and text.isdigit() and len(text) < 5 and int(text) <= _THREADS_MAX):
            raise _fault(
                f'parameters["{key}"].string_value',
                f"expected a whole number from 0 to {_THREADS_MAX}; found {text[:50]!r}",
            )
        return int(text) or None
    return None


def _version_policy(config: Any) -> VersionPolicy:
    if not config.HasField("version_policy"):
        return VersionPolicy()
    match config.version_policy.WhichOneof("policy_choice"):
        case "latest":
            return VersionPolicy(latest=int(config.version_policy.latest.num_versions) or 1)
        case "specific":
            listed = tuple(int(number) for number in config.version_policy.specific.versions)
            if not listed:
                raise _fault("version_policy.specific.versions", "expected at least one version")
            return VersionPolicy(listed=listed)
        case _:
            return VersionPolicy()


def _warm_up(sample: Any, field: str, batched: bool, folder: Path) -> WarmUp:
    if len(sample.inputs) > TENSORS_MAX:
        raise _fault(f"{field}.inputs", f"expected at most {TENSORS_MAX}")
    axis = (max(int(sample.batch_size), 1),) if batched else ()
    inputs: list[TensorSpec] = []
    data: dict[str, Path] = {}
    for name in sorted(sample.inputs):
        said = sample.inputs[name]
        at = f'{field}.inputs["{name[:100]}"]'
        dims = _dims(said.dims, f"{at}.dims")
        if -1 in dims:
            raise _fault(f"{at}.dims", "expected the size of every axis; found -1")
        inputs.append(TensorSpec(name, _datatype(said.data_type, f"{at}.data_type"), axis + dims))
        if said.WhichOneof("input_data_type") == "input_data_file":
            file = _file_name(said.input_data_file, f"{at}.input_data_file")
            data[name] = folder / WARM_UP_FOLDER / file
            there = data[name].is_file()
            if not (there and data[name].resolve().is_relative_to(folder.resolve())):
                raise _fault(
                    f"{at}.input_data_file", f"there is no file {file!r} in {WARM_UP_FOLDER}/"
                )
    if not inputs:
        raise _fault(f"{field}.inputs", "expected the inputs of one request")
    return WarmUp(tuple(inputs), max(int(sample.count), 1), data)
