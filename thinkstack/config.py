"""Build frozen dataclasses from TOML: merged layers, dotted overrides, strict keys, resolved dump."""

import dataclasses
import datetime
import difflib
import functools
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le

from thinkstack.files import read_text
from thinkstack.types import ConfigError

T = TypeVar("T")
Tree = dict[str, Any]

Count = Annotated[int, Ge(1), Le(10**9)]
"""A count of at least 1. `build` checks these types; each dataclass checks combinations of its own fields."""
CountOrZero = Annotated[int, Ge(0), Le(10**9)]
"""A count that may be 0; the docstring of the field documents the meaning of 0."""
SecondsOrZero = Annotated[float, Ge(0), Le(1e6)]
"""A duration; the docstring of the field documents the meaning of 0."""
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
"""Seed of a random generator."""
Share = Annotated[float, Ge(0), Le(1)]
"""A fraction, or a decay rate."""
Weight = Annotated[float, Ge(0), Le(1e6)]
"""Weight of a term; 0 turns it off."""
Positive = Annotated[float, Gt(0), Le(1e6)]
"""A positive rate, norm or duration."""
Temperature = Annotated[float, Ge(0), Le(100)]
"""Sampling temperature; 0 is greedy decoding."""


@dataclasses.dataclass(frozen=True)
class Input:
    """Annotation of a setting whose values name inputs of a stage: a stage, STAGE/OUTPUT, RECIPE:STAGE or a path."""

    output: str
    """The output that the name of a stage means: a file or folder in the folder of the stage, or "" for this folder."""


@dataclasses.dataclass(frozen=True)
class Unhashed:
    """Annotation of a setting that decides how fast, how far or where a stage works, and never what it finds: a stage
    with another value goes on where it stopped."""


ModelInput = Annotated[str, Input("model")]
"""A checkpoint, or the stage that writes it."""
DataInput = Annotated[tuple[str, ...], Input("data.jsonl")]
"""Files of data, or the stages that write them; * in a file name matches several files."""


def read_toml(path: Path) -> Tree:
    """The tables of a TOML file. Raises ConfigError if it is missing, damaged or malformed."""
    text = read_text(path, "settings")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # an invalid date is a plain ValueError
        raise ConfigError(f"{path} is not TOML: {error}") from error


def merge(base: Tree, overlay: Tree) -> Tree:
    """`base` with the entries of `overlay` on top; tables are merged key by key, other values are replaced."""
    merged = dict(base)
    for key, value in overlay.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def override(tree: Tree, assignment: str) -> Tree:
    """`tree` with one dotted assignment such as stages.zero.steps=20. The value is parsed as TOML; a date, and what is
    not TOML, is a string."""
    path, separator, text = assignment.partition("=")
    if not separator or not path.strip():
        raise ConfigError(f"cannot read the override {assignment!r}; write it as key.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if isinstance(value, datetime.date | datetime.time):
        value = text.strip()
    overlay: Tree = functools.reduce(lambda inner, key: {key: inner}, reversed(path.strip().split(".")), value)
    return merge(tree, overlay)


def build(kind: type[T], values: Tree, where: str = "") -> T:
    """Build the dataclass `kind` from a table; `where` is the address of the table in messages.

    A table for a dataclass field overrides fields of the default of that field. A list of names for a field that is a
    table of dataclasses gives each name the defaults. Raises ConfigError for an unknown key, a wrong type or a value
    that the dataclass rejects.
    """
    import pydantic

    hints = typing.get_type_hints(kind)
    lists = {key: value for key, value in values.items() if row_of(hints.get(key)) and isinstance(value, list | tuple)}
    values = values | {key: {str(name): {} for name in value} for key, value in lists.items()}
    check_keys(kind, values, where)
    for entry in dataclasses.fields(kind):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(entry.default) and isinstance(values.get(entry.name), dict):
            values = values | {entry.name: _over_default(entry.default, values[entry.name])}
    _check_finite(values, where)
    try:
        return pydantic.TypeAdapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            raise ConfigError(str(cause)) from error
        address = ".".join(filter(None, (where, *(str(part) for part in first["loc"] if not _is_type_name(part)))))
        raise ConfigError(f"{address}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from error


def _over_default(default: Any, values: Tree) -> Tree:
    """The fields of `default` with those of `values` on top; only dataclasses are merged field by field."""
    nested = {name: old for name, old in vars(default).items() if dataclasses.is_dataclass(old)}
    merged = {name: _over_default(nested[name], values[name]) for name in nested if isinstance(values.get(name), dict)}
    return dump(default) | values | merged


def _check_finite(value: Any, address: str) -> None:
    """Raise ConfigError for a number that is NaN or infinite, at any depth; range checks do not catch all of them."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{address}={value} is not a finite number; use a finite number, or leave the setting out")
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, entry in entries:
        _check_finite(entry, f"{address}.{key}" if address else str(key))


def _is_type_name(part: object) -> bool:
    """Whether a part of an address is the class of a union member, which pydantic inserts."""
    return isinstance(part, str) and part.endswith("Config")


def check_keys(kind: Any, values: Tree, where: str) -> None:
    """Raise ConfigError for the first key of `values`, at any depth, that `kind` does not have."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for key, value in values.items():
        address = f"{where}.{key}" if where else key
        if key not in names:
            raise ConfigError(f"unknown key {address}{did_you_mean(key, names, where)}")
        nested = [member for member in _members(hints[key]) if dataclasses.is_dataclass(member)]
        for index, entry in enumerate(value if isinstance(value, list | tuple) else ()):
            if nested and isinstance(entry, dict):
                check_keys(nested[0], entry, f"{address}[{index}]")
        if nested and isinstance(value, dict):
            best = min(nested, key=lambda member: len(set(value) - {f.name for f in dataclasses.fields(member)}))
            check_keys(best, value, address)
        if (row := row_of(hints[key])) and isinstance(value, dict):
            for name, entry in value.items():
                if isinstance(entry, dict):
                    check_keys(row, entry, f"{address}.{name}")


def row_of(hint: Any) -> Any:
    """The dataclass of the rows of a table dict[str, dataclass]; None for any other type."""
    row = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
    return row if dataclasses.is_dataclass(row) else None


def _members(hint: Any) -> tuple[Any, ...]:
    """The possible types of a value; for a tuple, the possible types of an entry."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple) else (hint,)


def map_inputs(config: Any, change: typing.Callable[[str, str, Input], str], where: str = "") -> Any:
    """A copy of a dataclass in which `change(address, value, input)` replaces each value of its inputs, at any depth.

    Empty values are not inputs. where: address of `config`, for the addresses.
    """
    hints, changed = typing.get_type_hints(type(config), include_extras=True), {}
    for name in (field.name for field in dataclasses.fields(config)):
        value, address = getattr(config, name), f"{where}.{name}" if where else name
        mark = next((mark for mark in getattr(hints[name], "__metadata__", ()) if isinstance(mark, Input)), None)
        if mark is not None:
            changed[name] = _map_strings(value, change, mark, address)
        elif dataclasses.is_dataclass(value):
            changed[name] = map_inputs(value, change, address)
        elif isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
            changed[name] = {key: map_inputs(entry, change, f"{address}.{key}") for key, entry in value.items()}
    return dataclasses.replace(config, **changed) if changed else config


def _map_strings(value: Any, change: typing.Callable[[str, str, Input], str], mark: Input, address: str) -> Any:
    """A string, a tuple of strings or a dict of strings with every string that is not empty changed."""
    if isinstance(value, str):
        return change(address, value, mark) if value else value
    if isinstance(value, dict):
        return {key: _map_strings(entry, change, mark, f"{address}.{key}") for key, entry in value.items()}
    return tuple(_map_strings(entry, change, mark, f"{address}[{index}]") for index, entry in enumerate(value))


def did_you_mean(name: str, known: typing.Iterable[str], where: str = "") -> str:
    """The end of a message about an unknown name: the closest known name, or all known names."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean {where + '.' if where else ''}{close[0]}?"
    return f"; known: {', '.join(names)}"


def dump(config: Any) -> Tree:
    """A dataclass as nested dicts for JSON."""
    return dataclasses.asdict(config)


def hashed_settings(config: Any) -> Tree:
    """`dump` without the settings that are Unhashed, at any depth: what the fingerprint of a stage is made of."""
    hints, kept = typing.get_type_hints(type(config), include_extras=True), {}
    for name in (field.name for field in dataclasses.fields(config)):
        if any(isinstance(mark, Unhashed) for mark in getattr(hints[name], "__metadata__", ())):
            continue
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            kept[name] = hashed_settings(value)
        elif isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
            kept[name] = {key: hashed_settings(entry) for key, entry in value.items()}
        else:
            kept[name] = dump_value(value)
    return kept


def dump_value(value: Any) -> Any:
    """A setting as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dump(value)
    if isinstance(value, list | tuple):
        return [dump_value(entry) for entry in value]
    return value
