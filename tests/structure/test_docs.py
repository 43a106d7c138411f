"""What the docs pages say is so: files, tests and metrics they name exist, and every metric is explained."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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
