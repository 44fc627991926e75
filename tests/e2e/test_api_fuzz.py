"""Whatever the schema allows or forbids is sent: nothing may answer 5xx or other than the schema says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from tests.conftest import ServerProcess, serve, wait_until

CHECKS = (not_a_server_error, response_schema_conformance, status_code_conformance)


@pytest.fixture(scope="module")
def small_server() -> Iterator[ServerProcess]:
    """Answers are short here: the context is."""
    with serve("--max-context", "96", "--kv-memory", "64MiB") as running:
        yield running


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["allowed", "forbidden"])
def test_no_input_breaks_the_server(small_server: ServerProcess, mode: GenerationMode):
    schema = schemathesis.openapi.from_url(f"{small_server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/chat/completions", "/v1/completions", "/v1/responses"}
    for operation in operations if mode is GenerationMode.POSITIVE else [o for o in operations if o.body]:

        @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case: schemathesis.Case) -> None:
            case.validate_response(case.call(timeout=60), checks=CHECKS)

        send()


def test_nothing_is_left_behind(small_server: ServerProcess):
    wait_until(lambda: small_server.metric("kvarn_kv_blocks", state="active") == 0, "the pool is empty after all of it")
