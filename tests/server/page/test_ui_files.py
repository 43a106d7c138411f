"""The page's own files: small, in two languages, and without anything from elsewhere."""

import re
from pathlib import Path

import pytest

import thinkstack.server

FOLDER = Path(thinkstack.server.__file__).parent / "ui"
FILES = sorted(path for path in FOLDER.iterdir() if path.suffix in (".js", ".css"))
ENTRY = re.compile(r"\b([a-z][a-z0-9_]*): \"((?:[^\"\\]|\\.)*)\"")
USED = re.compile(r"\bt\(\"([a-z0-9_]+)\"|data-t(?:-label|-placeholder)?=\"([a-z0-9_]+)\"")
MADE = re.compile(r"\bt\(`([a-z_]+)\$\{")


def strings(language):
    return dict(ENTRY.findall((FOLDER / f"{language}.js").read_text(encoding="utf-8")))


def used_names():
    """Names of strings in scripts and the document, and beginnings of names that scripts put together."""
    texts = [path.read_text(encoding="utf-8") for path in FOLDER.iterdir() if path.suffix in (".js", ".html")]
    names = {first or second for text in texts for first, second in USED.findall(text)}
    return names, {name for text in texts for name in MADE.findall(text)}


def test_scripts_and_styles_are_small():
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert sum(lines.values()) <= 2500
    assert max(lines.values()) <= 400


def test_every_string_is_there_in_both_languages():
    english, chinese = strings("en"), strings("zh")
    assert len(english) > 100
    assert sorted(english) == sorted(chinese)
    holes = {name: sorted(re.findall(r"\{\w+\}", text)) for name, text in english.items()}
    assert holes == {name: sorted(re.findall(r"\{\w+\}", text)) for name, text in chinese.items()}


def test_every_string_that_is_used_exists():
    names, beginnings = used_names()
    known = strings("en")
    assert len(names) > 80
    assert sorted(names - set(known)) == []
    assert [each for each in beginnings if not any(name.startswith(each) for name in known)] == []


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_nothing_comes_from_elsewhere(path):
    text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text) == []
    assert not re.search(r"\son[a-z]+=|<script>|style=\"", text)
