"""What a config.pbtxt means, and what is refused in one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mesh.core.errors import Code, LoadFailed
from mesh.runtimes.api import ModelOptions, TensorSpec, WarmUp
from mesh.runtimes.model_config import VersionPolicy, read_model_config
from protos import oip_pb2

NOWHERE = Path("/nowhere")

# As a user of Triton writes it: what the mesh knows, and what it does not.
WHOLE = """
# a comment
name: "densenet"
platform: "onnxruntime_onnx"
backend: "onnxruntime"
max_batch_size: 16
default_model_filename: "net.onnx"
version_policy { latest { num_versions: 3 } }
input [
  { name: "data" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [ 3, -1, 224 ] }
]
input { name: "text" data_type: TYPE_STRING dims: 1 }
output [ { name: "prob" data_type: TYPE_FP16 dims: [ 1000 ] label_filename: "labels.txt" } ]
instance_group [ { count: 2 kind: KIND_GPU gpus: [ 0, 1 ] } ]
dynamic_batching {
  preferred_batch_size: [ 4, 8 ]
  max_queue_delay_microseconds: 500
  default_queue_policy { timeout_action: REJECT }
}
optimization { graph { level: 1 } cuda { graphs: true } }
parameters { key: "intra_op_thread_count" value: { string_value: "4" } }
parameters: { key: "mode" value: { string_value: "fast" } }
response_cache { enable: true }
"""


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("", None),
        ("instance_group [{kind: KIND_CPU}]", None),
        ("instance_group [{count: 1}]", 1),
        ("instance_group [{count: 2 kind: KIND_GPU}, {count: 3 kind: KIND_CPU}]", 5),
        ("instance_group [{count: 2}, {kind: KIND_CPU}]", 3),
    ],
)
def test_so_many_instances_are_so_many_inferences_at_once(
    groups: str, expected: int | None
) -> None:
    assert read(groups).max_concurrency == expected


def test_a_reshape_is_said_to_have_no_effect() -> None:
    tensor = 'name: "x" data_type: TYPE_FP32 dims: [4] reshape {shape: [2, 2]}'
    assert read(f"input {{{tensor}}} output {{{tensor}}}").warnings == tuple(
        f"config.pbtxt: {role}[0].reshape has no effect: clients see 'x' as the model has it, "
        "[2, 2], and not as [4]"
        for role in ("input", "output")
    )


def read(text: str, folder: Path = NOWHERE) -> ModelOptions:
    return read_model_config(text, folder)[0]


def test_a_whole_file_is_understood() -> None:
    options, policy = read_model_config(WHOLE, NOWHERE)
    assert options == ModelOptions(
        source="config.pbtxt",
        format="onnx",
        file="net.onnx",
        inputs=(
            TensorSpec("data", "FP32", (-1, 3, -1, 224)),
            TensorSpec("text", "BYTES", (-1, 1)),
        ),
        outputs=(TensorSpec("prob", "FP16", (-1, 1000)),),
        max_batch_size=16,
        max_concurrency=2,
        warnings=(
            "config.pbtxt: output[0].label_filename has no effect: there is no classification "
            "extension, clients get the numbers of 'prob'",
        ),
        max_latency_us=500,
        threads=4,
        parameters={"intra_op_thread_count": "4", "mode": "fast"},
    )
    assert policy == VersionPolicy(latest=3)


def test_an_empty_file_says_nothing() -> None:
    assert read_model_config("", NOWHERE) == (
        ModelOptions(source="config.pbtxt"),
        VersionPolicy(),
    )


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ('platform: "onnxruntime_onnx"', "onnx"),
        ('platform: "tensorflow_savedmodel"', "tensorflow"),
        ('platform: "pytorch_libtorch"', "pytorch"),
        ('backend: "onnxruntime"', "onnx"),
        ('backend: "tensorflow"', "tensorflow"),
        ('backend: "pytorch"', "pytorch"),
        ('backend: "python"', "python"),
        ('backend: "lightgbm"', "lightgbm"),
        ('platform: "xgboost"', "xgboost"),
        ('name: "m"', ""),
    ],
)
def test_platform_or_backend_is_the_format(text: str, form: str) -> None:
    assert read(text).format == form


@pytest.mark.parametrize(
    ("text", "size", "latency_us", "shape"),
    [
        pytest.param("", None, None, (4,), id="silent: the mesh may batch, dims are whole"),
        pytest.param("max_batch_size: 0", 0, None, (4,), id="0: never batch, dims are whole"),
        pytest.param("max_batch_size: 8", 8, None, (-1, 4), id="a bound for the mesh's own way"),
        pytest.param(
            "max_batch_size: 8 dynamic_batching { }", 8, 0, (-1, 4), id="no waiting for others"
        ),
        pytest.param(
            "dynamic_batching { max_queue_delay_microseconds: 9 }", None, 9, (4,), id="only a wait"
        ),
    ],
)
def test_batching(text: str, size: int | None, latency_us: int | None, shape: object) -> None:
    options = read(text + ' input { name: "x" data_type: TYPE_FP32 dims: 4 }')
    assert (options.max_batch_size, options.max_latency_us) == (size, latency_us)
    assert options.inputs[0].shape == shape


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        pytest.param(
            'max_batch_size: 1 input { name: "x" data_type: TYPE_INT64 dims: 1 reshape { } }',
            TensorSpec("x", "INT64", (-1,)),
            id="a reshape to nothing but the batch",
        ),
        pytest.param(
            'input { name: "x" data_type: TYPE_BF16 dims: 4 reshape { shape: [ 2, 2 ] } }',
            TensorSpec("x", "BF16", (2, 2)),
            id="the model's own shape counts",
        ),
        pytest.param(
            'input { name: "x" data_type: TYPE_BOOL reshape { } }',
            TensorSpec("x", "BOOL", ()),
            id="a scalar",
        ),
        pytest.param(
            'input { name: "x" data_type: TYPE_UINT8 }',
            TensorSpec("x", "UINT8", (), any_rank=True),
            id="no dims at all",
        ),
    ],
)
def test_shapes(text: str, spec: TensorSpec) -> None:
    assert read(text).inputs == (spec,)


@pytest.mark.parametrize(
    ("key", "said", "threads"),
    [
        ("intra_op_thread_count", "4", 4),
        ("INTRA_OP_THREAD_COUNT", " 2 ", 2),
        ("TF_NUM_INTRA_THREADS", "1", 1),
        ("intra_op_thread_count", "0", None),
        ("other", "9", None),
    ],
)
def test_threads_of_one_inference(key: str, said: str, threads: int | None) -> None:
    text = f'parameters {{ key: "{key}" value {{ string_value: "{said}" }} }}'
    assert read(text).threads == threads


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("", VersionPolicy()),
        ("version_policy { }", VersionPolicy()),
        ("version_policy { all { } }", VersionPolicy()),
        ("version_policy { latest { } }", VersionPolicy(latest=1)),
        ("version_policy { specific { versions: [ 3, 1 ] } }", VersionPolicy(listed=(3, 1))),
    ],
)
def test_version_policies(text: str, policy: VersionPolicy) -> None:
    assert read_model_config(text, NOWHERE)[1] == policy


def warm(inputs: str, rest: str = "") -> str:
    return f'model_warmup [ {{ name: "w" {rest} inputs {{ key: "x" value {{ {inputs} }} }} }} ]'


def test_a_warm_up_has_the_batch_axis_where_the_model_is_batched() -> None:
    text = warm("data_type: TYPE_FP32 dims: [ 3, 2 ] zero_data: true", "batch_size: 4 count: 7")
    x = TensorSpec("x", "FP32", (3, 2))
    assert read(text).warm_up == (WarmUp((x,), 7),)
    x = TensorSpec("x", "FP32", (4, 3, 2))
    assert read("max_batch_size: 8 " + text).warm_up == (WarmUp((x,), 7),)


def test_a_warm_up_without_numbers_is_one_request_of_one_row() -> None:
    text = "max_batch_size: 8 " + warm("data_type: TYPE_INT8 dims: 2 random_data: true")
    assert read(text).warm_up == (WarmUp((TensorSpec("x", "INT8", (1, 2)),), 1),)


def test_a_warm_up_may_bring_its_data(tmp_path: Path) -> None:
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "x.raw").write_bytes(bytes(8))
    text = warm('data_type: TYPE_FP32 dims: 2 input_data_file: "x.raw"')
    found = read(text, tmp_path).warm_up[0]
    assert found.data == {"x": tmp_path / "warmup" / "x.raw"}


def test_a_warm_ups_data_do_not_come_from_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(8))
    (tmp_path / "m" / "warmup").mkdir(parents=True)
    (tmp_path / "m" / "warmup" / "x").symlink_to(tmp_path / "secret")
    text = warm('data_type: TYPE_FP32 dims: 2 input_data_file: "x"')
    with pytest.raises(LoadFailed, match=r"input_data_file: there is no file 'x' in warmup/"):
        read(text, tmp_path / "m")


X = 'name: "x" data_type: TYPE_FP32'

WRONG = [
    pytest.param("max_batch_size: many", "text format: 1:17", id="a word for a number"),
    pytest.param("max_batch_size: 99999999999", "text format: 1:17", id="a number too large"),
    pytest.param("name: 'x", "text format: 1:7", id="an open quote"),
    pytest.param("input { name: 'x'", "text format: 1:15", id="an open brace"),
    pytest.param('{"name": "x"}', "text format: 1:1", id="JSON"),
    pytest.param("a {" * 5000, "text format", id="nested without end"),
    pytest.param("\n" + "a: 1 " * 8000, "line 2: expected at most 16384", id="a long line"),
    pytest.param("max_batch_size: -1", "max_batch_size: expected at least 0", id="below 0"),
    pytest.param("input { data_type: TYPE_FP32 }", "input[0].name: expected", id="no name"),
    pytest.param('output { name: "y" }', "output[0].data_type: expected", id="no datatype"),
    pytest.param(
        f"input {{ {X} dims: 0 }}", "input[0].dims: expected sizes of at least 1, or -1", id="0"
    ),
    pytest.param(f"input {{ {X} dims: [{'1,' * 32} 1] }}", "at most 32 axes", id="many axes"),
    pytest.param(
        f"input {{ {X} reshape {{ shape: -3 }} }}", "input[0].reshape.shape", id="a wrong reshape"
    ),
    pytest.param(f"input {{ {X} }} input {{ {X} }}", "input[1].name: 'x' stands", id="twice"),
    pytest.param(f"input {{ {X} }}\n" * 1025, "input: expected at most 1024", id="many inputs"),
    pytest.param('platform: "tensorrt_plan"', "platform: no runtime", id="a plan"),
    pytest.param('backend: "fil"', "say modelFormat xgboost or lightgbm", id="fil"),
    pytest.param('backend: "my_own"', "backend: no runtime of the mesh", id="an own back end"),
    pytest.param(
        'platform: "pytorch_libtorch" backend: "python"', "backend: 'python' does not", id="both"
    ),
    pytest.param('platform: "ensemble"', "a graph of models", id="an ensemble by platform"),
    pytest.param("ensemble_scheduling { step { } }", "ensemble_scheduling:", id="an ensemble"),
    pytest.param("sequence_batching { direct { } }", "sequence_batching:", id="sequences"),
    pytest.param(
        "model_transaction_policy { decoupled: true }", "decoupled: a request", id="decoupled"
    ),
    pytest.param('default_model_filename: "../x"', "default_model_filename: expected", id="up"),
    pytest.param(f'default_model_filename: "{"x" * 256}"', "expected a name", id="a long name"),
    pytest.param('default_model_filename: "/etc/x"', "inside the version's folder", id="absolute"),
    pytest.param(
        "max_batch_size: 0 dynamic_batching { }", "dynamic_batching: expected", id="never batched"
    ),
    pytest.param(
        "max_batch_size: 4 dynamic_batching { preferred_batch_size: 8 }",
        "dynamic_batching.preferred_batch_size: expected sizes from 1", id="a batch too large",
    ),
    pytest.param(
        "dynamic_batching { max_queue_delay_microseconds: 60000001 }",
        "dynamic_batching.max_queue_delay_microseconds: expected at most", id="a long wait",
    ),
    pytest.param(
        'parameters { key: "intra_op_thread_count" value { string_value: "all" } }',
        'parameters["intra_op_thread_count"].string_value: expected', id="threads in words",
    ),
    pytest.param(
        "version_policy { specific { } }", "version_policy.specific.versions", id="no version"
    ),
    pytest.param("model_warmup { }", "model_warmup[0].inputs: expected", id="an empty warm-up"),
    pytest.param(
        warm("data_type: TYPE_FP32 dims: -1"), 'model_warmup[0].inputs["x"].dims', id="a free axis"
    ),
    pytest.param(warm("dims: 1"), 'inputs["x"].data_type: expected', id="an untyped warm-up"),
    pytest.param(
        warm("data_type: TYPE_FP32 dims: 1", "count: 101"), "at most 100 warm-up requests",
        id="a long warm-up",
    ),
    pytest.param(
        warm("data_type: TYPE_FP32 dims: [ 1000000, 1000000 ]"), "at most 256 MiB in one warm-up",
        id="a large warm-up",
    ),
    pytest.param(
        warm('data_type: TYPE_FP32 dims: 1 input_data_file: "x"'), "no file 'x' in warmup/",
        id="data that are not there",
    ),
    pytest.param(
        warm('data_type: TYPE_FP32 dims: 1 input_data_file: "../x"'), "input_data_file: expected",
        id="data from elsewhere",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_a_wrong_file_is_refused_by_field(text: str, said: str) -> None:
    with pytest.raises(LoadFailed) as caught:
        read(text)
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert caught.value.message.startswith("config.pbtxt: ")
    assert said in caught.value.message
    assert len(caught.value.message) < 600


FIELDS = [field.name for field in oip_pb2.ModelConfig.DESCRIPTOR.fields]
SCALARS = st.one_of(
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.text(max_size=8).map(lambda text: f'"{text}"'),
    st.sampled_from(["true", "TYPE_FP32", "TYPE_STRING", "KIND_GPU", "-", "inf", "[", "#", "''"]),
)
INNER = [
    *("name", "dims", "data_type", "reshape", "shape", "count", "kind", "key", "value"),
    *("string_value", "latest", "num_versions", "specific", "versions", "inputs", "zero_data"),
    *("input_data_file", "batch_size", "preferred_batch_size", "max_queue_delay_microseconds"),
    *("[a.b/c.D]", "unknown", "7"),
]


def _messages(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    name = st.sampled_from(FIELDS + INNER)
    scalar = st.tuples(name, SCALARS).map(lambda pair: f"{pair[0]}: {pair[1]}")
    message = st.tuples(name, st.lists(inner, max_size=4)).map(
        lambda pair: f"{pair[0]} {{ {' '.join(pair[1])} }}"
    )
    return st.one_of(scalar, message)


TEXTS = st.one_of(
    st.text(),
    st.lists(st.recursive(_messages(st.just("")), _messages, max_leaves=12), max_size=6).map(
        "\n".join
    ),
)


@given(TEXTS)
@settings(max_examples=100, deadline=None)
@example("[type.googleapis.com/mesh.oip.ModelConfig] { }")
@example('input { name: "\\377" }')
@example('name: "\\ud800"')
@example("input { data_type: 99 name: 'x' }")
@example("model_warmup { inputs { value { dims: 1 data_type: 1 input_data_file: '\\000' } } }")
def test_any_text_is_options_or_a_refusal(text: str) -> None:
    try:
        options = read(text)
    except LoadFailed as error:
        assert error.message.startswith("config.pbtxt: ")
    else:
        assert options.source == "config.pbtxt"
