"""The verbs, against the real API server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.reconciler.kube import (
    ApiConflict,
    ApiExists,
    ApiForbidden,
    ApiInvalid,
    ApiNotFound,
    Kube,
    KubeConfigError,
    Limits,
    Obj,
    key_of,
)
from mesh.reconciler.kube_resources import (
    CLUSTER_SERVING_RUNTIMES,
    CONFIG_MAPS,
    DEPLOYMENTS,
    INFERENCE_SERVICES,
    NAMESPACES,
    SERVING_RUNTIMES,
    Resource,
)
from tests.kube_server import KubeServer
from tests.reconciler.access import grant

pytestmark = pytest.mark.kube


@pytest.fixture
async def client(kube: KubeServer) -> AsyncIterator[Kube]:
    async with await Kube.connect(kube.kubeconfig()) as client:
        yield client


def config_map(namespace: str, name: str, **data: str) -> Obj:
    return {"metadata": {"name": name, "namespace": namespace}, "data": data}


def service(namespace: str, name: str) -> Obj:
    model = {"modelFormat": {"name": "sklearn"}, "storageUri": "s3://bucket/iris"}
    return {
        "apiVersion": INFERENCE_SERVICES.api_version,
        "kind": INFERENCE_SERVICES.kind,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"predictor": {"model": model}},
    }


@pytest.mark.parametrize(
    ("resource", "namespace", "name", "subresource", "path"),
    [
        (CONFIG_MAPS, "a", "b", "", "/api/v1/namespaces/a/configmaps/b"),
        (CONFIG_MAPS, None, "", "", "/api/v1/configmaps"),
        (NAMESPACES, None, "a", "", "/api/v1/namespaces/a"),
        (DEPLOYMENTS, "a", "", "", "/apis/apps/v1/namespaces/a/deployments"),
        (
            INFERENCE_SERVICES,
            "a",
            "b",
            "status",
            "/apis/serving.kserve.io/v1beta1/namespaces/a/inferenceservices/b/status",
        ),
        (
            CLUSTER_SERVING_RUNTIMES,
            "not meant",
            "b",
            "",
            "/apis/serving.kserve.io/v1alpha1/clusterservingruntimes/b",
        ),
        (CONFIG_MAPS, "a/../b", "c?d", "", "/api/v1/namespaces/a%2F..%2Fb/configmaps/c%3Fd"),
    ],
)
def test_paths(
    resource: Resource, namespace: str | None, name: str, subresource: str, path: str
) -> None:
    assert resource.path(namespace, name, subresource) == path


async def test_an_object_lives_through_every_verb(client: Kube, namespace: str) -> None:
    made = await client.create(CONFIG_MAPS, config_map(namespace, "a", x="1"))
    with pytest.raises(ApiExists, match=f"create configmaps a in namespace {namespace}"):
        await client.create(CONFIG_MAPS, config_map(namespace, "a"))
    changed = await client.replace(CONFIG_MAPS, made | {"data": {"x": "2"}})
    with pytest.raises(ApiConflict):
        await client.replace(CONFIG_MAPS, made | {"data": {"x": "3"}})
    patched = await client.patch(CONFIG_MAPS, namespace, "a", {"data": {"y": "4"}})
    assert patched["data"] == {"x": "2", "y": "4"}
    stale = {"metadata": {"resourceVersion": changed["metadata"]["resourceVersion"]}}
    with pytest.raises(ApiConflict):
        await client.patch(CONFIG_MAPS, namespace, "a", stale | {"data": {"z": "5"}})
    assert await client.get(CONFIG_MAPS, namespace, "a") == patched
    with pytest.raises(ApiConflict):
        await client.delete(CONFIG_MAPS, namespace, "a", uid="another")
    assert await client.delete(CONFIG_MAPS, namespace, "a", uid=made["metadata"]["uid"])
    assert not await client.delete(CONFIG_MAPS, namespace, "a")
    with pytest.raises(ApiNotFound):
        await client.get(CONFIG_MAPS, namespace, "a")


async def test_an_apply_takes_back_what_it_no_longer_says_and_writes_no_change_twice(
    client: Kube, namespace: str
) -> None:
    first = await client.apply(CONFIG_MAPS, config_map(namespace, "a", x="1", y="2"))
    await client.patch(CONFIG_MAPS, namespace, "a", {"data": {"theirs": "3"}})
    second = await client.apply(CONFIG_MAPS, config_map(namespace, "a", x="4"))
    assert second["data"] == {"x": "4", "theirs": "3"}
    assert second["metadata"]["uid"] == first["metadata"]["uid"]
    third = await client.apply(CONFIG_MAPS, config_map(namespace, "a", x="4"))
    assert third["metadata"]["resourceVersion"] == second["metadata"]["resourceVersion"]
    tried = await client.apply(CONFIG_MAPS, config_map(namespace, "b", x="1"), dry_run=True)
    assert tried["data"] == {"x": "1"}
    with pytest.raises(ApiNotFound):
        await client.get(CONFIG_MAPS, namespace, "b")


async def test_a_status_is_written_by_its_subresource_and_nothing_else_with_it(
    client: Kube, namespace: str
) -> None:
    made = await client.create(INFERENCE_SERVICES, service(namespace, "a"))
    edited = made | {"spec": {}, "status": {"url": "grpc://a"}}
    written = await client.replace_status(INFERENCE_SERVICES, edited)
    assert (written["spec"], written["status"]) == (made["spec"], {"url": "grpc://a"})
    with pytest.raises(ApiConflict):
        await client.replace_status(INFERENCE_SERVICES, edited)
    patched = await client.patch_status(
        INFERENCE_SERVICES, namespace, "a", {"status": {"url": "grpc://b"}}
    )
    assert patched["status"] == {"url": "grpc://b"}
    assert patched["metadata"]["generation"] == made["metadata"]["generation"]


async def test_what_is_wrong_with_an_object_is_named_by_its_field(
    client: Kube, namespace: str
) -> None:
    wrong = config_map(namespace, "a") | {"spec": {"selector": {"matchLabels": {"a": "b"}}}}
    with pytest.raises(ApiInvalid) as refused:
        await client.create(DEPLOYMENTS, wrong)
    assert refused.value.status == 422
    fields = {cause.field for cause in refused.value.causes}
    assert {"spec.template.metadata.labels", "spec.template.spec.containers"} <= fields
    with pytest.raises(ApiInvalid) as refused:
        await client.create(
            INFERENCE_SERVICES, service(namespace, "a") | {"spec": {"predictor": 5}}
        )
    assert "spec.predictor" in {cause.field for cause in refused.value.causes}


async def test_a_list_comes_in_pages_and_whole(kube: KubeServer, namespace: str) -> None:
    limits = Limits(page_size=3)
    async with await Kube.connect(kube.kubeconfig(), limits=limits) as client:
        for number in range(7):
            await client.create(CONFIG_MAPS, config_map(namespace, f"a{number}", x=str(number)))
        listing = await client.list(CONFIG_MAPS, namespace)
        assert [key_of(item)[1] for item in listing.items] == [f"a{n}" for n in range(7)]
        assert {(item["apiVersion"], item["kind"]) for item in listing.items} == {
            ("v1", "ConfigMap")
        }
        assert client.calls_total["list", "configmaps", 200] == 3
        reduced = await client.list(CONFIG_MAPS, namespace, keep=lambda obj: obj["data"])
        assert reduced.items == [{"x": str(n)} for n in range(7)]
        one = await client.list(CONFIG_MAPS, namespace, field_selector="metadata.name=a3")
        assert [item["data"] for item in one.items] == [{"x": "3"}]
        assert one.resource_version == await client.newest_version(CONFIG_MAPS, namespace)


async def test_a_watch_tells_what_comes_after_its_version_until_its_time_is_over(
    kube: KubeServer, namespace: str
) -> None:
    limits = Limits(watch_timeout_s=1)
    async with await Kube.connect(kube.kubeconfig(), limits=limits) as client:
        made = await client.create(CONFIG_MAPS, config_map(namespace, "a", x="ä" * 100_000))
        await client.patch(CONFIG_MAPS, namespace, "a", {"data": {"y": "2"}})
        await client.delete(CONFIG_MAPS, namespace, "a")
        version = made["metadata"]["resourceVersion"]
        events = client.watch(CONFIG_MAPS, namespace, resource_version=version)
        seen = [event async for event in events if event.type != "BOOKMARK"]
    assert [(event.type, event.object["data"]["y"]) for event in seen] == [
        ("MODIFIED", "2"),
        ("DELETED", "2"),
    ]


async def test_a_missing_right_is_named_and_the_rest_goes_on(
    kube: KubeServer, namespace: str
) -> None:
    grant(kube, namespace, "controller", INFERENCE_SERVICES, "get", "list", "create")
    async with await Kube.connect(kube.kubeconfig("controller")) as client:
        await client.create(INFERENCE_SERVICES, service(namespace, "a"))
        with pytest.raises(ApiForbidden) as refused:
            await client.patch_status(INFERENCE_SERVICES, namespace, "a", {"status": {}})
        said = f"cannot patch inferenceservices.serving.kserve.io/status a in namespace {namespace}"
        assert str(refused.value).startswith(said)
        with pytest.raises(
            ApiForbidden, match=r"cannot list inferenceservices[a-z.]+ in all namespaces"
        ):
            await client.list(INFERENCE_SERVICES)
        events = client.watch(INFERENCE_SERVICES, namespace, resource_version="0")
        with pytest.raises(ApiForbidden, match=f"watch .* in namespace {namespace}"):
            async with aclosing(events):
                await anext(events)
        assert len((await client.list(INFERENCE_SERVICES, namespace)).items) == 1


async def test_a_resource_without_its_crd_is_not_found(client: Kube, namespace: str) -> None:
    missing = replace(SERVING_RUNTIMES, plural="servingwalks")
    with pytest.raises(ApiNotFound):
        await client.list(missing, namespace)


async def test_writes_are_counted_and_urgent_ones_pass_a_full_gate(
    kube: KubeServer, namespace: str
) -> None:
    async with await Kube.connect(kube.kubeconfig(), limits=Limits(writes_in_flight=2)) as client:
        writes = [
            client.create(CONFIG_MAPS, config_map(namespace, f"a{number}")) for number in range(20)
        ]
        made = await asyncio.gather(*writes)
        assert client.writes_total == 20
        await client.get(CONFIG_MAPS, namespace, "a1")
        assert client.writes_total == 20
        await client.replace(CONFIG_MAPS, made[0] | {"data": {"x": "1"}}, urgent=True)
        assert client.writes_total == 21


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("", "does not read as one"),
        ("just words", "does not read as one"),
        ("{a: [", "does not read as one"),
        ("{apiVersion: v1, current-context: a, contexts: [], clusters: [], users: []}", "name a"),
    ],
)
async def test_a_kubeconfig_that_is_none_is_named(
    tmp_path: Path, content: str | None, said: str
) -> None:
    path = tmp_path / "kubeconfig"
    if content is not None:
        path.write_text(content)
    with pytest.raises(KubeConfigError, match=str(path)) as refused:
        await Kube.connect(path)
    assert said in str(refused.value)


async def test_outside_a_pod_a_kubeconfig_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(KubeConfigError, match="as a pod"):
        await Kube.connect(None)
