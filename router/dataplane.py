"""ModelMesh's DataplaneApiConfig: which methods clients may call, and where each names its model.

``{"rpcConfigs": {"pkg.Service/Method": {"idExtractionPath": [1], "vModelId": true}},
"allowOtherRpcs": false}``. With ``vModelId`` what the message names is a vmodel (an alias, such as
an InferenceService's name), and NOT_FOUND where there is none; without, it is an alias or a model,
whichever there is, the alias first.

Read at the start, where a wrong file is InvalidArgument with the field's path, and again whenever
the file has changed; then a wrong one is logged and what was read last stays.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final

import orjson

from mesh.core.errors import InvalidArgument
from mesh.manifest_fields import Fields, wrong
from mesh.protobuf_path import field_path
from mesh.wire.relay import Rpcs

log = logging.getLogger(__name__)

_TEXT_MAX_BYTES: Final = 1 << 20


def parse_dataplane_config(text: bytes) -> Rpcs:
    """Raises InvalidArgument. Warnings are logged."""
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"the dataplane config is no JSON: {error}") from None
    warnings: list[str] = []
    top = Fields(document, "", warnings)
    methods = top.optional_fields("rpcConfigs")
    paths: dict[str, tuple[int, ...] | None] = {}
    vmodels: set[str] = set()
    for name in methods.raw if methods is not None else ():
        assert methods is not None
        if name.strip("/").count("/") != 1:
            raise wrong(methods.at(name), 'a method as "package.Service/Method"', name)
        one = methods.fields(name)
        if _flag(one, "vModelId"):
            vmodels.add("/" + name.strip("/"))
        numbers = one.take("idExtractionPath")
        if numbers is not None and not isinstance(numbers, list):
            raise wrong(one.at("idExtractionPath"), "a list of field numbers", numbers)
        where = one.at("idExtractionPath")
        paths["/" + name.strip("/")] = field_path(numbers, where) if numbers else None
        one.close()
    found = Rpcs(paths, frozenset(vmodels), _flag(top, "allowOtherRpcs"))
    top.close()
    for warning in warnings:
        log.warning("dataplane config: %s", warning)
    return found


def _flag(fields: Fields, key: str) -> bool:
    value: Any = fields.take(key)
    if value is not None and not isinstance(value, bool):
        raise wrong(fields.at(key), "true or false", value)
    return bool(value)


class Dataplane:
    """A file, or JSON itself, and what it said when it was read last. ``again`` may run in any one
    thread."""

    def __init__(self, said: str) -> None:
        self._inline = said if said.lstrip().startswith("{") else ""
        self._path = Path("" if self._inline else said)
        self._stamp: tuple[int, int, int] | None = None
        self._rpcs = Rpcs()

    def read(self) -> Rpcs:
        """Raises InvalidArgument."""
        if self._inline:
            self._rpcs = parse_dataplane_config(self._inline.encode())
            return self._rpcs
        try:
            stat = self._path.stat()
            if stat.st_size > _TEXT_MAX_BYTES:
                raise InvalidArgument(f"{self._path} is larger than {_TEXT_MAX_BYTES} bytes")
            self._stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            text = self._path.read_bytes()
        except OSError as error:
            raise InvalidArgument(f"{self._path} cannot be read: {error}") from None
        try:
            self._rpcs = parse_dataplane_config(text)
        except InvalidArgument as error:
            raise InvalidArgument(f"{self._path}: {error.message}") from None
        return self._rpcs

    def again(self) -> Rpcs:
        """What holds now; the file is read only when it looks different."""
        if self._inline:
            return self._rpcs
        try:
            stat = self._path.stat()
            if (stat.st_mtime_ns, stat.st_size, stat.st_ino) != self._stamp:
                self.read()
                log.info("%s has changed and holds from now on", self._path)
        except OSError as error:
            log.warning("%s cannot be read; what it said before holds: %s", self._path, error)
        except InvalidArgument as error:
            log.error("%s; what it said before holds", error.message)
        return self._rpcs
