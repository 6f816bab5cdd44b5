"""Keeps a mesh in step with a folder of manifests, or of models laid out one folder or file each.

An *entry* is what lies right in the folder: a manifest file, or a model. ``FolderPlan`` decides,
from one scan to the next, which entries have changed and come to rest and which are gone (pure);
``FolderSync`` reads them, applies them, and deletes what it itself had applied and is there no
more. Names that somebody else applied are never touched. What it applied is remembered in a file,
so that an entry that goes while nobody watches is noticed at the next start.

How it fails: a bad entry is one line and keeps what was applied of it before; the others go on. A
mesh that cannot be reached is asked again at the next scans. A folder that is gone as a whole
deletes nothing: that is a mount that is missing, not a decision to serve nothing.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Final, Protocol

from mesh.core.errors import InvalidArgument
from mesh.manifest_files import SUFFIXES, Document, read_file
from mesh.model_folder import looks_like_model, model_from_path

# A file that has not been written to for so long is complete; younger ones must stay unchanged from
# one scan to the next.
QUIET_MS: Final = 2_000
# Applies under way at once: a few hundred models are registered within seconds.
PARALLEL_APPLIES: Final = 8
# Files looked at below one model's folder; more than this is no model.
ENTRY_FILES_MAX: Final = 10_000
# What problems are filed under that are not an entry's; no file can have such a name.
_FOLDER: Final = "/folder"
_MESH: Final = "/mesh"


class SyncRefused(Exception):
    """The mesh said no to one resource; it will again until the resource is changed."""


class SyncUnavailable(Exception):
    """The mesh cannot be asked now."""


# Of what is no model, the applier's names begin so: with the kind, as no model's name does.
_OTHERS: Final = tuple(
    f"{kind}/" for kind in ("ServingRuntime", "ClusterServingRuntime", "InferenceGraph", "Secret")
)


@dataclass(frozen=True, slots=True)
class Applied:
    """``name`` is a model's, or ``Kind/name`` for what is none."""

    name: str
    action: str  # created | configured | unchanged
    warnings: tuple[str, ...] = ()


class Applier(Protocol):
    """The mesh, as far as the folder needs it. Called from several threads."""

    def apply(self, manifest_json: str) -> Applied:
        """Raises SyncRefused or SyncUnavailable."""

    def delete(self, name: str) -> None:
        """Deleting what is not there is no error. Raises SyncRefused or SyncUnavailable."""


class SyncReporter(Protocol):
    def applied(self, source: str, result: Applied) -> None: ...

    def deleted(self, name: str) -> None: ...

    def problem(self, text: str) -> None:
        """One line; said once until the entry changes or the mesh answers again."""

    def progress(self, done: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Signature:
    """What tells one content of an entry from another without reading it."""

    files: int
    size_bytes: int
    newest_mtime_ns: int
    # A file that was replaced by an older one of the same size has another inode.
    identity: int = 0


@dataclass(frozen=True, slots=True)
class ScanDecision:
    changed: tuple[str, ...]
    gone: tuple[str, ...]
    unsettled: tuple[str, ...]  # still being written


class FolderPlan:
    """Decides what a scan means. Pure: signatures and the time come in, names of entries go out."""

    def __init__(self, quiet_ms: int = QUIET_MS) -> None:
        self._quiet_ns = quiet_ms * 1_000_000
        self._seen: dict[str, Signature] = {}
        self._done: dict[str, Signature] = {}

    def scan(self, entries: Mapping[str, Signature], now_ns: int) -> ScanDecision:
        changed: list[str] = []
        unsettled: list[str] = []
        for name, signature in sorted(entries.items()):
            if self._done.get(name) == signature:
                continue
            quiet = now_ns - signature.newest_mtime_ns >= self._quiet_ns
            if signature.size_bytes and (quiet or self._seen.get(name) == signature):
                changed.append(name)
            else:
                unsettled.append(name)
        gone = tuple(sorted(self._done.keys() - entries.keys()))
        self._seen = dict(entries)
        return ScanDecision(tuple(changed), gone, tuple(unsettled))

    def done(self, name: str) -> None:
        """The entry's content of the last scan has been dealt with, well or badly."""
        self._done[name] = self._seen[name]

    def forget(self, name: str) -> None:
        self._done.pop(name, None)


@dataclass(frozen=True, slots=True)
class _Outcome:
    entry: str
    names: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    retry: bool = False
    opens: bool = False  # something else may be taken now that was refused before


ReadModel = Callable[[Path], Sequence[Document]]


def read_model(path: Path) -> Sequence[Document]:
    """The resource for a model that lies in the folder without a manifest; none: not a model."""
    if not looks_like_model(path):
        return ()
    try:
        manifest = model_from_path(path).alias.manifest
    except InvalidArgument as error:
        return (Document(str(path), fault=error.message.removeprefix(f"{path}: ")),)
    return (Document(str(path), json.loads(manifest)),)


@dataclass(slots=True)
class FolderSync:
    """One watched folder. ``step`` is one scan; call it every second or so, from one thread."""

    folder: Path
    state_path: Path
    applier: Applier
    reporter: SyncReporter
    read_model: ReadModel = read_model
    plan: FolderPlan = field(default_factory=FolderPlan)
    _owned: dict[str, str] = field(default_factory=dict)  # name -> entry
    _said: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _loaded: bool = False
    _down: Event = field(default_factory=Event)  # the mesh did not answer in this step

    def step(self, now_ns: int | None = None) -> bool:
        """One scan, and what follows from it. True when nothing is left to be done or tried."""
        if not self._loaded:
            self._owned, self._loaded = _read_owned(self.state_path), True
        entries = scan_folder(self.folder)
        if entries is None:
            self._say(
                _FOLDER, (f"{self.folder} cannot be read; nothing is changed until it can be",)
            )
            return False
        self._say(_FOLDER, ())
        decision = self.plan.scan(entries, time.time_ns() if now_ns is None else now_ns)
        settled = self._apply(decision.changed)
        settled &= self._delete_gone(entries.keys())
        for entry in decision.gone:
            self.plan.forget(entry)
            self._said.pop(entry, None)
        return settled and not decision.unsettled

    @property
    def names(self) -> frozenset[str]:
        """The names of models that this folder has in the mesh."""
        return frozenset(name for name in self._owned if not name.startswith(_OTHERS))

    def _apply(self, changed: Sequence[str]) -> bool:
        if not changed:
            return True
        settled, opened = True, False
        done = 0
        self._down.clear()
        with ThreadPoolExecutor(PARALLEL_APPLIES, thread_name_prefix="folder-sync") as pool:
            read = list(zip(changed, pool.map(self._read, changed), strict=True))
            early = [one for one in read if any(document.is_early for document in one[1])]
            later = [one for one in read if not any(document.is_early for document in one[1])]
            for batch in (early, later):
                for outcome in pool.map(lambda one: self._apply_entry(*one), batch):
                    done += 1
                    self.reporter.progress(done, len(changed))
                    settled &= self._settle(outcome)
                    opened |= outcome.opens
        if not self._down.is_set():
            self._say(_MESH, ())
        if opened:
            settled &= self._again(set(changed))
        _write_owned(self.state_path, self._owned)
        return settled

    def _again(self, looked_at: set[str]) -> bool:
        """Have other entries that were refused looked at anew; True when there are none."""
        refused = [
            entry
            for entry, faults in self._said.items()
            if faults and entry not in (looked_at | {_FOLDER, _MESH})
        ]
        for entry in refused:
            self.plan.forget(entry)
        return not refused

    def _read(self, entry: str) -> list[Document]:
        path = self.folder / entry
        # xgboost's models end in .json, too; their first bytes tell them.
        is_manifest = path.suffix in SUFFIXES and path.is_file() and not looks_like_model(path)
        documents = read_file(path) if is_manifest else self.read_model(path)
        return sorted(documents, key=lambda document: document.turn)

    def _apply_entry(self, entry: str, documents: Sequence[Document]) -> _Outcome:
        """In a thread of the pool: touches nothing of ``self`` but the applier and the reporter."""
        if self._down.is_set():  # one refusal to answer is enough for a whole step
            return _Outcome(entry, retry=True)
        names: list[str] = []
        faults: list[str] = []
        opens = False
        for document in documents:
            if document.fault:
                faults.append(f"{document.source}: {document.fault}")
                continue
            try:
                result = self.applier.apply(document.as_json())
            except SyncUnavailable as error:
                self._down.set()
                return _Outcome(entry, tuple(names), (str(error),), retry=True, opens=opens)
            except SyncRefused as error:
                faults.append(f"{document.source}: {document.label}: {error}")
                continue
            names.append(result.name)
            opens |= document.is_early and result.action != "unchanged"
            self.reporter.applied(document.source, result)
        return _Outcome(entry, tuple(names), tuple(faults), opens=opens)

    def _settle(self, outcome: _Outcome) -> bool:
        if outcome.retry:
            self._owned.update(dict.fromkeys(outcome.names, outcome.entry))
            if outcome.faults:
                self._say(_MESH, outcome.faults[:1])
            return False
        faults = list(outcome.faults)
        for name in outcome.names:
            other = self._owned.get(name)
            if other not in (None, outcome.entry) and (self.folder / str(other)).exists():
                faults.append(f"{outcome.entry}: {name} stands in {other} too; the last one counts")
            self._owned[name] = outcome.entry
        self._say(outcome.entry, tuple(faults))
        self.plan.done(outcome.entry)
        if not outcome.faults:  # a bad edit does not take away what it had
            dropped = [n for n, e in self._owned.items() if e == outcome.entry]
            return self._delete(name for name in dropped if name not in outcome.names)
        return True

    def _delete_gone(self, present: Iterable[str]) -> bool:
        still = set(present)
        return self._delete([name for name, entry in self._owned.items() if entry not in still])

    def _delete(self, names: Iterable[str]) -> bool:
        settled, deleted = True, False
        for name in list(names):
            try:
                self.applier.delete(name)
            except SyncUnavailable:
                settled = False
                continue
            except SyncRefused as error:
                self.reporter.problem(f"{name}: not deleted: {error}")
            else:
                self.reporter.deleted(name)
            del self._owned[name]
            deleted = True
        if deleted:
            _write_owned(self.state_path, self._owned)
        return settled

    def _say(self, entry: str, faults: tuple[str, ...]) -> None:
        """Report what is new; an entry's same faults are not said at every scan."""
        if self._said.get(entry, ()) != faults:
            for fault in faults:
                self.reporter.problem(fault)
        self._said[entry] = faults


def scan_folder(folder: Path) -> dict[str, Signature] | None:
    """The signature of every entry; None when the folder cannot be read."""
    entries: dict[str, Signature] = {}
    try:
        with os.scandir(folder) as listing:
            for item in listing:
                if not item.name.startswith((".", "_")) and not item.name.endswith("~"):
                    signature = _signature(Path(item.path))
                    if signature is not None:
                        entries[item.name] = signature
    except OSError:
        return None
    return entries


def _signature(path: Path) -> Signature | None:
    """None for what vanished meanwhile and for what is neither a file nor a folder."""
    files, size_bytes, newest, identity = 0, 0, 0, 0
    try:
        top = path.stat()
        if stat.S_ISREG(top.st_mode):
            return Signature(1, top.st_size, top.st_mtime_ns, top.st_ino)
        if not stat.S_ISDIR(top.st_mode):
            return None
        for parent, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in names:
                info = (Path(parent) / name).stat()
                files += 1
                size_bytes += info.st_size
                newest = max(newest, info.st_mtime_ns)
                # Order must not matter: os.walk does not promise one for files.
                identity ^= info.st_ino
                if files >= ENTRY_FILES_MAX:
                    return Signature(files, size_bytes, newest, identity)
    except OSError:
        return None
    return Signature(files, size_bytes, newest, identity)


def _read_owned(path: Path) -> dict[str, str]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    names = value.get("names") if isinstance(value, dict) else None
    return {str(k): str(v) for k, v in names.items()} if isinstance(names, dict) else {}


def _write_owned(path: Path, owned: Mapping[str, str]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"names": dict(sorted(owned.items()))}, indent=1), "utf-8")
    partial.replace(path)
