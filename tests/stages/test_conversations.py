"""Rows of published conversations: what each spelling becomes, what is listed, and what is refused by its name."""

import json
from pathlib import Path

import pytest

from thinkstack.stages.conversations import read_conversations
from thinkstack.types import ConfigError, Message, Tool, ToolCall

ASKED, PLAIN = Message(role="user", content="q"), Message(role="assistant", content="a")
THOUGHT = Message(role="assistant", content="a", reasoning="t")
SYSTEM = Message(role="system", content="s")
CALL = ToolCall(name="weather", arguments='{"city": "Paris"}')
OPENAI = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = Tool(name="weather", description="d", parameters=SCHEMA)
AS_TOOL = {"name": "weather", "description": "d", "parameters": SCHEMA}


def write_rows(folder: Path, rows: list[object], name: str = "talks.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return str(path)


def user(content="q", **more):
    return {"role": "user", "content": content, **more}


def assistant(content="a", **more):
    return {"role": "assistant", "content": content, **more}


def chat_row(*turns, **beside):
    return {"messages": list(turns), **beside}


def read(folder: Path, row: object):
    (found,) = read_conversations([write_rows(folder, [row])], with_masks=True)
    return found


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (chat_row(user(), assistant()), [ASKED, PLAIN]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [ASKED, PLAIN]),
        ({"conversations": [user(), assistant()]}, [ASKED, PLAIN]),
        ({"conversation": [user(), assistant()], "conversation_id": "7"}, [ASKED, PLAIN]),
        ({"messages": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}, [ASKED, PLAIN]),
        ({"question": "q", "answer": "a"}, [ASKED, PLAIN]),
        ({"prompt": "q", "completion": "a"}, [ASKED, PLAIN]),
        ({"query": "q", "response": "a", "type": "GSM_Rephrased"}, [ASKED, PLAIN]),
        ({"prompt": "q", "prompt_id": "7", "messages": [user(), assistant()]}, [ASKED, PLAIN]),
        ({"instruction": "q", "input": "", "output": "a"}, [ASKED, PLAIN]),
        ({"instruction": "q", "input": "i", "output": "a"}, [Message(role="user", content="q\ni"), PLAIN]),
        ({"input": "q", "output": "a"}, [ASKED, PLAIN]),
        ({"instruction": "q", "output": "a", "history": [["q", "a"]]}, [ASKED, PLAIN, ASKED, PLAIN]),
        ({"prompt": [user()], "completion": [assistant()]}, [ASKED, PLAIN]),
        ({"input": [{"role": "system", "content": "s"}, user()], "output": "a"}, [SYSTEM, ASKED, PLAIN]),
        (chat_row(user([{"type": "text", "text": "q"}]), assistant([{"type": "text", "text": "a"}])), [ASKED, PLAIN]),
        (chat_row(user(name=None, images=[]), assistant(refusal=None, audio=None, annotations=[])), [ASKED, PLAIN]),
    ],
)  # fmt: skip
def test_the_forms_of_published_rows_are_read(tmp_path, row, messages):
    found = read(tmp_path, row)
    assert found == messages
    assert read_conversations([str(tmp_path / "*.jsonl")]) == [messages]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_read_under_each_of_their_keys(tmp_path, key):
    """Under any key but one they were dropped, and the model was trained to answer without."""
    rows = [
        chat_row(user(), assistant(**{key: "t"})),
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", key: "t"}]},
        *(
            {asked: "q", turn_fields: "a", key: "t"}
            for asked in ("prompt", "question")
            for turn_fields in ("response", "answer")
        ),
        {"instruction": "q", "input": "", "output": "a", key: "t"},
        {"prompt": [user()], "completion": [assistant(**{key: "t"})]},
        chat_row(user(), assistant(**{key: "t", "reasoning": "t", "thinking": ""})),
    ]
    assert read_conversations([write_rows(tmp_path, rows)]) == [[ASKED, THOUGHT]] * len(rows)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat_row(user(), assistant(reasoning="t", thinking="u")), "turn 2 has reasoning and thinking with different"),
        ({"prompt": "q", "response": "a", "reasoning_content": "t", "thinking": "u"}, "reasoning_content and thinking"),
        (chat_row(user(), assistant("<think>u</think>a", reasoning="t")), "reasoning twice"),
        ({"question": "q", "answer": "\n<think>u</think>a", "reasoning": "u"}, "reasoning twice"),
        ({"input": [user()], "output": "<think>u</think>a", "reasoning": "on"}, "reasoning='on' is a switch"),
        ({"input": [user()], "output": "a", "reasoning": "off"}, "reasoning='off' is a switch"),
        (chat_row(user(reasoning="t"), assistant()), "turn 1 has the key 'reasoning'"),
        (chat_row(user(), assistant(), reasoning="t"), "line 1 has the key 'reasoning'"),
        (chat_row(user(), assistant(reasoning=["t"])), "reasoning.*part 1 is text, not an object"),
        (chat_row(user(), assistant(thinking=True)), "thinking is true or false, not text"),
        (chat_row(user(), assistant(thought="t")), "turn 2 has the key 'thought'"),
        ({"question": "q", "answer": "a", "cot": "t"}, "line 1 has the key 'cot'"),
    ],
)
def test_thoughts_that_contradict_or_have_no_place_are_refused_by_name(tmp_path, row, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, row)


@pytest.mark.parametrize(
    "turn_fields",
    [
        {"content": "", "tool_calls": [OPENAI | {"id": None}]},
        {"content": None, "tool_calls": [OPENAI | {"id": None, "index": 0}]},
        {"tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Paris"}}}]},
        {"tool_calls": [{"name": "weather", "arguments": {"city": "Paris"}}]},
        {"content": "", "tool_calls": {"name": "weather", "parameters": '{"city": "Paris"}'}},
        {"content": None, "function_call": {"name": "weather", "arguments": '{"city": "Paris"}'}},
        {"role": "function_call", "content": '{"name": "weather", "arguments": {"city": "Paris"}}'},
        {"role": "tool_call", "content": '[{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}]'},
    ],
)
def test_a_call_is_trained_on_as_a_call_however_it_is_spelled(tmp_path, turn_fields):
    """The words beside a call were trained on, an empty answer as a rule, and the call was dropped."""
    turns = [user(), {"role": "assistant"} | turn_fields, {"role": "tool", "content": "mild"}, assistant()]
    assert read(tmp_path, chat_row(*turns)) == [
        ASKED, Message(role="assistant", content="", tool_calls=(CALL,)), Message(role="tool", content="mild"), PLAIN
    ]  # fmt: skip


def test_calls_keep_their_words_their_order_and_their_ids(tmp_path):
    turn_fields = assistant("Let me look.", tool_calls=[OPENAI, OPENAI | {"id": "c2"}], reasoning="t")
    result = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": [{"type": "text", "text": "mild"}]}
    found = read(tmp_path, chat_row(user(), turn_fields, result, assistant()))
    assert found[1].content == "Let me look." and found[1].reasoning == "t"
    assert [call.id for call in found[1].tool_calls] == ["c1", "c2"]
    assert found[2] == Message(role="tool", content="mild", tool_call_id="c1", name="weather")
    words, call = (
        assistant("Let me look."),
        {"role": "tool_call", "content": json.dumps({"name": "f", "arguments": {}})},
    )
    found = read(tmp_path, chat_row(user(), words, call, call, {"role": "tool_response", "content": "1"}, assistant()))
    assert [message.role for message in found] == ["user", "assistant", "tool", "assistant"]
    assert (found[1].content, len(found[1].tool_calls)) == ("Let me look.", 2)


@pytest.mark.parametrize(
    ("turn_fields", "message"),
    [
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "turn 2, call 1: arguments is not JSON"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, "arguments are not a JSON object"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": 0}}]}, "arguments are not a JSON object"),
        ({"tool_calls": [OPENAI, {"function": {"arguments": "{}"}}]}, "call 2 has no function name"),
        ({"tool_calls": [{"type": "custom", "custom": {"name": "f"}}]}, "not of type function"),
        ({"tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]}, "arguments has the key 'a' twice"),
        ({"tool_calls": [{"name": "f", "arguments": '{"a": "\\ud83d"}'}]}, r"arguments has \\ud83d, half of a char"),
        ({"tool_calls": [OPENAI | {"output": "mild"}]}, "call 1 has the key 'output'"),
        ({"tool_calls": "weather"}, "call 1 is text, not an object"),
        ({"tool_calls": [OPENAI], "function_call": {"name": "f"}}, "tool_calls and function_call with different"),
        ({"role": "function_call", "content": "weather(Paris)"}, "content of a call is not JSON"),
        ({"role": "user", "tool_calls": [OPENAI]}, "turn 2 has the key 'tool_calls'"),
    ],
)
def test_a_call_that_cannot_be_read_is_refused_with_its_place(tmp_path, turn_fields, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, chat_row(user(), {"role": "assistant", "content": ""} | turn_fields, assistant()))


@pytest.mark.parametrize(
    "tools",
    [
        {"tools": [{"type": "function", "function": AS_TOOL}]},
        {"tools": [{"type": "function", "function": AS_TOOL | {"strict": True}}]},
        {"tools": [AS_TOOL]},
        {"tools": json.dumps([AS_TOOL])},
        {"tools": [json.dumps({"type": "function", "function": AS_TOOL})]},
        {"functions": [AS_TOOL]},
    ],
)
def test_tools_beside_the_turns_are_kept(tmp_path, tools):
    assert read(tmp_path, chat_row(user(), assistant(), **tools)).tools == (TOOL,)
    assert read(tmp_path, {"question": "q", "answer": "a"} | tools).tools == (TOOL,)


@pytest.mark.parametrize("tools", [[], None, "", "[]"])
def test_no_tools_are_none(tmp_path, tools):
    assert read(tmp_path, chat_row(user(), assistant(), tools=tools)).tools == ()


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("weather", "tools is not JSON"),
        (AS_TOOL, "tools is an object, not a list"),
        ([{"type": "function"}], "tool 1 has no name"),
        ([AS_TOOL | {"returns": "text"}], "tool 1 has the key 'returns'"),
        ([AS_TOOL | {"parameters": ["city"]}], "tool 1: parameters is a list"),
        ([AS_TOOL, 7], "tool 2 is a number"),
    ],
)
def test_tools_that_cannot_be_read_are_refused_with_their_place(tmp_path, tools, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, chat_row(user(), assistant(), tools=tools))


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_text_beside_the_turns_stands_before_them(tmp_path, key):
    """ShareGPT, OpenThoughts, OpenOrca and Alpaca have it there; it was dropped."""
    sharegpt = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    pair, alpaca = {"question": "q", "response": "a"}, {"instruction": "q", "input": "", "output": "a"}
    trl = {"prompt": [user()], "completion": [assistant()]}
    rows = [row | {key: "s"} for row in (chat_row(user(), assistant()), sharegpt, pair, alpaca, trl)]
    rows.append(chat_row({"role": "system", "content": "s"}, user(), assistant(), **{key: "s"}))
    assert read_conversations([write_rows(tmp_path, rows)]) == [[SYSTEM, ASKED, PLAIN]] * len(rows)
    with pytest.raises(ConfigError, match="line 1 has one system prompt under a key and another as a turn"):
        read(tmp_path, chat_row({"role": "system", "content": "other"}, user(), assistant(), **{key: "s"}))


@pytest.mark.parametrize("key", ["weight", "train", "training", "trainable", "loss", "loss_mask", "step_loss_mask"])
def test_masks_of_turns_are_read_and_refused_by_callers_without_masks(tmp_path, key):
    row = chat_row(user(), assistant("bad", **{key: 0}), user("no"), assistant("good", **{key: True}))
    assert [message.is_trained for message in read(tmp_path, row)] == [True, False, True, True]
    with pytest.raises(ConfigError, match="line 1 has turns that are masked from training"):
        read_conversations([str(tmp_path / "talks.jsonl")])
    all_on = chat_row(user(**{key: False}), assistant(**{key: 1.0}))
    assert read_conversations([write_rows(tmp_path, [all_on])]) == [[ASKED, PLAIN]]


def test_answers_within_a_prompt_of_turns_are_context(tmp_path):
    """TRL learns the completion only."""
    row = {"prompt": [user(), assistant("before"), user()], "completion": [assistant()]}
    assert [message.is_trained for message in read(tmp_path, row) if message.role == "assistant"] == [False, True]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat_row(user(), assistant(weight=0.5)), "turn 2: weight=0.5 is not supported"),
        (chat_row(user(), assistant(weight=-1)), "weight=-1 is not supported"),
        (chat_row(user(), assistant(train="false")), 'train="false" is not supported'),
        (chat_row(user(), assistant(weight=float("nan"))), "weight=NaN is not supported"),
        (chat_row(user(), assistant(weight=0, train=True)), "weight and train with different"),
        (chat_row(user(weight=1), assistant()), "would train on a user turn"),
        (chat_row(user(), assistant(loss_scale=0.3)), "turn 2 has the key 'loss_scale'"),
        (chat_row(user(), assistant(mask=1)), "turn 2 has the key 'mask'"),
        (
            chat_row(user(), assistant(train_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}])),
            "train_detail",
        ),
        (chat_row(user(), assistant(weight=0)), "has no turn to train on"),
        (chat_row(user(), assistant(), weight=0.5), "line 1 has the key 'weight'"),
        (
            chat_row(user(), assistant("x", train=False), {"role": "tool_call", "content": '{"name": "f"}'}),
            "are merged into one assistant turn",
        ),
    ],
)
def test_masks_that_are_not_0_or_1_or_that_contradict_are_refused_by_name(tmp_path, row, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, row)


@pytest.mark.parametrize(
    ("role", "wanted"),
    [
        *((role, "user") for role in ("user", "human", "Human", "prompter", "USER")),
        *((role, "assistant") for role in ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "CHATBOT")),
        *((role, "system") for role in ("system", "developer", "System")),
        *((role, "tool") for role in ("tool", "function", "observation", "tool_response", "ipython")),
    ],
)
def test_roles_of_published_files_are_known(tmp_path, role, wanted):
    row = chat_row(user(), assistant("x", tool_calls=[OPENAI]), {"role": role, "content": "c"}, assistant())
    assert read(tmp_path, row)[2].role == wanted


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "hello"}, r"talks\.jsonl line 1 is not a conversation \(it has the keys text\); use a list of turns"),
        ({}, "is not a conversation"),
        ({"prompt": "q", "canonical_solution": "a"}, "is not a conversation"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "is not a conversation"),
        (chat_row({"role": "robot", "content": "q"}), 'line 1, turn 1: role "robot" is not supported; use one of user'),
        (chat_row(user(), {"from": "narrator", "value": "q"}), 'turn 2: role "narrator" is not supported'),
        (chat_row({"role": 3, "content": "q"}), "turn 1: role 3 is not supported"),
        (chat_row({"content": "q"}), "turn 1 has no role"),
        (chat_row({"role": None, "content": "q"}), "turn 1 has no role"),
        (chat_row({"role": "user", "from": "gpt", "content": "q"}), "role and from with different"),
        (chat_row({"role": "user"}), "turn 1 has no content"),
        (chat_row(user(None), assistant()), "turn 1 has no content"),
        (chat_row(user(), {"role": "assistant"}), "turn 2 has neither content nor tool calls"),
        (chat_row(user({"text": "q"}), assistant()), "content or value is an object, not text"),
        (
            chat_row(user([{"type": "image_url", "image_url": {"url": "u"}}]), assistant()),
            "has type=image_url; only type=text",
        ),
        (chat_row(user(["q"]), assistant()), "part 1 is text, not an object"),
        (chat_row("hello", assistant()), "turn 1 is text, not an object"),
        ({"messages": "hello"}, "its turns are text, not a list"),
        ({"messages": {"0": user()}}, "its turns are an object"),
        ({"messages": []}, "is not a conversation"),
        (chat_row(user(), assistant(""), assistant("")), "turn 2: the assistant turn is empty"),
        ({"question": "q", "answer": " \n"}, "the assistant turn is empty"),
        (chat_row(user()), "does not end with an assistant message"),
        (chat_row(user(), assistant(), user()), "does not end with an assistant message"),
        ({"prompt": "q", "response": None}, "response is empty"),
        ({"prompt": None, "response": "a"}, "prompt is empty"),
        ({"prompt": 7, "response": "a"}, "the question is a number, not text"),
        ({"question": "q", "answer": {"text": "a"}}, "the answer is an object"),
        ({"question": "q", "answer": "4", "response": "four"}, "response and answer with different"),
        ({"prompt": "q", "question": "r", "answer": "4"}, "prompt and question with different"),
        ({"messages": [user(), assistant()], "conversations": [user(), assistant("b")]}, "with different values"),
        ({"instruction": "q", "output": "a", "history": ["q", "a"]}, r"round 1 of history is not \[question, answer\]"),
        ({"instruction": "q", "output": "a", "history": "q"}, "history is text"),
    ],
)
def test_a_row_that_is_no_conversation_is_refused_in_our_words(tmp_path, row, message):
    """Roles and missing keys came up as KeyError('content') and TypeError."""
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path, row)
    assert "\n" not in str(error.value) and "Error(" not in str(error.value)


@pytest.mark.parametrize("content", [None, "", "I cannot"])
def test_a_refusal_is_named_even_where_nothing_else_is_said(tmp_path, content):
    with pytest.raises(ConfigError, match="line 1, turn 2 has the key 'refusal'"):
        read(tmp_path, chat_row(user(), assistant(content, refusal="no")))


@pytest.mark.parametrize("key", ["images", "audio", "refusal", "name", "reasoning_details", "cot", "tool_calls_text"])
def test_a_key_of_a_turn_that_may_carry_content_is_refused_by_name(tmp_path, key):
    with pytest.raises(ConfigError, match=f"line 1, turn 2 has the key '{key}', which is not supported"):
        read(tmp_path, chat_row(user(), assistant(**{key: "x"})))


@pytest.mark.parametrize(
    "key",
    [
        *("images", "videos", "context", "history", "chosen", "thoughts", "chat_template_kwargs"),
        *("weight", "train", "training", "trainable", "loss_mask", "loss_scale", "kto_tag", "choices", "options"),
    ],
)
def test_a_key_of_a_row_that_would_change_what_is_trained_on_is_refused_by_name(tmp_path, key):
    with pytest.raises(ConfigError, match=f"line 1 has the key '{key}', which is not supported"):
        read(tmp_path, chat_row(user(), assistant(), **{key: ["x"]}))


@pytest.mark.parametrize("label", [True, False, 3, "spam", None])
def test_a_label_is_listed_unless_it_says_whether_the_answer_is_wanted(tmp_path, label):
    """TRL's rows for KTO have label: false where an answer is a bad one; it was trained on."""
    row = {"prompt": "q", "completion": "a", "label": label}
    if isinstance(label, bool):
        with pytest.raises(ConfigError, match="line 1 has the key 'label'"):
            read(tmp_path, row)
    else:
        assert read(tmp_path, row) == [ASKED, PLAIN]


@pytest.mark.parametrize("role", ["function", "observation", "tool", "ipython", "tool_response"])
def test_a_result_that_follows_no_turn_of_the_assistant_is_refused(tmp_path, role):
    """Some ShareGPT files give a call the role "function", elsewhere that of results: the call was not trained on."""
    result = {"from": role, "value": '{"name": "weather", "arguments": {}}'}
    for before in ([], [user()], [{"role": "system", "content": "s"}]):
        with pytest.raises(
            ConfigError, match=rf"turn {len(before) + 1} \(role \"{role}\"\) is the result of a tool call"
        ):
            read(tmp_path, chat_row(*before, result, {"from": "observation", "value": "mild"}, assistant()))


def test_every_other_key_is_listed_once_for_its_file_with_a_count(tmp_path, caplog):
    """They were dropped without a word."""
    caplog.set_level("INFO")
    rows = [chat_row(user(timestamp=1), assistant(id="m"), id=i, source="web", date=None) for i in range(1200)]
    rows.append({"question": "q", "answer": "a", "id": 7, "difficulty": 0})
    path = write_rows(tmp_path, rows)
    read_conversations([path, write_rows(tmp_path, [{"question": "q", "answer": "a"}], "bare.jsonl")])
    (line,) = caplog.messages
    assert line.startswith(f"{path}: keys not used: ")
    counts = set(line.removeprefix(f"{path}: keys not used: ").split(", "))
    turns = {"turn's timestamp (1,200 rows)", "turn's id (1,200 rows)"}
    assert counts == turns | {"id (1,201 rows)", "source (1,200 rows)", "difficulty (1 rows)"}


def test_a_pattern_without_files_and_a_file_without_rows_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"empty\.jsonl has no rows"):
        read_conversations([str(tmp_path / "empty.jsonl")])
    with pytest.raises(ConfigError, match=r"no file matches .*\*\.parquet"):
        read_conversations([str(tmp_path / "*.parquet")])
    with pytest.raises(ConfigError, match="it is a folder"):
        read_conversations([str(tmp_path)])
