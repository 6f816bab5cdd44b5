"""The storage secret on its way to serving pods: a folder for those outside, a mark for others."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from mesh.reconciler.kube_resources import CONFIG_MAPS, PODS, SECRETS, Obj
from mesh.reconciler.storage import SECRET_HASH
from mesh.reconciler.workload_names import MANAGED_BY, MANAGER
from tests.reconciler.rig import Rig, condition, isvc, runtime, until

pytestmark = [pytest.mark.kube, pytest.mark.etcd]

ENTRY = json.dumps({"type": "s3", "secret_access_key": "hush-hush"})


def secret(rig: Rig, name: str = "storage-config", **entries: str) -> Obj:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": rig.namespace},
        "data": {key: base64.b64encode(text.encode()).decode() for key, text in entries.items()},
    }


def files_of(folder: Path) -> dict[str, str] | None:
    if not folder.is_dir():
        return None
    files = [one for one in folder.iterdir() if not one.name.startswith(".")]
    return {one.name: one.read_text() for one in files}


async def holds(folder: Path, **entries: str) -> None:
    async def look() -> bool:
        return files_of(folder) == entries

    await until(look, what=f"{entries} in the folder")


def pod(rig: Rig, name: str, *, ours: bool = True) -> Obj:
    return {
        "metadata": {
            "name": name,
            "namespace": rig.namespace,
            "labels": {MANAGED_BY: MANAGER} if ours else {},
        },
        "spec": {"containers": [{"name": "mesh", "image": "mesh:test"}]},
    }


async def test_the_folder_follows_the_secret(rig: Rig, tmp_path: Path) -> None:
    folder = tmp_path / "storage"
    await rig.client.create(SECRETS, secret(rig, minio=ENTRY, other="{}"))
    await rig.start(storage_config_dir=folder)
    await holds(folder, minio=ENTRY, other="{}")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "minio").stat().st_mode & 0o777 == 0o600
    await rig.client.replace(SECRETS, secret(rig, minio='{"type": "gcs"}', new="{}"))
    await holds(folder, minio='{"type": "gcs"}', new="{}")
    await rig.client.delete(SECRETS, rig.namespace, "storage-config")
    await holds(folder)


async def test_a_secret_of_another_name_counts_once_the_configuration_says_so(
    rig: Rig, tmp_path: Path
) -> None:
    await rig.client.create(SECRETS, secret(rig, minio=ENTRY))
    await rig.client.create(SECRETS, secret(rig, "other-config", second="{}"))
    await rig.start(storage_config_dir=tmp_path)
    await holds(tmp_path, minio=ENTRY)
    config = {
        "metadata": {"name": "model-serving-config", "namespace": rig.namespace},
        "data": {"config.yaml": "storageSecretName: other-config"},
    }
    await rig.client.create(CONFIG_MAPS, config)
    await holds(tmp_path, second="{}")
    await rig.client.replace(SECRETS, secret(rig, "other-config", second="{}", third="{}"))
    await holds(tmp_path, second="{}", third="{}")
    await rig.client.delete(CONFIG_MAPS, rig.namespace, "model-serving-config")
    await holds(tmp_path, minio=ENTRY)


async def test_serving_pods_are_marked_when_it_changes(rig: Rig) -> None:
    await rig.client.create(SECRETS, secret(rig, minio=ENTRY))
    await rig.client.create(PODS, pod(rig, "serves"))
    await rig.client.create(PODS, pod(rig, "stranger", ours=False))
    await rig.start()
    await rig.idle()
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await rig.apply(isvc("iris", rig.namespace, uri="", storage={"key": "minio", "path": "x"}))
    await rig.mesh.registered("iris")

    async def mark(name: str) -> str:
        found = await rig.client.get(PODS, rig.namespace, name)
        return str((found["metadata"].get("annotations") or {}).get(SECRET_HASH, ""))

    assert await mark("serves") == ""
    await rig.client.replace(SECRETS, secret(rig, minio='{"type": "gcs"}'))
    first = await until(lambda: mark("serves"), what="the mark")
    await rig.client.replace(SECRETS, secret(rig, minio=ENTRY))

    async def moved() -> bool:
        return await mark("serves") != first

    await until(moved, what="another mark")
    assert await mark("stranger") == ""
    assert "hush" not in await mark("serves")


async def test_a_failed_model_is_tried_again_with_the_new_secret_and_no_value_leaks(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    await rig.mesh.instance()
    await rig.client.create(SECRETS, secret(rig, minio="{}"))
    await rig.start()
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await rig.apply(isvc("iris", rig.namespace, uri="", storage={"key": "minio", "path": "x"}))
    alias = await rig.mesh.registered("iris")
    await rig.mesh.fail("iris", "403 Forbidden")
    await rig.status("iris", lambda s: (s.get("modelStatus") or {}).get("lastFailureInfo"))
    await rig.client.replace(SECRETS, secret(rig, minio=ENTRY))

    async def forgotten() -> bool:
        found = await rig.mesh.store.range(f"failures/{alias.target_model_id}")
        return not found.items

    await until(forgotten, what="the failure to be forgotten")
    await rig.mesh.load("iris")
    status = await rig.ready("iris")
    assert condition(status, "PredictorReady")["status"] == "True"
    everything = [item.value for item in (await rig.mesh.store.range("")).items]
    assert not any(b"hush-hush" in value for value in everything)
    assert "hush-hush" not in caplog.text and "hush-hush" not in str(status)
