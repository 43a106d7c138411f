"""Jinja templates with which other programs can write the prompts of our chat formats.

transformers renders a conversation to one string and then finds control tokens in it by their spelling. The ids equal
ours unless a format or a message contains the spelling of a control token as plain text. `template_of` compares the ids
of a probe conversation and returns no template if they differ.
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
    "{{ raise_exception('the last message must come from the user or a tool; add a user message') }}"
    "{% endif %}"
)

_PROBE = (
    Message(role="system", content="Be brief."),
    Message(role="user", content="What is 12 + 30?"),
    Message(role="assistant", content="42"),
    Message(role="user", content="And 4 more?\nWhy?"),
)


def template_text(name: str) -> str:
    """Return the Jinja source of the format `name`, one of text.chat.FORMATS."""
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
            _generation_prompt(style),
        )
    )


def _write(*texts: str) -> str:
    """Return a Jinja statement that writes these expressions in order."""
    return "{{ " + " + ".join(text for text in texts if text) + " }}"


def _literal(*texts: str) -> str:
    return json.dumps("".join(texts), ensure_ascii=False)


def _call(style: Style, name: str, arguments: str) -> str:
    """Return the Jinja source of one call; name and arguments are expressions."""
    begin = _literal(CALL_BEGIN, f"function{CALL_SEP}" if style.fenced else "")
    between, end = ("\n```json\n", "\n```") if style.fenced else (CALL_SEP, "")
    return _write(begin, name, _literal(between), arguments, _literal(end, CALL_END))


def _system(style: Style) -> str:
    return (
        "{% set texts = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list %}"
        "{{ texts | join('\\n\\n') }}"
        "{% if tools %}{% if texts %}{{ '\\n\\n' }}{% endif %}"
        + _write(_literal(TOOLS_HEADING))
        + "{% for tool in tools %}{% set tool = tool['function'] %}"
        + _write(_literal("\n### "), "tool['name']", _literal("\nDescription: "), "tool['description']")
        + _write(_literal("\n\nParameters: "), "tool['parameters'] | tojson", _literal("\n"))
        + "{% endfor %}"
        + _write(_literal(TOOLS_RULES, CALLS_BEGIN))
        + _call(style, _literal("NAME"), _literal("ARGUMENTS"))
        + _write(_literal(CALLS_END))
        + "{% endif %}"
    )


def _user(style: Style) -> str:
    header = _literal(ASSISTANT) if style.header == "after users" else ""
    return "{% if message['role'] == 'user' %}" + _write(_literal(USER), "message['content']", header)


def _assistant(style: Style) -> str:
    headers = {"after users": "", "before answers": _write(_literal(ASSISTANT))}
    first = "{% if ns.last == 'user' %}" + _write(_literal(ASSISTANT, THINK_CLOSE)) + "{% endif %}"
    content = "{% set content = message['content'] or '' %}"
    strip_thinking = (
        f"{{% if '{THINK_CLOSE}' in content and (content.lstrip().startswith('{THINK_OPEN}') or "
        f"content.lstrip().startswith('{THINK_CLOSE}')) %}}"
        f"{{% set content = content.split('{THINK_CLOSE}', 1)[1] %}}{{% endif %}}"
    )
    more = _write(_literal("\n")) if style.fenced else ""
    return (
        "{% elif message['role'] == 'assistant' %}{% if ns.last == 'tool' %}"
        + (_write(_literal(OUTPUTS_END)) if style.fenced else "")
        + "{% else %}"
        + headers.get(style.header, first)
        + "{% endif %}"
        + content
        + (strip_thinking if style.drops_thinking else "")
        + "{{ content }}{% for call in message['tool_calls'] or [] %}{% set call = call['function'] %}"
        + "{% set arguments = call['arguments'] if call['arguments'] is string else call['arguments'] | tojson %}"
        + "{% if loop.first %}"
        + _write(_literal(CALLS_BEGIN))
        + "{% else %}"
        + more
        + "{% endif %}"
        + _call(style, "call['name']", "arguments")
        + "{% if loop.last %}"
        + _write(_literal(CALLS_END))
        + "{% endif %}{% endfor %}{{ eos_token }}"
    )


def _output(style: Style) -> str:
    wrapped = (
        "{% if ns.last != 'tool' %}"
        + _write(_literal(OUTPUTS_BEGIN))
        + "{% else %}"
        + _write(_literal(style.between_outputs))
        + "{% endif %}"
    )
    output = _write(_literal(OUTPUT_BEGIN), "message['content']", _literal(OUTPUT_END))
    return "{% elif message['role'] == 'tool' %}" + (wrapped if style.fenced else "") + output + "{% endif %}"


def _generation_prompt(style: Style) -> str:
    """Return the Jinja source of the generation prompt."""
    openings = {
        "written by the model": "",
        "begun by the prompt": _write(_literal(THINK_OPEN, style.gap)),
        "switched by the prompt": f"{{{{ '{THINK_OPEN}' if thinking else '{THINK_CLOSE}' }}}}",
    }
    return (
        "{% if add_generation_prompt %}{% if ns.last == 'tool' %}"
        + (_write(_literal(OUTPUTS_END)) if style.fenced else "")
        + "{% else %}"
        + (_write(_literal(ASSISTANT)) if style.header != "after users" else "")
        + openings[style.thinking]
        + "{% endif %}{% endif %}"
    )


def template_of(name: str, tokenizer: Tokenizer) -> str | None:
    """Return the template of the format `name`, or None if a template cannot give the ids of the format.

    Raises ConfigError for an unknown name or a tokenizer without the format's control tokens.
    """
    chat = chat_format(name, tokenizer)
    template = template_text(name)
    return (
        template
        if tokenizer.encode_pieces(tokenizer.split_controls(_render_probe(template))) == chat.prompt(_PROBE)
        else None
    )


def _render_probe(template: str) -> str:
    """Render the probe conversation."""
    messages = [{"role": m.role, "content": m.content} for m in _PROBE]
    return render(template, messages=messages, bos_token=BOS, eos_token=EOS, add_generation_prompt=True)
