"""The committed stubs are what the .proto files say, and they live beside foreign ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from protos import (
    generate,
    health_pb2,
    mesh_admin_pb2,
    mesh_internal_pb2,
    mmesh_pb2,
    oip_pb2,
    reflection_pb2,
)

MODULES = (health_pb2, mesh_admin_pb2, mesh_internal_pb2, mmesh_pb2, oip_pb2, reflection_pb2)


def test_committed_stubs_equal_freshly_generated_ones(tmp_path: Path) -> None:
    fresh = generate.generate(tmp_path)
    committed = {path.name for path in generate.HERE.glob("*_pb2.py*")}
    assert {path.name for path in fresh} == committed
    for path in fresh:
        assert path.read_text() == (generate.HERE / path.name).read_text(), path.name


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_no_file_takes_a_name_that_another_library_registers(module: object) -> None:
    described = module.DESCRIPTOR  # type: ignore[attr-defined]
    assert described.name.startswith("protos/")
    assert described.package.startswith("mesh.")


def test_a_foreign_library_can_register_the_real_packages() -> None:
    pool = descriptor_pool.Default()
    for package in ("inference", "mmesh"):
        file = descriptor_pb2.FileDescriptorProto(name=f"test_{package}.proto", package=package)
        file.message_type.add(name="ModelInferRequest")
        pool.Add(file)
        assert pool.FindMessageTypeByName(f"{package}.ModelInferRequest")


@pytest.mark.parametrize(
    ("message", "numbers"),
    [
        (
            oip_pb2.ModelInferRequest,
            "model_name=1 model_version=2 id=3 parameters=4 inputs=5 outputs=6 "
            "raw_input_contents=7",
        ),
        (
            oip_pb2.ModelInferResponse,
            "model_name=1 model_version=2 id=3 parameters=4 outputs=5 raw_output_contents=6",
        ),
        (
            oip_pb2.InferTensorContents,
            "bool_contents=1 int_contents=2 int64_contents=3 uint_contents=4 uint64_contents=5 "
            "fp32_contents=6 fp64_contents=7 bytes_contents=8",
        ),
        (
            oip_pb2.InferParameter,
            "bool_param=1 int64_param=2 string_param=3 double_param=4 uint64_param=5",
        ),
        (
            mmesh_pb2.SetVModelRequest,
            "vModelId=1 targetModelId=2 updateOnly=3 modelInfo=4 autoDeleteTargetModel=5 "
            "loadNow=6 force=7 sync=8 expectedTargetModelId=9 owner=10",
        ),
        (
            mmesh_pb2.RuntimeStatusResponse,
            "status=1 capacityInBytes=2 maxLoadingConcurrency=3 modelLoadingTimeoutMs=4 "
            "defaultModelSizeInBytes=5 runtimeVersion=6 numericRuntimeVersion=7 methodInfos=8 "
            "limitModelConcurrency=9 allowAnyMethod=10",
        ),
        (mmesh_pb2.EnsureLoadedRequest, "modelId=1 lastUsedTime=2 sync=4"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_field_numbers_are_the_protocols(message: object, numbers: str) -> None:
    fields = message.DESCRIPTOR.fields  # type: ignore[attr-defined]
    assert " ".join(f"{field.name}={field.number}" for field in fields) == numbers
