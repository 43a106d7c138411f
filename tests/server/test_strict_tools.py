"""DeepSeek's rules for strict tools hold on /beta, and nowhere else."""

import httpx
import pytest

from tests.server.live import live
from tests.server.requests import QUESTION
from thinkstack.server.strict_tools import check_strict_tools
from thinkstack.types import RequestError, Tool

CLOSED = {"additionalProperties": False}
POINT = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]+$", "description": "Its name"},
        "mail": {"type": "string", "format": "email"},
        "weight": {"anyOf": [{"type": "number", "minimum": 0, "multipleOf": 0.5}, {"const": "unknown"}]},
        "tags": {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}},
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "boolean"}]},
    },
    "required": ["name", "mail", "weight", "tags", "next"],
    "$defs": {"node": {"type": "object", "properties": {}, "required": [], **CLOSED}},
    **CLOSED,
}


def one(schema):
    """Parameters with one property."""
    return {"type": "object", "properties": {"a": schema}, "required": ["a"], **CLOSED}


def tool(parameters, name="add", strict=True):
    return Tool(name=name, description="", parameters=parameters, strict=strict)


def test_what_the_rules_allow_is_accepted():
    check_strict_tools([tool(POINT), tool(one({"type": "integer", "default": 3}), "sub")])
    check_strict_tools([tool({"type": "object", "minProperties": 2}, strict=False)])


@pytest.mark.parametrize(
    ("parameters", "place", "words"),
    [
        ({"type": "object", "properties": {}}, "", "needs additionalProperties=false"),
        ({"type": "object", "properties": {"a": {"type": "string"}}, **CLOSED}, "", "a is missing"),
        (one({"type": "string", "minLength": 1}), ".properties.a", "has minLength"),
        (one({"type": "string", "format": "date"}), ".properties.a", "email, hostname, ipv4, ipv6, uuid"),
        (one({"type": "array", "items": {"type": "null"}}), ".properties.a.items", "the type 'null'"),
        (one({"type": "array", "maxItems": 3}), ".properties.a", "has maxItems"),
        (one({"type": ["string", "null"]}), ".properties.a", "has the type ['string', 'null']"),
        (one({"description": "anything"}), ".properties.a", "has no type"),
        (one({"anyOf": [{"type": "object"}]}), ".properties.a.anyOf[0]", "additionalProperties"),
        (one({"oneOf": [], "type": "string"}), ".properties.a", "has oneOf"),
        (one(True), ".properties.a", "is no schema"),
        ({**one({"$ref": "#/$def/b"}), "$def": {"b": {"type": "object"}}}, ".$def.b", "additionalProperties"),
    ],
)
def test_what_breaks_a_rule_is_refused_with_its_place(parameters, place, words):
    with pytest.raises(RequestError) as raised:
        check_strict_tools([tool(POINT, "sub"), tool(parameters)])
    assert raised.value.field == f"tools[1].function.parameters{place}" and words in str(raised.value)


def test_all_tools_are_strict_or_none():
    with pytest.raises(RequestError, match="set it for all tools"):
        check_strict_tools([tool(POINT), tool(POINT, "sub", strict=False)])


@pytest.mark.parametrize("odd", [[], [[]], [{}], "a", 3, None, {"a": [[]]}])
@pytest.mark.parametrize("key", ["properties", "required", "$defs", "anyOf", "items", "format", "enum", "type"])
def test_odd_schemas_are_refused_or_left_to_the_compiler(key, odd):
    try:
        check_strict_tools([tool(POINT | {key: odd})])
    except RequestError as error:
        assert error.field


def test_only_beta_has_the_rules(tmp_path):
    function = {"name": "add", "strict": True, "parameters": one({"type": "string", "minLength": 1})}
    body = {"model": "deepseek-chat", "messages": QUESTION, "tools": [{"type": "function", "function": function}]}
    with live(tmp_path, lambda prompt, index: "Paris") as server:

        def post(base):
            return httpx.post(f"{server.url}{base}/chat/completions", json=body, headers=server.headers)

        assert post("").status_code == post("/v1").status_code == 200
        refused = post("/beta")
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "tools[0].function.parameters.properties.a"
