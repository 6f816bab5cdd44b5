"""What a PyTorch file holds, told from the zip archive that it is; nothing in it is run.

Owns which files may be given to PyTorch's loaders at all. Those of ``torch.export`` trust the file:
they unpickle what it marks as pickled, load native libraries that it carries, evaluate its symbolic
sizes and its guards as Python and write the names of its arguments into code. So a ``.pt2`` is
refused unless it is free of the first two, and its texts are of the narrow form that PyTorch itself
writes. A TorchScript program may do arithmetic only: those that touch files are refused. That keeps
out what is known; whoever wants a boundary as well runs the format isolated.

Fails with ``LoadFailed`` (FAILED_PRECONDITION). Does not import torch.
"""

from __future__ import annotations

import ast
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mesh.core.errors import LoadFailed
from mesh.runtimes import tabular
from mesh.runtimes.api import ModelSpec

SAVE_HINT: Final = "save the model with torch.jit.save (.pt) or torch.export.save (.pt2)"

# Of a zip file, at its end: signature, disks, entries, the directory's size and place, a comment.
_END: Final = struct.Struct("<4s4H2LH")
_LOCATOR64: Final = struct.Struct("<4sLQL")
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_TENSORS: Final = ("data/", "constants/")
# Bound on one description inside the archive; the largest seen, of a 1B transformer, has 20 MB.
_JSON_BYTES_MAX: Final = 256 * 1024 * 1024
_CODE_BYTES_MAX: Final = 64 * 1024 * 1024
_TOUCHES_FILES: Final = re.compile(rb"\b(?:torch|aten|ops\.aten)\.(?:from_file|save|load)\b")

_DAMAGED: Final = (
    *(zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, struct.error),
)
_NAME: Final = re.compile(r"[\w.\-]*")
_TEXT: Final = re.compile(r"[\w.+\- /]*")
_SYMBOL: Final = re.compile(r"[a-z]+\d+")
_OPERATOR: Final = re.compile(
    r"torch\.ops\.(?!load_library|loaded_libraries|import_module)[A-Za-z]\w*\.\w+(\.\w+)?"
    r"|torch\._?sym_\w+|math\.[a-z0-9]+"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge"
    r"|and_|or_|not_|xor|lshift|rshift)"
)
# What sizes are written with: sympy's own classes and PyTorch's.
_FUNCTIONS: Final = frozenset(
    (
        *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Abs"),
        *("Mod", "PythonMod", "FloorDiv", "CeilDiv", "CleanDiv", "IntTrueDiv", "FloatTrueDiv"),
        *("ModularIndexing", "Where", "CeilToInt", "FloorToInt", "TruncToInt", "RoundToInt"),
        *("TruncToFloat", "ToFloat", "RoundDecimal", "LShift", "RShift", "PowByNatural"),
        *("FloatPow", "Identity", "IsNonOverlappingAndDenseIndicator", "OpaqueUnaryFn_sqrt"),
        *("BitwiseFn_bitwise_and", "BitwiseFn_bitwise_or", "Eq", "Ne", "Lt", "Le", "Gt", "Ge"),
        *("Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan"),
        *("GreaterThan", "And", "Or", "Not", "Piecewise", "ExprCondPair", "floor", "ceiling"),
        *("int", "float", "bool", "min", "max", "sqrt"),
    )
)
_VALUES: Final = frozenset(("true", "false", "oo", "int_oo", "nan", "L", "math", "inf"))
_METHODS: Final = frozenset(
    (
        *("size", "stride", "storage_offset", "dim", "numel", "ndim", "shape"),
        *("floor", "ceil", "sqrt", "trunc"),
    )
)
_NODES: Final = (
    *(ast.Expression, ast.Name, ast.Load, ast.Constant, ast.Call, ast.keyword, ast.Attribute),
    *(ast.Subscript, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.IfExp, ast.Tuple),
    *(ast.cmpop, ast.boolop, ast.operator, ast.unaryop),
)
_CONTAINERS: Final = frozenset({"builtins.tuple", "builtins.list", "builtins.dict"})


@dataclass(frozen=True, slots=True)
class PytorchArchive:
    """``content_bytes``: of all entries, unpacked; ``tensor_bytes``: of the weights among them.
    ``samples``: of an exported program: the pickles of its example inputs, which its loader opens;
    to be opened with ``weights_only`` first."""

    exported: bool
    content_bytes: int
    tensor_bytes: int
    samples: tuple[bytes, ...] = ()


def content_bytes(path: Path, spec: ModelSpec) -> int:
    """Of all entries, unpacked; the file's size where it is no archive. Near instant."""
    size_bytes = tabular.file_bytes(path, spec)
    try:
        with zipfile.ZipFile(path) as archive:
            return max(size_bytes, sum(entry.file_size for entry in archive.infolist()))
    except (zipfile.BadZipFile, OSError, ValueError):
        return size_bytes  # the load says what is wrong with it


def open_archive(path: Path, spec: ModelSpec) -> PytorchArchive:
    """Raises LoadFailed unless it is a program that may be given to PyTorch."""

    def refused(why: str) -> LoadFailed:
        return LoadFailed(f"model {spec.model_id!r}: {path.name} {why}")

    try:
        if not _ends_as_an_archive(path):
            raise refused(_not_a_zip(path))
        with zipfile.ZipFile(path) as archive:
            if not _directory_is_where_it_says(path, archive):
                raise refused("is damaged: its directory is not where it says")
            return _looked_into(archive, refused)
    except _DAMAGED as error:
        raise refused(f"is damaged: {tabular.one_line(error)}") from None
    except (ValueError, RecursionError) as error:  # of json
        raise refused(f"has a damaged description: {tabular.one_line(error)}") from None
    except OSError as error:
        raise tabular.unreadable(path, spec, error) from None


def _ends_as_an_archive(path: Path) -> bool:
    """PyTorch's archives have no comment. One that is cut off may still hold a whole archive, its
    example inputs, which Python's reader would take for it."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _END.size))
        return file.read().startswith(b"PK\x05\x06")


def _directory_is_where_it_says(path: Path, archive: zipfile.ZipFile) -> bool:
    """Python's reader looks before the end for the directory, PyTorch's where the end says that it
    is: they must see the same entries."""
    with path.open("rb") as file:
        end_at = file.seek(path.stat().st_size - _END.size)
        *_, directory_at, comment_bytes = _END.unpack(file.read(_END.size))
        record_at = end_at - _LOCATOR64.size - _END64.size
        if record_at >= 0:
            file.seek(record_at)
            *_, directory64_at = _END64.unpack(file.read(_END64.size))
            signature, _, said_at, _ = _LOCATOR64.unpack(file.read(_LOCATOR64.size))
            if signature == b"PK\x06\x07":  # of 4 GB or more
                directory_at = directory64_at if said_at == record_at else -1
    return bool(comment_bytes == 0 and directory_at == archive.start_dir)


def _not_a_zip(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(2)
    if head == b"PK":
        return "is cut off"
    if head[:1] == b"\x80":
        return f"is a pickle, which runs code when it is loaded; {SAVE_HINT}"
    return f"is no archive of PyTorch's; {SAVE_HINT}"


def _looked_into(archive: zipfile.ZipFile, refused: Callable[[str], LoadFailed]) -> PytorchArchive:
    entries: dict[str, zipfile.ZipInfo] = {}
    roots: set[str] = set()
    for entry in archive.infolist():
        root, _, name = entry.filename.partition("/")
        roots.add(root)
        # PyTorch's own reader takes the first of two and may not tell upper from lower case.
        if entries.setdefault(name.lower(), entry) is not entry:
            raise refused(f"has two entries named {name!r}")
    if "serialized_exported_program.json" in roots:
        raise refused("is an exported program of an old PyTorch, with pickles; save it with 2.8 up")
    if any(name.startswith("data/aotinductor/") for name in entries):
        raise refused(
            "carries a native library (AOTInductor), which runs whatever it likes; "
            "save the model with torch.export.save (.pt2)"
        )
    scripted = "constants.pkl" in entries and any(name.startswith("code/") for name in entries)
    exported = "models/model.json" in entries
    if len(roots) != 1 or scripted == exported:
        raise refused(
            "holds weights or pickled modules, not a program that can be run without its code; "
            + SAVE_HINT
        )
    if scripted:
        _check_code(archive, entries, refused)
    else:
        _check_export(archive, entries, refused)
    return PytorchArchive(
        exported=exported,
        content_bytes=sum(entry.file_size for entry in entries.values()),
        tensor_bytes=sum(
            entry.file_size
            for name, entry in entries.items()
            if name.startswith(_TENSORS) and not name.endswith(".json")
        ),
        samples=tuple(
            archive.read(entry)
            for name, entry in entries.items()
            if exported and name.startswith("data/sample_inputs/")
        ),
    )


def _check_code(
    archive: zipfile.ZipFile,
    entries: dict[str, zipfile.ZipInfo],
    refused: Callable[[str], LoadFailed],
) -> None:
    for name, entry in entries.items():
        if not name.startswith("code/") or not name.endswith(".py"):
            continue
        if entry.file_size > _CODE_BYTES_MAX:
            raise refused(f"has {entry.file_size} bytes of code in {name}")
        if found := _TOUCHES_FILES.search(archive.read(entry)):
            raise refused(f"uses {found[0].decode()}, which touches files; a model may not")


def _check_export(
    archive: zipfile.ZipFile,
    entries: dict[str, zipfile.ZipInfo],
    refused: Callable[[str], LoadFailed],
) -> None:
    for name, entry in entries.items():
        folder, _, file = name.rpartition("/")
        if folder in ("data/weights", "data/constants"):
            if file.endswith(".pt"):
                raise refused("has pickled weights; save it with torch.export.save of PyTorch 2.8")
            if file.endswith(".json"):
                for one, payload in _json(archive, entry, refused).get("config", {}).items():
                    held = str(payload.get("path_name", ""))
                    if payload.get("use_pickle") or not held.startswith(("weight_", "tensor_")):
                        raise refused(f"has a pickled object, {one!r}, not plain weights")
                    if f"{folder}/{held}" not in entries:
                        raise refused(f"lacks the weights of {one!r} ({held})")
        elif folder == "models":
            # Its loader hides what it misses behind a general word.
            if f"data/sample_inputs/{file.removesuffix('.json')}.pt" not in entries:
                raise refused("lacks the example inputs that torch.export.save writes")
            for problem in _problems(_json(archive, entry, refused)):
                raise refused(f"has {problem}; PyTorch would run it as code, so it is refused")


def _json(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, refused: Callable[[str], LoadFailed]
) -> dict[str, Any]:
    if entry.file_size > _JSON_BYTES_MAX:
        raise refused(f"has a description of {entry.file_size} bytes")
    found = json.loads(archive.read(entry))
    if not isinstance(found, dict):
        raise refused("has a damaged description")
    return found


def _problems(described: Any) -> Iterator[str]:
    """What is not as ``torch.export.save`` writes it, in a few words."""
    pending = [described]
    while pending:
        one = pending.pop()
        if isinstance(one, list):
            pending.extend(one)
        elif isinstance(one, dict):
            pending.extend(one.values())
            for key, value in one.items():
                check = _CHECKS.get(key)
                for text in value if isinstance(value, list) else (value,):
                    if check is not None and isinstance(text, str) and not check[1](text):
                        yield f"{check[0]} {text[:100]!r}"


def _harmless_expression(text: str) -> bool:
    """Arithmetic on sizes, and nothing else that Python could do."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return all(_harmless_node(node) for node in ast.walk(tree))


def _harmless_node(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Name(id=name)):
            return name in _FUNCTIONS
        case ast.Call(func=ast.Attribute()):
            return True  # the attribute itself is looked at, too
        case ast.Call():
            return False
        case ast.Name(id=name):
            return name in _FUNCTIONS or name in _VALUES or bool(_SYMBOL.fullmatch(name))
        case ast.Attribute(attr=name):
            return name in _METHODS
        case ast.Constant(value=str(text)):
            return bool(_TEXT.fullmatch(text))
        case ast.Constant(value=value):
            return value is None or isinstance(value, bool | int | float)
        case _:
            return isinstance(node, _NODES)


def _harmless_tree(text: str) -> bool:
    """The form of arguments and answers: tuples, lists and dicts with plain keys."""
    if not text:
        return True
    pending = [json.loads(text)]
    while pending:
        one = pending.pop()
        if isinstance(one, list):
            pending.extend(one)
        elif isinstance(one, dict):
            if one.get("type") is None:
                continue
            context = json.loads(one.get("context") or "null")
            keys = context if isinstance(context, list) else [context]
            plain = all(
                key is None
                or isinstance(key, int)
                or (isinstance(key, str) and _TEXT.fullmatch(key))
                for key in keys
            )
            if one["type"] not in _CONTAINERS or not plain:
                return False
            pending.extend(one.get("children_spec", ()))
    return True


# Keys of the description, wherever they are, to what they hold and what it may be.
_CHECKS: Final[dict[str, tuple[str, Callable[[str], bool]]]] = {
    "expr_str": ("a size", _harmless_expression),
    "guards_code": ("a guard", _harmless_expression),
    "target": ("an operator", lambda text: bool(_OPERATOR.fullmatch(text))),
    "as_operator": ("an operator", lambda text: bool(_OPERATOR.fullmatch(text))),
    "in_spec": ("arguments", _harmless_tree),
    "out_spec": ("answers", _harmless_tree),
    "name": ("a name", lambda text: bool(_NAME.fullmatch(text))),
    "as_custom_obj": ("an object", lambda text: False),
}
