"""The provider of inspect: turns with thinking and calls, options, batches, and a task from end to end.

Needs the extra `inspect`: pip install -e '.[inspect]'.
"""

import asyncio
import math

import pytest

from tests.server.live import TOKENIZER, scripted
from tests.tiny import GQA_TINY, tiny_model
from thinkstack.checkpoint.model import save_model
from thinkstack.engine.engine import Engine
from thinkstack.evals.loglikelihood import loglikelihoods
from thinkstack.text.chat import chat_format
from thinkstack.types import ConfigError, Message, RequestError, SamplingParams

pytest.importorskip("inspect_ai")
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    GenerateConfig,
    get_model,
)
from inspect_ai.scorer import includes
from inspect_ai.tool import ToolInfo
from inspect_ai.util import json_schema

from thinkstack.evals.adapters.inspect_model import ThinkstackAPI

CHAT = chat_format("v3_1_think", TOKENIZER)
MODEL = tiny_model(GQA_TINY, vocab_size=TOKENIZER.vocab_size, max_positions=256)
ASK = [ChatMessageUser(content="What is the sum?")]
CALL = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect") / "model"
    save_model(folder, MODEL, TOKENIZER, CHAT)
    return str(folder)


def turn(folder, text, input=ASK, tools=(), **config):
    """What the provider makes of a scripted turn."""
    model = ThinkstackAPI(folder, dtype="fp32")
    model.checkpoint.engine = scripted(CHAT, text if callable(text) else lambda prompt, index: text)

    async def generate():
        try:
            return await model.generate(input, list(tools), "auto", GenerateConfig(**config))
        finally:
            await model.aclose()

    return asyncio.run(generate())


def test_the_thinking_is_a_part_of_its_own_and_counted(folder):
    output = turn(folder, "explain why</think>The sum is 3", max_tokens=50)
    reasoning, answer = output.message.content
    assert (reasoning.reasoning, answer.text) == ("explain why", "The sum is 3") and output.completion == "The sum is 3"
    assert output.stop_reason == "stop"
    usage, prompt = output.usage, CHAT.prompt([Message(role="user", content="What is the sum?")])
    assert usage.input_tokens + usage.input_tokens_cache_read == len(prompt)
    assert usage.total_tokens == len(prompt) + usage.output_tokens
    assert 0 < usage.reasoning_tokens < usage.output_tokens


def test_thinking_that_is_not_closed_is_no_answer(folder):
    output = turn(folder, "explain why the sum is 3", max_tokens=4)
    assert output.completion == "" and output.stop_reason == "max_tokens"


def test_stop_strings_end_the_answer_and_not_the_thinking(folder):
    output = turn(folder, "Paris</think>The capital Paris of France", max_tokens=50, stop_seqs=["Paris"])
    assert output.message.content[0].reasoning == "Paris" and output.completion == "The capital "
    assert output.stop_reason == "stop"


@pytest.mark.parametrize(
    ("arguments", "parsed", "error"), [('{"a": 1}', {"a": 1}, None), ("[1]", {}, "list"), ('{"a"', {}, "no JSON")]
)
def test_tool_calls_are_read_and_broken_arguments_are_named(folder, arguments, parsed, error):
    tool = ToolInfo(name="add", description="adds")
    output = turn(folder, f"why</think>{CALL.format(arguments)}", tools=[tool], max_tokens=80)
    (call,) = output.message.tool_calls
    assert (call.function, call.arguments) == ("add", parsed) and output.stop_reason == "tool_calls"
    assert call.parse_error is None if error is None else error in call.parse_error
    result = ChatMessageTool(content="3", tool_call_id=call.id, function="add")
    after = turn(folder, "</think>3", input=[*ASK, output.message, result], tools=[tool], max_tokens=9)
    assert after.completion == "3"


def test_a_turn_goes_on_from_an_assistant_message(folder):
    start = ChatMessageAssistant(content="The sum")
    output = turn(folder, " is 3", input=[*ASK, start], max_tokens=20)
    assert output.completion == " is 3"


def test_log_probabilities_choices_and_seeds_are_those_of_the_engine(folder):
    model = ThinkstackAPI(folder, dtype="fp32")
    config = GenerateConfig(max_tokens=6, num_choices=2, logprobs=True, top_logprobs=3, temperature=0.8, seed=5)

    async def generate(count):
        try:
            return await asyncio.gather(*(model.generate(ASK, [], "none", config) for _ in range(count)))
        finally:
            await model.aclose()

    first, second = asyncio.run(generate(2))
    prompt, seed = CHAT.prompt([Message(role="user", content="What is the sum?")]), first.metadata["seed"]
    sampling = SamplingParams(
        temperature=0.8,
        max_tokens=6,
        n=2,
        top_logprobs=3,
        raw_logprobs=True,
        seed=seed,
        stop_token_ids=CHAT.stop_token_ids,
    )
    (expected,) = Engine(MODEL).generate([prompt], [sampling])
    for choice, completion in zip(first.choices, expected, strict=True):
        assert [bytes(each.bytes) for each in choice.logprobs.content] == list(
            map(TOKENIZER.bytes_of, completion.token_ids)
        )
        assert [each.logprob for each in choice.logprobs.content] == pytest.approx(completion.logprobs, abs=1e-6)
        assert [len(each.top_logprobs) for each in choice.logprobs.content] == [3] * 6
    assert second.metadata["seed"] != seed and second.choices[0].logprobs != first.choices[0].logprobs
    assert second.metadata["prompt_sha256"] == first.metadata["prompt_sha256"]


@pytest.mark.parametrize("count", [1, 3])
def test_the_tokens_of_a_prompt_are_scored(folder, count):
    model = ThinkstackAPI(folder, dtype="fp32")
    config = GenerateConfig(max_tokens=1, prompt_logprobs=count, num_choices=2)
    output = asyncio.run(model.generate(ASK, [], "none", config))
    ids = CHAT.prompt([Message(role="user", content="What is the sum?")])
    (expected,) = loglikelihoods(MODEL, [(ids[:1], ids[1:])])
    first, second = (choice.prompt_logprobs.content for choice in output.choices)
    assert first == second and [bytes(each.bytes) for each in first] == list(map(TOKENIZER.bytes_of, ids[1:]))
    assert sum(each.logprob for each in first) == pytest.approx(expected.logprob, abs=1e-4)
    assert all(len(each.top_logprobs or ()) == (count if count > 1 else 0) for each in first)


def test_json_follows_a_schema(folder):
    from inspect_ai.model import ResponseSchema

    model = ThinkstackAPI(folder, dtype="fp32", thinking=False)
    config = GenerateConfig(
        max_tokens=40, response_schema=ResponseSchema(name="one", json_schema=json_schema(bool)), seed=1
    )
    output = asyncio.run(model.generate(ASK, [], "none", config))
    assert output.completion.strip() in ("true", "false")


def test_a_prompt_that_fills_the_context_is_reported_as_such(folder):
    model = ThinkstackAPI(folder, dtype="fp32", max_model_len=16)
    output = asyncio.run(model.generate([ChatMessageUser(content="sum " * 40)], [], "none", GenerateConfig()))
    assert output.stop_reason == "model_length" and "the context 16" in output.error
    whole = ThinkstackAPI(folder, dtype="fp32", max_model_len=32)
    endless = GenerateConfig(max_tokens=400, logit_bias=dict.fromkeys(CHAT.stop_token_ids, -100.0))
    output = asyncio.run(whole.generate(ASK, [], "none", endless))
    assert output.stop_reason == "model_length" and output.usage.total_tokens == 32


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"best_of": 2}, "best_of=2 is not supported"),
        ({"reasoning_effort": "high"}, "limit the thinking by reasoning_tokens"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs=true"),
        ({"temperature": -1.0}, "temperature=-1.0 must lie in"),
        ({"reasoning_tokens": 5, "reasoning_effort": "none"}, "this model does not think here"),
    ],
)
def test_options_that_are_not_supported_are_refused_by_name(folder, config, message):
    with pytest.raises(RequestError, match=message):
        turn(folder, "3", **config)


def test_images_base_urls_and_base_models_are_refused(folder, tmp_path):
    with pytest.raises(RequestError, match="content of the type 'image'"):
        turn(folder, "3", input=[ChatMessageUser(content=[ContentImage(image="data:image/png;base64,")])])
    with pytest.raises(ConfigError, match="for a server use the provider openai-api"):
        ThinkstackAPI(folder, base_url="http://127.0.0.1:8000")
    save_model(tmp_path / "base", MODEL, TOKENIZER)
    with pytest.raises(ConfigError, match="this is a base model"):
        ThinkstackAPI(str(tmp_path / "base"))


def test_a_thinking_budget_closes_the_thinking(folder):
    output = turn(folder, lambda prompt, index: "why " * 30, max_tokens=40, reasoning_tokens=5)
    assert output.usage.reasoning_tokens <= 7 and output.completion


def test_a_task_runs_through_the_entry_point_and_its_epochs_are_samples(folder, tmp_path):
    task = Task(
        dataset=[Sample(input="What is the sum?", target="3"), Sample(input="capital?", target="e")], scorer=includes()
    )
    model = get_model(f"thinkstack/{folder}", dtype="fp32", memoize=False)
    (log,) = eval(task, model=model, epochs=3, max_tokens=8, temperature=1.0, display="none", log_dir=str(tmp_path))
    assert log.status == "success" and len(log.samples) == 6
    assert len({sample.output.metadata["seed"] for sample in log.samples}) == 6
    assert math.isfinite(log.results.scores[0].metrics["accuracy"].value)
