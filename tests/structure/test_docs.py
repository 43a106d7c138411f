"""What the docs pages say is so: files, tests and metrics they name exist, and every metric is explained."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from thinkstack import cli
from thinkstack.pipeline.graph import plan_stages
from thinkstack.pipeline.recipe import read_recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GROUPS = "loss train router policy mismatch correction critic reward group rollout time"
METRIC = re.compile(rf"(?:{GROUPS.replace(chr(32), chr(124))})/[a-z][a-z0-9_]*")


def read(page):
    return page.read_text(encoding="utf-8")


def logged_names():
    """Metric names written out in the package."""
    names = set()
    for path in (ROOT / "thinkstack").rglob("*.py"):
        constants = (node.value for node in ast.walk(ast.parse(read(path))) if isinstance(node, ast.Constant))
        names |= {value for value in constants if isinstance(value, str) and METRIC.fullmatch(value)}
    return names


def explained_names():
    return set(METRIC.findall(" ".join(re.findall(r"^\| `([^`]+)`", read(ROOT / "docs" / "metrics.md"), re.MULTILINE))))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_linked_file_exists(page):
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", read(page)) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_named_file_exists(page):
    places = re.findall(r"`((?:thinkstack|tests|docs|bench|examples)/[\w./-]+)", read(page))
    assert [place for place in places if not (ROOT / place).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_named_test_exists(page):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)", read(page))
    missing = [f"{place}::{name}" for place, name in named if f"def {name}(" not in read(ROOT / place)]
    assert missing == []


def defined(path):
    """Names of the functions, classes and methods (Class.method) of a module."""
    found = set()
    for node in ast.parse(read(path)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_every_function_of_the_tour_exists():
    steps = re.findall(r"\[`([\w.]+)`\]\(\.\./(thinkstack/[\w/]+\.py)\)", read(ROOT / "docs" / "tour.md"))
    assert len(steps) > 40
    assert [(name, place) for name, place in steps if name not in defined(ROOT / place)] == []


def commands(page):
    """Command lines of the package in the shell blocks of a page, as words, without what is optional or a comment."""
    blocks = re.findall(r"```sh\n(.*?)```", read(page), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    shown = [re.sub(r"\[--[^]]*\]", "", line.split(" #")[0]) for line in lines]
    return [shlex.split(line)[1:] for line in shown if re.match(r"(\.venv/bin/)?thinkstack ", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_has_the_options_that_are_shown(page):
    for words in commands(page):
        assert callable(cli._parse(words)), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_and_setting_that_a_command_names_exists(page, tmp_path):
    for words in commands(page):
        if words[0] not in ("run", "demo"):
            continue
        words = [word.replace("FOLDER", str(tmp_path)) for word in words]
        settings = [word for word in words if "=" in word and not word.startswith(("-", "stages.zero.reward"))]
        scale = words[words.index("--scale") + 1] if "--scale" in words else ""
        recipe = words[1] if words[0] == "run" else "demo"
        assert plan_stages(read_recipe(recipe, scale, tuple(settings)), tmp_path), words


def test_every_logged_metric_is_explained():
    assert "policy/entropy_nats" in logged_names()
    assert sorted(logged_names() - explained_names()) == []


def test_every_explained_metric_is_logged():
    made = {
        "reward/accuracy",
        "reward/format",
        "reward/language",
        "time/step_seconds",
        "time/rollout_seconds",
        "time/train_seconds",
    }
    assert sorted(explained_names() - logged_names() - made) == []
