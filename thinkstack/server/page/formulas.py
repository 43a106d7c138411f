r"""Formulas in Markdown: where they begin and end, and LaTeX to MathML.

A formula is written \( ... \) in a line, or \[ ... \] or $$ ... $$ for display. A single dollar is currency.
"""

import re
import unicodedata
from functools import lru_cache
from html import escape, unescape
from typing import Literal
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert_to_element

MAX_FORMULA_CHARS = 4_000
"""A longer formula is shown as its source."""
MAX_FORMULA_SPAN = 10_000
"""Display maths on lines of its own is recognized if it closes within this many characters (line ends excluded)."""
MAX_FORMULA_DEPTH = 40
"""Nesting of braces, and of MathML elements, above which a formula is shown as its source."""

Delimiter = Literal["\\(", "\\[", "$$"]

# The next thing that decides about an open formula: its closing delimiter, the same opening delimiter again, or a
# backtick. Only the first keeps the formula: inside code nothing is maths. No pattern crosses a line end, and an
# opening delimiter stops the search, so that all searches together are linear in the text.
_EVENTS = {
    "\\(": re.compile(r"(?<!\\)(?:\\\\)*\\[()]|`"),
    "\\[": re.compile(r"(?<!\\)(?:\\\\)*\\[\[\]]|`"),
    "$$": re.compile(r"(?<!\\)\$\$|`"),
}
_CLOSING = {"\\(": "\\)", "\\[": "\\]", "$$": "$$"}
_OPENING = re.compile(r"\\[(\[]|(?<!\$)\$\$(?!\$)")
_DISPLAY_OPENING = re.compile(r"\\\[|\$\$(?!\$)")


def match_opening(text: str, position: int) -> Delimiter | None:
    """The opening delimiter at this position, if there is one."""
    found = _OPENING.match(text, position)
    return found[0] if found else None  # type: ignore[return-value]


def match_display_opening(text: str, position: int = 0) -> Delimiter | None:
    """The opening delimiter of display maths at this position, if there is one."""
    found = _DISPLAY_OPENING.match(text, position)
    return found[0] if found else None  # type: ignore[return-value]


def search_event(delimiter: Delimiter, text: str, start: int = 0, end: int | None = None) -> tuple[int, bool] | None:
    """What decides about a formula whose content begins at start: (its position, whether it closes the formula)."""
    found = _EVENTS[delimiter].search(text, start, len(text) if end is None else end)
    if found is None:
        return None
    return found.end() - min(len(found[0]), 2), found[0].endswith(_CLOSING[delimiter])


# MathML: elements and attributes that latex2mathml produces and that can neither load nor run anything. A length is
# bounded, so that a formula cannot be drawn over the rest of the page.
_LENGTH = re.compile(
    r"[+-]?(?:[01]?\d(?:\.\d*)?|\.\d+)(?:em|ex)|[+-]?(?:\d{1,2}(?:\.\d*)?|\.\d+)(?:px|pt|mu)|0|-?[.\d]{1,4}width"
)
_BOOLEAN = re.compile("true|false")
_WORDS = re.compile(r"[a-z]{1,20}(?: [a-z]{1,20}){0,100}")
_COLOR = re.compile(r"#[0-9A-Fa-f]{3,8}|[A-Za-z]{1,30}")
_SPACE = re.compile(rf"{_LENGTH.pattern}|(?:negative)?(?:thin|medium|thick)mathspace")
_LENGTHS = re.compile(rf"(?:{_LENGTH.pattern})(?: (?:{_LENGTH.pattern})){{0,100}}")
MATHML_ELEMENTS = frozenset(
    re.findall(
        "[a-z]+",
        "math mrow mi mn mo mtext mspace msup msub msubsup mfrac msqrt mroot mover munder munderover "
        "mtable mtr mtd mstyle mpadded mphantom menclose",
    )
)
_NUM_CHILDREN = {"msubsup": 3, "munderover": 3}
_NUM_CHILDREN.update(dict.fromkeys(("mfrac", "mroot", "msub", "msup", "mover", "munder"), 2))
MATHML_ATTRIBUTES = {
    "display": re.compile("block|inline"),
    **dict.fromkeys(("width", "lspace", "rspace"), _SPACE),
    **dict.fromkeys(("height", "depth", "voffset", "minsize", "maxsize", "linethickness", "mathsize"), _LENGTH),
    **dict.fromkeys(("rowspacing", "columnspacing"), _LENGTHS),
    **dict.fromkeys(("stretchy", "fence", "separator", "movablelimits", "accent", "displaystyle", "largeop"), _BOOLEAN),
    **dict.fromkeys(("columnalign", "columnlines", "rowlines", "notation"), _WORDS),
    **dict.fromkeys(("mathcolor", "mathbackground"), _COLOR),
    "scriptlevel": re.compile("[0-2]"),
    "form": re.compile("prefix|postfix"),
    "linebreak": re.compile("newline"),
    "mathvariant": re.compile("normal|[a-z]{1,12}(?:-[a-z]{1,12}){0,3}"),
}
# Commands that define others may expand exponentially, and so does \sideset inside \sideset.
_DEFINITIONS = re.compile(r"\\(?:(?:re)?newcommand|def|newenvironment|DeclareMathOperator)(?![a-zA-Z])")
_COMMENT = re.compile(r"(?<!\\)%[^\n]*")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


class _RefusedError(Exception):
    """This formula is shown as its source."""


def render_formula(latex: str, delimiter: Delimiter) -> str:
    """MathML of a formula, or its escaped source in <code class="formula"> where it cannot be converted."""
    display = delimiter != "\\("
    try:
        return _serialize(_convert(latex, display), depth=0)
    except (
        Exception
    ):  # latex2mathml fails on incomplete LaTeX with whatever its code runs into, RecursionError included
        return f'<code class="formula">{escape(delimiter + latex + _CLOSING[delimiter])}</code>'


def _convert(latex: str, display: bool) -> Element:
    if (
        not latex.strip()
        or len(latex) > MAX_FORMULA_CHARS
        or _DEFINITIONS.search(latex)
        or latex.count("\\sideset") > 1
    ):
        raise _RefusedError
    depth = 0
    for brace in _BRACES.findall(latex):
        depth += (brace == "{") - (brace == "}")
        if depth > MAX_FORMULA_DEPTH:
            raise _RefusedError
    # One space for many: the tokenizer's pattern of \operatorname is quadratic in white space.
    plain = " ".join(_COMMENT.sub("", latex).split())
    return convert_to_element(plain, display="block" if display else "inline")


def _serialize(element: Element, depth: int) -> str:
    """HTML of a MathML tree. latex2mathml's own serialization is not used: it takes the escapes of < and & back."""
    if depth > MAX_FORMULA_DEPTH or element.tag not in MATHML_ELEMENTS:
        raise _RefusedError
    if len(element) != _NUM_CHILDREN.get(element.tag, len(element)):
        raise _RefusedError  # an argument is missing
    attributes = dict(element.attrib)  # the sanitizer looks at them
    text = unescape(element.text or "")  # latex2mathml writes symbols as character references
    if element.tag in ("mi", "mn") and (variant := attributes.get("mathvariant", "normal")) != "normal":
        # Browsers have only mathvariant="normal" (MathML Core): other alphabets are characters of their own.
        text = "".join(_styled(character, variant) for character in text)
        del attributes["mathvariant"]
    if element.tag == "mo" and text in ("|", "\u2016") and "form" not in attributes:
        attributes |= {
            "lspace": "0em",
            "rspace": "0em",
        }  # as in TeX; browsers take a bar between two terms for a relation
    written = "".join(f' {name}="{escape(value)}"' for name, value in attributes.items())
    children = "".join(_serialize(child, depth + 1) for child in element)
    return f"<{element.tag}{written}>{escape(text, quote=False)}{children}</{element.tag}>"


def is_mathml_attribute(name: str, value: str) -> bool:
    """Whether the sanitizer keeps this attribute of a MathML element."""
    return name in MATHML_ATTRIBUTES and MATHML_ATTRIBUTES[name].fullmatch(value) is not None


@lru_cache(maxsize=2_000)
def _styled(character: str, variant: str) -> str:
    """The letter or digit in a mathematical alphabet, or the character itself where Unicode has none."""
    name = unicodedata.name(character, "").replace("LATIN ", "").replace("LETTER ", "")
    if not re.fullmatch(r"(?:CAPITAL|SMALL) \w+|DIGIT \w+|GREEK (?:CAPITAL|SMALL) \w+", name):
        return character
    name = name.removeprefix("GREEK ")
    style = variant.upper().replace("BOLD-ITALIC", "BOLD ITALIC").replace("SERIF-ITALIC", "SERIF ITALIC")
    for candidate in (
        f"MATHEMATICAL {style} {name}",
        f"{style} {name}",
        f"{style.replace('FRAKTUR', 'BLACK-LETTER')} {name}",
    ):
        try:
            return unicodedata.lookup(candidate)
        except KeyError:
            continue
    return character
