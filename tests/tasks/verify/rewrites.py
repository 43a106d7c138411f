"""Rewrites of an answer that keep its meaning, by answer type, and an independent reading of its value."""

import functools
import re
from fractions import Fraction

OUTER = {
    "dollars": "${}$",
    "dollars and blanks": "$ {} $",
    "double dollars": "$${}$$",
    "parentheses": r"\({}\)",
    "brackets": r"\[{}\]",
    "box": r"\boxed{{{}}}",
    "box in dollars": r"$\boxed{{{}}}$",
    "dollars in box": r"\boxed{{${}$}}",
    "displayed box": "\\[\n\\boxed{{{}}}\n\\]",
    "box and full stop": r"\boxed{{{}}}.",
    "fbox": r"\fbox{{{}}}",
    "box and blank": r"\boxed {{{}}}",
    "blanks in box": r"\boxed{{ {} }}",
    "display style in box": r"\boxed{{\displaystyle {}}}",
    "display style": r"\displaystyle {}",
    "text style": r"\textstyle {}",
    "bold": "**${}$**",
    "bold box": r"**$\boxed{{{}}}$**",
    "blanks": "  {}  ",
    "line break": "{}\n",
    "full stop": "${}$.",
    "chinese full stop": "${}$\u3002",
    "braces": "{{{}}}",
    "double braces": "{{{{{}}}}}",
    "bold math": r"\boldsymbol{{{}}}",
    "bm": r"\bm{{{}}}",
    "mathbf": r"\mathbf{{{}}}",
    "underline": r"\underline{{{}}}",
    "bold in box": r"\boxed{{\boldsymbol{{{}}}}}",
    "thin space in box": r"\boxed{{\,{}\,}}",
    "sized left and right": r"\boxed{{{}}} ",
}
"""Around any answer."""

FRACTION = {
    "dfrac": lambda text: re.sub(r"\\[dtc]?frac", r"\\dfrac", text),
    "tfrac": lambda text: re.sub(r"\\[dtc]?frac", r"\\tfrac", text),
    "frac": lambda text: re.sub(r"\\[dtc]?frac", r"\\frac", text),
    "blanks in fractions": lambda text: re.sub(r"frac\{([^{}]*)\}\{([^{}]*)\}", r"frac { \1 } { \2 }", text),
    "fraction without braces": lambda text: re.sub(r"frac\{(\d)\}\{(\d)\}", r"frac\1\2", text),
    "braces in fraction": lambda text: re.sub(r"frac\s*(\d)(\d)", r"frac{\1}{\2}", text),
}
SPACING = {
    "no blanks": lambda text: re.sub(r"(?<![A-Za-z])\s+|(?<=[a-z])\s+(?=[^A-Za-z])", "", text),
    "blank around signs": lambda text: re.sub(r"(?<=[\w)}])\s*([+=])\s*(?=[\w(\\])", r" \1 ", text),
    "thin spaces after commas": lambda text: re.sub(r",\s*(?!\d{3}(?!\d)|\\!)", r",\\,", text),
    "blanks after commas": lambda text: re.sub(r",\s*(?!\d{3}(?!\d)|\\)", ", ", text),
    "left and right": lambda text: _sized(text, r"\left", r"\right"),
    "bigl and bigr": lambda text: _sized(text, r"\bigl", r"\bigr"),
    "big": lambda text: _sized(text, r"\big", r"\big"),
    "left and right with blanks": lambda text: _sized(text, r"\left ", r" \right"),
    "no left and right": lambda text: re.sub(r"\\(?:left|right)\s*(?=[\[\](){}\\])", "", text),
}
SIGN = {
    "typographic minus": lambda text: re.sub(r"(?<!\[)-", "\u2212", text),
}


def _sized(text, left, right):
    """Put a macro before every bracket of a text that has none."""
    if r"\left" in text or r"\begin" in text:
        return text
    return re.sub(r"\\?[(\[]|\\\{", lambda found: left + found[0], re.sub(r"[)\]]|\\\}", lambda f: right + f[0], text))


def _thousands(separator):
    def rewrite(text):
        is_large = re.fullmatch(r"-?\d{4,}|-?\d{1,3}(,\\!\d{3})+", text)
        return f"{int(text.replace(chr(92), '').replace(',!', '')):,}".replace(",", separator) if is_large else text

    return rewrite


def _as_decimal(text):
    value = number_of(text)
    if value is None:
        return text
    for digits in range(7):
        scaled = value * 10**digits
        if scaled.denominator == 1:
            return f"{float(value):.{digits}f}"
    return text


def _as_ratio(pattern):
    def rewrite(text):
        value = number_of(text)
        return text if value is None else pattern.format(value.numerator, value.denominator)

    return rewrite


def _doubled(text):
    value = number_of(text)
    return text if value is None else rf"\frac{{{2 * value.numerator}}}{{{2 * value.denominator}}}"


NUMBER = FRACTION | SIGN | {
    "plus sign": lambda text: f"+{text}" if text[0] not in "-+" else text,
    "x =": lambda text: f"x = {text}",
    "n=": lambda text: f"n={text}",
    "equals": lambda text: f"= {text}",
    "ratio": _as_ratio("{}/{}"),
    "fraction": _as_ratio(r"\frac{{{}}}{{{}}}"),
    "unreduced": _doubled,
    "decimal": _as_decimal,
    "trailing zero": lambda text: re.sub(r"^(-?\d*\.\d+)$", r"\g<1>0", text),
    "decimal point and zeros": lambda text: re.sub(r"^(-?\d+)$", r"\1.00", text),
    "leading zero": lambda text: re.sub(r"^(-?)\.(\d)", r"\g<1>0.\2", text),
    "no leading zero": lambda text: re.sub(r"^(-?)0\.(\d)", r"\1.\2", text),
    "thousands commas": _thousands(","),
    "thousands braces": _thousands("{,}"),
    "thousands thin": _thousands(r"\,"),
    "thousands negative thin": _thousands(r",\!"),
    "text": lambda text: rf"\text{{{text}}}",
    "full width": lambda text: re.sub(r"^\d+$", lambda f: "".join(chr(ord(d) + 0xFEE0) for d in f[0]), text),
    "blank after sign": lambda text: re.sub(r"^-(?=\d)", "- ", text),
}  # fmt: skip
PRODUCT = {
    "cdot before root": lambda text: re.sub(r"(?<=\d)\s*(?=\\sqrt)", r" \\cdot ", text),
    "times before root": lambda text: re.sub(r"(?<=\d)\s*(?=\\sqrt)", r" \\times ", text),
    "star before root": lambda text: re.sub(r"(?<=\d)\s*(?=\\sqrt)", "*", text),
    "blank before root": lambda text: re.sub(r"(?<=\d)\s*(?=\\sqrt)", " ", text),
    "root with braces": lambda text: re.sub(r"\\sqrt\s*(\d)(?!\d)", r"\\sqrt{\1}", text),
    "root without braces": lambda text: re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", text),
    "root sign": lambda text: re.sub(r"\\sqrt\{(\d+)\}", "\u221a\\1", text),
    "fraction of root as ratio": lambda text: re.sub(r"^(-?)\\frac\{(\d*\\sqrt\{\d+\})\}\{(\d+)\}$", r"\1\2/\3", text),
    "sign inside": lambda text: re.sub(r"^-\\frac\{(\d*\\sqrt\{\d+\}|\d*\\pi|\d+)\}", r"\\frac{-\1}", text),
    "unicode pi": lambda text: re.sub(r"\\pi(?![a-z])\s*", "\u03c0", text),
    "cdot before pi": lambda text: re.sub(r"(?<=\d)\s*(?=\\pi)", r" \\cdot ", text),
    "star before pi": lambda text: re.sub(r"(?<=\d)\s*(?=\\pi)", "*", text),
    "blank before pi": lambda text: re.sub(r"(?<=\d)\s*(?=\\pi)", " ", text),
    "braces around pi": lambda text: re.sub(r"\\pi(?![a-z])", r"{\\pi}", text),
    "fraction of pi as ratio": lambda text: re.sub(r"^(-?)\\frac\{(\d*)\\pi\}\{(\d+)\}$", r"\1\2\\pi/\3", text),
}
POLYNOMIAL = {
    "braces around exponents": lambda text: re.sub(r"\^\s*(\d)", r"^{\1}", text),
    "no braces around exponents": lambda text: re.sub(r"\^\{(\d)\}", r"^\1", text),
    "blank before exponents": lambda text: re.sub(r"(?<=[\w)])\^", " ^", text),
    "blanks in exponents": lambda text: re.sub(r"\^\{([^{}]*)\}", r"^{ \1 }", text),
    "cdot before letters": lambda text: (
        re.sub(r"(?<=\d)(?=[a-z])(?<!\\)", r" \\cdot ", text)
        if not re.search(r"\\[a-z]*\d[a-z]|[_^{]\d+[a-z]", text)
        else text
    ),
    "f(x) =": lambda text: text,
}
BRACKETS = {
    "blanks inside": lambda text: re.sub(r"^(\(|\[)(.*)(\)|\])$", r"\1 \2 \3", text),
    "blank before commas": lambda text: re.sub(r"\s*,(?!\d{3}(?!\d)|\\!)", " ,", text),
    "tilde after commas": lambda text: re.sub(r",\s*(?!\d{3}(?!\d)|\\)", ",~", text),
    "backslash blank after commas": lambda text: re.sub(r",\s*(?!\d{3}(?!\d)|\\)", r",\\ ", text),
    "quad after commas": lambda text: re.sub(r",\s*(?!\d{3}(?!\d)|\\)", r",\\quad ", text),
}
INTERVAL = {
    "x in": lambda text: rf"x \in {text}" if r"\in " not in text else text,
    "unicode infinity": lambda text: re.sub(r"\\infty\s*", "\u221e", text),
    "plus infinity": lambda text: re.sub(r"(?<!-)\\infty", r"+\\infty", text),
    "unicode union": lambda text: re.sub(r"\s*\\cup\s*", "\u222a", text),
    "blanks around union": lambda text: re.sub(r"\s*\\cup\s*", r" \\cup ", text),
    "union in another order": lambda text: (
        r" \cup ".join(reversed(re.split(r"\s*\\cup\s*", text))) if r"\in " not in text else text
    ),
}
LIST = {
    "another order": lambda text: ", ".join(reversed(re.split(r",\s*", text))),
    "and": lambda text: r" \text{ and } ".join(re.split(r",\s*", text)),
    "or": lambda text: r" \text{ or } ".join(re.split(r",\s*", text)),
    "plain and": lambda text: ", and ".join(text.rsplit(",", 1)),
    "x =": lambda text: f"x = {text}",
    "semicolons": lambda text: re.sub(r",\s*", "; ", text),
}
UNIT = {
    "mathrm": lambda text: text.replace(r"\text{", r"\mathrm{"),
    "textrm": lambda text: text.replace(r"\text{", r"\textrm{"),
    "mbox": lambda text: text.replace(r"\mbox{", r"\text{"),
    "blank before the unit": lambda text: re.sub(r"(?<=\d)\\text\{\s*", r" \\text{ ", text),
    "thin space before the unit": lambda text: re.sub(r"(?<=\d)\s*\\text\{\s*", r"\\,\\text{", text),
    "tilde before the unit": lambda text: re.sub(r"(?<=\d)\s*\\text\{\s*", r"~\\text{", text),
    "plain unit": lambda text: re.sub(r"(?<=\d)\s*\\text\{\s*([A-Za-z ]+?)\s*\}$", r" \1", text),
    "no unit": lambda text: re.sub(r"(?<=\d)\s*(?:\\text\{\s*(?!and)[A-Za-z ]+\}|\^\{?\\circ\}?|\\%)$", "", text),
    "degree sign": lambda text: re.sub(r"\^\s*\{?\\circ\}?", "\u00b0", text),
    "braces around circ": lambda text: re.sub(r"\^\s*\\circ", r"^{\\circ}", text),
    "degree macro": lambda text: re.sub(r"\^\s*\{?\\circ\}?", r"\\degree", text),
    "degrees": lambda text: re.sub(r"\^\s*\{?\\circ\}?$", " degrees", text),
    "text degrees": lambda text: re.sub(r"\^\s*\{?\\circ\}?$", r"\\text{ degrees}", text),
    "percent sign": lambda text: text.replace(r"\%", "%"),
    "blank before percent": lambda text: text.replace(r"\%", r" \%"),
    "percent": lambda text: re.sub(r"\\%$", " percent", text),
    "text percent": lambda text: re.sub(r"\\%$", r"\\text{ percent}", text),
    "no currency": lambda text: text.replace(r"\$", ""),
    "plain dollar": lambda text: text.replace(r"\$", "$"),
    "blank after the dollar": lambda text: text.replace(r"\$", r"\$ "),
    "dollars": lambda text: re.sub(r"^\\\$\s*(.*)$", r"\1 dollars", text),
    "text dollars": lambda text: re.sub(r"^\\\$\s*(.*)$", r"\1\\text{ dollars}", text),
    "thousands": lambda text: text.replace(r",\!", ","),
}


def _lettered(pattern, text):
    return pattern.format(re.sub(r"\\text|[(){}\\]", "", text))


CHOICE = {
    name: functools.partial(_lettered, pattern)
    for name, pattern in {
        "letter": "{}", "bracketed": "({})", "text": r"\text{{{}}}", "bracketed text": r"\text{{({})}}",
        "text in brackets": r"(\text{{{}}})", "textbf": r"\textbf{{{}}}", "bracketed textbf": r"\textbf{{({})}}",
        "mathrm": r"\mathrm{{{}}}", "bracketed mathrm": r"\mathrm{{({})}}", "mathbf": r"\mathbf{{{}}}",
        "bold": "**{}**", "bracketed bold": "**({})**", "full stop": "{}.", "bracketed full stop": "({}).",
    }.items()
}  # fmt: skip
BASE = {
    "braces around the base": lambda text: re.sub(r"_\{?(\d+)\}?$", r"_{\1}", text),
    "blanks in the base": lambda text: re.sub(r"_\{?(\d+)\}?$", r"_{ \1 }", text),
    "brackets": lambda text: re.sub(r"^(-?)([\w.]+)_", r"\1(\2)_", text),
    "left and right": lambda text: re.sub(r"^(-?)([\w.]+)_", r"\1\\left(\2\\right)_", text),
    "braces": lambda text: re.sub(r"^(-?)([\w.]+)_", r"\1{\2}_", text),
    "text": lambda text: re.sub(r"^(-?)([\w.]+)_", r"\1\\text{\2}_", text),
    "thin space before the base": lambda text: re.sub(r"_(?=\{?\d+\}?$)", r"\\,_", text),
    "text base": lambda text: re.sub(r"_\{?(\d+)\}?$", r"_{\\text{\1}}", text),
    "one digit without braces": lambda text: re.sub(r"_\{(\d)\}$", r"_\1", text),
    "base in words": lambda text: re.sub(r"_8$", r"_{\\text{eight}}", text),
}
MATRIX = FRACTION | SIGN | {
    "bmatrix": lambda text: text.replace("pmatrix", "bmatrix"),
    "no blanks": lambda text: re.sub(r"(?<!\\)\s+", "", text),
    "gap after rows": lambda text: text.replace(r"\\", r"\\[4pt]"),
    "break after the last row": lambda text: text.replace(r" \end", r" \\ \end"),
    "line breaks": lambda text: text.replace(r"\\", "\\\\\n"),
    "blanks around cells": lambda text: text.replace("&", " & "),
    "fractions": lambda text: re.sub(r"(-?)(\d+)/(\d+)", r"\1\\frac{\2}{\3}", text),
    "dfractions": lambda text: re.sub(r"(-?)(\d+)/(\d+)", r"\\dfrac{\1\2}{\3}", text),
    "array": lambda text: text.replace(r"\begin{pmatrix}", r"\left(\begin{array}{cc}").replace(
        r"\end{pmatrix}", r"\end{array}\right)"
    ),
    "matrix in brackets": lambda text: text.replace(r"\begin{pmatrix}", r"\left(\begin{matrix}").replace(
        r"\end{pmatrix}", r"\end{matrix}\right)"
    ),
}  # fmt: skip
WORD = {
    "text": lambda text: rf"\text{{{_word(text)}}}",
    "plain": lambda text: _word(text),
    "lower case": lambda text: _word(text).lower(),
    "textbf": lambda text: rf"\textbf{{{_word(text)}}}",
    "mathrm": lambda text: rf"\mathrm{{{_word(text)}}}",
    "bold": lambda text: f"**{_word(text)}**",
    "full stop": lambda text: f"{_word(text)}.",
}


def _word(text):
    return re.sub(r"\\text\{(.*)\}", r"\1", text).strip()


REWRITES = {
    "integer": NUMBER,
    "decimal": NUMBER,
    "fraction": NUMBER,
    "mixed": NUMBER,
    "root": FRACTION | SPACING | SIGN | PRODUCT,
    "pi": FRACTION | SPACING | SIGN | PRODUCT,
    "polynomial": FRACTION | SPACING | SIGN | POLYNOMIAL,
    "equation": FRACTION | SPACING | SIGN | POLYNOMIAL,
    "tuple": FRACTION | SPACING | SIGN | BRACKETS,
    "interval": FRACTION | SPACING | SIGN | BRACKETS | INTERVAL,
    "list": FRACTION | SPACING | SIGN | LIST,
    "unit": FRACTION | SIGN | UNIT,
    "base": BASE | SIGN,
    "choice": CHOICE,
    "matrix": MATRIX,
    "word": WORD,
}
"""Rewrites by type, besides those of OUTER."""


def rewrites(kind, answer):
    """(name, text) of every rewrite that changes an answer of this type."""
    found = {name: pattern.format(answer) for name, pattern in OUTER.items()}
    found |= {name: rewrite(answer) for name, rewrite in REWRITES[kind].items()}
    return [(name, text) for name, text in found.items() if text != answer]


PLAIN = r"(?:[-+0-9{} .i]|\\[dt]?frac|\\sqrt)+"


def type_of(answer):
    """The type of an answer of MATH; "" for the few of none of these types."""
    if re.fullmatch(r"-?\d+|-?\d{1,3}(,\\!\d{3})+", answer):
        return "integer"
    for kind, pattern in {
        "decimal": r"-?\d*\.\d+",
        "fraction": r"-?\\[dt]?frac(\{-?\d+\}\{\d+\}|\d\d)",
        "choice": r"(\\text\{)?\(?[A-F]\)?\}?",
        "base": r"-?[\w.]+_\{?\d+\}?",
        "matrix": r"\\begin\{pmatrix\}.*\\end\{pmatrix\}",
        "mixed": r"\d+\s*\\[dt]?frac(\{\d+\}\{\d+\}|\d\d)",
        "interval": r"(?:x \\in )?(?:(?:\\left)?[(\[].*(?:infty|\\cup).*[)\]]|\[[^\[\]]*[\])])|\([^()]*\]",
        "tuple": r"(\\left)?\s*\([^()]+,[^()]+\)",
        "word": r"\\text\{[A-Za-z ]{3,}\}",
        "unit": r"\\\$\s*[\d.,\\!]+|-?[\d.]+\s*(\\text\{[A-Za-z ]+\}|\^\{?\\circ\}?|\\%)",
        "list": rf"(?!\d+(\{{?,\}}?\d{{3}})+$){PLAIN}(,(?!\\!){PLAIN})+",
        "equation": r"[-+0-9a-z ]*[a-z]\s*=.*",
        "root": r"[^a-z]*(\\(sqrt|frac|dfrac)[^a-z]*)*\\sqrt[^a-z]*(\\(sqrt|frac|dfrac)[^a-z]*)*",
        "pi": r".*\\pi.*",
        "polynomial": r"[-+0-9a-z^(){} ]*[a-z][-+0-9a-z^(){} ]*",
    }.items():
        if re.fullmatch(pattern, answer, re.DOTALL):
            return kind
    return ""


def number_of(text):
    """The value of an integer, a decimal or a fraction; None for anything else."""
    text = text.replace(r",\!", "")
    mixed = re.fullmatch(r"(\d+)\s*(\\.*)", text)
    if mixed:
        part = number_of(mixed[2])
        return None if part is None else int(mixed[1]) + part
    found = re.fullmatch(r"(-?)\\[dt]?frac\s*(?:\{(-?\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))", text)
    if found and int(found[4] or found[5]):
        return Fraction(f"{found[1]}1") * Fraction(int(found[2] or found[3]), int(found[4] or found[5]))
    return Fraction(text) if re.fullmatch(r"-?\d*\.?\d+", text) else None
