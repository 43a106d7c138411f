"""Descriptions of recipes, stages and settings, with defaults and meanings read from the source."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thinkstack.config import did_you_mean, row_of
from thinkstack.files import read_text
from thinkstack.pipeline.graph import STAGES
from thinkstack.pipeline.recipe import read_recipe, recipe_names, recipe_path, scales_of

WIDTH = 100
REQUIRED = "(required)"


def list_recipes() -> str:
    """Text that lists each recipe of the package with the leading comment of the file, and the kinds of stages."""
    lines = ["Recipes, for `thinkstack run NAME --out FOLDER`:"]
    for name in recipe_names():
        scales = "|".join(scales_of(name))
        lines += ["", f"{name}{f'  (--scale {scales})' if scales else ''}", *_leading_comment(recipe_path(name))]
    lines += ["", f"`thinkstack recipes NAME` lists the settings of a recipe or a kind of stage: {', '.join(STAGES)}."]
    return "\n".join(lines)


def _leading_comment(path: Path) -> list[str]:
    """The leading comment of a recipe file, line by line, so that its commands can be copied."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), read_text(path).split("\n"))
    return [f"    {line.removeprefix('#').removeprefix(' ')}" for line in lines]


def describe_recipe(name: str, settings: bool = True) -> str:
    """Text that describes the stages of a recipe and their settings, or the settings of one kind of stage.

    Raises ConfigError for a name that is neither a recipe nor a kind of stage.
    """
    if name in STAGES:
        return "\n".join(_settings(name))
    tree, lines = read_recipe(name), [*_leading_comment(recipe_path(name)), ""]
    kinds: list[str] = []
    for stage, table in tree.get("stages", {}).items():
        kind = table.get("stage", "")
        kinds += [kind] if kind not in kinds else []
        lines += [f"stages.{stage}: {kind if kind in STAGES else kind + did_you_mean(kind, STAGES)}"]
        lines += [f"    {key} = {value!r}" for key, value in _flat(table) if key != "stage"]
    for kind in kinds if settings else ():
        lines += ["", *_settings(kind)]
    return "\n".join(lines)


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _settings(kind: str) -> list[str]:
    """Every setting of a kind of stage."""
    config = STAGES[kind][0]
    head = f"Settings of stages of kind {kind}, as KEY = DEFAULT; change one with --set stages.NAME.KEY=VALUE."
    return [head, *(line for setting in _fields(config) for line in setting)]


def _fields(config: type, prefix: str = "") -> Iterator[list[str]]:
    bases = [base for base in reversed(config.__mro__) if dataclasses.is_dataclass(base)]
    meanings = {name: meaning for base in bases for name, meaning in meanings_of(base).items()}
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _fields(hint, f"{prefix}{field.name}.")
            continue
        default = REQUIRED if field.default is dataclasses.MISSING else repr(field.default)
        row = row_of(hint)
        if field.default_factory is not dataclasses.MISSING:
            default = repr(list(field.default_factory()) if row else field.default_factory())
        meaning = meanings.get(field.name, "")
        if typing.get_origin(hint) is typing.Literal:
            meaning += f" One of {', '.join(map(repr, typing.get_args(hint)))}."
        margin = " " * 6
        yield [
            f"  {prefix}{field.name} = {default}",
            *textwrap.wrap(meaning, WIDTH, initial_indent=margin, subsequent_indent=margin),
        ]
        if row:
            yield from _fields(row, f"{prefix}{field.name}.NAME.")


def meanings_of(config: type) -> dict[str, str]:
    """The docstring under each field of a dataclass in the source, by field name."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(tree, ast.ClassDef)
    meanings = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            meanings[field.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    return meanings
