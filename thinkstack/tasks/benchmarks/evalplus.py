"""HumanEval+ and MBPP+ (EvalPlus, arXiv:2305.01210): many inputs per function, compared with a reference solution.

The reference solution runs in a sandbox of its own, and its results are the expected ones. As published, an input has
at least MIN_SECONDS, and FACTOR times the time of the reference.
"""

import ast
import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy

from thinkstack.tasks.benchmarks.code_prompts import HUMANEVAL_PLUS_PROMPTS, MBPP_PLUS_PROMPTS
from thinkstack.tasks.benchmarks.code_task import code_problem, parsed_statements, text_of
from thinkstack.tasks.benchmarks.humaneval import HumanEval
from thinkstack.tasks.verify.code import Call, CodeVerdict, grade_calls, results_of
from thinkstack.tasks.verify.code_blocks import last_code_block, visible_text
from thinkstack.tasks.verify.rungs import Rung
from thinkstack.types import ConfigError, Problem, Response

FACTOR, REFERENCE_SECONDS = 4.0, 60.0
MEMORY_BYTES = 4 << 30
"""Memory of a program, as published; some results are large."""
SAME_SET = frozenset(
    {
        "similar_elements",
        "find_char_long",
        "common_in_nested_lists",
        "extract_singly",
        "larg_nnum",
        "intersection_array",
        "find_dissimilar",
        "Diff",
    }
)
"""Functions of MBPP+ whose results are compared as sets."""
LARGE_RESULTS = {"combinations_colors": 20}
"""Functions of MBPP+ with inputs that are left out: those whose second argument is above this number. Their results
have up to 1,663,740 tuples of 77 words, more than may cross between processes."""
NOT_NONE = ("check_str", "text_match_three", "text_starta_endb")
"""Functions of MBPP+ that may return a match or a truth value."""


class HumanEvalPlus(HumanEval):
    """HumanEval with more inputs. Fields: those of HumanEval without test, and base_input, plus_input, atol."""

    SOURCE = "HumanEvalPlus.jsonl.gz of the releases of github.com/evalplus/humanevalplus_release (Apache-2.0)"
    FIELDS: tuple[str, ...] = (
        "task_id",
        "prompt",
        "entry_point",
        "canonical_solution",
        "base_input",
        "plus_input",
        "atol",
    )
    FILE_NAMES: tuple[str, ...] = ("HumanEvalPlus",)
    PROMPTS = HUMANEVAL_PLUS_PROMPTS
    TEST_SECONDS = 4.0

    def tests(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        return inputs_of(row, where)

    def num_tests(self, problem: Problem) -> int:
        return len(problem.metadata["inputs"])

    def grade(self, problem: Problem, program: str, rung: Rung) -> CodeVerdict:
        return grade_inputs(problem, program, rung, self.test_seconds)


class MbppPlus(HumanEvalPlus):
    """MBPP with more inputs. Fields: those of HumanEval+, and assertion, whose calls show the types of the inputs.

    JSON has no tuples, sets and complex numbers: an input has the types that the calls in `assertion` have at the same
    place.
    """

    SOURCE = "MbppPlus.jsonl.gz of the releases of github.com/evalplus/mbppplus_release (Apache-2.0)"
    PROMPTS = MBPP_PLUS_PROMPTS
    FIELDS: tuple[str, ...] = (*HumanEvalPlus.FIELDS, "assertion")
    FILE_NAMES: tuple[str, ...] = ("MbppPlus", "MbppPlus-v0.1.0", "MbppPlus-v0.2.0")

    def _problem(self, row: dict[str, Any], where: str) -> Problem:
        texts = {name: text_of(row, name, where) for name in ("task_id", "prompt", "entry_point", "canonical_solution")}
        examples = calls_in(text_of(row, "assertion", where), texts["entry_point"], where)
        metadata = {"entry_point": texts["entry_point"], "examples": repr(examples), **inputs_of(row, where)}
        question = texts["prompt"].strip()
        return code_problem(self.name, question, texts["canonical_solution"], texts["task_id"], metadata)

    def program(self, problem: Problem, response: Response) -> str | None:
        return last_code_block(visible_text(response))


def inputs_of(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Return inputs and tolerance of a row. Raises ConfigError for the wrong shape."""
    row = row | {"plus_input": row["plus_input"] or []}  # the release writes {} for no further inputs
    for name in ("base_input", "plus_input"):
        if not isinstance(row[name], list) or not all(isinstance(values, list) for values in row[name]):
            raise ConfigError(f"{where}: {name} must be a list of lists of arguments; give the published file")
    if not isinstance(row["atol"], int | float):
        raise ConfigError(f"{where}: atol is {row['atol']!r}, not a number; give the published file")
    if not row["base_input"]:
        raise ConfigError(f"{where}: base_input is empty; give the published file")
    inputs, most = [*row["base_input"], *row["plus_input"]], LARGE_RESULTS.get(row["entry_point"], math.inf)
    return {"inputs": [values for values in inputs if most == math.inf or values[1] <= most], "atol": row["atol"]}


def grade_inputs(problem: Problem, program: str, rung: Rung, min_seconds: float) -> CodeVerdict:
    """Compare the candidate with the reference solution on all inputs."""
    name, atol = problem.metadata["entry_point"], float(problem.metadata["atol"])
    examples = ast.literal_eval(problem.metadata.get("examples", "[]"))
    inputs = [typed(values, examples) for values in problem.metadata["inputs"]]
    expected = _expected(problem.answer, name, json.dumps(problem.metadata["inputs"]), repr(examples), rung)
    calls = [Call(arguments=given, expected=(given, value)) for given, (value, _) in zip(inputs, expected, strict=True)]
    seconds = [max(min_seconds, FACTOR * taken) for _, taken in expected]

    def compare(found: Any, pair: tuple[Sequence[Any], Any]) -> bool:
        return is_right(name, pair[0], found, pair[1], atol)

    return grade_calls(program, name, calls, rung, seconds, compare, MEMORY_BYTES)


@lru_cache(maxsize=64)
def _expected(code: str, name: str, inputs: str, examples: str, rung: Rung) -> list[tuple[Any, float]]:
    """Return (result, seconds) of the reference solution for each input."""
    shapes = ast.literal_eval(examples)
    given = [typed(values, shapes) for values in json.loads(inputs)]
    return results_of(code, name, given, rung, REFERENCE_SECONDS, MEMORY_BYTES)


def is_right(name: str, arguments: Sequence[Any], found: Any, expected: Any, atol: float) -> bool:
    """Compare a result as EvalPlus does: equal, or close where the expected value consists of floats.

    Exceptions by name: a root of a polynomial is put into it, some results are sets or matches. Two published
    exceptions are left out: they accept a program that always returns 0 (sum_div) or true (are_equivalent).
    """
    if name == "find_zero":
        return abs(sum(factor * math.pow(found, place) for place, factor in enumerate(arguments[0]))) <= atol
    if name in SAME_SET:
        return set(found) == set(expected)
    if name in NOT_NONE:
        return _is_match(found) == _is_match(expected)
    if found == expected:
        return True
    tolerance = 1e-6 if atol == 0 and _is_floats(expected) else atol
    if tolerance == 0 or type(found) is not type(expected):
        return False
    if isinstance(expected, list | tuple) and len(found) != len(expected):
        return False
    return bool(numpy.allclose(found, expected, rtol=1e-7, atol=tolerance, equal_nan=True))


def _is_match(value: Any) -> bool:
    return value if isinstance(value, bool) else value is not None


def _is_floats(value: Any) -> bool:
    parts = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(part, float) for part in parts)


def calls_in(assertion: str, name: str, where: str) -> list[tuple[Any, ...]]:
    """Return the literal arguments of the calls of a function in test code."""
    nodes = [node for part in parsed_statements(assertion, where, "assertion") for node in ast.walk(part)]
    found = []
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            try:
                found.append(tuple(ast.literal_eval(argument) for argument in node.args))
            except ValueError:  # an expression; other calls show the types
                continue
    return found


def typed(values: Sequence[Any], examples: Sequence[Sequence[Any]]) -> list[Any]:
    """Return arguments from JSON with the types that the arguments of `examples` have at the same place."""
    places = [[row[place] for row in examples if place < len(row)] for place in range(len(values))]
    pairs = zip(values, places, strict=True)
    return [(_number if isinstance(value, str) else _typed)(value, shown) for value, shown in pairs]


def _number(text: str, examples: Sequence[Any]) -> Any:
    """Return the number that a text stands for, where the examples are numbers: JSON has no complex ones."""
    if not examples or not all(isinstance(example, int | float | complex) for example in examples):
        return text
    for kind in (complex,) if complex in map(type, examples) else (float, complex):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _typed(value: Any, examples: Sequence[Any], outer: type = list) -> Any:
    """Return a value with the types of the examples; a list where they have no container is like the one around it."""
    kinds = {type(example) for example in examples}
    if isinstance(value, dict):
        inside = [item for example in examples if isinstance(example, dict) for item in example.values()]
        return {key: _typed(item, inside) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    kinds = kinds & {list, tuple, set, dict} or {outer}
    kind = next(kind for kind in (set, list, tuple, dict) if kind in kinds)
    inside = [item for example in examples if isinstance(example, list | tuple | set) for item in example]
    items = [_typed(item, inside, list if kind is list else tuple) for item in value]
    if kind is set:
        return set(items) if items or dict not in kinds else {}
    return tuple(items) if kind is tuple else items
