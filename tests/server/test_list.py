"""What the list of requirements asks for and no other test of the server checks; docs/server_list.md has all of it."""

import re
from pathlib import Path

import httpx
import numpy
import pytest

from tests.server.live import TOKENIZER, live
from tests.server.requests import chunks_of, post
from thinkstack.text.grammar import GrammarCompiler, json_object

PAGE = Path(__file__).parents[2] / "docs" / "server_list.md"
OPEN = {"/health", "/ready", "/health/generate", "/metrics"}
"""Routes that need no key on this machine."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("data"), lambda prompt, index: "I think.</think>It is Paris, France.") as running:
        yield running


def test_every_point_of_the_list_has_a_test():
    rows = re.findall(r"^\| (\d+) \|.*`(tests/\S+)::test_\w+`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(number) for number, _ in rows] == [*range(1, 24), 25]  # 24 is about the page, which is to come


def test_every_route_but_health_needs_a_key(server):
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert set(paths) > OPEN and len(paths) > 20
    for path, operations in paths.items():
        for method in operations:
            status = httpx.request(method, server.url + path.format(request_id="x")).status_code
            assert status == 200 if path in OPEN else status == 401, (method, path, status)


@pytest.fixture
def sampled(server, monkeypatch):
    """The sampling parameters of the requests."""
    service, found = server.server.models.members["default"].service, []
    submit = service.submit

    async def spy(prompt, sampling, **named):
        found.append(sampling)
        return await submit(prompt, sampling, **named)

    monkeypatch.setattr(service, "submit", spy)
    return found


FIELDS = {
    "temperature": 0.5, "top_p": 0.25, "presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": 7, "n": 2,
}  # fmt: skip


def test_sampling_fields_are_honored_or_refused(server, sampled):
    bias = {"logit_bias": {"5": 2.0}, "max_tokens": 9}
    reply = post(server, **FIELDS, **bias, logprobs=True, top_logprobs=3).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    assert len(reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 3
    found = vars(sampled[0])
    for name, value in FIELDS.items():
        assert found[name] == value, name
    assert (found["logit_bias"], found["max_tokens"]) == ({5: 2.0}, 9)
    for field in ("best_of", "min_p", "top_k", "repetition_penalty", "functions", "guided_json"):
        assert post(server, **{field: 3}).json()["error"]["param"] == field


def test_requests_without_a_seed_have_different_ones(server, sampled):
    for _ in range(3):
        post(server)
    assert len({each.seed for each in sampled}) == 3


def test_a_stop_string_is_leaked_by_no_part_of_a_stream(server):
    """It spans tokens, and its beginning comes once without its end."""
    stop = "aris, Fr"
    assert all(len(TOKENIZER.encode(text)) > 1 for text in (stop, "aris"))
    text = post(server, model="deepseek-reasoner", stop=stop, stream=True).text
    parts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks_of(text)]
    assert "".join(parts).strip() == "It is P" and all(part in "It is P" for part in parts)
    assert chunks_of(text)[-1]["choices"][0]["finish_reason"] == "stop"


def test_json_has_bounded_whitespace(server):
    """A model that only wants whitespace has to go on after some of it."""
    compiler = GrammarCompiler(server.server.models.members["default"].chat)
    state, blanks = compiler.compile(json_object()).factory()(), 0
    state.advance(TOKENIZER.encode("{"))
    while blanks < 100:
        mask = numpy.zeros((1, -(-TOKENIZER.vocab_size // 32)), dtype=numpy.int32)
        state.fill_bitmask(mask, 0)
        bits = numpy.unpackbits(mask.view(numpy.uint8), bitorder="little")
        white = [token for token in numpy.flatnonzero(bits) if not TOKENIZER.decode([int(token)]).strip()]
        if not white:
            break
        state.advance([int(white[0])])
        blanks += 1
    assert 0 < blanks <= 40
