"""Whatever the schema allows or forbids is sent: nothing may answer 5xx or other than the schema says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from tests.conftest import ServerProcess, serve, wait_until


@pytest.fixture(scope="module")
def small_server() -> Iterator[ServerProcess]:
    """Answers are short here: the context is."""
    with serve("--max-context", "96", "--kv-memory", "64MiB") as running:
        yield running


@pytest.fixture(scope="module")
def api_schema(small_server: ServerProcess) -> Any:
    return schemathesis.openapi.from_url(f"{small_server.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("api_schema")


@schema.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_input_breaks_the_server(case: schemathesis.Case):
    response = case.call(timeout=60)
    case.validate_response(response, checks=(not_a_server_error, response_schema_conformance, status_code_conformance))


def test_nothing_is_left_behind(small_server: ServerProcess):
    wait_until(lambda: small_server.metric("kvarn_kv_blocks", state="active") == 0, "the pool is empty after all of it")
