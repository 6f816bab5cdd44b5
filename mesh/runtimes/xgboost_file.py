"""Reads an XGBoost model before the library does, and refuses what would take the process down.

XGBoost believes the numbers in a file: a child that is not there, a feature out of range, or a
UBJSON that was cut off end in a segmentation fault, of every model of the pod. Here JSON and UBJSON
are read to the end, and each tree is held to be one: arrays of one length, children in range and
with one parent each (so that a walk ends), features that the model has. What the numbers mean is
not checked. Costs about what parsing costs, and memory of the order of the file, for a moment.

Fails with ``Malformed``, which says where.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from mesh.runtimes.api import Array

# The deepest that XGBoost writes is 7.
_DEPTH_MAX: Final = 32
# XGBoost keeps a category in a float32; larger ones it cannot tell apart.
_CATEGORY_MAX: Final = 1 << 24
_GROUPS_MAX: Final = 1 << 20
FEATURES_MAX: Final = 1 << 24
_SHOWN: Final = 60
_NO_PARENT: Final = 2**31 - 1
_NODE_ARRAYS: Final = (
    *("left_children", "right_children", "parents", "split_indices", "split_conditions"),
    *("default_left", "sum_hessian", "loss_changes", "base_weights", "split_type"),
)

_DTYPES: Final[dict[int, np.dtype[Any]]] = {
    ord("i"): np.dtype("i1"),
    ord("U"): np.dtype("u1"),
    ord("I"): np.dtype(">i2"),
    ord("l"): np.dtype(">i4"),
    ord("L"): np.dtype(">i8"),
    ord("d"): np.dtype(">f4"),
    ord("D"): np.dtype(">f8"),
}
_NUMBERS: Final = {
    ord("i"): struct.Struct(">b"),
    ord("U"): struct.Struct(">B"),
    ord("I"): struct.Struct(">h"),
    ord("l"): struct.Struct(">i"),
    ord("L"): struct.Struct(">q"),
    ord("d"): struct.Struct(">f"),
    ord("D"): struct.Struct(">d"),
}
_INTEGERS: Final = frozenset(b"iUIlL")
_CONSTANTS: Final = {ord("T"): True, ord("F"): False, ord("Z"): None}


class Malformed(Exception):
    """The file is no model that XGBoost could be trusted with; the text says why."""


def check_model(content: bytes) -> None:
    if content.startswith(b"binf"):
        raise Malformed(
            "it is in the binary form of XGBoost before 3, which is not read any more: load it "
            "with the XGBoost that wrote it, and save_model() it as .json or .ubj"
        )
    if content.lstrip()[:1] != b"{" or len(content) < 2:
        raise Malformed(f"it is neither JSON nor UBJSON (it begins with {content[:12]!r})")
    if content[:1] == b"{" and content[1] in _INTEGERS:
        model = _ubjson(content)
    else:
        model = _json(content)
    _check_learner(_get(model, "learner", dict, "the model"))


def _json(content: bytes) -> Any:
    # Only whole numbers are looked at: floats are not kept, which saves most of the memory.
    no_float: Mapping[str, None] = {}
    try:
        return json.loads(content, parse_float=no_float.get, parse_constant=no_float.get)
    except json.JSONDecodeError as error:
        at_end = error.pos >= len(error.doc.rstrip()) - 1 or "Unterminated" in error.msg
        cut = "; the file seems to be cut off" if at_end else ""
        raise Malformed(f"it is no JSON: {error.msg} at byte {error.pos}{cut}") from None
    except UnicodeDecodeError as error:
        raise Malformed(f"it is no JSON: not UTF-8 at byte {error.start}") from None
    except (RecursionError, ValueError) as error:
        raise Malformed(f"it is no JSON that XGBoost writes: {error}") from None


# ---- UBJSON -----------------------------------------------------------------------------------


def _ubjson(content: bytes) -> Any:
    reader = _Ubjson(content)
    try:
        return reader.value(reader.byte(), 0)
    except (struct.error, IndexError):
        raise Malformed(f"its UBJSON is cut off at byte {len(content)}") from None
    except UnicodeDecodeError:
        raise Malformed(
            f"its UBJSON has a text that is not UTF-8 before byte {reader.at}"
        ) from None


class _Ubjson:
    """Draft 12 as far as XGBoost writes it. Arrays of one type become views of the content."""

    __slots__ = ("at", "content")

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.at = 0

    def byte(self) -> int:
        found = self.content[self.at]
        self.at += 1
        return found

    def value(self, marker: int, depth: int) -> Any:
        if depth > _DEPTH_MAX:
            raise Malformed(f"its UBJSON is nested deeper than {_DEPTH_MAX}")
        if marker in _NUMBERS:
            return self.number(marker)
        if marker == ord("S"):
            return self.text()
        if marker == ord("{"):
            return self.map(depth)
        if marker == ord("["):
            return self.array(depth)
        if marker in _CONSTANTS:
            return _CONSTANTS[marker]
        raise Malformed(f"its UBJSON has the unknown type {marker} at byte {self.at - 1}")

    def number(self, marker: int) -> Any:
        form = _NUMBERS[marker]
        (found,) = form.unpack_from(self.content, self.at)
        self.at += form.size
        return found

    def length(self) -> int:
        marker = self.byte()
        found = self.number(marker) if marker in _INTEGERS else -1
        if found < 0:
            raise Malformed(f"its UBJSON has no length at byte {self.at}")
        return int(found)

    def text(self) -> str:
        size_bytes = self.length()
        if size_bytes > len(self.content) - self.at:
            raise IndexError
        self.at += size_bytes
        return self.content[self.at - size_bytes : self.at].decode()

    def map(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while self.content[self.at] != ord("}"):
            key = self.text()
            found[key] = self.value(self.byte(), depth + 1)
        self.at += 1
        return found

    def array(self, depth: int) -> Any:
        marker = self.content[self.at]
        if marker == ord("$"):
            self.at += 1
            dtype = _DTYPES.get(self.byte())
            if dtype is None or self.byte() != ord("#"):
                raise Malformed(f"its UBJSON has an array of unknown type at byte {self.at}")
            count = self.length()
            if count * dtype.itemsize > len(self.content) - self.at:
                raise IndexError
            self.at += count * dtype.itemsize
            return np.frombuffer(self.content, dtype, count, self.at - count * dtype.itemsize)
        if marker == ord("#"):
            self.at += 1
            count = self.length()
            if count > len(self.content) - self.at:  # a byte each at least
                raise IndexError
            return [self.value(self.byte(), depth + 1) for _ in range(count)]
        items: list[Any] = []
        while self.content[self.at] != ord("]"):
            items.append(self.value(self.byte(), depth + 1))
        self.at += 1
        return items


# ---- the model --------------------------------------------------------------------------------


def _check_learner(learner: Mapping[str, Any]) -> None:
    parameters = _get(learner, "learner_model_param", dict, "learner")
    features = _count(parameters, "num_feature", "learner_model_param", FEATURES_MAX)
    groups = max(
        _count(parameters, "num_class", "learner_model_param", _GROUPS_MAX, default=0),
        _count(parameters, "num_target", "learner_model_param", _GROUPS_MAX, default=1),
        1,
    )
    for key in ("feature_names", "feature_types"):
        names = learner.get(key)
        if names is not None and len(names) not in (0, features):
            raise Malformed(f"it has {len(names)} {key} and {features} features")
    booster = _get(learner, "gradient_booster", dict, "learner")
    match booster.get("name"):
        case "gbtree":
            _check_trees(_get(booster, "model", dict, "gradient_booster"), features, groups)
        case "dart":
            inner = _get(booster, "gbtree", dict, "gradient_booster")
            model = _get(inner, "model", dict, "gbtree")
            _check_trees(model, features, groups)
            if len(booster.get("weight_drop", ())) != len(model["trees"]):
                raise Malformed("weight_drop has not one weight for each tree")
        case "gblinear":
            model = _get(booster, "model", dict, "gradient_booster")
            if len(model.get("weights", ())) != (features + 1) * groups:
                raise Malformed("its linear weights do not fit the number of features")
        case other:
            raise Malformed(f"its booster {str(other)[:_SHOWN]!r} is not known")


def _check_trees(model: Mapping[str, Any], features: int, groups: int) -> None:
    parameters = _get(model, "gbtree_model_param", dict, "model")
    trees = model.get("trees")
    if not isinstance(trees, list):
        raise Malformed("it has no trees")
    count = _count(parameters, "num_trees", "gbtree_model_param", 1 << 31)
    _count(parameters, "num_parallel_tree", "gbtree_model_param", 1 << 31, default=1)
    info = _integers(model, "tree_info", "model")
    if not len(trees) == len(info) == count:
        raise Malformed(
            f"it says that it has {count} trees; there are {len(trees)}, and {len(info)} are listed"
        )
    if len(info) and not (info.min() >= 0 and info.max() < groups):
        raise Malformed(f"tree_info names another class than the {groups} there are")
    if "iteration_indptr" in model:
        rounds = _integers(model, "iteration_indptr", "model")
        right = len(rounds) and rounds[0] == 0 and rounds[-1] == count
        if not right or np.any(np.diff(rounds) < 0):
            raise Malformed("iteration_indptr does not divide its trees into rounds")
    nodes = [_tree_nodes(tree, number, groups) for number, tree in enumerate(trees)]
    if trees:
        if sorted(_integers({"id": [tree.get("id") for tree in trees]}, "id", "")) != list(
            range(count)
        ):
            raise Malformed("the ids of its trees are not the numbers from 0")
        _check_nodes(trees, np.asarray(nodes, dtype=np.int64), features)
    for number, tree in enumerate(trees):
        if len(tree.get("categories_nodes", ())) or np.any(tree.get("split_type", ())):
            _check_categories(tree, number)
        if _vector(tree) > 1:
            _check_leaf_vectors(tree, number)


def _tree_nodes(tree: Any, number: int, groups: int) -> int:
    """How many nodes it has; every array has one value for each."""
    if not isinstance(tree, dict):
        raise Malformed(f"tree {number} is no object")
    parameters = _get(tree, "tree_param", dict, f"tree {number}")
    nodes = _count(parameters, "num_nodes", f"tree {number}", 1 << 31)
    if nodes == 0:
        raise Malformed(f"tree {number} has no node")
    wide = _vector(tree)
    if wide not in (1, groups):
        raise Malformed(f"tree {number}: size_leaf_vector is {wide}, for {groups} targets")
    for key in _NODE_ARRAYS:
        values = tree.get(key)
        if values is None and key == "split_type":  # not before 1.3
            continue
        found = len(values) if isinstance(values, (list, np.ndarray)) else -1
        if found != (nodes * wide if key == "base_weights" else nodes):
            raise Malformed(
                f"tree {number} says that it has {nodes} nodes; {key} has {max(found, 0)} values"
            )
    return nodes


def _vector(tree: Mapping[str, Any]) -> int:
    parameters = _get(tree, "tree_param", dict, "tree")
    return max(_count(parameters, "size_leaf_vector", "tree_param", _GROUPS_MAX, default=1), 1)


def _check_nodes(trees: list[Any], nodes: Array, features: int) -> None:
    """All trees at once: numpy's calls would cost more than the work for each alone."""
    sizes = np.repeat(nodes, nodes)
    starts = np.repeat(np.cumsum(nodes) - nodes, nodes)

    def joined(key: str) -> Array:
        return np.concatenate([_integers(tree, key, "a tree") for tree in trees])

    def refuse(wrong: Array, what: str) -> None:
        if wrong.any():
            number = int(np.searchsorted(np.cumsum(nodes), int(wrong.argmax()), side="right"))
            raise Malformed(f"tree {number}: {what}")

    left, right = joined("left_children"), joined("right_children")
    inner = left != -1
    for children in (left, right):
        refuse(inner & ((children < 1) | (children >= sizes)), "a child is out of range")
    children = np.concatenate(((left + starts)[inner], (right + starts)[inner]))
    refuse(np.bincount(children, minlength=len(left)) > 1, "a node is the child of two nodes")
    splits = joined("split_indices")
    refuse(
        inner & ((splits < 0) | (splits >= features)),
        f"a split uses another feature than the {features} there are",
    )
    parents = joined("parents")
    root = (parents == -1) | (parents == _NO_PARENT)
    refuse(~root & ((parents < 0) | (parents >= sizes)), "a node's parent is out of range")


def _check_leaf_vectors(tree: Mapping[str, Any], number: int) -> None:
    """A leaf's vector is found by the leaf's number, which takes the right child's place."""
    leaves = _integers(tree, "right_children", "it")[_integers(tree, "left_children", "it") == -1]
    if len(leaves) and not (leaves.min() >= -1 and leaves.max() < len(leaves)):
        raise Malformed(f"tree {number}: the weights of a leaf are out of range")
    weights = tree.get("leaf_weights")
    if weights is not None and len(weights) != len(leaves) * _vector(tree):
        raise Malformed(f"tree {number}: its {len(leaves)} leaves have {len(weights)} weights")


def _check_categories(tree: Mapping[str, Any], number: int) -> None:
    where = f"tree {number}"
    at = _integers(tree, "categories_nodes", where)
    starts = _integers(tree, "categories_segments", where)
    sizes = _integers(tree, "categories_sizes", where)
    values = _integers(tree, "categories", where)
    categorical = _integers(tree, "split_type", where) != 0
    wanted = np.flatnonzero(categorical & (_integers(tree, "left_children", where) != -1))
    if not len(at) == len(starts) == len(sizes) or not np.array_equal(at, wanted):
        raise Malformed(f"{where}: its categories do not belong to its categorical splits")
    if len(at) and not (
        min(starts.min(), sizes.min()) >= 0
        and max(starts.max(), sizes.max()) <= len(values)
        and int((starts + sizes).max()) <= len(values)
    ):
        raise Malformed(f"{where}: the categories of a split are out of range")
    if len(values) and not (values.min() >= 0 and values.max() < _CATEGORY_MAX):
        raise Malformed(f"{where}: a category is out of range (0 to {_CATEGORY_MAX - 1})")


# ---- values -----------------------------------------------------------------------------------


def _get(found: Any, key: str, kind: type[dict[str, Any]], where: str) -> dict[str, Any]:
    value = found.get(key) if isinstance(found, dict) else None
    if not isinstance(value, kind):
        raise Malformed(f"{where} has no {key}")
    return value


def _count(
    found: Mapping[str, Any], key: str, where: str, limit: int, default: int | None = None
) -> int:
    """XGBoost writes its parameters as text."""
    text: Any = found.get(key, default)
    try:
        value = int(text)
    except (TypeError, ValueError):
        raise Malformed(f"{where} has no number {key}") from None
    if not 0 <= value < limit:
        raise Malformed(f"{where}: {key} is {value}, out of range")
    return value


def _integers(found: Mapping[str, Any], key: str, where: str) -> Array:
    values: Sequence[Any] | Array | None = found.get(key)
    if values is None:
        raise Malformed(f"{where} has no {key}")
    try:
        array = np.asarray(values, dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        raise Malformed(f"{key} holds something else than whole numbers") from None
    if array.ndim != 1:
        raise Malformed(f"{key} holds something else than whole numbers")
    return array
