"""Shipped chat templates with more written into them: worked examples, an instruction, the start of the answer.

A template is text, so what a model was trained to be asked with stays in its checkpoint, and every program that runs
the template asks the same way.
"""

import json
from collections.abc import Sequence

from thinkstack.text.tokenizer import THINK_CLOSE


def asked_with(template: str, preamble: str, shots: Sequence[tuple[str, str]], prefill: str) -> str:
    """`template` that puts a system message and answered questions before every conversation and begins the answer.

    preamble: the system message; empty leaves it out. shots: questions and their answers. prefill: text that every
    answer begins with, written by the prompt.
    """
    before = [{"role": "system", "content": preamble}] if preamble else []
    for question, answer in shots:
        before += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if before:
        template = f"{{% set messages = {_literal(before)} + messages %}}{template}"
    if prefill:
        template += f"{{% if add_generation_prompt %}}{{{{ {_literal(prefill)} }}}}{{% endif %}}"
    return template


def without_thinking(template: str) -> str:
    """`template` that leaves the thinking of earlier answers out, as DeepSeek-R1's does."""
    return (
        "{% set kept = namespace(messages=[]) %}{% for message in messages %}"
        f"{{% if message['role'] == 'assistant' and '{THINK_CLOSE}' in message['content'] %}}"
        "{% set kept.messages = kept.messages + [{'role': 'assistant', "
        f"'content': message['content'].split('{THINK_CLOSE}')[-1].lstrip('\\n')}}] %}}"
        "{% else %}{% set kept.messages = kept.messages + [message] %}{% endif %}{% endfor %}"
        "{% set messages = kept.messages %}" + template
    )


def _literal(value: object) -> str:
    """A list, table or string as Jinja writes it, which within a block reads braces as any other characters."""
    return json.dumps(value, ensure_ascii=False)
