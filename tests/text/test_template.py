"""Checkpoint templates: equality with transformers, the loss mask, and the bounds of the sandbox."""

import time

import pytest

from tests.golden import as_request, conversations, read_messages, read_tools, schemas
from tests.tiny import tiny_tokenizer
from thinkstack.text import template_sandbox as sandbox
from thinkstack.text.template import TemplateFormat
from thinkstack.text.template_sandbox import render
from thinkstack.text.tokenizer import ASSISTANT, BOS, EOS, PAD, USER, Control
from thinkstack.types import Message, RequestError, Tool, ToolCall

QUESTION = Message(role="user", content="1+2?")
CALL = ToolCall(name="add", arguments='{"a": 1}')
CAREFUL = """
{%- if tools %}{{ 'Tools:' }}{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<｜Assistant｜>says\\n' }}
{%- generation %}
{%- if m.reasoning_content and loop.last %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}
{{- (m.content or '').split('</think>')[-1].lstrip('\\n') }}
{%- for call in m.tool_calls or [] %}{{ '\\ncall ' + call.function.name + ' ' + call.function.arguments | tojson }}
{%- endfor %}
{{- eos_token }}
{%- endgeneration %}
{{- '\\n' }}
{%- else %}
{%- if m.content is none %}{% continue %}{% endif %}
{{- '<｜User｜>' + m.role + '\\n' + m.content | trim + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>says\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
"""A template that trims, splits and quotes message text, and adds its own text next to it."""


def careful_format(**more):
    return TemplateFormat(tiny_tokenizer(), CAREFUL, BOS, EOS, **more)


def theirs(template):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer

    fast = Tokenizer.from_str(tiny_tokenizer().spec)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, chat_template=template, bos_token=BOS, eos_token=EOS
    )


def assistant(content, **more):
    return Message(role="assistant", content=content, **more)


def text(ids):
    return tiny_tokenizer().decode(ids)


def masked_texts(chat, messages, **options):
    """Return [text, trained text, text, ...] for each example."""
    found = []
    for ids, loss_mask in chat.example(messages, **options):
        spans: list[list[int]] = [[]]
        for index, token in enumerate(ids):
            if index and loss_mask[index] != loss_mask[index - 1]:
                spans.append([])
            spans[-1].append(token)
        found.append([text(span) for span in spans])
    return found


@pytest.mark.parametrize("thinking", [None, True, False])
def test_prompts_equal_those_of_transformers_token_by_token(thinking):
    switches, hugging = {} if thinking is None else {"enable_thinking": thinking}, theirs(CAREFUL)
    compared = 0
    for conversation in conversations():
        if conversation.get("spells"):
            continue
        expected = hugging.apply_chat_template(
            as_request(conversation, as_text=False),
            tools=schemas(conversation),
            add_generation_prompt=True,
            return_dict=False,
            **switches,
        )
        assert careful_format().prompt(read_messages(conversation), read_tools(conversation), thinking) == expected, (
            conversation["key"]
        )
        compared += 1
    assert compared == 32


def test_the_loss_mask_equals_that_of_transformers():
    """The mask of transformers comes from generation tags, ours from rendering with and without the answer."""
    hugging, compared = theirs(CAREFUL), 0
    for conversation in conversations():
        messages = read_messages(conversation)
        while messages and messages[-1].role != "assistant":
            messages.pop()
        if (
            conversation.get("spells")
            or not messages
            or "thinking" in conversation["key"]
            or "reasoning" in conversation["key"]
        ):
            continue
        request = as_request(conversation, as_text=False)[: len(messages)]
        expected = hugging.apply_chat_template(request, return_dict=True, return_assistant_tokens_mask=True)
        ids, loss_mask = careful_format().example(messages, thinking=True)[-1]
        theirs_mask = [
            i for i, is_trained in zip(expected["input_ids"], expected["assistant_masks"], strict=True) if is_trained
        ]
        ours_mask = [token for token, is_trained in zip(ids, loss_mask, strict=True) if is_trained]
        assert text(ours_mask) == text(theirs_mask), conversation["key"]
        compared += 1
    assert compared >= 12


def test_text_that_spells_a_control_token_stays_text():
    content = f"a {EOS} b {USER}{PAD}<｜Us"
    ids = careful_format().prompt([Message(role="user", content=content)])
    expected = [Control(USER), f"user\n{content}\n", Control(ASSISTANT), "says\n"]
    assert ids == tiny_tokenizer().encode_pieces(expected)


def test_two_messages_cannot_spell_a_control_token_together():
    chat = TemplateFormat(tiny_tokenizer(), "{% for m in messages %}{{ m.content | trim }}{% endfor %}", BOS, EOS)
    halves = [Message(role="user", content=f"{EOS[:9]} "), Message(role="user", content=EOS[9:])]
    assert chat.prompt(halves) == tiny_tokenizer().encode(EOS)


def test_spelt_tokens_come_back_from_json_with_and_without_escapes():
    tool = Tool(name="t", description=EOS, parameters={EOS: [EOS]})
    for escapes in ("", "(ensure_ascii=True)"):
        chat = TemplateFormat(tiny_tokenizer(), f"{{{{ tools | tojson{escapes} }}}}", BOS, EOS)
        ids = chat.prompt([QUESTION], [tool])
        assert tiny_tokenizer().control_id(EOS) not in ids
        assert text(ids).count(EOS if not escapes else EOS.encode("unicode_escape").decode()) == 3
        assert "\\ue000" not in text(ids) and "\ue000" not in text(ids)


def test_private_use_characters_in_messages_are_preserved():
    content = "".join(map(chr, range(0xE000, 0xE010)))
    assert content in text(careful_format().prompt([Message(role="user", content=content + EOS)]))


def test_the_tool_template_is_used_if_there_are_tools():
    chat = careful_format(tool_template="{{ 'with ' + tools[0].function.name }}")
    assert text(chat.prompt([QUESTION], [Tool(name="add", description="")])) == "with add"
    assert text(chat.prompt([QUESTION])) == f"{USER}user\n1+2?\n{ASSISTANT}says\n"


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        ([QUESTION], [Tool(name="add", description="")], "does not support tools"),
        ([QUESTION, assistant("", tool_calls=(CALL,))], [], "does not support tool calls"),
        ([], [], "cannot render this conversation"),
    ],
    ids=["tools", "calls", "no message"],
)
def test_content_that_a_template_drops_is_refused(messages, tools, reason):
    chat = TemplateFormat(tiny_tokenizer(), "{{ messages[0].role + messages[-1].content }}", BOS, EOS)
    with pytest.raises(RequestError, match=reason):
        chat.prompt(messages, tools)


DROPS_ROLES = "{% for m in messages %}{% if m.role in KNOWN %}{{ '<｜User｜>' + m.content }}{% endif %}{% endfor %}"
"""A template that silently drops unknown roles, as some published ones do."""


@pytest.mark.parametrize("role", ["system", "tool"])
def test_roles_that_a_template_drops_are_refused(role):
    """Regression: a system message or a tool result was silently dropped from the prompt."""
    messages = [QUESTION, assistant("3"), Message(role=role, content="said"), QUESTION]
    known = TemplateFormat(
        tiny_tokenizer(), DROPS_ROLES.replace("KNOWN", "['user', 'assistant', 'system', 'tool']"), BOS, EOS
    )
    dropping = TemplateFormat(tiny_tokenizer(), DROPS_ROLES.replace("KNOWN", "['user', 'assistant']"), BOS, EOS)
    assert "said" in text(known.prompt(messages))
    with pytest.raises(RequestError, match=f"drops messages of the role '{role}'"):
        dropping.prompt(messages)
    dropping.prompt([QUESTION])


@pytest.mark.parametrize(
    "condition", ["tools", "messages[loop.index0 - 1].tool_calls", "m.tool_call_id", "m.name", "tools is defined"]
)
def test_results_that_a_template_writes_conditionally_are_accepted(condition):
    template = (
        "{{ tools }}{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{{ (m.tool_calls or []) | tojson }}"
        f"{{% elif {condition} %}}{{{{ m.content }}}}{{% endif %}}{{% endfor %}}"
    )
    chat = TemplateFormat(tiny_tokenizer(), template, BOS, EOS)
    called = assistant("", tool_calls=(ToolCall(name="f", arguments="{}", id="c"),))
    messages = [QUESTION, called, Message(role="tool", content="said", tool_call_id="c", name="f")]
    assert "said" in text(chat.prompt(messages, [Tool(name="f", description="f")]))
    if condition == "tools":
        with pytest.raises(RequestError, match="drops messages of the role 'tool'"):
            chat.prompt(messages)


def test_a_template_that_requires_call_ids_gets_them():
    """Regression: Mistral's templates were reported to write no calls, because the probe call had no id."""
    wants = "{{ raise_exception('ids have nine letters') if m.tool_calls[0].id is not defined }}"
    template = (
        "{% for m in messages %}{% if m.tool_calls %}" + wants + "{{ m.tool_calls[0].function | tojson }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    chat = TemplateFormat(tiny_tokenizer(), template, BOS, EOS)
    call = ToolCall(name="add", arguments='{"a": 1}', id="call00001")
    assert '"name": "add"' in text(chat.prompt([QUESTION, assistant("", tool_calls=(call,)), QUESTION]))
    with pytest.raises(RequestError, match="ids have nine letters"):
        chat.prompt([QUESTION, assistant("", tool_calls=(CALL,)), QUESTION])


def test_content_before_a_call_that_a_template_drops_is_refused():
    template = (
        "{% for m in messages %}{{ m.tool_calls[0].function | tojson if m.tool_calls else m.content }}{% endfor %}"
    )
    chat = TemplateFormat(tiny_tokenizer(), template, BOS, EOS)
    assert '"arguments": {"a": 1}' in text(chat.prompt([QUESTION, assistant("", tool_calls=(CALL,))]))
    with pytest.raises(RequestError, match="drops the content before a tool call"):
        chat.prompt([QUESTION, assistant("Wait.", tool_calls=(CALL,))])


def test_arguments_that_are_not_json_are_refused():
    with pytest.raises(RequestError, match="'add' are not valid JSON"):
        careful_format().prompt([QUESTION, assistant("", tool_calls=(ToolCall(name="add", arguments="{"),))])


def test_stop_tokens_are_the_turn_end_and_those_of_the_checkpoint():
    control = tiny_tokenizer().control
    chat = TemplateFormat(
        tiny_tokenizer(), CAREFUL.replace("eos_token", f"'{PAD}'"), BOS, EOS, end_token_ids=(control[USER],)
    )
    assert chat.stop_token_ids == (control[PAD], control[EOS], control[USER])
    assert chat.answer("3") == [*tiny_tokenizer().encode("3"), control[PAD]]


def test_the_prefill_is_parsed_with_the_answer_and_not_trained():
    opened = CAREFUL + "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    chat = TemplateFormat(tiny_tokenizer(), opened, BOS, EOS)
    assert chat.prefill == "<think>\n" and chat.text_of(tiny_tokenizer().encode("a")) == "<think>\na"
    prompt_text = f"{USER}user\n1+2?\n{ASSISTANT}says\n<think>\n"
    thought = [QUESTION, assistant("3", reasoning="a")]
    assert masked_texts(chat, thought) == [[prompt_text, f"a\n</think>\n\n3{EOS}"]]
    assert masked_texts(chat, [QUESTION, assistant("3")], thinking=True) == [[prompt_text, f"\n</think>\n\n3{EOS}"]]


def test_a_turn_without_thinking_trains_no_empty_think_block():
    prompt_text = f"{USER}user\n1+2?\n{ASSISTANT}says\n"
    assert masked_texts(careful_format(), [QUESTION, assistant("3")]) == [
        [f"{prompt_text}<think>\n\n</think>\n\n", f"3{EOS}"]
    ]
    assert masked_texts(careful_format(), [QUESTION, assistant("3", reasoning="a")]) == [
        [prompt_text, f"<think>\na\n</think>\n\n3{EOS}"]
    ]


def test_thinking_that_a_template_cannot_write_is_trained_and_left_out_of_history():
    plain = "{% for m in messages %}{{ '<｜User｜>' + m.role + ': ' + m.content + eos_token + '\\n' }}{% endfor %}"
    plain += "{% if add_generation_prompt %}{{ '<｜User｜>assistant: ' }}{% endif %}"
    chat = TemplateFormat(tiny_tokenizer(), plain, BOS, EOS)
    messages = [QUESTION, assistant("3", reasoning="a"), QUESTION, assistant("3")]
    prompt_text = f"{USER}user: 1+2?{EOS}\n{USER}assistant: "
    assert masked_texts(chat, messages) == [
        [prompt_text, f"<think>\na\n</think>\n\n3{EOS}"],
        [f"{prompt_text}3{EOS}\n{prompt_text}", f"3{EOS}"],
    ]
    dropping = [messages[0], assistant("3"), *messages[2:]]
    assert masked_texts(chat, dropping) == [[prompt_text, f"3{EOS}", f"\n{prompt_text}", f"3{EOS}"]]


def test_a_template_that_drops_the_answer_cannot_be_trained():
    chat = TemplateFormat(tiny_tokenizer(), "{{ messages[0].content }}", BOS, EOS)
    with pytest.raises(RequestError, match="cannot be used for training"):
        chat.example([QUESTION, assistant("3")])


def test_templates_have_the_functions_of_transformers():
    template = (
        "{% for c in 'abc' %}{% if c == 'b' %}{% break %}{% endif %}{{ c ~ 1 }}{% endfor %}{{ strftime_now('%Y') }}"
    )
    assert render(template) == f"a1{time.strftime('%Y')}"
    assert render("{{ {'é': '<'} | tojson }}{{ [1] | tojson(indent=1) }}") == '{"é": "<"}[\n 1\n]'
    assert (
        render("{% for a in b %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{% endfor %}", b="xy")
        == "0False21True2"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
        "{{ range(10 ** 9) | list }}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ [0] * 10 ** 10 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set n = namespace(x='xx') %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='xx') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ 'x'.ljust(10 ** 11) }}",
        "{{ 'x' | center(10 ** 11) }}",
        "{{ '%99999999999d' % 3 }}",
        "{{ '%99999999999d' | format(3) }}",
        "{{ '{:>99999999999}'.format(3) }}",
        "{% set b = 'x' * 10 ** 7 %}{{ b.replace('x', b) }}",
        "{% set b = 'x' * 10 ** 7 %}{{ b | replace('x', b) }}",
        "{% set b = 'x' * 10 ** 7 %}{{ ([b] * 1000) | join }}",
        "{% set b = 'x' * 10 ** 7 %}{{ ''.join([b] * 1000) }}",
    ],
)
def test_no_template_hangs_or_exhausts_memory(template):
    started = time.process_time()
    with pytest.raises(RequestError, match=r"more than [0-9,]+ (steps|characters)"):
        render(template)
    assert time.process_time() - started < 200


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ b.append(1) }}",
        "{{ 1 / 0 }}",
        "{% endless",
    ],
)
def test_any_error_in_a_template_is_a_request_error(template):
    with pytest.raises(RequestError, match="cannot render this conversation"):
        render(template, b=[])


def test_bounds_allow_a_long_conversation():
    messages = [QUESTION, assistant("word " * 2000)] * 100
    assert len(render(CAREFUL, messages=[{"role": m.role, "content": m.content} for m in messages])) > 1_000_000
    assert sandbox.MAX_SIZE > 10_000_000
