"""KServe's own client of the cluster. Run in a virtual environment of its own.

Usage: kserve_cluster_script.py KUBECONFIG NAMESPACE PATH. Creates ``from-kserve``, whose model lies
at PATH of the storage entry ``minio``, and waits for it twice: by asking and by watching. Prints
"passed" and exits 0, or a traceback.
"""

from __future__ import annotations

import sys

from kserve import (
    KServeClient,
    V1beta1InferenceService,
    V1beta1InferenceServiceSpec,
    V1beta1ModelFormat,
    V1beta1ModelSpec,
    V1beta1PredictorSpec,
    V1beta1StorageSpec,
)
from kubernetes.client import V1ObjectMeta

NAME = "from-kserve"


def main() -> None:
    kubeconfig, namespace, path = sys.argv[1:4]
    model = V1beta1ModelSpec(
        # Unless told, it says "", which Debian's Go has this old API server take for a null.
        name="kserve-container",
        model_format=V1beta1ModelFormat(name="onnx"),
        storage=V1beta1StorageSpec(key="minio", path=path),
    )
    service = V1beta1InferenceService(
        api_version="serving.kserve.io/v1beta1",
        kind="InferenceService",
        metadata=V1ObjectMeta(
            name=NAME,
            namespace=namespace,
            annotations={"serving.kserve.io/deploymentMode": "ModelMesh"},
        ),
        spec=V1beta1InferenceServiceSpec(predictor=V1beta1PredictorSpec(model=model)),
    )
    client = KServeClient(config_file=kubeconfig)
    made = client.create(service)
    generation = made["metadata"]["generation"]
    client.wait_isvc_ready(
        NAME,
        namespace=namespace,
        timeout_seconds=60,
        polling_interval=0.2,
        expected_generation=generation,
    )
    client.wait_isvc_ready(
        NAME, namespace=namespace, watch=True, timeout_seconds=60, expected_generation=generation
    )
    assert client.is_isvc_ready(NAME, namespace=namespace)
    status = client.get(NAME, namespace=namespace)["status"]
    assert status["observedGeneration"] == generation, status
    print("passed")


if __name__ == "__main__":
    main()
