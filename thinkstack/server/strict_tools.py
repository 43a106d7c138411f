"""DeepSeek's rules for strict tools: which JSON schemas its /beta routes take."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from thinkstack.types import RequestError, Tool

COMMON = frozenset(("type", "title", "description", "enum", "const", "default", "anyOf", "$ref", "$def", "$defs"))
KEYWORDS: Mapping[str, frozenset[str]] = {
    "object": frozenset(("properties", "required", "additionalProperties")),
    "string": frozenset(("pattern", "format")),
    "number": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")),
    "integer": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")),
    "boolean": frozenset(),
    "array": frozenset(("items",)),
}
"""The keywords of each type beside those of all."""
FORMATS = ("email", "hostname", "ipv4", "ipv6", "uuid")


def check_strict_tools(tools: Sequence[Tool]) -> None:
    """Raise RequestError with the place in the request for tools that break DeepSeek's rules for strict mode: all tools
    are strict, objects are closed and need all their properties, and only some types and keywords exist.

    Source: api-docs.deepseek.com, Tool Calls, strict mode.
    """
    if not any(tool.strict for tool in tools):
        return
    for index, tool in enumerate(tools):
        field = f"tools[{index}].function"
        if not tool.strict:
            raise RequestError(f"{field}.strict is false, but another tool is strict; set it for all tools", field)
        waiting: list[tuple[str, Any]] = [(f"{field}.parameters", tool.parameters)]
        while waiting:
            place, schema = waiting.pop()
            if fault := _fault(schema):
                raise RequestError(f"{place} {fault}", place)
            waiting += _parts(place, schema)


def _parts(place: str, schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas directly within a schema, with their places."""
    for name in ("properties", "$def", "$defs"):
        if isinstance(found := schema.get(name), Mapping):
            yield from ((f"{place}.{name}.{key}", part) for key, part in found.items())
    if isinstance(options := schema.get("anyOf"), list):
        yield from ((f"{place}.anyOf[{index}]", part) for index, part in enumerate(options))
    if "items" in schema:
        yield f"{place}.items", schema["items"]


def _fault(schema: Any) -> str:
    """What is wrong with one schema, apart from those within it; empty if nothing is."""
    if not isinstance(schema, Mapping):
        return "is no schema; use an object with a type"
    kind = schema.get("type")
    if kind is None and not {"anyOf", "$ref", "enum", "const"} & set(schema):
        return f"has no type; use {', '.join(KEYWORDS)}, anyOf or $ref"
    if kind is not None and (not isinstance(kind, str) or kind not in KEYWORDS):
        return f"has the type {kind!r}, which strict tools do not have; use {', '.join(KEYWORDS)} or anyOf"
    known = COMMON | (KEYWORDS[kind] if kind else frozenset())
    if unknown := [name for name in schema if name not in known]:
        return f"has {unknown[0]}, which strict tools do not have there; use {', '.join(sorted(known))}"
    if schema.get("format", FORMATS[0]) not in FORMATS:
        return f"has the format {schema['format']!r}; strict tools have {', '.join(FORMATS)}"
    if kind != "object":
        return ""
    if schema.get("additionalProperties") is not False:
        return "needs additionalProperties=false, because it is part of a strict tool"
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        return "has properties that are no object, or required that is no list"
    missing = [name for name in properties if name not in required]
    return f"needs all its properties in required; {missing[0]} is missing" if missing else ""
