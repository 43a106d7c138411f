"""Hostile texts, one file for each kind: `cases()` yields them for the tests of rendering and of the page."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

_SURROGATE = re.compile(r"\\u(d[89a-f][0-9a-f]{2})")  # TOML has no escape for half of a pair


def cases() -> Iterator[tuple[str, str, str]]:
    """(name, kind, text) of each case. Kinds: html, link, formula, code (Markdown), name (of a conversation, file or
    model), import (a file)."""
    for path in sorted(Path(__file__).parent.glob("*.toml")):
        found = tomllib.loads(path.read_text(encoding="utf-8"))
        for name, text in found["cases"].items():
            kind = found["kind"]
            if kind != "import":
                text = _SURROGATE.sub(lambda half: chr(int(half[1], 16)), text)
            yield f"{path.stem}-{name}", kind, text
