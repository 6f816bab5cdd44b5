"""Which runtime a model gets: KServe's rules, row by row."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from mesh.runtime_selection import Chosen, NotChosen, RuntimeOffer, RuntimeWish, choose_runtime
from mesh.serving_runtime import ModelFormat, ServingRuntime

OLD, NEW = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"


def offer(
    name: str,
    *formats: ModelFormat,
    cluster: bool = False,
    at: str = OLD,
    disabled: bool = False,
    multi_model: bool = True,
    protocols: tuple[str, ...] = (),
) -> RuntimeOffer:
    runtime = ServingRuntime(
        name,
        formats or (ModelFormat("onnx", "1", auto_select=True),),
        multi_model=multi_model,
        disabled=disabled,
        protocol_versions=protocols,
    )
    return RuntimeOffer(runtime, cluster, at)


def onnx(version: str = "1", *, auto: bool = True, priority: int | None = None) -> ModelFormat:
    return ModelFormat("onnx", version, auto, priority)


ANY = RuntimeWish("onnx")


@pytest.mark.parametrize(
    ("wish", "offers", "expected"),
    [
        pytest.param(
            ANY,
            [offer("a", cluster=True, at=NEW), offer("b")],
            "b",
            id="the namespace's own before the cluster's",
        ),
        pytest.param(ANY, [offer("a"), offer("b", at=NEW)], "b", id="the later one"),
        pytest.param(ANY, [offer("b"), offer("a")], "a", id="by name at last"),
        pytest.param(
            ANY,
            [offer("a", onnx(priority=1), at=NEW), offer("b", onnx(priority=2))],
            "b",
            id="a higher priority before a later one",
        ),
        pytest.param(
            ANY,
            [offer("a", at=NEW), offer("b", onnx(priority=1))],
            "b",
            id="a priority before none",
        ),
        pytest.param(
            ANY,
            [offer("a", onnx(priority=9), cluster=True), offer("b", onnx(priority=1))],
            "b",
            id="the namespace's own before a higher priority of the cluster's",
        ),
        pytest.param(
            ANY,
            [
                offer("a", ModelFormat("tf", "", True, 9), onnx(priority=1)),
                offer("b", onnx(priority=2)),
            ],
            "b",
            id="the priority is the format's",
        ),
        pytest.param(ANY, [offer("a", onnx(auto=False)), offer("b")], "b", id="autoSelect"),
        pytest.param(ANY, [offer("a", disabled=True), offer("b")], "b", id="not a disabled one"),
        pytest.param(ANY, [offer("a", multi_model=False), offer("b")], "b", id="multiModel"),
        pytest.param(
            RuntimeWish("onnx", "2"), [offer("a"), offer("b", onnx("2"))], "b", id="the version"
        ),
        pytest.param(
            RuntimeWish("onnx", "2.1.3"),
            [offer("a", onnx("2.2")), offer("b", onnx("2.1"))],
            "b",
            id="a minor version covers its patches",
        ),
        pytest.param(
            RuntimeWish("onnx", "2.1"), [offer("b", onnx("2"))], "b", id="a major its minors"
        ),
        pytest.param(
            RuntimeWish("onnx", protocol="grpc-v1"),
            [offer("a", protocols=("v2",)), offer("b", protocols=("v1", "grpc-v1"))],
            "b",
            id="the protocol",
        ),
        pytest.param(
            RuntimeWish("onnx", protocol="v1"),
            [offer("b", protocols=("grpc-v2",))],
            "b",
            id="the router translates",
        ),
        pytest.param(
            RuntimeWish("onnx", runtime="b"),
            [offer("a", at=NEW), offer("b", onnx(auto=False))],
            "b",
            id="a named one needs no autoSelect",
        ),
    ],
)
def test_chosen(wish: RuntimeWish, offers: list[RuntimeOffer], expected: str) -> None:
    for _ in range(4):
        random.Random(expected).shuffle(offers)
        found = choose_runtime(wish, offers)
        assert isinstance(found, Chosen)
        assert (found.name, found.explicit) == (expected, bool(wish.runtime))


def test_a_namespaces_runtime_hides_the_clusters_of_that_name() -> None:
    shared = offer("a", cluster=True)
    assert choose_runtime(ANY, [shared]) == Chosen("a", cluster=True, explicit=False)
    hidden = choose_runtime(ANY, [shared, offer("a", disabled=True)])
    assert isinstance(hidden, NotChosen)
    named = choose_runtime(replace(ANY, runtime="a"), [shared, offer("a")])
    assert named == Chosen("a", cluster=False, explicit=True)


@pytest.mark.parametrize(
    ("wish", "offers", "reason", "said"),
    [
        (ANY, [], "NoSupportingRuntime", "there is no ServingRuntime"),
        (
            RuntimeWish("foo"),
            [offer("a")],
            "NoSupportingRuntime",
            "formats that runtimes list: onnx",
        ),
        (
            RuntimeWish("onnx", "2"),
            [offer("a"), offer("c", ModelFormat("onnx", "", True))],
            "NoSupportingRuntime",
            "a: its versions of the format are 1; c: its versions of the format are (none named)",
        ),
        (RuntimeWish("onnx", "10"), [offer("a")], "NoSupportingRuntime", "format are 1"),
        (ANY, [offer("a", onnx(auto=False))], "NoSupportingRuntime", "no autoSelect"),
        (ANY, [offer("a", disabled=True)], "NoSupportingRuntime", "a: it is disabled"),
        (ANY, [offer("a", multi_model=False)], "NoSupportingRuntime", "not multiModel"),
        (
            RuntimeWish("onnx", protocol="grpc-v1"),
            [offer("a", protocols=("v2", "grpc-v2"))],
            "NoSupportingRuntime",
            "its protocols are v2, grpc-v2",
        ),
        (
            RuntimeWish("onnx", protocol="v2"),
            [offer("a", protocols=("v1",))],
            "NoSupportingRuntime",
            "its protocols are v1",
        ),
        (
            RuntimeWish("onnx", runtime="x"),
            [offer("a"), offer("b", cluster=True)],
            "RuntimeNotRecognized",
            "there is: a, b",
        ),
        (RuntimeWish("onnx", runtime="a"), [offer("a", disabled=True)], "RuntimeDisabled", "'a'"),
        (
            RuntimeWish("foo", runtime="a"),
            [offer("a")],
            "NoSupportingRuntime",
            "'a' cannot serve the format 'foo': its formats are onnx",
        ),
        (
            RuntimeWish("onnx", runtime="a"),
            [offer("a", multi_model=False)],
            "NoSupportingRuntime",
            "not multiModel",
        ),
    ],
)
def test_not_chosen(wish: RuntimeWish, offers: list[RuntimeOffer], reason: str, said: str) -> None:
    found = choose_runtime(wish, offers)
    assert isinstance(found, NotChosen)
    assert found.reason == reason
    assert said in found.message


def test_a_message_is_short_however_many_runtimes_there_are() -> None:
    offers = [offer(f"runtime-{at:04}", ModelFormat(f"format-{at}")) for at in range(1_000)]
    for wish in (RuntimeWish("x"), RuntimeWish("x", runtime="y")):
        found = choose_runtime(wish, offers)
        assert isinstance(found, NotChosen)
        assert len(found.message) < 400
        assert "and 992 more" in found.message
