"""Recipe files: TOML tables of stages, merged with the recipes that they extend, a scale, and overrides.

`shared` settings apply to every stage that has these keys; `stages.NAME` is the table of one stage; `scales.NAME`
contains tables that `--scale NAME` merges over the recipe; `extends` lists recipes whose tables lie below.
"""

from importlib import resources
from pathlib import Path

from thinkstack.config import Tree, did_you_mean, merge, override, read_toml
from thinkstack.types import ConfigError

RECIPES = Path(str(resources.files("thinkstack") / "recipes"))
"""Folder of the recipes in the package."""
KEYS = ("extends", "shared", "stages", "scales")


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe, by name or by a path that ends in .toml. Raises ConfigError if it does not exist."""
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        hint = "there is no such file" if name.endswith(".toml") else "give a name, or a path that ends in .toml"
        raise ConfigError(f"no recipe {name!r}: {hint}{did_you_mean(name, recipe_names())}")
    return path


def scales_of(name: str) -> list[str]:
    """Names of the scales of a recipe."""
    return sorted(_read_merged(name).get("scales", {}))


def read_recipe(name: str, scale: str = "", overrides: tuple[str, ...] = ()) -> Tree:
    """The tables `shared` and `stages` of a recipe, with a scale and dotted overrides applied.

    Raises ConfigError for an unknown recipe, key, scale or stage, and for recipes that extend each other in a cycle.
    """
    tree = _read_merged(name)
    for key in tree.keys() - set(KEYS):
        raise ConfigError(f"{recipe_path(name)}: unknown key {key}{did_you_mean(key, KEYS)}")
    scales = tree.pop("scales", {})
    if scale and scale not in scales:
        known = did_you_mean(scale, scales) if scales else f"; add a table scales.{scale}, or leave --scale out"
        raise ConfigError(f"the recipe {name} has no scale {scale!r}{known}")
    tree = _merge_stages(tree, scales[scale], f"scales.{scale}") if scale else tree
    for assignment in overrides:
        tree = _merge_stages(tree, override({}, assignment), assignment)
    return tree


def _merge_stages(tree: Tree, overlay: Tree, where: str) -> Tree:
    """`tree` with an overlay that changes settings but adds no stage."""
    for stage in overlay.get("stages", {}).keys() - tree.get("stages", {}).keys():
        raise ConfigError(f"{where}: the recipe has no stage {stage}{did_you_mean(stage, tree.get('stages', {}))}")
    return merge(tree, overlay)


def _read_merged(name: str, extending: tuple[str, ...] = ()) -> Tree:
    """The tables of a recipe file over the tables of the recipes that it extends. extending: the recipes above."""
    if name in extending:
        raise ConfigError(f"recipes extend each other in a cycle: {' -> '.join((*extending, name))}")
    own = read_toml(recipe_path(name))
    merged: Tree = {}
    for other in own.pop("extends", ()):
        merged = merge(merged, _read_merged(other, (*extending, name)))
    return merge(merged, own)
