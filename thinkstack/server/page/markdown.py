"""Markdown of models to sanitized HTML: CommonMark with tables, strikethrough and formulas; no HTML, no images.

The page, share links and exports all render through `render_block`. Text that is finished block by block is split
by `BlockSplitter`; the HTML of the blocks is that of the whole, but for link definitions (`[name]: url`), which hold
in their own block only.
"""

import re
from html import escape
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock, table
from markdown_it.rules_block.list import skipBulletListMarker, skipOrderedListMarker
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

from thinkstack.server.page.blocks import BlockSplitter
from thinkstack.server.page.formulas import (
    MATHML_ATTRIBUTES,
    MATHML_ELEMENTS,
    MAX_FORMULA_SPAN,
    is_mathml_attribute,
    match_display_opening,
    match_opening,
    render_formula,
    search_event,
)

__all__ = ["URL_SCHEMES", "BlockSplitter", "is_attribute_allowed", "render", "render_block"]

URL_SCHEMES = ("http", "https", "mailto")
"""Links go nowhere else; relative links are plain text."""
MAX_NESTING = 20
"""Levels of lists (two each) and quotes; a block with more is shown as its source."""

_LINK_ATTRIBUTES = {"rel": "noopener noreferrer nofollow", "target": "_blank"}  # added to every link
_HTML_ATTRIBUTES = {
    "a": {
        "href": re.compile(r"(?:https?:|mailto:).*", re.DOTALL | re.IGNORECASE),
        "title": re.compile(".*", re.DOTALL),
    },
    "ol": {"start": re.compile("[0-9]{1,9}")},
    "th": {"align": re.compile("left|center|right")},
    "td": {"align": re.compile("left|center|right")},
    "code": {"class": re.compile(r"language-[A-Za-z0-9_+-]{1,20}|formula")},
    "div": {"class": re.compile("formula")},
    "span": {"class": re.compile("formula")},
}
_HTML_ELEMENTS = frozenset(
    re.findall("[a-z0-9]+", "p br hr h3 h4 h5 h6 ul li blockquote pre em strong s table thead tbody tr")
)
# What HTML must not contain, as text or as a character reference: controls, lone surrogates, noncharacters.
_NOT_TEXT = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff"
    + "".join(f"{chr(plane + 0xFFFE)}{chr(plane + 0xFFFF)}" for plane in range(0x10000, 0x110000, 0x10000))
    + "]"
)


def replace_non_text(text: str) -> str:
    """The text with U+FFFD for controls, lone surrogates and noncharacters."""
    return _NOT_TEXT.sub("\ufffd", text)


def render(text: str) -> str:
    """HTML of a whole text, block by block."""
    splitter = BlockSplitter()
    return "".join(render_block(block) for block in [*splitter.feed(text), *splitter.finish()])


def render_block(source: str) -> str:
    """Sanitized HTML of a block's Markdown in <div class="block">; empty if nothing in it is visible."""
    body = _render_body(source)
    return f'<div class="block">{body}</div>' if body.strip() else ""


def _render_body(source: str) -> str:
    environment: dict[str, Any] = {}
    tokens = _PARSER.parse(source, environment)
    if any(token.level >= MAX_NESTING - 1 for token in tokens):  # the parser drops what is nested deeper
        return f"<pre>\n{escape(replace_non_text(source), quote=False)}</pre>"
    html = _PARSER.renderer.render(tokens, _PARSER.options, environment)
    return _CLEANER.clean(replace_non_text(html))


def is_attribute_allowed(element: str, name: str, value: str) -> bool:
    """Whether rendered Markdown may have this attribute."""
    if element == "a" and name in _LINK_ATTRIBUTES:
        return value == _LINK_ATTRIBUTES[name]
    if element in MATHML_ELEMENTS:
        return is_mathml_attribute(name, value)
    pattern = _HTML_ATTRIBUTES.get(element, {}).get(name)
    return pattern is not None and pattern.fullmatch(value) is not None


def _display_formula(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    """Display maths on lines of its own, blank lines included; it ends a paragraph, a list or a quote before it."""
    if state.is_code_block(start_line):
        return False
    position = state.bMarks[start_line] + state.tShift[start_line]
    delimiter = match_display_opening(state.src[position : position + 3])
    if delimiter is None:
        return False
    # The other lines are indented as much as the first and are in the same quote. So the verdict is the same whichever
    # list or quote asks; end_line may be that of the document.
    indent, is_quoted = state.sCount[start_line], state.bsCount[start_line] > 0
    line, begin, size = start_line, position + 2, 0
    while True:
        size += state.eMarks[line] - state.bMarks[line]
        if size > MAX_FORMULA_SPAN:
            return False
        event = search_event(delimiter, state.src, begin, state.eMarks[line])
        if event is not None:
            break
        line += 1
        if line >= end_line or (state.bsCount[line] > 0) != is_quoted:
            return False
        if not state.isEmpty(line) and state.sCount[line] < indent:
            return False
        begin = state.bMarks[line]
    at, closes = event
    if not closes or state.src[at + 2 : state.eMarks[line]].strip(" \t"):
        return False
    if silent:
        return True
    state.line = line + 1
    token = state.push("display_formula", "", 0)
    token.info = delimiter
    first_end = at if line == start_line else state.eMarks[start_line]
    middle = state.getLines(start_line + 1, line, state.blkIndent, True) if line > start_line + 1 else ""
    last = state.src[state.bMarks[line] : at] if line > start_line else ""
    token.content = f"{state.src[position + 2 : first_end]}\n{middle}{last}"
    token.map = [start_line, state.line]
    return True


def _inline_formula(state: StateInline, silent: bool) -> bool:
    """A formula within a paragraph."""
    delimiter = match_opening(state.src, state.pos)
    if delimiter is None:
        return False
    event = search_event(delimiter, state.src, state.pos + 2, state.posMax)
    if event is None or not event[1] or not state.src[state.pos + 2 : event[0]].strip():
        return False
    if not silent:
        token = state.push("inline_formula", "", 0)
        token.info = delimiter
        token.content = state.src[state.pos + 2 : event[0]]
    state.pos = event[0] + 2
    return True


def _table(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    """A table whose header is not the first line of another block."""
    if skipBulletListMarker(state, start_line) >= 0 or skipOrderedListMarker(state, start_line) >= 0:
        return False
    return table(state, start_line, end_line, silent)


def _adapt(state: StateCore) -> None:
    """Fit the tokens into the page: it has one h1 and one h2 per message, no images and no inline styles."""
    for token in state.tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + 2, 6)}"
        elif token.type in ("th_open", "td_open") and token.attrs:
            token.attrs = {"align": str(token.attrs["style"]).removeprefix("text-align:")}
        elif token.type == "inline" and token.children:
            token.children = _link_images(token.children, state.md.renderer)


def _link_images(tokens: list[Token], renderer: Any) -> list[Token]:
    """Replace images by links to them, or by their description inside a link."""
    written: list[Token] = []
    is_in_link = False
    for token in tokens:
        if token.type in ("link_open", "link_close"):
            is_in_link = token.type == "link_open"
        if token.type != "image":
            written.append(token)
            continue
        source = str(token.attrs["src"])
        description = renderer.renderInlineAsText(token.children, None, {}) if token.children else ""
        text = Token("text", "", 0, content=description or (source if not is_in_link else ""))
        if is_in_link:
            written.append(text)
        else:
            written += [Token("link_open", "a", 1, attrs={"href": source}), text, Token("link_close", "a", -1)]
    return written


def _is_link_allowed(url: str) -> bool:
    scheme, colon, _ = url.strip().partition(":")
    return bool(colon) and scheme.lower() in URL_SCHEMES


def _build_parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": MAX_NESTING}).enable("strikethrough")
    parser.validateLink = _is_link_allowed  # type: ignore[method-assign]
    block = parser.block.ruler
    block.after("fence", "display_formula", _display_formula, {"alt": ["paragraph", "reference", "blockquote", "list"]})
    block.before("lheading", "plain_table", _table, {"alt": ["paragraph", "reference"]})
    parser.inline.ruler.before("escape", "inline_formula", _inline_formula)
    parser.core.ruler.push("adapt", _adapt)
    renderer: Any = parser.renderer
    rules = renderer.rules
    rules["display_formula"] = lambda tokens, index, options, env: (
        f'<div class="formula">{render_formula(tokens[index].content, tokens[index].info)}</div>\n'
    )
    rules["inline_formula"] = lambda tokens, index, options, env: render_formula(
        tokens[index].content, tokens[index].info
    )
    return parser


def _filter_attribute(element: str, name: str, value: str) -> str | None:
    return value if is_attribute_allowed(element, name, value) else None


_PARSER = _build_parser()
_CLEANER = nh3.Cleaner(
    tags=_HTML_ELEMENTS | _HTML_ATTRIBUTES.keys() | MATHML_ELEMENTS,
    attributes={
        **{element: set(attributes) for element, attributes in _HTML_ATTRIBUTES.items()},
        **{element: set(MATHML_ATTRIBUTES) for element in MATHML_ELEMENTS},
    },
    attribute_filter=_filter_attribute,
    url_schemes=set(URL_SCHEMES),
    url_relative="deny",
    link_rel=_LINK_ATTRIBUTES["rel"],
    set_tag_attribute_values={"a": {"target": _LINK_ATTRIBUTES["target"]}},
)
