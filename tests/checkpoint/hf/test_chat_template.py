"""The Jinja templates that are saved with a checkpoint: they give the ids of our formats, here and in transformers."""

import json
from functools import cache
from pathlib import Path

import pytest
import tokenizers

from tests.golden import as_request, conversations, read_messages, read_tools, schemas
from tests.tiny import tiny_model
from thinkstack.checkpoint.hf.chat_template import template_of, template_text
from thinkstack.checkpoint.model import load_chat, save_model
from thinkstack.models.config import named
from thinkstack.text.chat import chat_format
from thinkstack.text.template import TemplateFormat
from thinkstack.text.tokenizer import BOS, CONTROL, EOS, TOOLS, train_tokenizer
from thinkstack.types import ConfigError, Message, Tool

OURS = ("v3", "r1", "r1_0528", "v3_1", "v3_1_think")


@cache
def tokenizer():
    return train_tokenizer(["the sum of 1 and 2 is 3, says the tool"] * 4, 380, control=(*CONTROL, *TOOLS))


def prompts_to_test(name):
    """Return (conversation, thinking) for all prompts that the format supports."""
    switches = (None, True, False) if chat_format(name, tokenizer()).can_switch else (None,)
    return [(case, thinking) for case in conversations() for thinking in switches]


@pytest.mark.parametrize("name", OURS)
def test_the_exported_template_gives_our_ids_in_transformers(name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer().spec),
        chat_template=template_text(name),
        bos_token=BOS,
        eos_token=EOS,
    )
    for case, thinking in prompts_to_test(name):
        if case.get("spells"):
            continue
        for as_text in (True, False):
            expected = theirs.apply_chat_template(
                as_request(case, as_text=as_text),
                tools=schemas(case),
                add_generation_prompt=True,
                return_dict=False,
                **({} if thinking is None else {"thinking": thinking}),
            )
            found = chat_format(name, tokenizer()).prompt(read_messages(case), read_tools(case), thinking)
            assert found == expected, (case["key"], thinking)


@pytest.mark.parametrize("name", OURS)
def test_the_exported_template_has_the_prompts_openings_and_ends_of_the_format(name):
    ours, read = chat_format(name, tokenizer()), TemplateFormat(tokenizer(), template_text(name), BOS, EOS)
    for case, thinking in prompts_to_test(name):
        messages, tools = read_messages(case), read_tools(case)
        assert read.prompt(messages, tools, thinking) == ours.prompt(messages, tools, thinking), case["key"]
        assert read.opening(messages, thinking) == ours.opening(messages, thinking), case["key"]
    assert (read.prefill, read.stop_token_ids, read.can_switch) == (ours.prefill, ours.stop_token_ids, ours.can_switch)


@pytest.mark.parametrize("name", OURS)
def test_the_exported_template_has_the_loss_mask_of_the_format(name):
    ours, read = chat_format(name, tokenizer()), TemplateFormat(tokenizer(), template_text(name), BOS, EOS)
    compared = 0
    for case in conversations():
        messages = read_messages(case)
        if messages[0].role != "assistant" and any(message.role == "assistant" for message in messages):
            assert read.example(messages) == ours.example(messages), case["key"]
            compared += 1
    assert compared >= 15


def test_a_vocabulary_without_tool_tokens_still_gets_its_template():
    plain = train_tokenizer(["the sum of 1 and 2 is 3"] * 4, 330)
    assert all(template_of(name, plain) == template_text(name) for name in OURS)


QUESTION = [Message(role="user", content="?")]
TWO = {"default": "plain{{ eos_token }}", "tool_use": "with {{ tools[0].function.name }}"}


def saved(folder: Path) -> Path:
    chat = TemplateFormat(tokenizer(), TWO["default"], BOS, EOS, TWO["tool_use"])
    save_model(folder, tiny_model(named("v3-tiny")), tokenizer(), chat)
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_template_for_tools_is_saved_and_read_by_its_name(tmp_path: Path):
    folder = saved(tmp_path / "model")
    assert load_chat(folder).tool_template == TWO["tool_use"]
    assert tokenizer().decode(load_chat(folder).prompt(QUESTION, [Tool(name="add", description="")])) == "with add"
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    assert theirs.chat_template == TWO


def test_a_template_for_tools_in_a_file_of_its_own_is_read(tmp_path: Path):
    folder = saved(tmp_path / "model")
    edit(folder / "tokenizer_config.json", chat_template="plain")
    assert load_chat(folder).tool_template == ""
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("from the file")
    assert load_chat(folder).tool_template == "from the file"


def test_all_end_tokens_of_generation_config_stop(tmp_path: Path):
    folder = saved(tmp_path / "model")
    edit(folder / "generation_config.json", eos_token_id=[1, 4])
    assert load_chat(folder).stop_token_ids == (1, 4)
    edit(folder / "generation_config.json", eos_token_id=2)
    assert load_chat(folder).stop_token_ids == (1, 2)


@pytest.mark.parametrize("ends", [[1, 99999], "1"])
def test_an_end_token_that_does_not_exist_is_refused(tmp_path: Path, ends: object):
    folder = saved(tmp_path / "model")
    edit(folder / "generation_config.json", eos_token_id=ends)
    with pytest.raises(ConfigError, match="eos_token_id"):
        load_chat(folder)
