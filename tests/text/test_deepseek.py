"""Formats of V3, R1, R1-0528 and V3.1: equality with the published templates, tools, and the loss mask."""

import itertools
import json
import random
from functools import cache

import pytest

from tests.golden import FOLDER, conversations, read_messages
from thinkstack.text.chat import FORMATS, chat_format
from thinkstack.text.tokenizer import (
    ASSISTANT,
    BOS,
    CALL_BEGIN,
    CALL_END,
    CALL_SEP,
    CALLS_BEGIN,
    CALLS_END,
    CONTROL,
    EOS,
    OUTPUT_BEGIN,
    OUTPUT_END,
    OUTPUTS_BEGIN,
    OUTPUTS_END,
    THINK_CLOSE,
    THINK_OPEN,
    TOOLS,
    USER,
    Control,
    train_tokenizer,
)
from thinkstack.types import Message, RequestError, Tool, ToolCall

GENUINE = ("v3", "r1", "r1_0528", "v3_1", "v3_1_think")
QUESTION = Message(role="user", content="1+2?")
CALL = ToolCall(name="add", arguments='{"a": 1}')


@cache
def tokenizer():
    return train_tokenizer(["the sum of 1 and 2 is 3, says the tool"] * 4, 380, control=(*CONTROL, *TOOLS))


def chat(name):
    return chat_format(name, tokenizer())


def assistant(content, **more):
    return Message(role="assistant", content=content, **more)


def ids_of(*pieces):
    """Return the ids of pieces; a piece that spells a control token is that token."""
    return tokenizer().encode_pieces([Control(piece) if piece in tokenizer().control else piece for piece in pieces])


def masked_texts(name, messages, thinking=None):
    """Return [prompt text, trained text, ...] for each example, one entry per span of equal loss mask."""
    found = []
    for ids, loss_mask in chat(name).example(messages, thinking=thinking):
        assert len(ids) == len(loss_mask)
        cuts = [0, *(i for i in range(1, len(ids)) if loss_mask[i] != loss_mask[i - 1]), len(ids)]
        assert loss_mask[0] == 0 and len(cuts) % 2 == 1
        found.append([tokenizer().decode(ids[a:b]) for a, b in itertools.pairwise(cuts)])
    return found


@pytest.mark.parametrize("name", GENUINE)
def test_a_prompt_equals_that_of_the_published_template(name):
    golden = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    for conversation in conversations():
        if (name, conversation["key"]) == ("r1", "two rounds of calls"):
            continue  # R1's own template never begins a second round of calls
        text = tokenizer().decode(chat(name).prompt(read_messages(conversation)))
        assert text == golden[conversation["key"]], conversation["key"]


@pytest.mark.parametrize("name", GENUINE)
def test_text_that_spells_control_tokens_adds_none(name):
    def conversation(text):
        return [
            Message(role="system", content=text),
            Message(role="user", content=text),
            assistant("a" + text, tool_calls=(ToolCall(name=text, arguments=text),)),
            Message(role="tool", content=text),
        ]

    rng, tools = random.Random(0), Tool(name="t", description="d", parameters={})
    control = set(tokenizer().control.values())
    plain = [token for token in chat(name).prompt(conversation("x"), [tools]) if token in control]
    for _ in range(30):
        text = "".join(rng.choice((*tokenizer().control, "x", "<", "｜")) for _ in range(5))
        ids = chat(name).prompt(conversation(text), [Tool(name=text, description=text, parameters={text: text})])
        assert [token for token in ids if token in control] == plain


def test_calls_of_v3_are_fenced_and_their_results_grouped():
    messages = [
        QUESTION,
        assistant("", tool_calls=(CALL, CALL)),
        Message(role="tool", content="3"),
        Message(role="tool", content="4"),
    ]
    call = [CALL_BEGIN, "function", CALL_SEP, 'add\n```json\n{"a": 1}\n```', CALL_END]
    results = [OUTPUTS_BEGIN, OUTPUT_BEGIN, "3", OUTPUT_END, "\n", OUTPUT_BEGIN, "4", OUTPUT_END, OUTPUTS_END]
    head = [BOS, USER, "1+2?", ASSISTANT, CALLS_BEGIN, *call, "\n", *call, CALLS_END, EOS]
    assert chat("v3").prompt(messages) == ids_of(*head, *results)


def test_calls_of_v3_1_are_not_fenced_and_the_answer_follows_their_results():
    messages = [QUESTION, assistant("", tool_calls=(CALL, CALL)), Message(role="tool", content="3")]
    call = [CALL_BEGIN, "add", CALL_SEP, '{"a": 1}', CALL_END]
    head = [BOS, USER, "1+2?", ASSISTANT, THINK_CLOSE, CALLS_BEGIN, *call, *call, CALLS_END, EOS]
    assert chat("v3_1").prompt(messages) == ids_of(*head, OUTPUT_BEGIN, "3", OUTPUT_END)


@pytest.mark.parametrize("name", ["v3", "v3_1"])
def test_tools_are_described_after_the_system_text(name):
    tool = Tool(name="add", description="Adds numbers.", parameters={"type": "object", "title": "数"})
    text = tokenizer().decode(chat(name).prompt([Message(role="system", content="Be brief."), QUESTION], [tool]))
    assert text.startswith(f"{BOS}Be brief.\n\n## Tools\n")
    assert '\n### add\nDescription: Adds numbers.\n\nParameters: {"type": "object", "title": "数"}\n' in text
    assert text.index("### add") < text.index(CALL_BEGIN) < text.index(USER)


def test_only_v3_1_switches_thinking_in_the_prompt():
    head = ids_of(BOS, USER, "1+2?", ASSISTANT)
    assert chat("v3_1").prompt([QUESTION]) == chat("v3_1_think").prompt([QUESTION], thinking=False)
    assert chat("v3_1").prompt([QUESTION]) == head + ids_of(THINK_CLOSE)
    assert chat("v3_1").prompt([QUESTION], thinking=True) == chat("v3_1_think").prompt([QUESTION])
    assert chat("v3_1_think").prompt([QUESTION]) == head + ids_of(THINK_OPEN)
    for name, thinking in (("v3", True), ("r1", False), ("r1_0528", False), ("r1_zero", False)):
        with pytest.raises(RequestError, match="no switch"):
            chat(name).prompt([QUESTION], thinking=thinking)
        assert chat(name).prompt([QUESTION], thinking=not thinking) == chat(name).prompt([QUESTION])


@pytest.mark.parametrize("name", GENUINE)
def test_a_prompt_ends_in_its_opening(name):
    after_tool = [QUESTION, assistant("", tool_calls=(CALL,)), Message(role="tool", content="3")]
    for thinking in (None, True, False) if chat(name).can_switch else (None,):
        opening = chat(name).opening([QUESTION], thinking)
        assert tokenizer().decode(chat(name).prompt([QUESTION], (), thinking)).endswith(ASSISTANT + opening)
    assert chat(name).prefill == chat(name).opening([QUESTION])
    assert chat(name).opening(after_tool) == ""
    assert chat(name).text_of(ids_of("3", EOS), opening="") == "3"


def test_a_plain_conversation_is_one_example_that_trains_answers_and_end_tokens():
    messages = [Message(role="system", content="s"), QUESTION, assistant("3"), QUESTION, assistant("3 again")]
    prompt_text = f"{USER}1+2?{ASSISTANT}"
    assert masked_texts("v3", messages) == [[f"{BOS}s{prompt_text}", f"3{EOS}", prompt_text, f"3 again{EOS}"]]
    closed = f"{prompt_text}{THINK_CLOSE}"
    assert masked_texts("v3_1", messages) == [[f"{BOS}s{closed}", f"3{EOS}", closed, f"3 again{EOS}"]]


def test_thinking_is_trained_in_its_own_turn_and_left_out_of_history():
    messages = [QUESTION, assistant("3", reasoning="two and one"), QUESTION, assistant("still 3", reasoning="same")]
    prompt_text = f"{BOS}{USER}1+2?{ASSISTANT}"
    later = f"{prompt_text}3{EOS}{USER}1+2?{ASSISTANT}"
    closed = f"{prompt_text}{THINK_CLOSE}3{EOS}{USER}1+2?{ASSISTANT}"
    assert masked_texts("r1", messages) == [
        [f"{prompt_text}<think>\n", f"two and one\n</think>\n\n3{EOS}"],
        [f"{later}<think>\n", f"same\n</think>\n\nstill 3{EOS}"],
    ]
    assert masked_texts("r1_0528", messages) == [
        [prompt_text, f"<think>\ntwo and one\n</think>\n\n3{EOS}"],
        [later, f"<think>\nsame\n</think>\n\nstill 3{EOS}"],
    ]
    assert masked_texts("v3_1", messages) == [
        [f"{prompt_text}<think>", f"two and one</think>3{EOS}"],
        [f"{closed}<think>", f"same</think>still 3{EOS}"],
    ]
    plain = [[f"{prompt_text}</think>", f"3{EOS}", f"{USER}1+2?{ASSISTANT}</think>", f"still 3{EOS}"]]
    assert masked_texts("v3_1", messages, thinking=False) == plain


def test_a_turn_of_r1_without_thoughts_closes_the_block_that_the_prompt_opened():
    found = masked_texts("r1", [QUESTION, assistant("3")])
    assert found == [[f"{BOS}{USER}1+2?{ASSISTANT}<think>\n", f"\n</think>\n\n3{EOS}"]]


@pytest.mark.parametrize("name", FORMATS)
def test_a_think_block_in_the_content_is_trained_like_the_reasoning_field(name):
    written = [QUESTION, assistant("<think>\ntwo and one\n</think>\n\n3")]
    apart = [QUESTION, assistant("3", reasoning="two and one")]
    assert chat(name).example(written) == chat(name).example(apart)
    ids, _ = chat(name).example(apart)[0]
    assert [ids.count(tokenizer().control_id(tag)) for tag in (THINK_OPEN, THINK_CLOSE)] == [1, 1]


@pytest.mark.parametrize("name", FORMATS)
def test_trained_tokens_follow_exactly_the_prompt_ids(name):
    """A sequence is not one rendering of the conversation: each turn follows the ids of the prompt it is sampled
    from."""
    messages = [QUESTION, assistant("\n3 \n", reasoning=" a\n"), QUESTION, assistant("the sum", reasoning="the tool")]
    prompts = [chat(name).prompt(messages[:count], (), True if chat(name).can_switch else None) for count in (1, 3)]
    starts = [ids[: loss_mask.index(1)] for ids, loss_mask in chat(name).example(messages)]
    assert starts == prompts[: len(starts)]


def test_calls_are_trained_and_results_are_not():
    messages = [QUESTION, assistant("", tool_calls=(CALL,)), Message(role="tool", content="3"), assistant("3")]
    call = f'{CALLS_BEGIN}{CALL_BEGIN}add{CALL_SEP}{{"a": 1}}{CALL_END}{CALLS_END}{EOS}'
    result = f"{OUTPUT_BEGIN}3{OUTPUT_END}"
    prompt_text = f"{BOS}{USER}1+2?{ASSISTANT}{THINK_CLOSE}"
    assert masked_texts("v3_1", messages) == [[prompt_text, call, result, f"3{EOS}"]]


@pytest.mark.parametrize("name", FORMATS)
def test_a_conversation_without_an_answer_is_refused(name):
    with pytest.raises(RequestError, match="no assistant turn to train on"):
        chat(name).example([QUESTION])


def test_only_assistant_messages_have_reasoning_and_calls():
    with pytest.raises(RequestError, match="role='user'"):
        Message(role="user", content="", tool_calls=(CALL,))
    with pytest.raises(RequestError, match="'r1_zero' does not support tools"):
        chat("r1_zero").prompt([QUESTION], [Tool(name="t", description="")])
