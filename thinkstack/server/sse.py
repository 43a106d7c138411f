"""Server-sent events, and JSON in streams and calls."""

import json
from typing import Any

from pydantic_core import from_json

KEEP_ALIVE_COMMENT = b": keep-alive\n\n"
"""What clients skip."""
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_LINE_BREAKS = str.maketrans({character: f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"})
"""Characters at which clients break lines of text, such as httpx's `iter_lines`, though they end no event."""


def to_json(body: Any) -> bytes:
    """Compact JSON in UTF-8, in one line by any definition."""
    text = _encode(body)
    return (text if text.isascii() else text.translate(_LINE_BREAKS)).encode()


def sse(body: Any, event: str | None = None) -> bytes:
    """An event with JSON as its data, and with a name if the dialect has one."""
    name = b"" if event is None else f"event: {event}\n".encode()
    return name + b"data: " + to_json(body) + b"\n\n"


def parse_arguments(text: str) -> dict[str, Any]:
    """The arguments of a call as an object; of a call that is cut off, what is complete. Other text is wrapped."""
    try:
        found = from_json(text or "{}", allow_partial=True)
        json.dumps(found, allow_nan=False)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"INVALID_JSON": text}
