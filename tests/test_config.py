"""Settings: layers, overrides, and errors that name the value and the way out."""

from dataclasses import dataclass, field
from typing import Annotated

import pytest

from thinkstack.config import Unhashed, build, dump, hashed_settings, merge, override
from thinkstack.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    steps: int = 5

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ConfigError(f"rate={self.rate} must be positive")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = Inner(rate=0.7)
    levels: tuple[int, ...] = ()


def test_tables_become_dataclasses_and_come_back():
    built = build(Outer, {"name": "a", "levels": [1, 2]})
    assert built == Outer(name="a", levels=(1, 2))
    assert build(Outer, dump(built)) == built


def test_a_partial_table_changes_the_default_of_its_field_not_that_of_its_class():
    assert build(Outer, {"name": "a", "inner": {"steps": 9}}).inner == Inner(rate=0.7, steps=9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a", "inner": {"stepz": 1}}, "unknown key run.inner.stepz; did you mean run.inner.steps?"),
        ({"name": "a", "qqq": 1}, "unknown key run.qqq; known: name, inner, levels"),
        ({"name": "a", "inner": {"steps": "many"}}, "run.inner.steps='many': input should be a valid integer"),
        ({"name": "a", "inner": {"rate": -1.0}}, "rate=-1.0 must be positive"),
        ({}, "run.name"),
    ],
)
def test_a_wrong_setting_is_named_with_the_way_out(values: dict, message: str):
    with pytest.raises(ConfigError) as error:
        build(Outer, values, "run")
    assert message in str(error.value)


def test_overrides_reach_any_depth_and_read_values_as_toml():
    tree = override({"a": {"b": 1, "c": 2}}, "a.b=[1, 2]")
    assert override(tree, "a.d=text") == {"a": {"b": [1, 2], "c": 2, "d": "text"}}
    assert override({}, "since= 2024-08-01 ") == {"since": "2024-08-01"}, "no setting is a date of TOML"
    assert merge({"a": {"b": 1}}, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    with pytest.raises(ConfigError, match=r"key\.key=value"):
        override({}, "nonsense")


def test_settings_that_cannot_change_a_result_are_left_out_of_fingerprints():
    """A raised budget must go on with what is paid for."""

    @dataclass(frozen=True, kw_only=True)
    class Budget:
        price: float = 1.0
        max_cost: Annotated[float, Unhashed()] = 0.0

    @dataclass(frozen=True, kw_only=True)
    class Stage:
        levels: tuple[int, ...] = (1, 2)
        budget: Budget = Budget()
        budgets: dict[str, Budget] = field(default_factory=lambda: {"a": Budget(max_cost=3.0)})

    found = hashed_settings(Stage(budget=Budget(max_cost=5.0)))
    assert found == hashed_settings(Stage()) == {
        "levels": [1, 2], "budget": {"price": 1.0}, "budgets": {"a": {"price": 1.0}}
    }  # fmt: skip
    assert found != hashed_settings(Stage(budget=Budget(price=2.0)))
