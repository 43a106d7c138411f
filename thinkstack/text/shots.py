"""Chat templates extended with few-shot examples, a system message, or the start of the assistant turn.

The additions are part of the template's text, so they stay in the checkpoint, and every program that renders the
template sends the prompts that the model was trained with.
"""

import json
from collections.abc import Sequence

from thinkstack.text.tokenizer import THINK_CLOSE


def with_few_shots(template: str, preamble: str, shots: Sequence[tuple[str, str]], prefill: str) -> str:
    """Return `template` with a system message and few-shot examples before every conversation, and with a prefill.

    preamble: the system message; empty leaves it out. shots: questions and their answers. prefill: the start of every
    assistant turn; it is part of the prompt.
    """
    before = [{"role": "system", "content": preamble}] if preamble else []
    for question, answer in shots:
        before += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if before:
        template = f"{{% set messages = {_literal(before)} + messages %}}{template}"
    if prefill:
        template += f"{{% if add_generation_prompt %}}{{{{ {_literal(prefill)} }}}}{{% endif %}}"
    return template


def strip_thinking_history(template: str) -> str:
    """Return `template` with the thinking of earlier assistant turns removed, as in DeepSeek-R1's template."""
    return (
        "{% set kept = namespace(messages=[]) %}{% for message in messages %}"
        f"{{% if message['role'] == 'assistant' and '{THINK_CLOSE}' in message['content'] %}}"
        "{% set kept.messages = kept.messages + [{'role': 'assistant', "
        f"'content': message['content'].split('{THINK_CLOSE}')[-1].lstrip('\\n')}}] %}}"
        "{% else %}{% set kept.messages = kept.messages + [message] %}{% endif %}{% endfor %}"
        "{% set messages = kept.messages %}" + template
    )


def _literal(value: object) -> str:
    """Return a list, dict or string as a Jinja literal; braces inside it have no special meaning."""
    return json.dumps(value, ensure_ascii=False)
