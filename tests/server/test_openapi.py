"""Random requests of the served OpenAPI, right and wrong ones, by schemathesis: each reply is one that it declares."""

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode, checks

from tests.server.live import live

CHECKS = [
    checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_schema_conformance,
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    def answer(prompt: str, index: int) -> str:
        return "I think.</think>Paris."

    with live(tmp_path_factory.mktemp("data"), answer) as running:
        yield running


def operations(server):
    """The operations of the API, without those that are the same at another base."""
    api = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    found = [result.ok() for result in api.get_all_operations()]
    return [operation for operation in found if not operation.path.startswith(("/v1", "/beta"))]


def check(server, operation, mode, num_requests, **settings):
    """Send random requests. Returns the statuses of the replies."""
    statuses = set()

    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    @hypothesis.settings(
        max_examples=num_requests, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck),
        **settings,
    )  # fmt: skip
    def send(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "deepseek-chat"
        response = case.call(headers=server.headers)
        case.validate_response(response, checks=CHECKS)
        statuses.add(response.status_code)

    send()
    return statuses


def test_replies_to_random_requests_are_those_of_the_openapi(server):
    served = set()
    for operation in operations(server):
        if 200 in check(server, operation, GenerationMode.POSITIVE, 4, derandomize=True):
            served.add(operation.path)
        if operation.body:
            assert check(server, operation, GenerationMode.NEGATIVE, 3, derandomize=True) <= {400, 403, 422}
    assert {"/models", "/user/balance", "/health"} <= served


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_replies_to_many_random_requests_are_those_of_the_openapi(server, mode):
    for operation in operations(server):
        if operation.body:
            check(server, operation, mode, 300)


def test_the_openapi_declares_streams_and_errors_in_the_shape_of_each_dialect(server):
    found = {operation.path: operation.definition.raw["responses"] for operation in operations(server)}
    for path, media_type, shape in (
        ("/chat/completions", "text/event-stream", "OpenAIError"),
        ("/completions", "text/event-stream", "OpenAIError"),
        ("/responses", "text/event-stream", "OpenAIError"),
        ("/anthropic/v1/messages", "text/event-stream", "AnthropicError"),
        ("/api/chat", "application/x-ndjson", "OllamaError"),
    ):
        assert set(found[path]["200"]["content"]) == {"application/json", media_type}
        assert {"400", "401", "402", "403", "413", "422", "429", "500", "503"} < set(found[path])
        for status, declared in found[path].items():
            assert status == "200" or declared["content"]["application/json"]["schema"]["$ref"].endswith(f"/{shape}")
