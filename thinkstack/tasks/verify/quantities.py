"""Numbers with a currency, a unit, bold or math delimiters. Nothing is computed."""

import re
from fractions import Fraction

from thinkstack.tasks.verify.answers import parse_number, strip_wrappers

_CURRENCY = (
    r"(?:(?:US|A|C)?\\?\$|\\text\{\s*\\?\$\s*\}|[\u20AC\u00A3\u00A5\u20B9]"
    r"|\\(?:textdollar|euro|pounds|yen)(?![A-Za-z])|(?:USD|EUR|GBP)(?![A-Za-z]))"
)
_CURRENCY_FIRST = re.compile(rf"^([+-]?)\s*{_CURRENCY}\s*(?:\\[,;:! ])?(?=[-+.0-9\\])")
_NAME = re.compile(r"^(?:[A-Za-z]\s*)?=\s*")
_BLANK = r"(?:\s|~|\\[ ,;:!]|\\q?quad)*"
_NO_UNIT = (
    r"(?i:[ap]\.?m|and|or|nor|not|plus|minus|times|over|divided|than|versus|to|mod|modulo|squared|cubed|factorial"
    r"|percent|root|one|two|three|four|five|six|seven|eight|nine|ten|dozen|hundred|thousand|million|billion|trillion"
    r"|hal(?:f|ves)|thirds?|fourths?|fifths?|sixths?|eighths?|tenths?|hundredths?"
    r"|sin|cos|tan|sec|csc|cot|log|exp|sqrt|gcd|lcm|max|min|choose)"
)
"""Words after a number that change its value or state another number."""
_WORD = rf"(?!(?:{_NO_UNIT})\b)[A-Za-z]"
_SHORT_UNIT = (
    r"(?:m/s|km/h|ft/s|cm|mm|km|kg|mg|ft|in|oz|lbs?|mi|yd|hrs?|m[lL]|mph|mins?|secs?|deg|degrees?)(?![A-Za-z])\.?"
)
"""Two-letter units and units written without a blank; any other two letters may be a product."""
_WORDS_UNIT = rf"(?:(?:(?<=\s)|/){_WORD}[A-Za-z]{{2,}}|{_SHORT_UNIT})(?:[\s/-]+{_WORD}+)*"
_CHINESE_UNIT = r"(?![\u4E00-\u9FFF]*[\u4E07\u4EBF\u5343\u767E\u5341\u534A\u500D\u548C\u6216])[\u4E00-\u9FFF]{1,4}"
"""Excludes characters that change a value (ten to a hundred million, half, -fold) or join two values (and, or)."""
_TEXT_UNIT = (
    r"\\(?:text|mbox|hbox|textrm|textnormal|textit|mathrm|rm)\s*\{"
    rf"(?!\s*[ie]\s*\}}|[^{{}}]*\b(?:{_NO_UNIT})\b)(?:[^{{}}0-9^]|\^\{{?[23]\}}?)*\}}"
)
_SIGN_UNIT = rf"\u00B0(?:[CF](?![A-Za-z]))?|\^\{{?\\circ\}}?|\\degree|{_CURRENCY}"
_UNIT = re.compile(
    rf"(?:(?<=[0-9)}}\]])|(?<=\\pi)){_BLANK}(?>(?:{_TEXT_UNIT}|{_WORDS_UNIT}|{_CHINESE_UNIT}|{_SIGN_UNIT}){_BLANK})+"
    r"(?:\^\{?[23]\}?|[\u00B2\u00B3])?$"
)
_PERCENT = re.compile(rf"{_BLANK}(?:\\?%|\bper ?cent\b|\\(?:text|mbox)\s*\{{\s*per ?cent\s*\}})$")


_UNIT_WORDS = {
    word: unit
    for unit, words in {
        "dollar": "$ dollar dollars usd",
        "euro": "\u20ac euro euros eur",
        "pound sterling": "\u00a3 gbp",
        "cent": "cent cents",
        "percent": "% percent",
        "degree": "\u00b0 circ degree degrees deg",
        "millimeter": "mm millimeter millimeters",
        "centimeter": "cm centimeter centimeters",
        "meter": "m meter meters",
        "kilometer": "km kilometer kilometers",
        "inch": "in inch inches",
        "foot": "ft foot feet",
        "yard": "yd yard yards",
        "mile": "mi mile miles mph",
        "gram": "g gram grams",
        "kilogram": "kg kilogram kilograms",
        "ounce": "oz ounce ounces",
        "pound": "lb lbs pound pounds",
        "second": "s sec secs second seconds",
        "minute": "min mins minute minutes",
        "hour": "h hr hrs hour hours mph",
        "day": "day days",
        "week": "week weeks",
        "month": "month months",
        "year": "yr year years",
    }.items()
    for word in words.split()
}
"""The unit of each word and sign; other words are not compared."""
_UNIT_TOKEN = re.compile(r"[A-Za-z]+|[$%\u00B0\u20AC\u00A3]")


def parse_units(answer: str) -> frozenset[str]:
    """Return the known units and currencies in an answer: dollar for $5, centimeter for 5\\text{ cm}^2."""
    text = strip_wrappers(answer)
    first, last = _CURRENCY_FIRST.match(text), _PERCENT.search(text) or _UNIT.search(text)
    stated = (first[0] if first else "") + (last[0] if last else "")
    return frozenset(_UNIT_WORDS[word] for word in _UNIT_TOKEN.findall(stated.lower()) if word in _UNIT_WORDS)


def units_agree(first: str, second: str) -> bool:
    """Whether the units of two answers are compatible: one set of units is a subset (maybe empty) of the other."""
    one, other = parse_units(first), parse_units(second)
    return one <= other or other <= one


def strip_unit(text: str) -> str:
    """Remove the unit after a number or a bracket at the end of `text`: 180 miles, 5\\text{ cm}^2, 90^\\circ.

    Words that change a value are not units: 5 million, 2 dozen and 5 squared stay unchanged.
    """
    return _UNIT.sub("", text)


def parse_quantity(answer: str, may_be_percent: bool = False) -> Fraction | None:
    """Return the value of a number with a currency, unit, "x=", bold or delimiters around it; None for anything else.

    may_be_percent: a percent sign counts as a unit.
    """
    text = _CURRENCY_FIRST.sub(r"\1", _NAME.sub("", strip_wrappers(answer)), count=1)
    if may_be_percent:
        text = _PERCENT.sub("", text)
    return parse_number(strip_wrappers(strip_unit(text)))
