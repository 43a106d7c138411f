"""Modelfiles for Ollama: the template gives the output of our format; a small interpreter of Go's syntax runs it."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tiny import tiny_tokenizer
from thinkstack.checkpoint.gguf.modelfile import write_modelfile
from thinkstack.text.chat import TemplateFormat, chat_format
from thinkstack.text.tokenizer import BOS, train_tokenizer
from thinkstack.types import Message

CONTROL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML = "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
DEFAULT = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CONVERSATION = (
    Message(role="system", content="Be brief."),
    Message(role="user", content="12 + 30?"),
    Message(role="assistant", content="42"),
    Message(role="user", content="And\nnow?"),
)


def shipped(template: str, eos: str) -> TemplateFormat:
    control = (BOS, *CONTROL) if "bos_token" in template else CONTROL
    return TemplateFormat(train_tokenizer(["a b"], 300, control=control), template, BOS, eos)


def parts(path: Path) -> tuple[str, str, list[str]]:
    """Return template, system text and other lines of a Modelfile."""
    text = path.read_text(encoding="utf-8")
    found = {key: re.search(rf'^{key} """(.*?)"""$', text, re.S | re.M) for key in ("TEMPLATE", "SYSTEM")}
    rest = [line for line in text.splitlines() if line.startswith(("FROM", "PARAMETER"))]
    return *(match[1] if match else "" for match in found.values()), rest


def go(template: str, messages: Sequence[Message]) -> str:
    """Render a template like Ollama: a range over messages whose body is a chain of comparisons with the role."""
    begin, _, rest = template.partition("{{ range .Messages }}")
    body, _, ask = rest.rpartition("{{ end }}{{ end }}")
    pieces = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', body)
    cases = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    return begin + "".join(cases[m.role].replace("{{ .Content }}", m.content) for m in messages) + ask


@pytest.mark.parametrize("name", ["v3", "r1", "r1_zero_short"])
def test_our_formats_are_written_in_go(name: str, tmp_path: Path):
    chat = chat_format(name, tiny_tokenizer())
    write_modelfile(tmp_path / "Modelfile", "m-Q8_0.gguf", chat)
    template, system, rest = parts(tmp_path / "Modelfile")
    assert go(template, CONVERSATION) == chat.tokenizer.decode(chat.prompt(CONVERSATION)[1:])
    assert system == ""
    assert rest == [
        "FROM ./m-Q8_0.gguf",
        'PARAMETER stop "<｜end▁of▁sentence｜>"',
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 0.95",
    ]


@pytest.mark.parametrize(
    ("template", "eos", "system"),
    [
        (CHATML + ASK, "<|im_end|>", ""),
        (DEFAULT + CHATML + ASK, "<|im_end|>", "You are kind."),
        (LLAMA, "<|eot_id|>", ""),
    ],
)
def test_templates_are_recognized_by_their_output(template: str, eos: str, system: str, tmp_path: Path):
    chat = shipped(template, eos)
    write_modelfile(tmp_path / "Modelfile", "m.gguf", chat)
    write_checkpoint, default, rest = parts(tmp_path / "Modelfile")
    assert go(write_checkpoint, CONVERSATION) == chat.tokenizer.decode(chat.prompt(CONVERSATION)).removeprefix(BOS)
    assert default == system
    assert f'PARAMETER stop "{eos}"' in rest


def test_an_unknown_template_is_not_written(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    chat = replace(shipped(CHATML + ASK, "<|im_end|>"), template=CHATML.replace("+ '\n'", "+ ':'") + ASK)
    write_modelfile(tmp_path / "Modelfile", "m.gguf", chat)
    assert parts(tmp_path / "Modelfile")[0] == ""
    assert "no known Ollama template matches" in caplog.text


def test_a_format_whose_text_spells_control_tokens_has_no_template(tmp_path: Path):
    """R1-Zero's preamble contains <think>, which llama.cpp would read as the token."""
    write_modelfile(tmp_path / "Modelfile", "m.gguf", chat_format("r1_zero", tiny_tokenizer()))
    assert parts(tmp_path / "Modelfile")[0] == ""


def test_a_base_model_has_only_the_from_line(tmp_path: Path):
    write_modelfile(tmp_path / "Modelfile", "m.gguf")
    assert (tmp_path / "Modelfile").read_text(encoding="utf-8") == "FROM ./m.gguf\n"
