"""POST /completions with echo and logprobs, as evaluation tools send it: a real model, over a real socket."""

import math

import httpx
import openai
import pytest
import torch

from tests import HANG_SECONDS
from tests.server.fake_vllm import FakeVllm, answer, attach
from tests.server.live import TOKENIZER, live
from tests.server.requests import until
from tests.tiny import GQA_TINY, tiny_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.engine.service import EngineService
from thinkstack.evals.loglikelihood import loglikelihoods
from thinkstack.server.completions import MAX_PROMPTS
from thinkstack.server.served import Member, MemberConfig
from thinkstack.text.chat import chat_format
from thinkstack.text.grammar import GrammarCompiler
from thinkstack.text.tokenizer import BOS
from thinkstack.types import SamplingParams

MODEL = tiny_model(GQA_TINY, vocab_size=TOKENIZER.vocab_size, max_positions=512)
TEXT = "the sum 你好 🙂 of naïve\n\nParis"
BEGIN = TOKENIZER.control_id(BOS)
ECHO = {"model": "deepseek-chat", "echo": True, "logprobs": 2, "temperature": 0, "max_tokens": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    chat = chat_format("v3_1_think", TOKENIZER)
    size = EngineConfig(max_num_seqs=8, max_prefill_tokens=24, max_waiting=MAX_PROMPTS)
    member = Member(MemberConfig(model="tiny"), EngineService(Engine(MODEL, size)), chat, GrammarCompiler(chat))
    with live(tmp_path_factory.mktemp("data"), lambda prompt, index: "", member=member) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0)


def expected(ids):
    """Log-probabilities (N - 1, V) after each token but the last."""
    with torch.no_grad():
        return MODEL(torch.tensor([ids]))[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("given", [TEXT, [BEGIN, *TOKENIZER.encode(TEXT)]])
def test_prompt_tokens_have_the_log_probabilities_of_a_plain_pass(client, given):
    ids = [BEGIN, *TOKENIZER.encode(TEXT)]
    choice = client.completions.create(prompt=given, **ECHO).choices[0]
    found, values = choice.logprobs, expected(ids)
    assert len(found.tokens) == len(ids) + 1
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    own = values.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert found.token_logprobs[1 : len(ids)] == pytest.approx(own, abs=1e-5)
    for top, row in zip(found.top_logprobs[1 : len(ids)], values, strict=True):
        best = row.topk(2)
        names = [TOKENIZER.decode([token]) for token in best.indices.tolist()]
        assert top == pytest.approx(dict(reversed(list(zip(names, best.values.tolist(), strict=True)))), abs=1e-5)
    (likelihood,) = loglikelihoods(MODEL, [(ids[:3], ids[3:])])
    assert sum(found.token_logprobs[3 : len(ids)]) == pytest.approx(likelihood.logprob, abs=1e-4)


@pytest.mark.parametrize("given", [TEXT, [BEGIN, *TOKENIZER.encode(TEXT)], TOKENIZER.encode(TEXT)])
def test_offsets_say_where_tokens_begin_in_a_text_of_many_bytes(client, given):
    choice = client.completions.create(prompt=given, **ECHO).choices[0]
    found, text = choice.logprobs, choice.text
    assert text.removeprefix(BOS).startswith(TEXT) and text.startswith(BOS) == (given[0] == BEGIN)
    assert found.text_offset == sorted(found.text_offset) and found.text_offset[0] == 0
    ends = found.text_offset[1:]
    for token, offset, end in zip(found.tokens[:-1], found.text_offset[:-1], ends, strict=True):
        if "\ufffd" not in token and (token != BOS or given[0] == BEGIN):
            assert text[offset:end] == token
    half = [place for place, token in enumerate(found.tokens) if "\ufffd" in token]
    assert half and any(found.text_offset[place] == found.text_offset[place + 1] for place in half)


def test_a_batch_has_the_choices_of_each_prompt_and_the_sum_of_their_usage(client, server):
    prompts = [[BEGIN, *TOKENIZER.encode(TEXT)[:size]] for size in (3, 9, 5)]
    rows = server.server.accounts.usage("user")
    requests = rows[0].requests if rows else 0
    together = client.completions.create(prompt=prompts, n=2, **ECHO | {"temperature": 1, "seed": 5})
    alone = [client.completions.create(prompt=one, n=2, **ECHO | {"temperature": 1, "seed": 5}) for one in prompts]
    assert [choice.index for choice in together.choices] == list(range(6))
    choices = [choice.model_dump(exclude={"index"}) for choice in together.choices]
    assert choices == [choice.model_dump(exclude={"index"}) for one in alone for choice in one.choices]
    assert together.usage.prompt_tokens == sum(map(len, prompts)) == sum(one.usage.prompt_tokens for one in alone)
    assert together.usage.completion_tokens == 6
    assert server.server.accounts.usage("user")[0].requests == requests + 6


def test_texts_in_a_batch_are_those_alone(client):
    texts = ["the sum", "explain why", "the capital"]
    together = client.completions.create(prompt=texts, model="deepseek-chat", max_tokens=5, temperature=0)
    alone = [
        client.completions.create(prompt=text, model="deepseek-chat", max_tokens=5, temperature=0) for text in texts
    ]
    assert [choice.text for choice in together.choices] == [one.choices[0].text for one in alone]


def test_the_prompt_alone_is_scored_and_charged_without_a_completion(client, server):
    client.completions.create(prompt="x", **ECHO)
    (before,) = server.server.accounts.usage("user")
    reply = client.completions.create(prompt=TEXT, **ECHO | {"max_tokens": 0})
    choice, ids = reply.choices[0], [BEGIN, *TOKENIZER.encode(TEXT)]
    assert (choice.text, choice.finish_reason) == (TEXT, "length")
    assert len(choice.logprobs.tokens) == len(ids)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), 0)
    (after,) = server.server.accounts.usage("user")
    assert after.usage.prompt_cache_miss_tokens - before.usage.prompt_cache_miss_tokens == len(ids)
    assert after.usage.completion_tokens == before.usage.completion_tokens
    with_one = client.completions.create(prompt=TEXT, **ECHO).choices[0].logprobs
    assert with_one.token_logprobs[: len(ids)] == choice.logprobs.token_logprobs


def test_whether_a_text_is_greedy_shows_in_equal_numbers(client):
    """lm-eval compares each log-probability with the largest alternative by ==."""
    ids = TOKENIZER.encode("the sum of")
    ((completion,),) = Engine(MODEL).generate([ids], [SamplingParams(temperature=0, max_tokens=12)])
    given = [*ids, *completion.token_ids]
    found = client.completions.create(prompt=[given], **ECHO | {"logprobs": 1}).choices[0].logprobs
    pairs = list(zip(found.token_logprobs, found.top_logprobs, strict=True))[len(ids) : -1]
    assert len(pairs) == 12 and all(value == max(top.values()) for value, top in pairs)


def test_a_completion_that_ends_at_once_still_has_an_entry_for_its_last_token(client):
    """lm-eval drops the last entry, which belongs to the one token that it samples."""
    end = str(TOKENIZER.control_id("<｜end▁of▁sentence｜>"))
    found = client.completions.create(prompt=TEXT, logit_bias={end: 100}, **ECHO).choices[0]
    assert len(found.logprobs.tokens) == len(TOKENIZER.encode(TEXT)) + 2 and found.text == TEXT
    assert found.finish_reason == "stop" and found.logprobs.text_offset[-1] == len(TEXT)


@pytest.mark.parametrize(
    "fields", [{}, {"max_tokens": 0}, {"n": 3, "max_tokens": 9}, {"stop": ["s", "e"], "max_tokens": 20}]
)
def test_a_stream_adds_up_to_the_whole_reply(client, fields):
    body = {"prompt": TEXT, "seed": 3} | ECHO | {"temperature": 1} | fields
    whole = client.completions.create(**body)
    *chunks, last = client.completions.create(**body, stream=True, stream_options={"include_usage": True})
    assert last.usage == whole.usage
    for index, choice in enumerate(whole.choices):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert own[0].text == TEXT and "".join(each.text for each in own) == choice.text
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            assert [part for each in own for part in getattr(each.logprobs, name)] == getattr(choice.logprobs, name)


def test_a_long_prompt_is_scored_between_other_steps(client):
    ids = [BEGIN, *TOKENIZER.encode(TEXT * 20)][:500]
    found = client.completions.create(prompt=ids, **ECHO | {"logprobs": 5}).choices[0].logprobs
    own = expected(ids).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert found.token_logprobs[1 : len(ids)] == pytest.approx(own, abs=1e-5)
    assert all(math.isfinite(value) for top in found.top_logprobs[1:] for value in top.values())


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"max_tokens": 0, "echo": False}, 400, "max_tokens", "needs echo=true"),
        ({"max_tokens": -1}, 422, "max_tokens", "greater than or equal to 0"),
        ({"prompt": []}, 422, "prompt", "at least 1"),
        ({"prompt": [[]]}, 422, "prompt", "at least 1"),
        ({"prompt": [1, "a"]}, 422, "prompt", "valid"),
        ({"prompt": ["a"] * (MAX_PROMPTS + 1)}, 422, "prompt", f"at most {MAX_PROMPTS}"),
        ({"prompt": ["a", "b"], "stream": True}, 400, "prompt", "a stream has one prompt, not 2"),
        ({"prompt": [5, 10**6]}, 400, "prompt", "token id 1000000; the vocabulary has ids"),
        ({"prompt": [["a"], ["b"]]}, 422, "prompt", "valid"),
        ({"prompt": [5], "suffix": "x"}, 400, "suffix", "needs prompts of text"),
        ({"suffix": "x"}, 400, "suffix", "excludes echo with logprobs"),
        ({"prompt": [5] * 512}, 400, "prompt", "prompt is 512 tokens; this model supports 512"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(server, fields, status, param, words):
    body = {"prompt": "x"} | ECHO | fields
    response = httpx.post(f"{server.url}/completions", json=body, headers=server.headers, timeout=HANG_SECONDS)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"].partition(".")[0] == param and words in error["message"]


def test_a_batch_with_a_bad_prompt_starts_nothing(client, server):
    with pytest.raises(openai.BadRequestError, match="token id 1000000"):
        client.completions.create(prompt=[[5, 6], [7, 10**6]], **ECHO)
    service = server.server.models.members["default"].service
    until(lambda: not server.server.turns and service.status.running == 0)


def test_a_member_on_vllm_servers_refuses_to_score_prompts(tmp_path):
    with FakeVllm(answer) as vllm, live(tmp_path, lambda prompt, index: "", member=attach(vllm)) as server:
        body = {"prompt": "x"} | ECHO
        response = httpx.post(f"{server.url}/completions", json=body, headers=server.headers, timeout=HANG_SECONDS)
    assert response.status_code == 400 and response.json()["error"]["param"] == "echo"
    assert "are not read from vLLM servers" in response.json()["error"]["message"]
