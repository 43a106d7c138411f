"""Verdicts of IFEval (arXiv:2311.07911): strict and loose, for each instruction and for the prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thinkstack.config import did_you_mean
from thinkstack.files import kind_of
from thinkstack.tasks.verify.ifeval_checks import CHECKS, RELATIONS
from thinkstack.text.parse import ANSWER_CLOSE, ANSWER_OPEN
from thinkstack.text.tokenizer import THINK_CLOSE, THINK_OPEN
from thinkstack.types import ConfigError

PREFIX = "en:"
"""Copies of the file in M-IFEval write en:punctuation:no_comma for punctuation:no_comma."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of a prompt."""

    kind: str
    """A key of CHECKS."""
    arguments: Mapping[str, Any]
    """The arguments of its check."""

    def is_followed(self, text: str) -> bool:
        """Whether the text follows the instruction; an empty text follows none."""
        return bool(text.strip()) and CHECKS[self.kind][0](text, **self.arguments)

    def is_followed_loosely(self, text: str) -> bool:
        """Whether one of the `loose_variants` of the text follows the instruction."""
        return any(self.is_followed(variant) for variant in loose_variants(text))


def loose_variants(text: str) -> list[str]:
    """Return the eight variants of a text: with or without its first line, its last line, and all asterisks."""
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return list(dict.fromkeys(variant for part in cut for variant in (part, part.replace("*", ""))))


def visible_content(text: str) -> str:
    """Return the content of a turn: without thinking, and without the answer tags around it.

    Everything up to the last closing tag is thinking. Unclosed thinking leaves an empty content.
    """
    content = text.rpartition(THINK_CLOSE)[2]
    if THINK_OPEN in content:
        return ""
    content = content.strip()
    if content.startswith(ANSWER_OPEN) and content.count(ANSWER_OPEN) == 1:
        content = content.removeprefix(ANSWER_OPEN).removesuffix(ANSWER_CLOSE)
    return content.strip("\n")


def read_instructions(row: Mapping[str, Any], where: str) -> tuple[Instruction, ...]:
    """Return the instructions of a row of the published file, in its order; a repeated one counts twice, as published.

    Raises ConfigError for an unknown kind and for missing or wrong arguments, with the field.
    """
    kinds, arguments = row["instruction_id_list"], row["kwargs"]
    for name, value in (("instruction_id_list", kinds), ("kwargs", arguments)):
        if not isinstance(value, list) or not value:
            raise ConfigError(f"{where}: {name} is {kind_of(value)}; it must be a list, not empty")
    if len(kinds) != len(arguments):
        raise ConfigError(
            f"{where}: instruction_id_list has {len(kinds)} entries and kwargs has {len(arguments)}; they belong "
            "together one by one"
        )
    return tuple(
        _read_instruction(kind, given, f"{where}: instruction_id_list[{place}]", f"{where}: kwargs[{place}]")
        for place, (kind, given) in enumerate(zip(kinds, arguments, strict=True))
    )


def _read_instruction(kind: Any, given: Any, where_kind: str, where: str) -> Instruction:
    name = kind.removeprefix(PREFIX) if isinstance(kind, str) else kind
    if name not in CHECKS:
        raise ConfigError(f"{where_kind} is {kind!r}, not an instruction of IFEval{did_you_mean(str(name), CHECKS)}")
    if not isinstance(given, dict):
        raise ConfigError(f"{where} is {kind_of(given)}; it must be an object with the arguments of {name}")
    wanted, found = CHECKS[name][1], {}
    for key, expected in wanted.items():  # other keys are null in the copy of the Hugging Face hub
        value = given.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, expected) or value in ("", []):
            raise ConfigError(f"{where}.{key} is {kind_of(value)}; {name} needs {_NOUNS[expected]}, not empty")
        if key.endswith("relation") and value not in RELATIONS:
            raise ConfigError(f"{where}.{key} is {value!r}; use one of {', '.join(RELATIONS)}")
        if isinstance(value, list) and not all(isinstance(word, str) and word for word in value):
            raise ConfigError(f"{where}.{key} must be a list of words")
        found[key] = value
    return Instruction(name, found)


_NOUNS = {str: "text", int: "an integer", list: "a list of words"}


def count_followed(instructions: Sequence[Instruction], text: str) -> dict[str, float]:
    """Return the verdicts of one content by name: prompt_strict and prompt_loose are 1 if all instructions are
    followed; num_instructions, and how many of them are followed strictly and loosely."""
    strict = [one.is_followed(text) for one in instructions]
    loose = [followed or one.is_followed_loosely(text) for one, followed in zip(instructions, strict, strict=True)]
    return {
        "prompt_strict": float(all(strict)),
        "prompt_loose": float(all(loose)),
        "num_instructions": float(len(instructions)),
        "instructions_strict": float(sum(strict)),
        "instructions_loose": float(sum(loose)),
    }


def instruction_accuracy(verdicts: Sequence[Mapping[str, float]], kind: str) -> float:
    """Return the share of followed instructions over all prompts. kind: "strict" or "loose"."""
    return sum(one[f"instructions_{kind}"] for one in verdicts) / sum(one["num_instructions"] for one in verdicts)
