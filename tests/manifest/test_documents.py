"""Texts with resources in them: YAML, JSON, several, lists, and what is not one."""

from __future__ import annotations

import json

import pytest

from mesh.core.errors import InvalidArgument
from mesh.manifest import load_documents, parse_manifests
from tests.manifest.resources import isvc


def test_several_documents_and_empty_ones() -> None:
    text = "---\n" + "\n---\n".join(json.dumps(isvc(name=n)) for n in "abc") + "\n---\n---\n"
    assert [m.name for m in parse_manifests(text)] == ["a", "b", "c"]


@pytest.mark.parametrize("kind", ["List", "InferenceServiceList"])
def test_lists_are_taken_apart(kind: str) -> None:
    inner = {"apiVersion": "v1", "kind": "List", "items": [isvc(name="b")]}
    text = json.dumps({"apiVersion": "v1", "kind": kind, "items": [isvc(name="a"), inner]})
    assert [m.name for m in parse_manifests(text)] == ["a", "b"]


def test_json_with_tabs_is_json() -> None:
    assert [d["kind"] for d in load_documents(json.dumps(isvc(), indent="\t"))] == [
        "InferenceService"
    ]


def test_no_text_is_no_resource() -> None:
    assert parse_manifests("") == ()
    assert parse_manifests("# nothing\n---\n") == ()


def test_a_date_stays_a_text() -> None:
    (document,) = load_documents("kind: X\nversion: 2024-01-01\n")
    assert document["version"] == "2024-01-01"


def test_yaml_anchors_and_merges_work() -> None:
    (document,) = load_documents("base: &b {a: 1, b: 2}\nkind: X\nspec: {<<: *b, b: 3}\n")
    assert document["spec"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("a: [", "neither YAML nor JSON", id="broken"),
        pytest.param("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' stands here twice", id="twice"),
        pytest.param("just text", "expected a resource", id="a text"),
        pytest.param("- a\n- b\n", "found a list of 2", id="a bare list"),
        pytest.param("1: x\n", "a key: expected a string", id="a number as key"),
        pytest.param("a: .nan\n", "expected a finite number", id="not a number"),
        pytest.param("a: !!binary aGk=\n", "what JSON can say", id="bytes"),
        pytest.param("a: !!python/object:os.system x\n", "neither YAML", id="python"),
        pytest.param("kind: List\nitems: {}\n", "items: expected a list", id="items"),
        pytest.param("kind: List\nitems: [1]\n", "items[0]: expected a resource", id="an item"),
        pytest.param("a: &x [*x]\n", "recursive", id="a loop"),
        pytest.param("a: " + "[" * 3000 + "]" * 3000, "", id="deep"),
        pytest.param("a: \x00", "neither YAML", id="a control character"),
    ],
)
def test_what_is_no_resource(text: str, said: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load_documents(text, "models.yaml")
    assert caught.value.message.startswith("models.yaml")
    assert said in caught.value.message


def test_the_document_of_several_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"^x\.yaml, document 2: expected a resource"):
        load_documents("kind: X\n---\n3\n", "x.yaml")


def test_aliases_that_multiply_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for n in range(1, 9):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]")
    with pytest.raises(InvalidArgument, match="at most 100000 values"):
        load_documents("\n".join(lines))
