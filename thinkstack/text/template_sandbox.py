"""A sandbox for untrusted Jinja templates: no access to the outside, bounded time and memory.

Templates have the environment of transformers: tojson, raise_exception, strftime_now, loop controls and generation
tags. Each loop iteration and each call is one step. The number of steps, the size of every computed value, and the size
of the output are bounded.
"""

import datetime
import functools
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
from jinja2 import nodes

from thinkstack.types import RequestError

MAX_STEPS = 300_000
"""Maximum iterations and calls per rendering."""
MAX_SIZE = 1 << 24
"""Maximum characters or items of a computed value, and maximum characters of the output."""
MAX_BITS = 1 << 12
"""Maximum bits of a computed integer."""
_STEPS = "the steps of this rendering"
_SIZED = (str, list, tuple)
_WIDE_FIELD = re.compile(r"\d{7}|\*")
"""A field of a format string whose width has seven digits or comes from an argument."""
_EXPANDING_FILTERS = ("center", "format", "indent", "join", "replace", "wordwrap", "batch", "slice")
"""Filters and methods whose result can be larger than their arguments."""


class _Steps:
    def __init__(self) -> None:
        self.left = MAX_STEPS

    def take(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise jinja2.TemplateError(f"it needs more than {MAX_STEPS:,} steps")


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks assistant text; the tag is ignored and its content rendered."""

    tags = {"generation"}  # noqa: RUF012  (as Jinja declares it)

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds on steps and sizes."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])
        self.filters |= {"tojson": _to_json, "counted": _count_iterations}
        self.filters |= {name: _bounded_filter(name, self.filters[name]) for name in _EXPANDING_FILTERS}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None).set_lineno(loop.lineno)  # type: ignore[arg-type]
        return _concat_to_add(tree)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __context.parent[_STEPS].take()
        method = inspect.unwrap(__obj)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        _check_growth(name, [*([owner] if isinstance(owner, str) else []), *args, *kwargs.values()])
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _relative_size(operator, left, right) > 1:
            raise _too_large()
        return super().call_binop(context, operator, left, right)


def _relative_size(operator: str, left: Any, right: Any) -> float:
    """Return the size of an operator's result as a share of the allowed size."""
    if operator == "+" and isinstance(left, _SIZED) and isinstance(right, _SIZED):
        return (len(left) + len(right)) / MAX_SIZE
    if operator == "*" and isinstance(left, _SIZED) != isinstance(right, _SIZED):
        sequence, times = (left, right) if isinstance(left, _SIZED) else (right, left)
        return len(sequence) * times / MAX_SIZE if isinstance(times, int) else 0
    if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        return bits / MAX_BITS
    return float("inf") if operator == "%" and isinstance(left, str) and _WIDE_FIELD.search(left) else 0


def _too_large() -> jinja2.TemplateError:
    return jinja2.TemplateError(f"it computes a value of more than {MAX_SIZE:,} characters, items or digits")


def _check_growth(name: str, arguments: list[Any]) -> None:
    """Raise TemplateError if the result of a call would be too large.

    arguments: the arguments of the call; for a method of a string, the string comes first.
    """
    size: float = max((value for value in arguments if isinstance(value, int)), default=0)
    texts = [value for value in arguments if isinstance(value, str)]
    if name in ("format", "format_map") and texts and _WIDE_FIELD.search(texts[0]):
        size = float("inf")
    elif name == "replace" and len(texts) >= 3:
        size = len(texts[0]) + len(texts[2]) * texts[0].count(texts[1])
    elif name == "join":
        size = sum(
            len(str(part)) + sum(map(len, texts)) for value in arguments if isinstance(value, list) for part in value
        )
    if size > MAX_SIZE:
        raise _too_large()


def _bounded_filter(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(filter_)
    def checked(*args: Any, **kwargs: Any) -> Any:
        takes_context = hasattr(filter_, "jinja_pass_arg")
        arguments = [*args[takes_context:], *kwargs.values()]
        if name == "join":
            arguments[0] = list(arguments[0])
            args = (*args[:takes_context], *arguments[: len(args) - takes_context])
        _check_growth(name, arguments)
        return filter_(*args, **kwargs)

    return checked


def _concat_to_add(node: Any) -> Any:
    """Replace every `a ~ b` in the tree by a sum of strings, so that the bound on sums applies."""
    for name, value in list(node.iter_fields()):
        if isinstance(value, nodes.Node):
            setattr(node, name, _concat_to_add(value))
        elif isinstance(value, list):
            setattr(node, name, [_concat_to_add(part) if isinstance(part, nodes.Node) else part for part in value])
    if isinstance(node, nodes.Concat):
        texts = [nodes.Filter(part, "string", [], [], None, None).set_lineno(node.lineno) for part in node.nodes]
        return functools.reduce(lambda *pair: nodes.Add(*pair).set_lineno(node.lineno), texts)
    return node


@jinja2.pass_context
def _count_iterations(context: Any, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        context.parent[_STEPS].take()
        yield item


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(reason: str) -> None:
    raise jinja2.TemplateError(reason)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> Callable[..., Iterator[str]]:
    return _BoundedEnvironment().from_string(template).generate


@functools.lru_cache(maxsize=32)
def template_variables(template: str) -> frozenset[str]:
    """Return the names that a template reads and does not set. Raises RequestError for invalid Jinja."""
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(_BoundedEnvironment().parse(template)))
    except jinja2.TemplateError as error:
        raise RequestError(f"the model's chat template is not valid Jinja: {error}") from error


def render(template: str, **values: Any) -> str:
    """Render the template. Raises RequestError for any error in it, including exceeded bounds."""
    pieces: list[str] = []
    size = 0
    try:
        for piece in _compiled(template)(**values, **{_STEPS: _Steps()}):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_SIZE:
                raise jinja2.TemplateError(f"it writes more than {MAX_SIZE:,} characters")
    except Exception as error:  # the boundary of the sandbox: a template can raise anything
        reason = str(error) or type(error).__name__
        raise RequestError(f"the model's chat template cannot render this conversation: {reason}") from error
    return "".join(pieces)
