"""Reads a LightGBM text before the library does, and refuses what would take the process down.

LightGBM follows the offsets in ``tree_sizes`` without looking, meets what it cannot read inside a
parallel section, where an error ends the process, and walks whatever children it is told of. Here
each tree must lie where the header says, have as many numbers as it has leaves, and be a tree:
children in range, with one parent each (so that a walk ends), features that the model has. What
the numbers mean is not checked. Costs about what the library's own parsing costs.

Fails with ``Malformed``, which says where.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from mesh.runtimes.api import Array

FEATURES_MAX: Final = 1 << 24
_CLASSES_MAX: Final = 1 << 20
_SHOWN: Final = 40
_END_OF_TREES: Final = b"end of trees"
# One number for each split; those that only importance is made of may be missing.
_OF_SPLITS: Final = ("split_feature", "threshold", "decision_type", "left_child", "right_child")
_OF_SPLITS_OR_NONE: Final = ("split_gain", "internal_value", "internal_weight", "internal_count")
_OF_LEAVES_OR_NONE: Final = ("leaf_weight", "leaf_count")
# Bit 0 of a decision: a set of categories and not a threshold.
_CATEGORICAL: Final = 1
_DECISION_MAX: Final = 15
_FLOAT: Final[np.dtype[Any]] = np.dtype(np.float64)


class Malformed(Exception):
    """The text is no model that LightGBM could be trusted with; the text says why."""


def check_model(content: bytes) -> None:
    if b"\r" in content[:4096]:
        raise Malformed("its lines end as on Windows; save it with LightGBM again, as binary")
    if not content.startswith(b"tree\n"):
        raise Malformed(f"it does not begin as a LightGBM text (it begins with {content[:12]!r})")
    end = content.find(_END_OF_TREES)
    if end < 0:
        raise Malformed("it is cut off: the end of its trees is missing")
    if b"\nparameters:" in content[end:] and b"end of parameters" not in content[end:]:
        raise Malformed("it is cut off: the end of its parameters is missing")
    blank = content.find(b"\n\n")
    header = _fields(content[:blank], "its header")
    features = _count(header, b"max_feature_idx", FEATURES_MAX) + 1
    classes = _count(header, b"num_class", _CLASSES_MAX)
    each_round = _count(header, b"num_tree_per_iteration", _CLASSES_MAX)
    if not classes or not each_round:
        raise Malformed("num_class and num_tree_per_iteration must be above 0")
    for key in (b"feature_names", b"feature_infos"):
        if key not in header or len(header[key].split(b" ")) != features:
            raise Malformed(f"its header has not {features} {key.decode()}, one for each feature")
    if b"tree_sizes" not in header:
        raise Malformed("its header has no tree_sizes; save it with a LightGBM of this decade")
    sizes = _integers(header, b"tree_sizes")
    if len(sizes) and (sizes.min() <= 0 or int(sizes.sum()) > end - blank):
        raise Malformed("tree_sizes in its header do not fit its length")
    if len(sizes) % each_round:
        raise Malformed(f"it has {len(sizes)} trees, not {each_round} a round")
    at = blank + 2
    for number, size in enumerate(sizes.tolist()):
        try:
            _check_tree(content[at : at + size], number, features)
        except Malformed as error:
            raise Malformed(f"tree {number}: {error}") from None
        at += size
    if content[at:end].strip():
        raise Malformed("it has more trees than its header says")


def _check_tree(block: bytes, number: int, features: int) -> None:
    first, _, rest = block.partition(b"\n")
    if first != b"Tree=%d" % number:
        raise Malformed(f"it does not lie where the header says (found {first[:_SHOWN]!r})")
    fields = _fields(rest.strip(b"\n"), "it")
    leaves = _count(fields, b"num_leaves", 1 << 31)
    if leaves < 1:
        raise Malformed("num_leaves must be above 0")
    _check_numbers(fields, leaves, features)
    if leaves == 1:
        return
    left, right = _integers(fields, b"left_child"), _integers(fields, b"right_child")
    children = np.concatenate((left, right))
    if not (children.min() >= -leaves and children.max() < leaves - 1 and 0 not in children):
        raise Malformed("a child is out of range")
    # Leaves are counted from -1 down.
    if np.bincount(children + leaves, minlength=2 * leaves - 1).max() > 1:
        raise Malformed("a node is the child of two nodes")
    splits = _integers(fields, b"split_feature")
    if not (splits.min() >= 0 and splits.max() < features):
        raise Malformed(f"a split uses another feature than the {features} there are")
    _check_categories(fields)


def _check_numbers(fields: Mapping[bytes, bytes], leaves: int, features: int) -> None:
    for names, wanted, needed in (
        (_OF_SPLITS, leaves - 1, True),
        (_OF_SPLITS_OR_NONE, leaves - 1, False),
        (("leaf_value",), leaves, True),
        (_OF_LEAVES_OR_NONE, leaves, False),
    ):
        for name in names:
            text = fields.get(name.encode())
            if text is None and not needed:
                continue
            count = len(_numbers(text or b"", name))
            # A stump's statistics may be there or not.
            if count != wanted and not (leaves == 1 and count <= 1):
                raise Malformed(f"it has {leaves} leaves; {name} has {count} numbers")
    for name in ("shrinkage", "num_cat", "is_linear"):
        _numbers(fields.get(name.encode(), b""), name)
    if fields.get(b"is_linear", b"0").strip() not in (b"", b"0"):
        _check_linear(fields, leaves, features)


def _check_linear(fields: Mapping[bytes, bytes], leaves: int, features: int) -> None:
    counts = _integers(fields, b"num_features")
    constants = _numbers(fields.get(b"leaf_const", b""), "leaf_const")
    used = _integers(fields, b"leaf_features")
    factors = _numbers(fields.get(b"leaf_coeff", b""), "leaf_coeff")
    if not len(counts) == len(constants) == leaves or counts.min() < 0:
        raise Malformed("its leaves' linear models are not one a leaf")
    if not len(used) == len(factors) == int(counts.sum()):
        raise Malformed("its leaves' linear models do not fit their numbers of features")
    if len(used) and not (used.min() >= 0 and used.max() < features):
        raise Malformed(f"a leaf uses another feature than the {features} there are")


def _check_categories(fields: Mapping[bytes, bytes]) -> None:
    decisions = _integers(fields, b"decision_type")
    if decisions.min() < 0 or decisions.max() > _DECISION_MAX:
        raise Malformed("a decision_type is not known")
    categorical = (decisions & _CATEGORICAL) != 0
    sets = _count(fields, b"num_cat", 1 << 31)
    if not sets:
        if categorical.any():
            raise Malformed("it splits by categories, and has none")
        return
    bounds, words = _integers(fields, b"cat_boundaries"), _integers(fields, b"cat_threshold")
    if len(bounds) != sets + 1 or bounds[0] != 0 or np.any(np.diff(bounds) < 0):
        raise Malformed("cat_boundaries do not divide its categories")
    if int(bounds[-1]) != len(words) or words.min(initial=0) < 0 or words.max(initial=0) >= 1 << 32:
        raise Malformed("cat_threshold does not fit cat_boundaries")
    chosen = _numbers(fields[b"threshold"], "threshold")[categorical]
    if len(chosen) and not (chosen.min() >= 0 and chosen.max() < sets):
        raise Malformed("a split's categories are out of range")


# ---- values -----------------------------------------------------------------------------------


def _fields(block: bytes, where: str) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    for line in block.split(b"\n"):
        key, equals, value = line.partition(b"=")
        if equals:
            found[key] = value
        elif line.strip() and line not in (b"tree", b"average_output", b"linear_tree"):
            raise Malformed(f"{where} has a line that is none of LightGBM's: {line[:_SHOWN]!r}")
    return found


def _count(fields: Mapping[bytes, bytes], key: bytes, limit: int) -> int:
    text = fields.get(key, b"").strip()
    if not text.isdigit() or not int(text) < limit:
        raise Malformed(f"{key.decode()} is {text[:_SHOWN]!r}, no number in range")
    return int(text)


def _integers(fields: Mapping[bytes, bytes], key: bytes) -> Array:
    return _numbers(fields.get(key, b""), key.decode(), np.dtype(np.int64))


def _numbers(text: bytes, name: str, dtype: np.dtype[Any] = _FLOAT) -> Array:
    """All of the text's numbers, which blanks divide."""
    if not text.strip():
        return np.empty(0, dtype)
    try:
        found: Array = np.fromstring(text, dtype, sep=" ")
    except (ValueError, DeprecationWarning):
        found = np.empty(0, dtype)
    # It stops, with a warning at most, at the first that it cannot read.
    if len(found) != len(text.split()):
        raise Malformed(f"{name} has something else than numbers")
    return found
