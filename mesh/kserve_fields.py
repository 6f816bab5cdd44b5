"""The names of the fields of KServe's resources, in groups; facts, no code.

Whatever stands here and is not read by ``mesh.manifest`` is "kept, not acted on"; whatever does
not is unknown.
"""

from __future__ import annotations

from typing import Final


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The old form of a predictor: ``predictor.<framework>``, one of:
FRAMEWORKS: Final = (
    "sklearn",
    "xgboost",
    "tensorflow",
    "pytorch",
    "triton",
    "onnx",
    "huggingface",
    "pmml",
    "lightgbm",
    "paddle",
)
PROTOCOLS: Final = ("v1", "v2", "grpc-v1", "grpc-v2")

# InferenceServiceSpec, besides ``predictor``
SPEC: Final = _names("transformer explainer canary")

# ComponentExtensionSpec: how many, how busy, how rolled out. Not what the model is.
COMPONENT: Final = _names(
    """minReplicas maxReplicas scaleTarget scaleMetric scaleMetricType autoScaling
    containerConcurrency timeout canaryTrafficPercent logger batcher labels annotations
    deploymentStrategy"""
)

# PredictorSpec's own fields, and those of the PodSpec that is inlined in it
PREDICTOR: Final = _names("name storageUris storageContainerName workerSpec") | _names(
    """volumes initContainers containers ephemeralContainers restartPolicy
    terminationGracePeriodSeconds activeDeadlineSeconds dnsPolicy nodeSelector serviceAccountName
    serviceAccount automountServiceAccountToken nodeName hostNetwork hostPID hostIPC
    shareProcessNamespace securityContext imagePullSecrets hostname subdomain affinity
    schedulerName tolerations hostAliases priorityClassName priority dnsConfig readinessGates
    runtimeClassName enableServiceLinks preemptionPolicy overhead topologySpreadConstraints
    setHostnameAsFQDN os hostUsers schedulingGates resourceClaims resources"""
)

# ModelSpec's own fields that no one reads here, and those of the Container inlined in it
MODEL: Final = _names("runtimeVersion confidential") | _names(
    """name image command args workingDir ports envFrom env resources resizePolicy restartPolicy
    volumeMounts volumeDevices livenessProbe readinessProbe startupProbe lifecycle
    terminationMessagePath terminationMessagePolicy imagePullPolicy securityContext stdin stdinOnce
    tty"""
)

# ObjectMeta's fields that say nothing to a mesh: nobody is warned of them
METADATA: Final = _names(
    """generateName uid resourceVersion generation creationTimestamp deletionTimestamp
    deletionGracePeriodSeconds ownerReferences finalizers managedFields selfLink"""
)
