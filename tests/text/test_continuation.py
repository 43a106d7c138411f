"""Prompts that go on from an assistant's content or reasoning, in every format; no text becomes a control token."""

import json

import pytest
import tokenizers

from tests.golden import as_request, conversations, read_messages
from tests.text.test_deepseek import QUESTION, assistant, chat, ids_of, tokenizer
from tests.text.test_template import CAREFUL
from thinkstack.checkpoint.hf.chat_template import template_text
from thinkstack.text.chat import FORMATS, TemplateFormat, chat_format
from thinkstack.text.stream import TurnStream
from thinkstack.text.tokenizer import (
    ASSISTANT,
    BOS,
    CONTROL,
    EOS,
    OUTPUT_END,
    OUTPUTS_END,
    THINK_CLOSE,
    THINK_OPEN,
    USER,
    train_tokenizer,
)
from thinkstack.types import Message, RequestError, Tool, ToolCall

HEAD = f"{BOS}{USER}1+2?{ASSISTANT}"
OPEN = {"r1": f"{THINK_OPEN}\n", "r1_0528": f"{THINK_OPEN}\n", "v3": f"{THINK_OPEN}\n", "v3_1": THINK_OPEN}
CLOSE = {"r1": "\n</think>\n\n", "r1_0528": "\n</think>\n\n", "v3": "\n</think>\n\n", "v3_1": "</think>"}
CALL = ToolCall(name="add", arguments="{}")


def continued(format_, *messages, **options) -> str:
    return format_.tokenizer.decode(format_.continue_final_message(messages, **options))


@pytest.mark.parametrize("name", OPEN)
def test_a_prompt_goes_on_from_content_and_from_reasoning(name):
    plain = {"r1": f"{THINK_OPEN}\n\n{THINK_CLOSE}\n\n", "v3_1": THINK_CLOSE}.get(name, "")
    assert continued(chat(name), QUESTION, assistant("It is\n")) == f"{HEAD}{plain}It is\n"
    thinking = f"{HEAD}{OPEN[name]}1+2"
    assert continued(chat(name), QUESTION, assistant("", reasoning="1+2")) == thinking
    assert continued(chat(name), QUESTION, assistant("3", reasoning="1+2")) == f"{thinking}{CLOSE[name]}3"
    assert continued(chat(name), QUESTION, assistant("", reasoning="")) == f"{HEAD}{OPEN[name]}"


@pytest.mark.parametrize("name", FORMATS)
def test_a_continued_prompt_is_the_start_of_the_trained_turn(name):
    """The model goes on from tokens as in training."""
    for content, reasoning in (("3", None), ("3", "1+2"), ("", "1+2")):
        thinking = None if reasoning is None or not chat(name).can_switch else True
        messages = [QUESTION, assistant(content, reasoning=reasoning)]
        ids = chat(name).continue_final_message(messages)
        trained, _ = chat(name).example(messages, thinking=thinking)[0]
        assert trained[: len(ids)] == ids or (thinking is None and chat(name).can_switch)
        assert tokenizer().decode(ids).endswith(reasoning if reasoning and not content else content)


def test_the_think_tags_of_r1_zero_are_control_tokens_or_text():
    messages = [QUESTION, assistant("", reasoning="1+2")]
    assert tokenizer().control_id(THINK_OPEN) in chat("r1_zero_short").continue_final_message(messages)
    text = chat_format("r1_zero_short", train_tokenizer(["1+2"] * 4, 300, control=CONTROL[:5]))
    assert continued(text, *messages).endswith("Assistant: <think>\n1+2")


def test_calls_and_results_come_before_a_continued_message():
    after_tool = (QUESTION, assistant("", tool_calls=(CALL,)), Message(role="tool", content="3"))
    assert continued(chat("v3_1"), *after_tool, assistant("It is")).endswith(f"3{OUTPUT_END}It is")
    assert continued(chat("r1_0528"), *after_tool, assistant("It is")).endswith(f"{OUTPUTS_END}It is")


@pytest.mark.parametrize("name", FORMATS)
def test_the_opening_is_the_end_of_the_prompt_and_has_the_state_of_the_turn(name):
    format_ = chat(name)
    cases = [([QUESTION], None), ([QUESTION, assistant("It")], "content")]
    cases += [
        ([QUESTION, assistant("", reasoning="a")], "thinking"),
        ([QUESTION, assistant("b", reasoning="a")], "content"),
    ]
    for messages, state in cases:
        opening = format_.opening_pieces(messages)
        is_continued = messages[-1].role == "assistant"
        ids = format_.continue_final_message(messages) if is_continued else format_.prompt(messages)
        assert tokenizer().decode(ids).endswith("".join(opening))
        prefilled = {"r1": "thinking", "v3_1": "content", "v3_1_think": "thinking"}.get(name, "start")
        assert TurnStream(format_, opening).state == (state or prefilled)


def test_what_cannot_be_continued_is_refused():
    for messages in ([QUESTION], [], [assistant("a")], [QUESTION, assistant("", tool_calls=(CALL,))]):
        with pytest.raises(RequestError, match="only an assistant message without tool calls can be continued"):
            chat("v3").continue_final_message(messages)
    with pytest.raises(RequestError, match="thinking is off"):
        chat("v3_1").continue_final_message([QUESTION, assistant("", reasoning="a")], thinking=False)


# -- templates


def with_template(template):
    return TemplateFormat(tokenizer(), template, BOS, EOS)


def theirs(template):
    transformers = pytest.importorskip("transformers")
    fast = tokenizers.Tokenizer.from_str(tokenizer().spec)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, chat_template=template, bos_token=BOS, eos_token=EOS
    )


TEMPLATES = {name: template_text(name) for name in ("v3", "r1_0528", "v3_1")} | {"careful": CAREFUL}


@pytest.mark.parametrize("name", TEMPLATES)
def test_continued_prompts_equal_those_of_transformers(name):
    hugging, format_, compared = theirs(TEMPLATES[name]), with_template(TEMPLATES[name]), 0
    for case in conversations():
        messages = read_messages(case)
        while messages and (messages[-1].role != "assistant" or messages[-1].tool_calls or messages[-1].reasoning):
            messages.pop()
        content = messages[-1].content if messages else ""
        if len(messages) < 2 or case.get("spells") or not content.strip() or THINK_CLOSE in content:
            continue
        request = as_request(case, as_text=name != "careful")[: len(messages)]
        options = {"continue_final_message": True, "return_dict": False}
        expected = hugging.apply_chat_template(request, **options)
        assert format_.continue_final_message(messages) == expected, case["key"]
        if name != "careful":
            ours = tokenizer().decode(chat(name).continue_final_message(messages))
            assert ours == tokenizer().decode(expected), case["key"]
        compared += 1
    assert compared >= 9


def test_a_template_goes_on_from_reasoning_where_the_model_has_think_tags():
    careful = with_template(CAREFUL)
    head = f"{USER}user\n1+2?\n{ASSISTANT}says\n"
    reasoning = [QUESTION, assistant("", reasoning="1+2")]
    assert continued(careful, *reasoning) == f"{head}<think>\n1+2"
    assert TurnStream(careful, careful.opening_pieces(reasoning)).state == "thinking"
    assert continued(with_template(template_text("v3_1_think")), *reasoning) == f"{HEAD}<think>1+2"
    assert continued(careful, QUESTION, assistant("3", reasoning="1+2")) == f"{head}<think>\n1+2\n</think>\n\n3"
    without = with_template(template_text("r1_0528"))  # writes no reasoning
    assert continued(without, QUESTION, assistant("3", reasoning="1+2")) == f"{HEAD}<think>\n1+2\n</think>\n\n3"
    assert careful.opening_pieces([QUESTION, assistant("3")]) == ["3"]
    untagged = train_tokenizer(["1+2"] * 4, 300, control=CONTROL[:5])
    with pytest.raises(RequestError, match="no think tags"):
        TemplateFormat(untagged, CAREFUL, BOS, EOS).continue_final_message(reasoning)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "changes the content"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes the content"),
    ],
)
def test_a_template_that_does_not_write_the_content_is_refused(template, reason):
    with pytest.raises(RequestError, match=f"cannot continue the last message: it {reason}"):
        with_template(template).continue_final_message([QUESTION, assistant("It")])


# -- control tokens

FIELDS = ("system", "user", "content", "reasoning", "call name", "arguments", "result", "result name", "tool", "last")


def conversation(field: str, text: str):
    """A conversation and tools with `text` in one of the fields."""

    def put(name: str, otherwise: str = "x") -> str:
        return text if name == field else otherwise

    call = ToolCall(name=put("call name"), arguments='{"a": ' + json.dumps(put("arguments")) + "}")
    messages = [
        Message(role="system", content=put("system")),
        Message(role="user", content=put("user")),
        assistant("x" + put("content"), tool_calls=(call,)),
        Message(role="tool", content=put("result"), name=put("result name")),
        assistant("x"),
        QUESTION,
        assistant(put("last"), reasoning=put("reasoning")),
    ]
    tool = put("tool")
    return messages, [Tool(name=tool, description=tool, parameters={tool: tool, "enum": [tool]})]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", [*FORMATS, "template"])
def test_no_field_becomes_a_control_token(name, field):
    """Every special string in every field, alone and beside the text that the format writes; exactly one BOS."""
    format_ = with_template(template_text("v3_1")) if name == "template" else chat(name)
    control = set(tokenizer().control.values())

    def controls(text: str) -> list[list[int]]:
        messages, tools = conversation(field, text)
        if name.startswith("r1_zero"):
            messages, tools = [m for m in messages if m.role != "tool" and not m.tool_calls], []
        found = [format_.prompt(messages[:-1], tools), format_.continue_final_message(messages, tools)]
        found += [format_.continue_final_message([*messages[:-1], assistant("", reasoning=messages[-1].reasoning)])]
        found += [tokenizer().encode_pieces(format_.opening_pieces(messages))]
        return [[token for token in ids if token in control] for ids in found]

    plain = controls("x")
    assert all(ids.count(tokenizer().control_id(BOS)) == 1 for ids in plain[:3])
    for token in tokenizer().control:
        for text in (token, f"{token}{token}", f"x{token[:-1]}", f"{token[1:]}x"):
            assert controls(text) == plain, text


@pytest.mark.parametrize("name", ["v3", "r1_0528", "v3_1"])
def test_tools_need_their_control_tokens(name):
    untooled = chat_format(name, train_tokenizer(["1+2"] * 4, 300, control=CONTROL))
    with pytest.raises(RequestError, match="this model does not support tools: its tokenizer has no token"):
        untooled.prompt([QUESTION], [Tool(name="t", description="")])
    with pytest.raises(RequestError, match="this model does not support tools"):
        untooled.prompt([QUESTION, assistant("", tool_calls=(CALL,)), Message(role="tool", content="")])
    assert ids_of(BOS) == untooled.prompt([QUESTION])[:1]
