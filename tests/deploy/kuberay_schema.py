"""The fields of KubeRay's objects (1.6, ray.io/v1) as a JSON schema: names, types and choices, without pod templates.

Written by hand from the operator's API reference, since the custom resource definitions themselves are a megabyte each
and come with the operator, not with a package. Pod templates are checked against Kubernetes' own schemas.
"""

_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_FLAG = {"type": "boolean"}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_POD = {
    "type": "object",
    "required": ["spec"],
    "properties": {"metadata": {"type": "object"}, "spec": {"type": "object"}},
}


def _record(required=(), **properties):
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": properties,
    }


def _choice(*values):
    return {"enum": list(values)}


_CREDENTIAL = _record(value=_TEXT, valueFrom={"type": "object"})

_GROUP = {
    "rayStartParams": _TEXTS,
    "template": _POD,
    "resources": {"type": "object"},
    "labels": _TEXTS,
}

CLUSTER = _record(
    ["headGroupSpec"],
    upgradeStrategy=_record(type=_choice("Recreate", "None")),
    authOptions=_record(mode=_choice("disabled", "token"), secretName=_TEXT, enableK8sTokenAuth=_FLAG),
    suspend=_FLAG,
    managedBy=_choice("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
    autoscalerOptions=_record(
        resources={"type": "object"},
        image=_TEXT,
        imagePullPolicy=_choice("Always", "IfNotPresent", "Never"),
        env={"type": "array"},
        envFrom={"type": "array"},
        volumeMounts={"type": "array"},
        securityContext={"type": "object"},
        idleTimeoutSeconds=_COUNT,
        upscalingMode=_choice("Default", "Aggressive", "Conservative"),
        version=_choice("v1", "v2"),
    ),
    headServiceAnnotations=_TEXTS,
    enableInTreeAutoscaling=_FLAG,
    gcsFaultToleranceOptions=_record(
        backend=_choice("redis", "rocksdb"),
        redisAddress=_TEXT,
        redisUsername=_CREDENTIAL,
        redisPassword=_CREDENTIAL,
        externalStorageNamespace=_TEXT,
        storage={"type": "object"},
    ),
    networkPolicy={"type": "object"},
    tlsOptions=_record(enabled=_FLAG),
    rayVersion=_TEXT,
    headGroupSpec=_record(
        ["template"],
        **_GROUP,
        serviceType=_choice("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
        headService={"type": "object"},
        enableIngress=_FLAG,
    ),
    workerGroupSpecs={
        "type": "array",
        "items": _record(
            ["groupName", "template"],
            **_GROUP,
            groupName=_TEXT,
            replicas=_COUNT,
            minReplicas=_COUNT,
            maxReplicas=_COUNT,
            numOfHosts=_COUNT,
            idleTimeoutSeconds=_COUNT,
            suspend=_FLAG,
            scaleStrategy={"type": "object"},
        ),
    },
)

JOB = _record(
    ["rayClusterSpec"],
    entrypoint=_TEXT,
    runtimeEnvYAML=_TEXT,
    jobId=_TEXT,
    submissionMode=_choice("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    entrypointResources=_TEXT,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    metadata=_TEXTS,
    clusterSelector=_TEXTS,
    submitterPodTemplate=_POD,
    submitterConfig=_record(backoffLimit=_COUNT),
    managedBy=_TEXT,
    deletionStrategy={"type": "object"},
    backoffLimit=_COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=_FLAG,
    ttlSecondsAfterFinished=_COUNT,
    suspend=_FLAG,
    rayClusterSpec=CLUSTER,
)

SERVICE = _record(
    ["serveConfigV2", "rayClusterConfig"],
    serveConfigV2=_TEXT,
    rayClusterConfig=CLUSTER,
    upgradeStrategy={"type": "object"},
    serveService={"type": "object"},
    rayClusterDeletionDelaySeconds=_COUNT,
    excludeHeadPodFromServeSvc=_FLAG,
)


def document(kind, spec):
    """The schema of a whole object."""
    return _record(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion=_choice("ray.io/v1"),
        kind=_choice(kind),
        metadata={"type": "object", "required": ["name"]},
        spec=spec,
    )


SCHEMAS = {"RayJob": document("RayJob", JOB), "RayService": document("RayService", SERVICE)}
