"""Typed reading of JSON files from other programs."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thinkstack.files import read_object
from thinkstack.types import ConfigError

REQUIRED = object()


class JsonReader:
    """Typed access to one JSON object; every error message names the file and the key."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def _get(self, key: str, default: Any, kinds: tuple[type, ...], kind_name: str) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is REQUIRED:
                raise ConfigError(f"{self.where} has no {key!r}; use the complete file of the checkpoint")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{self.where}: {key}={value!r} is not {kind_name}; correct it")
        return value

    def integer(self, key: str, default: Any = REQUIRED, least: int = 1) -> int:
        value = self._get(key, default, (int,), "an integer")
        if value < least:
            raise ConfigError(f"{self.where}: {key}={value} is below {least}; correct it")
        return value

    def number(self, key: str, default: Any = REQUIRED) -> float:
        value = float(self._get(key, default, (int, float), "a number"))
        if not 0 <= value < math.inf:
            raise ConfigError(f"{self.where}: {key}={value} is negative or not finite; correct it")
        return value

    def flag(self, key: str, default: bool) -> bool:
        return self._get(key, default, (bool,), "true or false")

    def text(self, key: str, default: Any = REQUIRED) -> str:
        return self._get(key, default, (str,), "a string")

    def object(self, key: str) -> "JsonReader":
        """Return the object under `key`, empty if there is none."""
        return JsonReader(self._get(key, {}, (dict,), "an object"), f"{self.where}: {key}")

    def require(self, key: str, allowed: Any, way_out: str) -> None:
        """Raise ConfigError if `key` is present with a value other than `allowed`."""
        value = self.values.get(key)
        if value is not None and value != allowed:
            raise ConfigError(f"{self.where}: {key}={value!r} is not supported (only {allowed!r}); {way_out}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ConfigError if the file is missing or damaged."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing; give the folder of a complete checkpoint")
    return read_object(path)
