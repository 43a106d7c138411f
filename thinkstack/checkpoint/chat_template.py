"""Jinja templates that let other programs write the prompts of our chat formats.

Hugging Face renders a conversation to one string and then finds control tokens in it by their spelling. That gives our
ids as long as a format writes no control token's spelling as plain text, and people do not type one. What a template
would get wrong for every conversation is not shipped: `template_of` compares ids first.
"""

import jinja2
import jinja2.sandbox
import tokenizers

from thinkstack.text.chat import ZERO_PREAMBLE, chat_format
from thinkstack.text.tokenizer import ASSISTANT, BOS, EOS, THINK_OPEN, USER, Tokenizer
from thinkstack.types import Message

_ZERO = (
    "{{ bos_token }}PREAMBLE"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}User: {% elif message['role'] == 'assistant' %}Assistant: {% endif %}"
    "{{ message['content'] + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)

_DEEPSEEK = (
    "{{ bos_token }}"
    "{% if add_generation_prompt and (not messages or messages[-1]['role'] != 'user') %}"
    "{{ raise_exception('the last message must come from the user; nothing else asks for an answer') }}"
    "{% endif %}"
    "{{ messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\\n\\n') }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANTPREFILL' }}{% endif %}"
)
_DEEPSEEK = _DEEPSEEK.replace("ASSISTANT", ASSISTANT).replace("USER", USER)

TEMPLATES = {
    "r1_zero": _ZERO.replace("PREAMBLE", ZERO_PREAMBLE),
    "r1_zero_short": _ZERO.replace("PREAMBLE", ""),
    "v3": _DEEPSEEK.replace("PREFILL", ""),
    "r1": _DEEPSEEK.replace("PREFILL", f"{THINK_OPEN}\\n"),
}
"""Jinja source of each format of text.chat."""

_PROBE = (
    Message(role="system", content="Be brief."),
    Message(role="user", content="What is 12 + 30?"),
    Message(role="assistant", content="42"),
    Message(role="user", content="And 4 more?\nWhy?"),
)


def template_of(name: str, tokenizer: Tokenizer) -> str | None:
    """The template of the format `name`, or None if text cannot give that format's ids with this tokenizer.

    Raises ConfigError for an unknown name or a tokenizer without the format's control tokens.
    """
    ours = chat_format(name, tokenizer).prompt(_PROBE)
    template = TEMPLATES[name]
    theirs = tokenizers.Tokenizer.from_str(tokenizer.spec).encode(render(template), add_special_tokens=False).ids
    return template if theirs == ours else None


def render(template: str) -> str:
    """The probe conversation in text."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": m.role, "content": m.content} for m in _PROBE]
    return environment.from_string(template).render(
        messages=messages, bos_token=BOS, eos_token=EOS, add_generation_prompt=True
    )
