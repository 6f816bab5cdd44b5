"""The `mesh` command against a real mesh: what it prints, in which form, with which exit code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.e2e.asking import FLOWERS, LABELS, isvc
from tests.e2e.conftest import Shared
from tests.etcd_server import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]

OLD_FORM = """\
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: old-form
spec:
  predictor:
    minReplicas: 1
    sklearn:
      storageUri: {uri}
      protocolVersion: v2
"""


def test_apply_waits_and_tells_then_get_describe_infer_delete(
    shared: Shared, tmp_path: Path
) -> None:
    mesh = shared.mesh.mesh
    manifest = tmp_path / "isvc.yaml"
    uri = (shared.models / "iris-0001").as_uri()
    manifest.write_text(yaml.safe_dump(isvc("by-command", uri)))
    done = mesh("apply", "-f", str(manifest), "--wait")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "inferenceservice.serving.kserve.io/by-command created\n"
    done = mesh("apply", "-f", str(manifest))
    assert done.stdout == "inferenceservice.serving.kserve.io/by-command unchanged\n"
    row = json.loads(mesh("get", "models", "by-command", "-o", "json").stdout)
    assert (row["name"], row["model_type"]) == ("by-command", "onnx")
    np.save(tmp_path / "flowers.npy", FLOWERS)
    done = mesh("infer", "by-command", "--npy", f"input={tmp_path / 'flowers.npy'}")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["model_name"] == "by-command"
    assert {o["name"]: o["data"] for o in answer["outputs"]}["label"] == LABELS
    described = mesh("describe", "model", "by-command")
    assert described.returncode == 0 and "LOADED" in described.stdout and uri in described.stdout
    done = mesh("delete", "model", "by-command")
    assert done.stdout == "inferenceservice.serving.kserve.io/by-command deleted\n"
    assert mesh("delete", "model", "by-command").returncode == 1
    assert mesh("describe", "model", "by-command").returncode == 1


def test_the_old_form_of_a_predictor(shared: Shared) -> None:
    text = OLD_FORM.format(uri=(shared.models / "iris-skops").as_uri())
    done = shared.mesh.mesh("apply", "-f", "-", stdin=text)
    assert done.returncode == 0, done.stderr
    done = shared.mesh.mesh("get", "models", "old-form", "-o", "yaml")
    row = yaml.safe_load(done.stdout)
    assert (row["model_type"], row["min_copies"]) == ("sklearn", 0)
    assert shared.mesh.mesh("delete", "model", "old-form").returncode == 0


def test_a_wrong_field_is_an_error_with_its_path_and_an_unknown_one_a_warning(
    shared: Shared,
) -> None:
    manifest = isvc("odd", (shared.models / "iris-0001").as_uri())
    manifest["spec"]["predictor"]["minReplicas"] = "many"
    done = shared.mesh.mesh("apply", "-f", "-", stdin=json.dumps(manifest))
    assert done.returncode == 1 and "spec.predictor.minReplicas" in done.stderr, done.stderr
    manifest["spec"]["predictor"]["minReplicas"] = 1
    manifest["spec"]["predictor"]["colour"] = "green"
    done = shared.mesh.mesh("apply", "-f", "-", "--no-load", stdin=json.dumps(manifest))
    assert done.returncode == 0 and "spec.predictor.colour" in done.stderr, done.stderr
    assert shared.mesh.mesh("delete", "model", "odd").returncode == 0


@pytest.mark.parametrize("kind", ["models", "instances"])
def test_lists_in_every_form(shared: Shared, kind: str) -> None:
    def listed(form: str) -> str:
        done = shared.mesh.mesh("get", kind, "-o", form)
        assert done.returncode == 0, done.stderr
        return done.stdout

    names = [line.split("/")[1] for line in listed("name").splitlines()]
    assert len(names) >= 2
    key = "name" if kind == "models" else "instance_id"
    assert sorted(row[key] for row in json.loads(listed("json"))) == sorted(names)
    assert sorted(row[key] for row in yaml.safe_load(listed("yaml"))) == sorted(names)
    wide = listed("wide")
    assert all(name in wide for name in names) and wide.startswith("NAME")


def test_explain_says_where_and_why(shared: Shared) -> None:
    done = shared.mesh.mesh("explain", "iris-0001", "-o", "json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["action"] in ("hit", "load") and told["reason"] and told["candidates"]
    unknown = shared.mesh.mesh("explain", "no-such-model")
    assert unknown.returncode == 1 and "no-such-model" in unknown.stderr


def test_exit_codes_tell_what_went_wrong(shared: Shared) -> None:
    mesh = shared.mesh.mesh
    assert mesh("get", "everything").returncode == 2
    assert mesh("apply", "-f", "/no/such/file").returncode == 2
    assert mesh("infer", "iris-0001").returncode == 2
    refused = mesh("infer", "no-such-model", "--npy", "input=/no/such.npy")
    assert refused.returncode == 2
    body = json.dumps(
        {"inputs": [{"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
    )
    refused = mesh("infer", "no-such-model", "--json", "-", stdin=body)
    assert refused.returncode == 1 and "no-such-model" in refused.stderr
    nobody = mesh("--address", f"127.0.0.1:{free_port()}", "get", "models")
    assert nobody.returncode == 3 and len(nobody.stderr.splitlines()) == 1
