"""Reads resources from files, a folder or a text: what `mesh apply -f` and the watched folder
read.

It yields one value a resource: what it holds, or the fault that keeps it from being one, so that
one broken file does not hide the others. What a resource means is ``mesh.manifest``'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mesh.core.errors import InvalidArgument
from mesh.manifest import load_documents

SUFFIXES: Final = (".yaml", ".yml", ".json")
# Applied before what may lean on them; a cluster does not mind the order, and a router looks once.
_FIRST: Final = {"Secret": 0, "ServingRuntime": 1, "ClusterServingRuntime": 1}
# A manifest is a page of text; a file this large is something else.
FILE_MAX_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """One resource, or why it cannot be read. ``source`` is for messages: file and number."""

    source: str
    resource: Mapping[str, Any] | None = None
    fault: str = ""

    @property
    def label(self) -> str:
        """``inferenceservice.serving.kserve.io/NAME``, as kubectl writes it."""
        resource = self.resource or {}
        metadata = resource.get("metadata")
        name = metadata.get("name") if isinstance(metadata, Mapping) else None
        group, _, version = str(resource.get("apiVersion", "")).rpartition("/")
        kind = str(resource.get("kind", "resource")).lower()
        return f"{kind}.{group}/{name or '?'}" if group and version else f"{kind}/{name or '?'}"

    @property
    def turn(self) -> int:
        """Documents are applied by it; those of one turn in the order of the files."""
        return _FIRST.get(str((self.resource or {}).get("kind")), len(_FIRST))

    @property
    def is_early(self) -> bool:
        """Whether others may lean on it."""
        return self.turn < len(_FIRST)

    def as_json(self) -> str:
        return json.dumps(self.resource)


def files_in(folder: Path) -> list[Path]:
    """The manifest files right in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())


def read_files(paths: list[Path]) -> Iterator[Document]:
    for path in paths:
        yield from read_file(path)


def read_file(path: Path) -> Iterator[Document]:
    """The documents of one file. Never raises: a file that cannot be read is a fault."""
    try:
        if path.stat().st_size > FILE_MAX_BYTES:
            fault = f"larger than {FILE_MAX_BYTES >> 20} MiB: not a manifest"
            yield Document(str(path), fault=fault)
            return
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        yield Document(str(path), fault="not a text file in UTF-8")
        return
    except OSError as error:
        yield Document(str(path), fault=error.strerror or str(error))
        return
    yield from read_text(text, str(path))


def read_text(text: str, source: str) -> Iterator[Document]:
    """The documents of a YAML (or JSON) text; a ``List`` is opened. Never raises."""
    try:
        resources = load_documents(text, source)
    except InvalidArgument as error:
        # The message begins with the source already.
        yield Document(source, fault=error.message.removeprefix(f"{source}: "))
        return
    for number, resource in enumerate(resources, 1):
        yield Document(f"{source}#{number}" if len(resources) > 1 else source, resource)
