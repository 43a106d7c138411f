"""Python values as JSON text, by which the arguments and results of a candidate cross between two processes.

Only plain data crosses: a value of another type arrives as plain data (a named tuple as a tuple, a numpy number as a
number), or as the number of an object that stays in its process. Decoding calls nothing of the sender's: it builds
None, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, range, iterators over lists, and the
containers of `collections`. The sandboxed process has this file and the standard library alone.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

MAX_ITEMS = 1_000_000
"""Most items that are taken from an iterator."""
MAX_DECIMAL_BITS = 10_000
"""Longer integers cross in base 16: decimal conversion takes quadratic time and stops at 4,300 digits."""
FACTORIES: dict[str, Any] = {"int": int, "list": list, "dict": dict, "set": set, "str": str, "float": float}
"""Factories of a defaultdict that cross by name; with any other one it arrives without a factory."""
TYPES: dict[str, Any] = {
    kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)
}
"""Types that cross by name: arguments such as `int`."""
CONTAINERS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_ITERATORS: tuple[Any, ...] = (Iterator, type({}.keys()), type({}.values()), type({}.items()))

EncodeObject = Callable[[Any], dict[str, Any]]
DecodeObject = Callable[[str, Any], Any]


class CannotCross(Exception):
    """A value that is no plain data."""


def refuse_object(value: Any) -> dict[str, Any]:
    """Raise CannotCross: no object crosses."""
    raise CannotCross(type(value).__name__)


def refuse_tag(tag: str, body: Any) -> Any:
    """Raise CannotCross: the tag is unknown."""
    raise CannotCross(str(tag)[:100])


def encode(value: Any, encode_object: EncodeObject = refuse_object) -> Any:
    """Return `value` as JSON data; what is no plain data becomes `encode_object(value)`.

    Lists stay lists; every other container is an object with one key, the name of its type.
    """
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if isinstance(value, bool | int | float | complex):
        return _encode_number(value)
    if isinstance(value, str):
        return str.__getitem__(value, slice(None))
    if isinstance(value, bytes | bytearray):
        return {"bytes" if isinstance(value, bytes) else "bytearray": bytes.decode(bytes(value), "latin-1")}
    if isinstance(value, dict):
        return _encode_mapping(value, encode_object)
    if kind is type and value in TYPES.values():
        return {"type": value.__name__}
    if kind is range:
        return {"range": [value.start, value.stop, value.step]}
    found = _as_list(value)
    if found is None:
        return _encode_foreign(value, encode_object)
    name, items = found
    encoded = [encode(item, encode_object) for item in items]
    return encoded if name == "list" else {name: encoded}


def _as_list(value: Any) -> tuple[str, list[Any]] | None:
    """Return the name of a container and its items, read by the methods of the builtin type."""
    for name, kind in CONTAINERS.items():
        if isinstance(value, kind):
            return name, list(kind.__iter__(value))
    if isinstance(value, deque):
        return "deque", [value.maxlen, *deque.__iter__(value)]
    if isinstance(value, _ITERATORS):
        items = []
        for item in value:
            items.append(item)
            if len(items) > MAX_ITEMS:
                raise CannotCross("an iterator without end")
        return "iterator", items
    return None


def _encode_number(value: Any) -> Any:
    if isinstance(value, bool):
        return bool(value)
    if isinstance(value, int):
        plain = int.__add__(value, 0)  # of an int, also where the value is of a subclass such as IntEnum
        return plain if plain.bit_length() <= MAX_DECIMAL_BITS else {"int": hex(plain)}
    if isinstance(value, float):
        plain_float = float.__pos__(value)
        return plain_float if plain_float - plain_float == 0 else {"float": float.__repr__(plain_float)}
    return {"complex": [_encode_number(complex(value).real), _encode_number(complex(value).imag)]}


def _encode_mapping(value: dict[Any, Any], encode_object: EncodeObject) -> Any:
    pairs = [[encode(key, encode_object), encode(item, encode_object)] for key, item in dict.items(value)]
    if isinstance(value, Counter):
        return {"Counter": pairs}
    if isinstance(value, OrderedDict):
        return {"OrderedDict": pairs}
    if isinstance(value, defaultdict):
        factory = next((name for name, kind in FACTORIES.items() if kind is value.default_factory), None)
        return {"defaultdict": [factory, pairs]}
    return {"dict": pairs}


def _encode_foreign(value: Any, encode_object: EncodeObject) -> Any:
    """Encode numbers and arrays of numpy as plain data, and other objects by `encode_object`."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        return encode(value.tolist(), encode_object)
    return encode_object(value)


def decode(data: Any, decode_object: DecodeObject = refuse_tag) -> Any:
    """Return the value of JSON data of `encode`; `decode_object(tag, body)` gives what has another tag."""
    if isinstance(data, list):
        return [decode(item, decode_object) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise CannotCross("an object with several keys")
    ((tag, body),) = data.items()
    try:
        if tag == "type":
            return TYPES[body]
        if tag in ("int", "float", "bytes", "bytearray", "complex", "range"):
            return _decode_scalar(tag, body)
        if tag in ("dict", "Counter", "OrderedDict", "defaultdict"):
            return _decode_mapping(tag, body, decode_object)
        if tag in ("tuple", "set", "frozenset", "deque", "iterator"):
            items = [decode(item, decode_object) for item in body]
            if tag == "deque":
                return deque(items[1:], items[0])
            return iter(items) if tag == "iterator" else CONTAINERS[tag](items)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise CannotCross(f"a wrong {tag}") from error
    return decode_object(tag, body)


def _decode_scalar(tag: str, body: Any) -> Any:
    if tag == "int":
        return int(body, 16)
    if tag == "float":
        return float(body)
    if tag == "complex":
        return complex(*(float(decode(part)) for part in body))
    if tag == "range":
        return range(*body)
    return bytes(body, "latin-1") if tag == "bytes" else bytearray(body, "latin-1")


def _decode_mapping(tag: str, body: Any, decode_object: DecodeObject) -> Any:
    factory, pairs = body if tag == "defaultdict" else (None, body)
    decoded = [(decode(key, decode_object), decode(item, decode_object)) for key, item in pairs]
    if tag == "Counter":
        return Counter(dict(decoded))
    if tag == "OrderedDict":
        return OrderedDict(decoded)
    return dict(decoded) if tag == "dict" else defaultdict(FACTORIES[factory] if factory else None, decoded)


def to_line(data: Any) -> bytes:
    """Return JSON data as one line of ASCII. Raises CannotCross for data that is nested too deeply."""
    try:
        return json.dumps(data).encode("ascii") + b"\n"
    except RecursionError as error:
        raise CannotCross("a value that is nested too deeply") from error


def from_line(line: bytes) -> Any:
    """Return the JSON data of a line. Raises CannotCross for anything else."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CannotCross("a line that is no JSON") from error
