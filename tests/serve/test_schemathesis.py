"""Thousands of generated requests over the OpenAPI document: no server error, no undocumented answer.

Invented names end in 404 and random bytes in 422 before anything deeper is looked at. So most cases are *grounded*:
what was generated stays, except that names, jobs, versions and images are replaced by ones that exist, each with some
probability. Run by hand: ``pytest -m slow tests/serve/test_schemathesis.py`` (extra ``conformance``).
"""

from __future__ import annotations

import collections
import json
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies
from hypothesis.errors import Unsatisfiable
from safetensors.numpy import save as safetensors

from serve.http.api import make_api
from serve.http.limits import Limits
from tests.serve.http_support import SIDE, adapt, make_backend, npy, pixels, png

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")
failures = pytest.importorskip("schemathesis.core.failures")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
CASES = 5000
STATES = ("park", "meadow", "lane")
METHODS = ("bn", "tent", "eata", "none", "distill")
OPTIONS = ("{}", '{"steps": 2}', '{"lr": 0.001}', '{"momentum": 0.1}')
CONFORMANCE = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
# Without input there is little to vary.
BLAND = ("/v2", "/v2/health/live", "/v2/health/ready", "/v1/model", "/v1/states")


class World:
    """What exists behind the API, and how a generated case is led to it."""

    def __init__(self, client, base_version):
        self.client, self.base_version = client, base_version
        self.rng = random.Random(0)
        self.jobs: list[str] = []
        self.restore()

    def restore(self):
        """Every state has two versions again."""
        for name in STATES:
            while True:
                found = self.client.get(f"/v1/states/{name}")
                if found.status_code == 200 and found.json()["version"] >= 2:
                    break
                made = adapt(self.client, name, pixels(8, seed=self.rng.randrange(1000)), method="bn")
                assert made.status_code == 200 and made.json()["kept"], made.text
        job = adapt(self.client, "lane", method="bn", wait=False)
        assert job.status_code == 202
        self.jobs = [*self.jobs[-3:], job.json()["id"]]

    def ground(self, case, thorough):
        """Replace parts of ``case``; in a negative case (not ``thorough``) the names only."""
        often = self.rng.random
        if often() < 0.85:
            name = self.rng.choice(STATES)
            real = {
                "model": "tiny",
                "name": name,
                "job": self.rng.choice(self.jobs),
                "version": self.rng.choice([name, f"{name}.1", f"{name}.2", self.base_version]),
            }
            case.path_parameters = {key: real.get(key, value) for key, value in (case.path_parameters or {}).items()}
        if not thorough:
            return
        query = dict(case.query or {})
        for key, choices in {
            "method": METHODS,
            "options": OPTIONS,
            "state": STATES,
            "version": (1, 2),
            "to": (1, 2),
        }.items():
            if key in query:
                if often() < 0.7:
                    query[key] = self.rng.choice(choices)
            elif key in case.operation.query and often() < 0.1:
                query[key] = self.rng.choice(choices)
        if "step_cap" in query and isinstance(query["step_cap"], int) and query["step_cap"] > 50 and often() < 0.9:
            query["step_cap"] = 1 + query["step_cap"] % 50
        if "method" in query and query["method"] not in METHODS[1:3]:
            query.pop("options", None) if often() < 0.7 else None
        case.query = query
        if often() < 0.75:
            self._real_body(case)

    def _real_body(self, case):
        images = pixels(self.rng.choice((1, 2, 8)), seed=self.rng.randrange(100))
        if case.path.endswith("/infer"):
            tensor = self.rng.choice(
                (
                    {"datatype": "UINT8", "shape": list(images.shape), "data": images.ravel().tolist()},
                    {"datatype": "FP32", "shape": [1, 3, SIDE, SIDE], "data": [0.5] * (3 * SIDE * SIDE)},
                    {"datatype": "FP32", "shape": [1, 3, SIDE, SIDE + 1], "data": [0.5] * (3 * SIDE * SIDE)},
                )
            )
            given = case.body if isinstance(case.body, dict) else {}
            case.body = {**given, "inputs": [{"name": "image", **tensor}]}
            if self.rng.random() < 0.6:  # invented parameters decide most cases otherwise
                case.body.pop("parameters", None)
        elif case.media_type == "multipart/form-data":
            case.body = {"files": [png(image) for image in images]}
        elif case.media_type == "application/x-npy":
            case.body = npy(images)
        elif case.media_type == "application/safetensors":
            case.body = safetensors({"images": np.ascontiguousarray(images)})


@pytest.fixture(scope="module")
def world_and_schema(tmp_path_factory):
    from starlette.testclient import TestClient

    backend = make_backend(tmp_path_factory.mktemp("states"))
    api = make_api(backend, limits=Limits(max_body_bytes=1 << 20))
    with TestClient(api) as client:
        yield World(client, backend.info.version), schemathesis.openapi.from_asgi("/openapi.json", api)


def test_generated_requests_never_break_the_server(world_and_schema):
    world, schema = world_and_schema
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 20
    varied = [operation for operation in operations if operation.path not in BLAND]
    each = -(-CASES // len(varied)) + 20
    seen: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    problems: dict[str, str] = {}

    def check(case, thorough):
        world.ground(case, thorough)
        response = case.call(timeout=120)  # the machine may be busy
        label = f"{case.method} {case.operation.path}"
        status = response.status_code
        seen[label][status] += 1
        if case.method == "DELETE" and status == 204:
            world.restore()
        text = response.content.decode("utf-8", "replace")
        where = f"{label} -> {status} {text[:200]}"
        if status >= 500 and status != 503:
            problems[f"server error: {label}"] = where
        if str(status) not in case.operation.definition.raw["responses"]:
            problems[f"undocumented: {label} {status}"] = where
        if status >= 400:
            told = json.loads(response.content)
            if "Traceback" in text or "error" not in told:
                problems[f"not our error: {label}"] = where
        else:
            try:
                case.validate_response(response, checks=CONFORMANCE)
            except failures.FailureGroup as error:
                problems[f"not as documented: {label} {status}"] = f"{where} {error!s:.400}"

    for operation in operations:
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            thorough = mode is schemathesis.GenerationMode.POSITIVE
            count = (each * 3 // 4 if thorough else each // 4) if operation in varied else 10
            run = settings(
                max_examples=count,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            try:
                strategy = operation.as_strategy(generation_mode=mode)
                run(given(case=strategy, thorough=strategies.just(thorough))(check))()
            except Unsatisfiable:
                pass  # nothing to negate
            except Exception as error:
                if "egative" not in f"{type(error).__name__} {error}":
                    raise
    statuses = sum(seen.values(), collections.Counter())
    total = sum(statuses.values())
    print(f"\n{total} cases: {dict(sorted(statuses.items()))}")
    for label, counts in sorted(seen.items()):
        print(f"  {label:<52} {dict(sorted(counts.items()))}")
    assert not problems, json.dumps(problems, indent=1)
    assert total >= CASES
    good = sum(count for status, count in statuses.items() if status < 300)
    assert good >= total // 4, "Too few cases get past the door."
    assert statuses[404] <= total // 3
