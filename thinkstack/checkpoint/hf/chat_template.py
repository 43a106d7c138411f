"""Jinja templates that let other programs write the prompts of our chat formats.

Hugging Face renders a conversation to one string and then finds control tokens in it by their spelling. That gives our
ids as long as a format writes no control token's spelling as plain text, and people do not type one. What a template
would get wrong for every conversation is not shipped: `template_of` compares ids first.
"""

import json

from thinkstack.text.chat import ZERO_PREAMBLE, chat_format
from thinkstack.text.deepseek import STYLES, TOOLS_HEADING, TOOLS_RULES, Style
from thinkstack.text.template_sandbox import render
from thinkstack.text.tokenizer import (
    ASSISTANT,
    BOS,
    CALL_BEGIN,
    CALL_END,
    CALL_SEP,
    CALLS_BEGIN,
    CALLS_END,
    EOS,
    OUTPUT_BEGIN,
    OUTPUT_END,
    OUTPUTS_BEGIN,
    OUTPUTS_END,
    THINK_CLOSE,
    THINK_OPEN,
    USER,
    Tokenizer,
)
from thinkstack.types import Message

_ZERO = (
    "{{ bos_token }}PREAMBLE"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}User: {% elif message['role'] == 'assistant' %}Assistant: {% endif %}"
    "{{ message['content'] + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)

_GUARD = (
    "{% if add_generation_prompt and (not messages or messages[-1]['role'] not in ['user', 'tool']) %}"
    "{{ raise_exception('the last message must come from the user or a tool; nothing else asks for an answer') }}"
    "{% endif %}"
)

_PROBE = (
    Message(role="system", content="Be brief."),
    Message(role="user", content="What is 12 + 30?"),
    Message(role="assistant", content="42"),
    Message(role="user", content="And 4 more?\nWhy?"),
)


def template_text(name: str) -> str:
    """Jinja source of the format `name`, one of text.chat.FORMATS."""
    if name.startswith("r1_zero"):
        return _ZERO.replace("PREAMBLE", ZERO_PREAMBLE if name == "r1_zero" else "")
    style = STYLES[name.removesuffix("_think")]
    default = (
        "{% if thinking is not defined %}{% set thinking = " + str(name.endswith("_think")).lower() + " %}{% endif %}"
    )
    return "".join(
        (
            default if style.thinking == "switched by the prompt" else "",
            "{{ bos_token }}",
            _GUARD,
            _system(style),
            "{% set ns = namespace(last='') %}{% for message in messages %}",
            _user(style),
            _assistant(style),
            _output(style),
            "{% if message['role'] != 'system' %}{% set ns.last = message['role'] %}{% endif %}",
            "{% endfor %}",
            _question(style),
        )
    )


def _said(*texts: str) -> str:
    """A statement that writes these expressions one after the other."""
    return "{{ " + " + ".join(text for text in texts if text) + " }}"


def _literal(*texts: str) -> str:
    return json.dumps("".join(texts), ensure_ascii=False)


def _call(style: Style, name: str, arguments: str) -> str:
    """One call; name and arguments are expressions."""
    begin = _literal(CALL_BEGIN, f"function{CALL_SEP}" if style.fenced else "")
    between, end = ("\n```json\n", "\n```") if style.fenced else (CALL_SEP, "")
    return _said(begin, name, _literal(between), arguments, _literal(end, CALL_END))


def _system(style: Style) -> str:
    return (
        "{% set texts = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list %}"
        "{{ texts | join('\\n\\n') }}"
        "{% if tools %}{% if texts %}{{ '\\n\\n' }}{% endif %}"
        + _said(_literal(TOOLS_HEADING))
        + "{% for tool in tools %}{% set tool = tool['function'] %}"
        + _said(_literal("\n### "), "tool['name']", _literal("\nDescription: "), "tool['description']")
        + _said(_literal("\n\nParameters: "), "tool['parameters'] | tojson", _literal("\n"))
        + "{% endfor %}"
        + _said(_literal(TOOLS_RULES, CALLS_BEGIN))
        + _call(style, _literal("NAME"), _literal("ARGUMENTS"))
        + _said(_literal(CALLS_END))
        + "{% endif %}"
    )


def _user(style: Style) -> str:
    header = _literal(ASSISTANT) if style.header == "after users" else ""
    return "{% if message['role'] == 'user' %}" + _said(_literal(USER), "message['content']", header)


def _assistant(style: Style) -> str:
    leads = {"after users": "", "before answers": _said(_literal(ASSISTANT))}
    first = "{% if ns.last == 'user' %}" + _said(_literal(ASSISTANT, THINK_CLOSE)) + "{% endif %}"
    content = "{% set content = message['content'] or '' %}"
    cut = (
        f"{{% if '{THINK_CLOSE}' in content and (content.lstrip().startswith('{THINK_OPEN}') or "
        f"content.lstrip().startswith('{THINK_CLOSE}')) %}}"
        f"{{% set content = content.split('{THINK_CLOSE}', 1)[1] %}}{{% endif %}}"
    )
    more = _said(_literal("\n")) if style.fenced else ""
    return (
        "{% elif message['role'] == 'assistant' %}{% if ns.last == 'tool' %}"
        + (_said(_literal(OUTPUTS_END)) if style.fenced else "")
        + "{% else %}"
        + leads.get(style.header, first)
        + "{% endif %}"
        + content
        + (cut if style.drops_thinking else "")
        + "{{ content }}{% for call in message['tool_calls'] or [] %}{% set call = call['function'] %}"
        + "{% set arguments = call['arguments'] if call['arguments'] is string else call['arguments'] | tojson %}"
        + "{% if loop.first %}"
        + _said(_literal(CALLS_BEGIN))
        + "{% else %}"
        + more
        + "{% endif %}"
        + _call(style, "call['name']", "arguments")
        + "{% if loop.last %}"
        + _said(_literal(CALLS_END))
        + "{% endif %}{% endfor %}{{ eos_token }}"
    )


def _output(style: Style) -> str:
    wrapped = (
        "{% if ns.last != 'tool' %}"
        + _said(_literal(OUTPUTS_BEGIN))
        + "{% else %}"
        + _said(_literal(style.between_outputs))
        + "{% endif %}"
    )
    output = _said(_literal(OUTPUT_BEGIN), "message['content']", _literal(OUTPUT_END))
    return "{% elif message['role'] == 'tool' %}" + (wrapped if style.fenced else "") + output + "{% endif %}"


def _question(style: Style) -> str:
    """What asks for an answer."""
    openings = {
        "written by the model": "",
        "begun by the prompt": _said(_literal(THINK_OPEN, style.gap)),
        "switched by the prompt": f"{{{{ '{THINK_OPEN}' if thinking else '{THINK_CLOSE}' }}}}",
    }
    return (
        "{% if add_generation_prompt %}{% if ns.last == 'tool' %}"
        + (_said(_literal(OUTPUTS_END)) if style.fenced else "")
        + "{% else %}"
        + (_said(_literal(ASSISTANT)) if style.header != "after users" else "")
        + openings[style.thinking]
        + "{% endif %}{% endif %}"
    )


def template_of(name: str, tokenizer: Tokenizer) -> str | None:
    """The template of the format `name`, or None if text cannot give that format's ids with this tokenizer.

    Raises ConfigError for an unknown name or a tokenizer without the format's control tokens.
    """
    chat = chat_format(name, tokenizer)
    template = template_text(name)
    return (
        template
        if tokenizer.encode_pieces(tokenizer.split_controls(_probed(template))) == chat.prompt(_PROBE)
        else None
    )


def _probed(template: str) -> str:
    """The probe conversation in text."""
    messages = [{"role": m.role, "content": m.content} for m in _PROBE]
    return render(template, messages=messages, bos_token=BOS, eos_token=EOS, add_generation_prompt=True)
