"""API keys: random tokens of which only a hash is stored.

A key is "sk-" and 192 random bits in hexadecimal. The first 32 of them are stored in clear to tell keys apart; 160
stay secret. The stored hash is SHA-256: a slow hash protects passwords, which can be guessed, and random tokens of this
length cannot. A key is found by its hash, so that no comparison depends on the secret's characters.
"""

import hashlib
import re
import secrets
from dataclasses import dataclass

from thinkstack.server.errors import PermissionDenied
from thinkstack.server.limits import UNLIMITED, Limits
from thinkstack.types import ConfigError

PREFIX_LENGTH = len("sk-") + 8
SCOPES = ("chat", "admin")
"""chat: the model routes; admin: the routes below /admin, for keys of administrators alone."""
UNITS = {"h": 3600, "d": 86_400, "w": 7 * 86_400}
KEY = re.compile(r"sk-[0-9a-f]{48}")


def make_key() -> str:
    """A new key; it is shown once and not stored."""
    return f"sk-{secrets.token_hex(24)}"


def hash_key(key: str) -> str:
    """SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def parse_expiry(text: str) -> int:
    """Seconds of a duration such as 12h, 90d or 4w. Raises ConfigError."""
    match = re.fullmatch(r"([1-9][0-9]{0,4})([hdw])", text)
    if match is None:
        raise ConfigError(f"cannot read the duration {text!r}; write hours, days or weeks such as 12h, 90d or 4w")
    return int(match[1]) * UNITS[match[2]]


@dataclass(frozen=True, kw_only=True)
class Principal:
    """Who sends a request: a user and one of its keys."""

    user_id: int
    user_name: str
    is_admin: bool
    limits: Limits
    """Limits of the user, over all keys."""
    key_id: int
    key_prefix: str
    key_limits: Limits
    """Limits of the key beside those of the user."""
    scopes: tuple[str, ...]
    models: tuple[str, ...]
    """Models the key is for; empty: all."""

    @property
    def has_key_limits(self) -> bool:
        """Whether the key has limits of its own."""
        return self.key_limits != UNLIMITED

    def check_scope(self, scope: str) -> None:
        """Raise PermissionDenied if the key does not have a scope; "admin" also needs an administrator."""
        if scope not in self.scopes or (scope == "admin" and not self.is_admin):
            raise PermissionDenied(f"key {self.key_prefix} has no scope {scope!r}; it has {', '.join(self.scopes)}")

    def check_model(self, model: str) -> None:
        """Raise PermissionDenied if the key is not for a model."""
        if self.models and model not in self.models:
            raise PermissionDenied(f"key {self.key_prefix} is for {', '.join(self.models)} and not for {model}")
