"""How a model's files lie: one version or several, what the model says of itself, its format.

Understood are a single file, a folder, Triton's ``NAME/VERSION/...`` with ``config.pbtxt``, and
MLServer's ``model-settings.json``, beside the model or in its version's folder. All numbered
folders are versions, the highest number the latest, unless ``version_policy`` says which are
served.

Reads names, first bytes and the small description files, never weights. Fails with ``LoadFailed``
(FAILED_PRECONDITION) when nothing tells the format, when several things do, or when what the
resource says and what the model says of itself contradict each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from mesh.core.errors import Code, LoadFailed
from mesh.formats import (
    ALIASES,
    CONFIG_PBTXT,
    DETECTED,
    HEAD_BYTES,
    MODEL_SETTINGS,
    FormatUnclear,
    HeadOf,
    candidates,
    format_of_file,
    format_of_folder,
    is_version,
    only_format,
)
from mesh.runtimes.api import ModelOptions
from mesh.runtimes.model_config import VersionPolicy, read_model_config
from mesh.runtimes.model_settings import Settings, read_model_settings

# A description is a page of text.
DESCRIPTION_MAX_BYTES: Final = 1 << 20
# Every version is loaded and takes memory of its own.
VERSIONS_MAX: Final = 100
_SAVED_MODEL_FOLDER: Final = "model.savedmodel"
# What people put beside a model: no part of it.
_BESIDE: Final = ("readme", "license", "sha256sums", "md5sums", "notice", "changelog")


@dataclass(frozen=True, slots=True)
class Version:
    """``name`` is "" where the artifact has no version folders. ``path``: a file or a folder.

    ``options``: what this version says of itself, None where all share the layout's.
    """

    name: str
    path: Path
    options: ModelOptions | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """``versions``: those to serve, the latest first; at least one."""

    format: str
    versions: tuple[Version, ...]
    options: ModelOptions


def lay_out(path: Path, model_type: str, model_id: str) -> Layout:
    """Looks at the artifact at ``path``. ``model_type`` may be an alias or one of ``DETECTED``."""
    said = ALIASES.get(model_type, model_type)
    try:
        return _lay_out(path, "" if said in DETECTED else said)
    except FormatUnclear as error:
        raise LoadFailed(f"model {model_id!r}: {error}") from None
    except LoadFailed as error:
        raise LoadFailed(f"model {model_id!r}: {error.message}", code=error.code) from None
    except OSError as error:
        raise LoadFailed(
            f"model {model_id!r}: its files cannot be read: {error.strerror or error}",
            code=Code.UNAVAILABLE,
        ) from None


def _lay_out(path: Path, said: str) -> Layout:
    """``said``: the format that the resource says, "" when it leaves it to the artifact."""
    if not path.is_dir():
        if not path.is_file():
            raise LoadFailed(f"there is no file or folder at {path.name!r}")
        told = said or format_of_file(path.name, _head_in(path.parent))
        return Layout(told or only_format({}), (Version("", path),), ModelOptions())
    options, policy, settings = _description(path)
    numbered = {} if settings is not None and settings.uri else _numbered(path)
    if numbered and (options.source or not _has_model(path, said)):
        chosen = _chosen(numbered, policy)
        versions = tuple(
            _version(str(number), chosen[number], options, path)
            for number in sorted(chosen, reverse=True)
        )
    else:
        if not numbered and not options.source:
            _refuse_model_folders(path)
        found = _in_folder(path, options, settings, path)
        versions = (replace(found, options=None),)
    _check_names_differ(versions)
    told = _format(said, versions, options)
    if told == "tensorflow":
        versions = tuple(replace(one, path=_saved_model(one.path)) for one in versions)
    # Its name is in the versions' paths now; who joined it once more would look in a wrong place.
    return Layout(told, versions, replace(options, file=""))


# ---- descriptions -----------------------------------------------------------------------------


def _description(folder: Path) -> tuple[ModelOptions, VersionPolicy, Settings | None]:
    """What the description file right in ``folder`` says; empty options where there is none."""
    config, settings = folder / CONFIG_PBTXT, folder / MODEL_SETTINGS
    if config.is_file() and settings.is_file():
        raise LoadFailed(
            f"both {CONFIG_PBTXT} and {MODEL_SETTINGS} describe the model; keep the one that is "
            "right"
        )
    if config.is_file():
        return *read_model_config(_text(config), folder), None
    if settings.is_file():
        read = read_model_settings(_text(settings))
        return read.options, VersionPolicy(), read
    return ModelOptions(), VersionPolicy(), None


def _text(file: Path) -> str:
    with file.open("rb") as stream:
        content = stream.read(DESCRIPTION_MAX_BYTES + 1)
    if len(content) > DESCRIPTION_MAX_BYTES:
        raise LoadFailed(
            f"{file.name}: larger than {DESCRIPTION_MAX_BYTES >> 20} MiB; a description is a page "
            "of text"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LoadFailed(f"{file.name}: not UTF-8 at byte {error.start}; save it as text") from None


# ---- versions ---------------------------------------------------------------------------------


def _numbered(folder: Path) -> dict[int, Path]:
    """The version folders by number; hidden and other folders are none."""
    found: dict[int, Path] = {}
    for entry in sorted(folder.iterdir()):
        if not is_version(entry.name) or not entry.is_dir():
            continue
        number = int(entry.name)
        if number in found:
            raise LoadFailed(
                f"the folders {found[number].name!r} and {entry.name!r} are both version {number}; "
                "take one away"
            )
        found[number] = entry
    return found


def _chosen(numbered: Mapping[int, Path], policy: VersionPolicy) -> dict[int, Path]:
    if policy.listed is not None:
        missing = sorted(set(policy.listed) - numbered.keys())
        if missing:
            there = ", ".join(str(number) for number in sorted(numbered)[:10])
            raise LoadFailed(
                f"{CONFIG_PBTXT}: version_policy.specific.versions: there is no folder for version "
                f"{', '.join(map(str, missing[:10]))}; the versions are {there}"
            )
        chosen = set(policy.listed)
    else:
        newest_first = sorted(numbered, reverse=True)
        chosen = set(newest_first[: policy.latest])
    if len(chosen) > VERSIONS_MAX:
        raise LoadFailed(
            f"expected at most {VERSIONS_MAX} versions to serve; found {len(chosen)}. Take old "
            f"ones away, or say version_policy in {CONFIG_PBTXT}"
        )
    return {number: numbered[number] for number in chosen}


def _version(name: str, folder: Path, options: ModelOptions, root: Path) -> Version:
    """One version's folder. What it says of itself counts where the model as a whole is silent."""
    if options.source or not (folder / MODEL_SETTINGS).is_file():
        path = _file(folder, options.file, f"{options.source}: default_model_filename", root)
        return Version(name, path)
    own = read_model_settings(_text(folder / MODEL_SETTINGS))
    found = _in_folder(folder, own.options, own, root)
    return replace(found, name=found.name or name)


def _in_folder(
    folder: Path, options: ModelOptions, settings: Settings | None, root: Path
) -> Version:
    """A folder that is one version."""
    if settings is None:
        where = f"{options.source}: default_model_filename"
        return Version("", _file(folder, options.file, where, root), options)
    path = _file(folder, settings.uri, f"{MODEL_SETTINGS}: parameters.uri", root)
    return Version(settings.version, path, options)


def _file(folder: Path, name: str, where: str, root: Path) -> Path:
    """What a description names inside ``folder``; links must not lead out of the artifact."""
    if not name:
        return folder
    path = folder / name
    if not path.exists():
        place = "the model's folder" if folder == root else f"version {folder.name}"
        raise LoadFailed(f"{where}: there is no {name!r} in {place}")
    if not path.resolve().is_relative_to(root.resolve()):
        raise LoadFailed(f"{where}: {name!r} leads out of the model's artifact")
    return path


def _check_names_differ(versions: tuple[Version, ...]) -> None:
    names = [version.name for version in versions]
    for name in names:
        if names.count(name) > 1:
            raise LoadFailed(
                f"{MODEL_SETTINGS}: parameters.version: two versions are named {name!r}; give each "
                "a name of its own"
            )


def _refuse_model_folders(folder: Path) -> None:
    """An artifact is one model; a folder around its folder is told of, not guessed through."""
    inner: list[str] = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.name.lower().startswith(_BESIDE):
            continue
        if not entry.is_dir() or format_of_folder(entry.name):
            return
        named = {child.name: child for child in entry.iterdir()}
        described = CONFIG_PBTXT in named or MODEL_SETTINGS in named
        if described or any(is_version(name) and at.is_dir() for name, at in named.items()):
            inner.append(entry.name)
    if inner:
        raise LoadFailed(
            f"the artifact is a folder around the model folder {', '.join(inner[:5])}, which is "
            f"not looked into; let storageUri end in {inner[0]!r}"
        )


# ---- formats ----------------------------------------------------------------------------------


def _format(said: str, versions: tuple[Version, ...], options: ModelOptions) -> str:
    """The one format of all versions, by the resource, the descriptions or else the files."""
    told: dict[str, str] = {}  # format to who says so
    for version in versions:
        own = version.options or options
        if own.format:
            told.setdefault(own.format, own.source)
        elif not said:
            at = f"version {version.name}" if version.name else "its files"
            told.setdefault(_detected(version), at)
    if said:
        for name, source in told.items():
            if name != said:
                raise LoadFailed(
                    f"the resource says that the model is {said}, and its {source} says {name}; "
                    "correct the one that is wrong"
                )
        return said
    if len(told) > 1:
        ways = ", ".join(f"{name} ({source})" for name, source in told.items())
        raise FormatUnclear(
            f"expected the same format in all versions; found {ways}. Take the wrong one away, or "
            "say modelFormat in the resource (a manifest)"
        )
    return next(iter(told))


def _detected(version: Version) -> str:
    path = version.path
    try:
        if path.is_file():
            return format_of_file(path.name, _head_in(path.parent)) or only_format({})
        return format_of_folder(path.name) or only_format(_candidates(path))
    except FormatUnclear as error:
        if version.name:
            raise FormatUnclear(f"version {version.name}: {error}") from None
        raise


def _has_model(folder: Path, said: str) -> bool:
    """Whether a model of the format (of any, when none is said) lies right in the folder."""
    try:
        found = _candidates(folder)
    except FormatUnclear:  # something is there, and whoever needs to know the format says the rest
        return True
    return said in found if said else bool(found)


def _candidates(folder: Path) -> Mapping[str, tuple[str, ...]]:
    entries = list(folder.iterdir())
    files = [entry.name for entry in entries if entry.is_file()]
    folders = [entry.name for entry in entries if entry.is_dir()]
    return candidates(files, folders, _head_in(folder))


def _head_in(folder: Path) -> HeadOf:
    """Reads the first bytes of a file of this folder."""

    def head(name: str) -> bytes:
        with (folder / name).open("rb") as file:
            return file.read(HEAD_BYTES)

    return head


def _saved_model(path: Path) -> Path:
    """Triton's ``VERSION/model.savedmodel/``, for those who name the version's folder."""
    inner = path / _SAVED_MODEL_FOLDER
    return inner if inner.is_dir() else path
