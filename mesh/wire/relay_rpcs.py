"""Calls of a router whose operator says which methods there are, and where each names its model.

What ModelMesh calls its DataplaneApiConfig. Without one, calls are ``RelayCall`` as they are; with
one, each call's method is looked up in ``Rpcs``: one that is not there is UNIMPLEMENTED unless
others are allowed, and where a path is given the message names the model, headers only when it
does not. Where that name is said to be a vmodel's, a model's own id there is not found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mesh.core.errors import MeshError, Unimplemented
from mesh.wire.peek import NoNameInMessage, Peeked, peek_at_path
from mesh.wire.relay_call import RelayCall


@dataclass(frozen=True, slots=True)
class Rpcs:
    """``paths``: a method's path (``/pkg.Service/Method``) to where its requests name the model;
    None: by the header alone. ``vmodels``: the methods whose messages name a vmodel."""

    paths: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict)
    vmodels: frozenset[str] = frozenset()
    allow_others: bool = False


class ConfiguredCall(RelayCall):
    """A call under ``Relay.rpcs``."""

    __slots__ = ("_names_vmodel", "_path")

    def begin(self) -> None:
        rpcs = self._relay.rpcs
        path = self.head.path
        self._path = rpcs.paths.get(path) if rpcs is not None else None
        self._names_vmodel = rpcs is not None and path in rpcs.vmodels
        if rpcs is not None and path not in rpcs.paths and not rpcs.allow_others:
            self._end_unrouted(Unimplemented("Method not found or not permitted"))
        elif self._path is not None:
            self._peeking = True
        else:
            super().begin()

    def _name_in(self, data: bytes, encoding: bytes, limit: int, *, ended: bool) -> Peeked:
        if self._path is None:
            return super()._name_in(data, encoding, limit, ended=ended)
        head = self.head
        try:
            return peek_at_path(data, encoding, limit, self._path, ended=ended)
        except NoNameInMessage:
            name = head.vmodel_id if head.vmodel_id is not None else head.model_id
            if not name:
                raise
            self._names_vmodel = head.vmodel_id is not None
            return name, True

    def _route(self) -> None:
        if self._names_vmodel:
            self._relay.dispatcher.check_vmodel(self.model_name, self._checked)
        else:
            super()._route()

    def _checked(self, error: MeshError | None) -> None:
        if self._finished:
            return
        if error is None:
            super()._route()
        else:
            self._end_unrouted(error)
