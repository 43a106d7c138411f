"""Numbers of the stages' settings that mean nothing are refused by their names, before anything runs."""

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from thinkstack.config import build, merge
from thinkstack.pipeline.graph import STAGES
from thinkstack.types import ConfigError

NEEDED: dict[str, dict[str, Any]] = {
    "import_checkpoint": {"start": "a"},
    "pretrain": {},
    "sft": {"start": "a", "data": ["x.jsonl"]},
    "rl": {"start": "a"},
    "evaluate": {"start": "a"},
    "report": {"title": "a"},
}
"""What a stage cannot do without."""


def numbers_of(kind: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Addresses of all numbers among the settings of a dataclass."""
    for name, hint in typing.get_type_hints(kind).items():
        members = (hint, *typing.get_args(hint))
        if hint in (int, float):
            yield (*path, name)
        for member in members:
            if dataclasses.is_dataclass(member) and hint is member:
                yield from numbers_of(member, (*path, name))


CASES = [(stage, path) for stage, (kind, _) in STAGES.items() for path in numbers_of(kind)]


def refusal(stage: str, path: tuple[str, ...], value: float) -> str:
    """What is said of this value."""
    tree: Any = value
    for key in reversed(path):
        tree = {key: tree}
    with pytest.raises(ConfigError) as raised:
        build(STAGES[stage][0], merge(NEEDED[stage], tree), f"stages.{stage}")
    return str(raised.value)


@pytest.mark.parametrize(("stage", "path"), CASES, ids=lambda one: one if isinstance(one, str) else ".".join(one))
@pytest.mark.parametrize("value", [-1, -0.5, 1e30, math.nan, math.inf, -math.inf])
def test_a_number_that_means_nothing_is_refused_by_its_name(stage, path, value):
    said = refusal(stage, path, value)
    assert path[-1] in said and "\n" not in said


def test_every_stage_has_numbers_that_are_tried():
    assert {stage for stage, _ in CASES} == set(STAGES) - {"import_checkpoint", "report"}
    assert ("rl", ("trainer", "optim", "learning_rate")) in CASES


def test_the_message_names_the_address_the_value_and_the_bound():
    assert refusal("pretrain", ("steps",), -1) == (
        "stages.pretrain.steps=-1: input should be greater than or equal to 1"
    )
    assert refusal("sft", ("trainer", "optim", "eps"), math.nan) == (
        "stages.sft.trainer.optim.eps=nan is not a finite number; use a finite number, or leave the setting out"
    )
