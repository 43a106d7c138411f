"""The program of an answer: the last complete block outside thinking."""

import pytest

from thinkstack.tasks.verify.code_blocks import continuation, last_code_block, visible_text
from thinkstack.types import Response

BLOCK = "```python\nprint(1)\n```"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (f"Here:\n{BLOCK}\nDone.", "print(1)\n"),
        (f"{BLOCK}\nBetter:\n```py\nprint(2)\n```", "print(2)\n"),
        (f"{BLOCK}\nBetter:\n```py\nprint(2)\n", "print(1)\n"),
        ("```\na\n```", "a\n"),
        ("~~~python\na\n~~~", "a\n"),
        ("````\n```\na\n```\n````", "```\na\n```\n"),
        ("  ```python\n  a\n  ```", "  a\n"),
        ("```python\n```", ""),
        ("```python\nprint(1)", None),
        ("print(1)", None),
        ("Use `a` and ```b``` inline.", None),
    ],
)
def test_the_last_complete_block_counts(text, code):
    assert last_code_block(text) == code


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (f"<think>{BLOCK}</think>\nSo:\n```\na\n```", "a\n"),
        (f"<think>\n{BLOCK}\n", None),
        (f"<think>\n{BLOCK}\n</think>\nNo code.", None),
        (f"I think\n{BLOCK}\n</think>\nSo:\n```\na\n```", "a\n"),
        (f"{BLOCK}\n<think>\n```\na\n```", "print(1)\n"),
        (f"<think></think>{BLOCK[:-3]}", None),
        (f"<think>.</think><answer>\n{BLOCK}\n</answer>", "print(1)\n"),
    ],
)
def test_thinking_holds_no_answer(text, code):
    assert last_code_block(visible_text(Response(text=text))) == code


def test_a_continuation_ends_at_the_next_statement_of_the_module():
    assert continuation("    return 1\n\ndef other():\n    pass") == "    return 1\n"
    assert continuation("    return 1\n    # note\n") == "    return 1\n    # note\n"
    assert continuation("    return 1\nprint(f())\nif x:") == "    return 1"
