"""Thousands of generated requests over the OpenAPI document: no server error, no undocumented answer.

Run by hand: ``pytest -m slow tests/serve/test_schemathesis.py``.
"""

from __future__ import annotations

import collections
import itertools
import json

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from serve.http.api import make_api
from serve.http.limits import Limits
from tests.serve.http_support import adapt, make_backend

schemathesis = pytest.importorskip("schemathesis")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
CASES = 5000
EXISTING = {"model": "tiny", "name": "park", "version": "park"}
# Without input there is little to vary.
BLAND = ("/v2", "/v2/health/live", "/v2/health/ready", "/v1/model", "/v1/states")


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    from starlette.testclient import TestClient

    api = make_api(make_backend(tmp_path_factory.mktemp("states")), limits=Limits(max_body_bytes=1 << 20))
    with TestClient(api) as client:
        assert adapt(client, "park").status_code == 200
        yield schemathesis.openapi.from_asgi("/openapi.json", api)


def test_generated_requests_never_break_the_server(schema):
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 20
    varied = [operation for operation in operations if operation.path not in BLAND]
    each = -(-CASES // len(varied)) + 20
    seen: collections.Counter[str] = collections.Counter()
    problems: dict[str, str] = {}
    number = itertools.count()

    def check(case):
        # Invented names end in 404 before anything else is looked at: two cases in three ask for what exists.
        if next(number) % 3:
            case.path_parameters = {
                key: EXISTING.get(key, value) for key, value in (case.path_parameters or {}).items()
            }
        response = case.call()
        label = f"{case.method} {case.operation.path}"
        seen[label] += 1
        seen[f"status {response.status_code}"] += 1
        documented = {str(status) for status in case.operation.definition.raw["responses"]}
        where = f"{label} -> {response.status_code} {response.text[:200]}"
        if response.status_code >= 500 and response.status_code != 503:
            problems[f"server error: {label}"] = where
        if str(response.status_code) not in documented:
            problems[f"undocumented: {label} {response.status_code}"] = where
        if response.status_code >= 400:
            told = json.loads(response.content)
            if "Traceback" in response.text or "error" not in told:
                problems[f"not our error: {label}"] = where

    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    for operation in operations:
        for mode in modes:
            try:
                strategy = operation.as_strategy(generation_mode=mode)
                run = settings(
                    max_examples=each // 2 if operation in varied else 10,
                    deadline=None,
                    database=None,
                    derandomize=True,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )(given(case=strategy)(check))
                run()
            except Exception as error:  # an operation without anything to negate has no negative cases
                if "egative" not in f"{type(error).__name__} {error}" and "Unsatisfiable" not in type(error).__name__:
                    raise
    total = sum(count for label, count in seen.items() if not label.startswith("status"))
    print(f"{total} cases: {dict(seen)}")
    assert not problems, json.dumps(problems, indent=1)
    assert total >= CASES
