"""Equality of prompts with transformers, for published tokenizers and templates.

THINKSTACK_TOKENIZERS is a folder of folders, each with a tokenizer.json and a tokenizer_config.json with the template.
If a folder has the name of one of our formats, that format is tested too.
"""

import os
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from tests.golden import as_request, conversations, read_messages, read_tools, schemas
from thinkstack.checkpoint.json_reader import read_json
from thinkstack.checkpoint.model import load_chat
from thinkstack.text.chat import FORMATS, chat_format
from thinkstack.text.formats import with_reasoning
from thinkstack.types import RequestError

FOLDER = Path(os.environ.get("THINKSTACK_TOKENIZERS", Path(os.environ.get("THINKSTACK_DATA", "data")) / "tokenizers"))
FOLDERS = sorted(path.parent for path in FOLDER.glob("*/tokenizer.json"))
CONVERSATIONS = {conversation["key"]: conversation for conversation in conversations()}
WITHOUT_CONTROL_SPELLINGS = [key for key, conversation in CONVERSATIONS.items() if not conversation.get("spells")]
WITH_CONTROL_SPELLINGS = [key for key, conversation in CONVERSATIONS.items() if conversation.get("spells")]
EXPECTED_REFUSALS = ("does not support tools", "does not support tool calls", "drops the content before")
"""Messages for conversations that transformers renders with something missing."""
DEPARTURES = {("r1", "two rounds of calls")}
"""R1's own template never begins a second round of calls."""

pytestmark = pytest.mark.skipif(
    not FOLDERS, reason="THINKSTACK_TOKENIZERS is not a folder with tokenizers and their templates"
)
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@cache
def ours(folder):
    return load_chat(folder)


@cache
def theirs(folder):
    transformers = pytest.importorskip("transformers")
    config = read_json(folder / "tokenizer_config.json")
    names = {key: ours(folder).bos if key == "bos_token" else ours(folder).eos for key in ("bos_token", "eos_token")}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        chat_template=config["chat_template"],
        **{key: name for key, name in names.items() if name},
    )


def rendered(folder, conversation, switches):
    """Render the conversation with transformers in every representation of calls; ids, or the error as text."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer, found = theirs(folder), []
    for as_text, without_content in (
        product((False, True), repeat=2) if "tool_calls" in str(conversation) else [(True, False)]
    ):
        try:
            texts, _ = render_jinja_template(
                [as_request(conversation, as_text, without_content)],
                tools=schemas(conversation),
                chat_template=tokenizer.chat_template,
                add_generation_prompt=True,
                **tokenizer.special_tokens_map,
                **switches,
            )
        except Exception as error:
            found.append(str(error))
        else:
            found.append(tokenizer(texts[0], add_special_tokens=False)["input_ids"])
    return found


@each_folder
@pytest.mark.parametrize("thinking", [None, False, True])
def test_a_shipped_template_gives_the_ids_of_transformers(folder, thinking):
    chat = ours(folder)
    if thinking is not None and not chat.can_switch:
        with pytest.raises(RequestError, match="no switch"):
            chat.prompt(read_messages(CONVERSATIONS["question"]), thinking=thinking)
        return
    switches = {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
    compared = 0
    for key in WITHOUT_CONTROL_SPELLINGS:
        conversation = CONVERSATIONS[key]
        expected = rendered(folder, conversation, switches)
        try:
            ids = chat.prompt(read_messages(conversation), read_tools(conversation), thinking)
        except RequestError as error:
            is_refused = all(isinstance(result, str) for result in expected)
            assert is_refused or any(reason in str(error) for reason in EXPECTED_REFUSALS), (key, error)
            continue
        assert ids in expected, (key, chat.tokenizer.decode(ids))
        calls = [call.arguments.strip("{}") for message in read_messages(conversation) for call in message.tool_calls]
        assert all(call in chat.tokenizer.decode(ids) for call in calls), key
        compared += 1
    print(folder.name, thinking, compared, "conversations equal")
    assert compared >= 20


@each_folder
def test_a_continued_prompt_of_a_shipped_template_has_the_ids_of_transformers(folder):
    chat, tokenizer, compared = ours(folder), theirs(folder), 0
    for key in WITHOUT_CONTROL_SPELLINGS:
        messages = read_messages(CONVERSATIONS[key])
        while messages and (messages[-1].role != "assistant" or messages[-1].tool_calls or messages[-1].reasoning):
            messages.pop()
        if (
            len(messages) < 2
            or any(message.tool_calls for message in messages)
            or not messages[-1].content.strip()
            or "</think>" in messages[-1].content
        ):
            continue
        request = as_request(CONVERSATIONS[key])[: len(messages)]
        try:
            expected = tokenizer.apply_chat_template(request, continue_final_message=True, return_dict=False)
            assert chat.continue_final_message(messages) == expected, key
        except RequestError as error:
            assert any(reason in str(error) for reason in (*EXPECTED_REFUSALS, "cannot continue")), error
            continue
        compared += 1
    print(folder.name, compared, "continued conversations equal")
    assert compared >= 5


@each_folder
@pytest.mark.parametrize("key", WITH_CONTROL_SPELLINGS)
def test_text_that_spells_control_tokens_encodes_like_sanitized_input(folder, key):
    """transformers splits the text around each spelling, so ids may differ; text and control tokens must be equal."""
    chat, tokenizer, conversation = ours(folder), theirs(folder), CONVERSATIONS[key]
    expected = tokenizer.apply_chat_template(
        as_request(conversation), add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
    known = {tokenizer.convert_tokens_to_ids(token) for token in tokenizer._get_control_tokens(tokenizer.chat_template)}
    ids = chat.prompt(read_messages(conversation))
    assert chat.tokenizer.decode(ids) == chat.tokenizer.decode(expected)
    assert [token for token in ids if token in known] == [token for token in expected if token in known]
    assert [token for token in ids if token in chat.tokenizer.control.values()] == [
        token for token in ids if token in known
    ]


@each_folder
def test_a_format_of_ours_gives_the_ids_of_its_template(folder):
    if folder.name not in FORMATS:
        pytest.skip(f"{folder.name} is no format of this package")
    chat, compared = chat_format(folder.name, ours(folder).tokenizer), 0
    for thinking in (None, False, True) if chat.can_switch else (None,):
        for key in WITHOUT_CONTROL_SPELLINGS:
            conversation = CONVERSATIONS[key] | {"tools": ()}
            expected = rendered(folder, conversation, {} if thinking is None else {"thinking": thinking})
            if (folder.name, key) not in DEPARTURES:
                assert chat.prompt(read_messages(conversation), thinking=thinking) in expected, key
                compared += 1
    print(folder.name, compared, "conversations equal")


@each_folder
def test_trained_turns_of_a_shipped_template_follow_their_prompt_ids(folder):
    chat, compared = ours(folder), 0
    for conversation in CONVERSATIONS.values():
        messages = read_messages(conversation)
        turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
        try:
            examples = chat.example(messages)
        except RequestError as error:
            reasons = (
                *EXPECTED_REFUSALS,
                "single tool",
                *(["cannot be used for training"] if "rounds" in conversation["key"] else []),
            )
            assert not turns or 0 in turns or any(reason in str(error) for reason in reasons), error
            continue
        trained_text = ""
        for ids, loss_mask in examples:
            trained_text += chat.tokenizer.decode(
                [token for token, is_trained in zip(ids, loss_mask, strict=True) if is_trained]
            )
            starts = [i for i in range(1, len(ids)) if loss_mask[i] > loss_mask[i - 1]]
            prompts = [chat.prompt(messages[:index], (), thinking) for index in turns for thinking in switched(chat)]
            assert all(ids[:start] in prompts for start in starts), conversation["key"]
            assert loss_mask[-1] == 1 and ids[-1] in chat.stop_token_ids
        for index in turns:
            assert with_reasoning(messages[index]).content.strip() in trained_text, conversation["key"]
            assert (messages[index].reasoning or "") in trained_text
        compared += 1
    print(folder.name, compared, "conversations compared")
    assert compared >= 9


def switched(chat):
    return (True, False) if chat.can_switch else (None,)
