"""Prompts equal to those of transformers, for tokenizers and templates as they are published.

THINKSTACK_TOKENIZERS is a folder of folders, each with a tokenizer.json and a tokenizer_config.json that holds the
template. A folder that bears the name of a format of ours is asked in that format too.
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
TALKS = {talk["key"]: talk for talk in conversations()}
PLAIN = [key for key, talk in TALKS.items() if not talk.get("spells")]
SPELT = [key for key, talk in TALKS.items() if talk.get("spells")]
UNSAID = ("no place for tools", "writes no tool calls", "leaves out what is said")
"""Why we refuse a conversation that transformers renders with something missing."""
DEPARTURES = {("r1", "two rounds of calls")}
"""R1's own template never begins a second round of calls."""

pytestmark = pytest.mark.skipif(
    not FOLDERS, reason="THINKSTACK_TOKENIZERS names no folder with tokenizers and their templates"
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


def rendered(folder, talk, switches):
    """Every way in which transformers can be told of this conversation that its template takes, as ids."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer, found = theirs(folder), []
    for as_text, without_content in product((False, True), repeat=2) if "tool_calls" in str(talk) else [(True, False)]:
        try:
            texts, _ = render_jinja_template(
                [as_request(talk, as_text, without_content)],
                tools=schemas(talk),
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
            chat.prompt(read_messages(TALKS["question"]), thinking=thinking)
        return
    switches = {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
    compared = 0
    for key in PLAIN:
        talk = TALKS[key]
        expected = rendered(folder, talk, switches)
        try:
            ids = chat.prompt(read_messages(talk), read_tools(talk), thinking)
        except RequestError as error:
            is_refused = all(isinstance(said, str) for said in expected)
            assert is_refused or any(reason in str(error) for reason in UNSAID), (key, error)
            continue
        assert ids in expected, (key, chat.tokenizer.decode(ids))
        calls = [call.arguments.strip("{}") for message in read_messages(talk) for call in message.tool_calls]
        assert all(call in chat.tokenizer.decode(ids) for call in calls), key
        compared += 1
    print(folder.name, thinking, compared, "conversations equal")
    assert compared >= 20


@each_folder
@pytest.mark.parametrize("key", SPELT)
def test_text_that_spells_control_tokens_stays_text_as_with_sanitized_input(folder, key):
    """transformers cuts the text around each spelling, so ids differ and text and control tokens must not."""
    chat, tokenizer, talk = ours(folder), theirs(folder), TALKS[key]
    expected = tokenizer.apply_chat_template(
        as_request(talk), add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
    known = {tokenizer.convert_tokens_to_ids(token) for token in tokenizer._get_control_tokens(tokenizer.chat_template)}
    ids = chat.prompt(read_messages(talk))
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
        for key in PLAIN:
            talk = TALKS[key] | {"tools": ()}
            expected = rendered(folder, talk, {} if thinking is None else {"thinking": thinking})
            if (folder.name, key) not in DEPARTURES:
                assert chat.prompt(read_messages(talk), thinking=thinking) in expected, key
                compared += 1
    print(folder.name, compared, "conversations equal")


@each_folder
def test_what_a_shipped_template_teaches_is_each_turn_after_the_ids_that_ask_for_it(folder):
    chat, compared = ours(folder), 0
    for talk in TALKS.values():
        messages = read_messages(talk)
        turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
        try:
            examples = chat.example(messages)
        except RequestError as error:
            reasons = (*UNSAID, "single tool", *(["nothing can be learnt"] if "rounds" in talk["key"] else []))
            assert not turns or 0 in turns or any(reason in str(error) for reason in reasons), error
            continue
        said = ""
        for ids, loss_mask in examples:
            said += chat.tokenizer.decode(
                [token for token, is_trained in zip(ids, loss_mask, strict=True) if is_trained]
            )
            starts = [i for i in range(1, len(ids)) if loss_mask[i] > loss_mask[i - 1]]
            prompts = [chat.prompt(messages[:index], (), thinking) for index in turns for thinking in switched(chat)]
            assert all(ids[:start] in prompts for start in starts), talk["key"]
            assert loss_mask[-1] == 1 and ids[-1] in chat.stop_token_ids
        for index in turns:
            assert with_reasoning(messages[index]).content.strip() in said, talk["key"]
            assert (messages[index].reasoning or "") in said
        compared += 1
    print(folder.name, compared, "conversations learnt")
    assert compared >= 9


def switched(chat):
    return (True, False) if chat.can_switch else (None,)
