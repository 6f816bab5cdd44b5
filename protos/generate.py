"""Generates the stubs of every .proto in this folder: ``python -m protos.generate``.

The stubs are committed, so that nobody needs grpcio-tools to run the mesh; a test holds them
equal to what this script writes. Files are compiled as ``protos/<name>.proto`` from the
repository's root: the generated imports then read ``from protos import ...``, and the names in
protobuf's process-wide pool carry the prefix ``protos/``, so that they meet no other library's
``health.proto``. Only message stubs are made: the mesh speaks gRPC with ``mesh.wire``.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent

# Newer compilers write stubs that protobuf 6 refuses, and tritonclient, kserve and mlserver all
# need protobuf < 7.
COMPILER_SERIES = "1.81."


def generate(out_root: Path) -> list[Path]:
    """Writes ``protos/*_pb2.py`` and ``.pyi`` below ``out_root`` and returns their paths."""
    found = version("grpcio-tools")
    if not found.startswith(COMPILER_SERIES):
        raise RuntimeError(
            f"grpcio-tools {found} is installed, the stubs need {COMPILER_SERIES}x: "
            f"pip install 'grpcio-tools>=1.81,<1.82'"
        )
    sources = sorted(HERE.glob("*.proto"))
    # In a process of its own: protoc crashes where torch has been imported before.
    arguments = [
        *(sys.executable, "-m", "grpc_tools.protoc"),
        f"-I{HERE.parent}",
        f"--python_out={out_root}",
        f"--pyi_out={out_root}",
        *(str(source) for source in sources),
    ]
    if subprocess.run(arguments, check=False).returncode != 0:
        raise RuntimeError("protoc failed; its message is above")
    return [
        out_root / HERE.name / f"{source.stem}_pb2{suffix}"
        for source in sources
        for suffix in (".py", ".pyi")
    ]


def main() -> int:
    for path in generate(HERE.parent):
        sys.stdout.write(f"{path.relative_to(HERE.parent)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
