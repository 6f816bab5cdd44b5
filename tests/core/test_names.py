"""Names and concrete ids."""

from __future__ import annotations

import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.errors import InvalidArgument
from mesh.core.names import (
    check_model_id,
    check_namespace,
    check_resource_name,
    concrete_model_id,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_an_id_is_name_source_and_ten_hex_of_the_canonical_spec() -> None:
    spec = {"b": 1, "a": {"d": "ü", "c": [2, 3]}}
    digest = hashlib.sha1('{"a":{"c":[2,3],"d":"ü"},"b":1}'.encode()).hexdigest()[:10]
    assert concrete_model_id("iris", "isvc", spec) == f"iris__isvc-{digest}"
    assert concrete_model_id("iris", "ksp", spec) == f"iris__ksp-{digest}"


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_the_order_of_keys_is_nothing(spec: dict[str, object]) -> None:
    turned = dict(reversed(spec.items()))
    assert concrete_model_id("n", "isvc", spec) == concrete_model_id("n", "isvc", turned)
    assert re.fullmatch(r"n__isvc-[0-9a-f]{10}", concrete_model_id("n", "isvc", spec))


def test_another_spec_is_another_id() -> None:
    ids = {concrete_model_id("n", "isvc", {"x": x}) for x in (1, "1", True, None, [1])}
    assert len(ids) == 5


@pytest.mark.parametrize("name", ["a", "iris", "a-b.c-d", "0", "a" * 253])
def test_good_resource_names(name: str) -> None:
    assert check_resource_name(name, "metadata.name") == name


@pytest.mark.parametrize(
    "name", ["", "A", "a_b", "-a", "a-", "a..b", ".a", "ü", "a/b", "a" * 254, "a\n", 3, None, ["a"]]
)
def test_bad_resource_names_are_told_with_their_path(name: object) -> None:
    with pytest.raises(InvalidArgument, match=r"^metadata\.name: expected "):
        check_resource_name(name, "metadata.name")


@pytest.mark.parametrize("name", ["a.b", "a" * 64, "", 1])
def test_bad_namespaces(name: object) -> None:
    with pytest.raises(InvalidArgument, match=r"^metadata\.namespace: expected "):
        check_namespace(name, "metadata.namespace")


@pytest.mark.parametrize("model_id", ["a", "My Model/v2 (ü)", "x" * 512])
def test_an_id_may_be_anything_printable(model_id: str) -> None:
    assert check_model_id(model_id) == model_id


@pytest.mark.parametrize(
    ("model_id", "said"),
    [
        ("", "found none"),
        ("x" * 513, "found 513"),
        ("a\x00", r"U\+0000 at character 1"),
        ("a\nb", r"U\+000A"),
        ("\x7f", r"U\+007F"),
        ("\x85", r"U\+0085"),
        ("\ud800", r"U\+D800"),
    ],
)
def test_an_id_may_not_be(model_id: str, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        check_model_id(model_id)
