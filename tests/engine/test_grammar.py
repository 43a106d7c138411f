"""Grammars: one state per completion, draft tokens, preemption, grammars that allow no token, and JSON of
text/grammar.py."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy
import pytest

from tests.engine.drafts import draft_from
from tests.engine.requests import LONG, SMALL, prompt
from tests.text.test_deepseek import chat
from tests.tiny import tiny_model
from thinkstack.engine.block_pool import BLOCK_SIZE
from thinkstack.engine.engine import Engine
from thinkstack.text.grammar import GrammarCompiler, json_schema
from thinkstack.text.tokenizer import THINK_CLOSE, Control
from thinkstack.types import RequestError, SamplingParams

OPEN, CLOSE, END = 1, 2, 0


class Brackets:
    """A grammar: balanced brackets of a depth of at most 3, then the end token. Counts the tokens that it reads."""

    def __init__(self) -> None:
        self.depths, self.num_read = [0], 0

    def advance(self, token_ids: Sequence[int]) -> None:
        self.num_read += len(token_ids)
        for token in token_ids:
            assert token in (OPEN, CLOSE), "the end token is not part of the grammar"
            self.depths.append(self.depths[-1] + (1 if token == OPEN else -1))
            assert 0 <= self.depths[-1] <= 3

    def rollback(self, num_tokens: int) -> None:
        del self.depths[len(self.depths) - num_tokens :]

    def fill_bitmask(self, bitmask: numpy.ndarray, index: int) -> None:
        depth = self.depths[-1]
        allowed = [(END, depth == 0 and len(self.depths) > 1), (OPEN, depth < 3), (CLOSE, depth > 0)]
        bitmask[index] = 0
        bitmask[index, 0] = sum(1 << token for token, is_allowed in allowed if is_allowed)


def bracket_depths(token_ids: Sequence[int]) -> list[int]:
    return numpy.cumsum([{OPEN: 1, CLOSE: -1, END: 0}[token] for token in token_ids]).tolist()


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_speculative_tokens": 3}, {"cache_tokens": 6 * BLOCK_SIZE}],
    ids=["plain", "drafts", "preemption"],
)
def test_every_completion_of_a_request_has_its_own_grammar(settings):
    """n completions with a grammar, others without; with preemption a state is kept, and each token is read once."""
    model, made = tiny_model(**LONG), list[Brackets]()

    def grammar() -> Brackets:
        made.append(Brackets())
        return made[-1]

    sampling = SamplingParams(max_tokens=90, seed=5, n=3, stop_token_ids=(END,), temperature=1.5)
    engine = Engine(model, replace(SMALL, **settings))
    plain = [engine.submit(prompt(70, seed), SamplingParams(max_tokens=100, seed=seed)) for seed in (1, 2)]
    request = engine.submit(prompt(70), sampling, grammar=grammar)
    while not all(each.is_finished for each in (request, *plain)):
        engine.step()
    assert len(made) == 3
    alone = Engine(model, SMALL)
    expected = alone.submit(prompt(70), sampling, grammar=Brackets)
    while not expected.is_finished:
        alone.step()
    assert request.completions == expected.completions
    assert len({completion.token_ids for completion in request.completions}) == 3
    for completion, state in zip(request.completions, made, strict=True):
        depths = bracket_depths(completion.token_ids)
        assert min(depths) >= 0 and max(depths) <= 3
        assert completion.finish_reason == "length" or depths[-1] == 0
        if not engine.speculator:
            assert state.num_read <= len(completion.token_ids)
    if "cache_tokens" in settings:
        assert engine.scheduler.num_preemptions > 0
    assert {c.finish_reason for each in plain for c in each.completions} == {"length"}


def test_draft_tokens_that_the_grammar_allows_are_accepted(monkeypatch):
    """Advanced over the draft tokens and rolled back: fewer steps, the same tokens."""
    model, sampling = tiny_model(**LONG), SamplingParams(max_tokens=40, stop_token_ids=(END,), seed=1, temperature=2.0)

    def generate(engine):
        request = engine.submit(prompt(30), sampling, grammar=Brackets)
        while not request.is_finished:
            engine.step()
        return request.completions[0].token_ids

    plain = generate(Engine(model, SMALL))
    draft_from(monkeypatch, {tuple(prompt(30)): plain}, wrong=0.2)
    engine = Engine(model, replace(SMALL, num_speculative_tokens=3))
    assert generate(engine) == plain
    assert engine.speculator.num_accepted.sum() > 10 or len(plain) < 20


class DeadEnd(Brackets):
    """Allows no token after four."""

    def fill_bitmask(self, bitmask: numpy.ndarray, index: int) -> None:
        super().fill_bitmask(bitmask, index)
        if len(self.depths) > 4:
            bitmask[index] = 0


class Refusing(Brackets):
    """Fails after two tokens."""

    def advance(self, token_ids: Sequence[int]) -> None:
        if len(self.depths) + len(token_ids) > 3:
            raise RequestError("out of fuel")
        super().advance(token_ids)


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize(
    ("grammar", "num_tokens", "part"),
    [(DeadEnd, 4, "the grammar allows no token after 4 tokens"), (Refusing, 3, "the grammar failed: out of fuel")],
)
def test_a_grammar_without_a_next_token_ends_its_own_completion(grammar, num_tokens, part, drafts):
    """With an error; the other requests go on."""
    model, sampling = tiny_model(**LONG), SamplingParams(max_tokens=12, min_tokens=12, stop_token_ids=(END,))
    engine = Engine(model, replace(SMALL, num_speculative_tokens=drafts))
    stuck, plain = engine.submit(prompt(9), sampling, grammar=grammar), engine.submit(prompt(9, 1), sampling)
    brackets = engine.submit(prompt(9, 2), sampling, grammar=Brackets)
    while not all(request.is_finished for request in (stuck, plain, brackets)):
        engine.step()
    assert stuck.completions[0].finish_reason == "error" and part in stuck.error
    assert len(stuck.completions[0].token_ids) == num_tokens
    assert plain.completions[0].finish_reason == brackets.completions[0].finish_reason == "length"
    assert engine.health().failed == 1 and engine.health().last_error == stuck.error
    engine.scheduler.check_invariants()


def test_min_tokens_and_a_grammar_may_exclude_all_tokens():
    class OnlyTheEnd(Brackets):
        def fill_bitmask(self, bitmask, index):
            bitmask[index] = [1 << END] + [0] * (bitmask.shape[1] - 1)

    engine = Engine(tiny_model(**LONG), SMALL)
    sampling = SamplingParams(max_tokens=5, min_tokens=3, stop_token_ids=(END,))
    request = engine.submit(prompt(9), sampling, grammar=OnlyTheEnd)
    engine.step()
    assert "min_tokens, allowed_token_ids and the grammar exclude all" in request.error


# -- JSON

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "array", "items": {"enum": [1, 20, 333, "abc"]}, "minItems": 3, "maxItems": 6},
        "b": {"type": "boolean"},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}


def generated(engine, sampling, number, factory):
    request = engine.submit(prompt(30, number), sampling, grammar=factory)
    while not request.is_finished:
        engine.step()
    return request


@pytest.mark.parametrize("is_thinking", [False, True], ids=["content", "thinking"])
@pytest.mark.parametrize(
    "settings", [{"num_speculative_tokens": 3}, {"cache_tokens": 9 * BLOCK_SIZE}], ids=["drafts", "preemption"]
)
def test_sampled_json_follows_its_schema_with_drafts_and_preemption(monkeypatch, settings, is_thinking):
    """After thinking that the model ends or the budget; the same tokens as alone and without drafts."""
    r1 = chat("r1")
    tokenizer = r1.tokenizer
    model = tiny_model(**LONG | {"vocab_size": tokenizer.vocab_size})
    opening = r1.opening_pieces([]) if is_thinking else [Control(THINK_CLOSE)]
    factory = GrammarCompiler(r1).compile(json_schema(SCHEMA)).factory(tokenizer.encode_pieces(opening))
    sampling = SamplingParams(max_tokens=90, stop_token_ids=r1.stop_token_ids, temperature=1.5, seed=3, n=3)
    if is_thinking:
        think_end = tuple(tokenizer.encode_pieces(["\n", Control(THINK_CLOSE), "\n\n"]))
        sampling = replace(sampling, thinking_budget=7, think_end_token_ids=think_end)
    expected = [generated(Engine(model, SMALL), sampling, number, factory) for number in range(3)]
    drafts = {tuple(prompt(30, n)): each.completions[0].token_ids for n, each in enumerate(expected)}
    engine = Engine(model, replace(SMALL, **settings))
    if engine.speculator:
        draft_from(monkeypatch, drafts, wrong=0.2)
    requests = [engine.submit(prompt(30, number), sampling, grammar=factory) for number in range(3)]
    while not all(request.is_finished for request in requests):
        engine.step()
    assert [request.completions for request in requests] == [request.completions for request in expected]
    for completion in (each for request in requests for each in request.completions):
        content = tokenizer.decode(completion.token_ids[:-1]).rpartition(THINK_CLOSE)[2]
        assert completion.finish_reason == "stop" and isinstance(json.loads(content)["b"], bool)
    assert (
        engine.scheduler.num_preemptions > 0
        if "cache_tokens" in settings
        else engine.speculator.num_accepted.sum() > 10
    )
