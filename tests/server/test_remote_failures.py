"""Servers of a member that do not fit, that fail, and requests that they cannot serve."""

import contextlib

import httpx
import pytest

from tests.server.fake_vllm import FakeVllm, answer, attach
from tests.server.live import TOKENIZER, WORDS, live, scripted
from tests.server.requests import QUESTION, get, post, until
from thinkstack.engine.service import EngineService
from thinkstack.server.served import Member, MemberConfig, NameConfig, ServedModels, read_config
from thinkstack.server.settings import ServerSettings
from thinkstack.text.chat import chat_format
from thinkstack.text.grammar import GrammarCompiler
from thinkstack.text.tokenizer import train_tokenizer
from thinkstack.types import ConfigError


@pytest.fixture
def pair():
    """Two servers that are alike."""
    with FakeVllm(answer) as one, FakeVllm(answer) as two:
        yield one, two


def serve(folder, member, **settings):
    return live(folder, lambda prompt, index: "", member=member, **settings)


def refusal(response):
    """Status, field and message of an error."""
    error = response.json()["error"]
    return response.status_code, error["param"], error["message"]


def stream(server):
    """Open a stream; it begins when its server has accepted the request."""
    body = {"model": "deepseek-chat", "messages": QUESTION, "stream": True}
    return httpx.stream("POST", f"{server.url}/chat/completions", json=body, headers=server.headers)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("context", 4096, "max_model_len=4096.*not.*max_model_len=8192"),
        ("model", "other", "model='other'.*not.*model='policy'"),
        ("is_raw", False, "reports_raw_logprobs=False"),
        ("weights", "step 7", "'default' and .*'step 7'"),
        ("tokenizer", train_tokenizer([WORDS[::-1]] * 4, 400, control=TOKENIZER.control), "another tokenizer"),
    ],
)
def test_servers_that_differ_are_refused_at_the_start(pair, name, value, message):
    setattr(pair[1], name, value)
    with pytest.raises(ConfigError, match=message):
        attach(*pair)


def test_the_start_needs_one_server_that_is_long_enough(pair):
    with pytest.raises(ConfigError, match="max_model_len=9,000 exceeds the 8,192"):
        attach(pair[0], max_model_len=9000)
    pair[0].is_down = True
    with pytest.raises(ConfigError, match="no vLLM server is available"):
        attach(pair[0])
    assert attach(*pair).service.status.failure is None


def test_servers_are_a_list_in_the_file(tmp_path):
    path = tmp_path / "server.toml"
    path.write_text('[members.m]\nmodel = "m"\nservers = ["http://a:1", "http://b:1"]\n[models.x]\nmember = "m"\n')
    assert read_config(path).members["m"].servers == ("http://a:1", "http://b:1")


def test_options_of_the_servers_are_refused_in_the_member():
    with pytest.raises(ConfigError, match="max_num_seqs and servers are both set"):
        MemberConfig(model="m", servers=("http://a:1",), max_num_seqs=8)
    with pytest.raises(ConfigError, match="twice"):
        MemberConfig(model="m", servers=("http://a:1", "http://a:1"))


def test_without_servers_the_member_is_down_and_others_go_on(tmp_path, pair):
    chat = chat_format("v3_1_think", TOKENIZER)
    engine = EngineService(scripted(chat, lambda prompt, index: "Paris"))
    local = Member(MemberConfig(model="scripted"), engine, chat, GrammarCompiler(chat))
    with serve(tmp_path, member := attach(*pair)) as server:
        names = {"deepseek-chat": NameConfig(thinking=False), "local": NameConfig(member="local", thinking=False)}
        server.server.models = ServedModels({"default": member, "local": local}, names)
        assert get(server, "/health/generate").status_code == get(server, "/ready").status_code == 200
        for fake in pair:
            fake.is_down = True
        until(lambda: get(server, "/ready").status_code == 503)
        assert list(get(server, "/health/generate").json()["members"]) == ["default"]
        assert refusal(post(server))[0] == 503
        assert post(server, model="local").json()["choices"][0]["message"]["content"] == "Paris"
        assert 'thinkstack_engine_up{member="default"} 0.0' in httpx.get(f"{server.url}/metrics").text
        pair[1].is_down = False
        until(lambda: get(server, "/ready").status_code == 200)
        assert post(server).json()["choices"][0]["message"]["content"] == "It is Paris."


def test_one_server_down_is_excluded_until_it_is_back(tmp_path, pair):
    with serve(tmp_path, member := attach(*pair)) as server:
        pair[0].is_down = True
        until(lambda: member.service.status.servers[pair[0].address])
        assert get(server, "/ready").status_code == 200
        assert [post(server).status_code for _ in range(3)] == [200] * 3
        assert len(pair[1].bodies) == 3
        pair[0].is_down, pair[0].context = False, 4096
        until(lambda: "differs" in member.service.status.servers[pair[0].address])
        pair[0].context = 8192
        until(lambda: member.service.status.servers[pair[0].address] == "")


def test_requests_go_to_the_server_with_the_fewest(tmp_path, pair):
    with serve(tmp_path, attach(*pair)) as server, contextlib.ExitStack() as streams:
        for fake in pair:
            fake.holds_after = 1
        for _ in range(4):
            streams.enter_context(stream(server))
        assert [len(fake.bodies) for fake in pair] == [2, 2]
        for fake in pair:
            fake.go.set()


def test_a_request_that_waits_too_long_is_given_up(tmp_path, pair):
    pair[0].holds_after = 0
    with serve(tmp_path, attach(pair[0]), settings=ServerSettings(max_wait=0.1)) as server:
        status, _, message = refusal(post(server))
        assert (status, "waited too long" in message) == (503, True)
        until(lambda: len(pair[0].aborted) == 1)


def test_a_full_queue_is_refused(tmp_path, pair):
    pair[0].holds_after = 0
    with serve(tmp_path, member := attach(pair[0], max_waiting=1)) as server, stream(server):
        assert member.service.status.waiting == 1
        assert "1 requests are waiting" in refusal(post(server))[2]
        pair[0].go.set()


def test_what_servers_cannot_do_is_refused_by_field(tmp_path, pair):
    for fake in pair:
        fake.is_raw = False
    with serve(tmp_path, attach(*pair)) as server:
        assert refusal(post(server, temperature=0.005))[:2] == (400, "temperature")
        assert refusal(post(server, logprobs=True))[:2] == (400, "logprobs")
        status, field, message = refusal(post(server, model="deepseek-reasoner", max_tokens=8190))
        assert (status, field) == (400, "max_tokens") and "8,192" in message and "8,190" in message
        long = [{"role": "user", "content": "the sum " * 9000}]
        status, field, message = refusal(post(server, messages=long))
        assert (status, field) == (400, "messages") and "8,192" in message
        assert [fake.bodies for fake in pair] == [[], []]


def test_what_a_server_refuses_is_an_error_of_the_request(tmp_path, pair):
    pair[0].answer = lambda prompt: "no JSON"
    with serve(tmp_path, attach(pair[0])) as server:
        status, _, message = refusal(post(server, response_format={"type": "json_object"}))
        assert status == 400 and message == "vLLM rejects the request: the grammar does not allow the script"
        assert get(server, "/ready").status_code == 200


@pytest.mark.parametrize("has_priority", [True, False])
def test_the_health_check_goes_first_where_servers_have_priorities(tmp_path, pair, has_priority):
    pair[0].has_priority = has_priority
    with serve(tmp_path, attach(pair[0])) as server:
        assert get(server, "/health/generate").status_code == 200
        assert pair[0].bodies[0].get("priority") == (-1 if has_priority else None)


def test_a_stop_of_the_api_server_ends_what_runs(tmp_path, pair):
    pair[0].holds_after = 2
    with serve(tmp_path, attach(pair[0]), settings=ServerSettings(drain_seconds=0.1)) as server:
        with stream(server) as reply:
            server.loop.call_soon_threadsafe(lambda: server.loop.create_task(server.server.drain()))
            text = "".join(reply.iter_text())
        assert "shutting down" in text
    until(lambda: len(pair[0].aborted) == 1)
