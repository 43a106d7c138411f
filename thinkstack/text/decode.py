"""Decoding: token ids in, text out, with constant work per token."""

import codecs
import re
from collections.abc import Collection, Iterable, Sequence

from thinkstack.text.tokenizer import Tokenizer


class TextDecoder:
    """Decodes token ids as they come; together the texts equal `Tokenizer.decode` of all ids. Incomplete characters are
    held back, and so is a stop token, which is left out at the end."""

    def __init__(self, tokenizer: Tokenizer, stop_token_ids: Collection[int] = ()):
        self._tokenizer, self._stop_token_ids = tokenizer, frozenset(stop_token_ids)
        self._held_stop: list[int] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._window: list[int] = []
        """The last token whose text is out, and the tokens after it; for tokenizers that are not byte-level."""
        self._sent = ""
        """Text of the first token of the window."""

    def feed(self, token_ids: Iterable[int]) -> str:
        """The text that is final after these ids."""
        found = ""
        for token in token_ids:
            ready, self._held_stop = self._held_stop, []
            if token in self._stop_token_ids:
                self._held_stop = [token]
            else:
                ready = [*ready, token]
            found += "".join(map(self._decode, ready))
        return found

    def feed_plain(self, token_ids: Sequence[int]) -> str:
        """`feed` for tokens none of which is a stop token."""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(b"".join(map(self._tokenizer.bytes_of, token_ids)))
        return "".join(map(self._decode, token_ids))

    def feed_token(self, token: int) -> list[str]:
        """The text that is final after this token, in pieces; a control token is a piece of its own, a `Control`."""
        text, control = self._decode(token), self._tokenizer.control_of_id.get(token)
        if control is not None and text.endswith(control):
            return [text.removesuffix(control), control] if len(text) > len(control) else [control]
        return [text] if text else []

    def finish(self) -> str:
        """The rest of the text."""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(b"", final=True)
        return self._tokenizer.decode(self._window)[len(self._sent) :]

    def _decode(self, token: int) -> str:
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(self._tokenizer.bytes_of(token))
        if not self._tokenizer.has_text(token):
            return ""
        self._window.append(token)
        if self._tokenizer.is_fallback_byte(token):
            return ""  # the characters of bytes depend on the whole run of bytes
        text = self._tokenizer.decode(self._window)[len(self._sent) :]
        self._window = [token]
        self._sent = self._tokenizer.decode(self._window)
        return text


class Markers:
    """Strings to find in a text that comes in chunks; none of them starts another one."""

    def __init__(self, markers: Iterable[str]):
        markers = tuple(markers)
        self._pattern = re.compile("|".join(map(re.escape, markers)) or "(?!)")
        self._prefixes = frozenset(marker[:size] for marker in markers for size in range(1, len(marker)))
        self._longest = max(map(len, self._prefixes), default=0)
        self._first_characters = frozenset(marker[:1] for marker in markers)

    def __bool__(self) -> bool:
        return bool(self._first_characters)

    def find(self, text: str) -> re.Match[str] | None:
        """The first marker."""
        return self._pattern.search(text)

    def partial(self, text: str) -> int:
        """Length of the longest end of `text` that may become a marker."""
        if self._first_characters.isdisjoint(text[-self._longest :]):
            return 0
        for size in range(min(self._longest, len(text)), 0, -1):
            if text[len(text) - size :] in self._prefixes:
                return size
        return 0


class Stripper:
    """Strips line breaks around a text that comes in chunks."""

    def __init__(self) -> None:
        self._num_breaks: int | None = None
        """Line breaks that are held back; None before the first other character."""

    def feed(self, text: str) -> str:
        """The text that is final."""
        if self._num_breaks is None:
            text = text.lstrip("\n")
            if not text:
                return ""
        body = text.rstrip("\n")
        breaks = self._num_breaks or 0
        self._num_breaks = len(text) - len(body) + (0 if body else breaks)
        return "\n" * breaks + body if body else ""

    def skip(self) -> None:
        """Leave out what is held back; further text follows another character, if there was one."""
        self._num_breaks = None if self._num_breaks is None else 0
