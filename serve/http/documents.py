"""What OpenAPI says about bodies that FastAPI does not parse for us, and about the answers that every route shares."""

from __future__ import annotations

from typing import Any

from serve.http.schemas import ErrorAnswer

_NAME = "[A-Za-z0-9][A-Za-z0-9_-]{0,63}"  # as serve.records checks it
Document = dict[str, Any]
Responses = dict[int | str, Document]

_WORDS = {
    400: "The request is malformed: JSON, multipart, compression, headers.",
    401: "The bearer token is missing or not known.",
    404: "There is no such model, state, version, job or route.",
    405: "The route does not know this method.",
    408: "The body arrived too slowly.",
    409: "In conflict with something that happens or exists: key reused, state in use, state of another base model.",
    413: "Too many bytes, images or pixels.",
    415: "This content type is not read here.",
    422: "Understood, but wrong: shape, dtype, NaN, not an image, unknown method or option.",
    429: "Too much at this moment; Retry-After tells when to come back.",
    503: "Overloaded, starting or stopping; Retry-After tells when to come back.",
}
_OIP_ERROR: Document = {
    "type": "object",
    "required": ["error", "code"],
    "properties": {key: {"type": "string"} for key in ("error", "code", "message", "fix")},
}


def _json(schema: Document, description: str = "Success.") -> Document:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def responses(success: Document | None = None) -> Responses:
    """Answers of a route of the protocol: 200 as given, and every refusal."""
    errors: Responses = {status: _json(_OIP_ERROR, words) for status, words in _WORDS.items()}
    return errors if success is None else {200: success, **errors}


def refusals() -> Responses:
    """Refusals of a route under /v1."""
    return {status: {"model": ErrorAnswer, "description": words} for status, words in _WORDS.items()}


_STRING: Document = {"type": "string"}
_TENSORS: Document = {"type": "array", "items": {"type": "object"}}
_METADATA: Document = {
    "type": "object",
    "required": ["name", "versions", "platform", "inputs", "outputs"],
    "properties": {"name": _STRING, "versions": {"type": "array", "items": _STRING}, "platform": _STRING},
}
_SERVER: Document = {
    "type": "object",
    "required": ["name", "version", "extensions"],
    "properties": {"name": _STRING, "version": _STRING, "extensions": {"type": "array", "items": _STRING}},
}
_ANSWER: Document = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {"model_name": _STRING, "model_version": _STRING, "id": _STRING, "outputs": _TENSORS},
}

SERVER = responses(_json(_SERVER))
READY = responses(_json({"type": "object"}, "Yes."))
MODEL = responses(_json(_METADATA))
VERSION: Document = {
    "description": "Outputs; binary after the JSON document where that was asked for.",
    "content": {
        "application/json": {"schema": _ANSWER},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}

_PARAMETERS: Document = {"type": "object"}
_INPUT: Document = {
    "type": "object",
    "required": ["name", "datatype", "shape", "data"],
    "properties": {
        "name": {"type": "string", "enum": ["image"]},
        "datatype": {"type": "string", "enum": ["FP16", "FP32", "FP64", "UINT8", "BYTES"]},
        "shape": {"type": "array", "minItems": 1, "maxItems": 8, "items": {"type": "integer", "minimum": 0}},
        "data": {"type": "array"},
        "parameters": _PARAMETERS,
    },
}
_OUTPUT: Document = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"enum": ["logits", "probabilities", "label"]}, "parameters": _PARAMETERS},
}
INFER_BODY: Document = {
    "requestBody": {
        "required": True,
        "description": "JSON, or JSON followed by raw tensors (header Inference-Header-Content-Length).",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["inputs"],
                    "properties": {
                        "id": _STRING,
                        "parameters": _PARAMETERS,
                        "inputs": {"type": "array", "minItems": 1, "maxItems": 1, "items": _INPUT},
                        "outputs": {"type": "array", "maxItems": 3, "items": _OUTPUT},
                    },
                }
            }
        },
    }
}

_BINARY: Document = {"type": "string", "format": "binary"}
_FILES: Document = {"type": "array", "minItems": 1, "items": _BINARY}
_FORM: Document = {"schema": {"type": "object", "required": ["files"], "properties": {"files": _FILES}}}
_ARRAYS: Document = {"application/x-npy": {"schema": _BINARY}, "application/safetensors": {"schema": _BINARY}}
_URI: Document = {
    "type": "object",
    "required": ["uri"],
    "additionalProperties": False,
    "properties": {"uri": {"type": "string", "description": "A data set that the server knows: dataset:NAME."}},
}


def images_body(uri: bool) -> Document:
    """Images as files, array or safetensors, and with ``uri`` also as the name of a data set."""
    content: Document = {"multipart/form-data": _FORM, **_ARRAYS}
    if uri:
        content["application/json"] = {"schema": _URI}
    return {"requestBody": {"required": True, "content": content}}


ROLLBACK_BODY: Document = {
    "requestBody": {
        "required": False,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"to": {"type": "integer", "minimum": 1, "description": "Version to go back to."}},
                }
            }
        },
    }
}
STATE_PATTERN = f"^{_NAME}$"
REFERENCE_PATTERN = rf"^{_NAME}(\.[1-9][0-9]{{0,8}})?$"
EXPORT: Responses = {
    200: {
        "description": "The delta as a safetensors file.",
        "content": {"application/safetensors": {"schema": _BINARY}},
    },
    **refusals(),
}
