"""The 25 instruction kinds of IFEval (arXiv:2311.07911): for each, whether a text follows the instruction.

The checks give the verdicts of the published program, also where these are debatable; each takes time proportional to
the text. docs/guides/tasks.md lists the differences. The names of arguments are those of the published file.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence

from thinkstack.tasks.verify.language_id import detect_language
from thinkstack.tasks.verify.sentences import count_capital_words, count_words, split_sentences

RELATIONS = ("less than", "at least")
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_WORD_END = frozenset(".,?!'\"")


def holds(count: int, relation: str, limit: int) -> bool:
    """Whether "`count` is `relation` `limit`": "less than" or "at least"."""
    return count < limit if relation == "less than" else count >= limit


def has_keywords(text: str, keywords: Sequence[str]) -> bool:
    """Whether every keyword occurs in any case, also inside a longer word."""
    return all(re.search(re.escape(word), text, re.IGNORECASE) for word in keywords)


def has_keyword_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    """Count a keyword in any case, also inside longer words."""
    return holds(len(re.findall(re.escape(keyword.strip()), text, re.IGNORECASE)), relation, frequency)


def lacks_forbidden_words(text: str, forbidden_words: Sequence[str]) -> bool:
    """Whether none of the words occurs as a word of its own."""
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def has_letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    """Count a letter in any case. Rows 1122 and 1129 ask for # and !, which are counted; the published program
    counts a random letter instead."""
    return holds(Counter(text.lower())[letter.strip().lower()], let_relation, let_frequency)


def is_in_language(text: str, language: str) -> bool:
    """Whether the text is in the language; a text without letters counts as such."""
    found = detect_language(text)
    return found is None or found == language


def has_number_of_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return holds(len(split_sentences(text)), relation, num_sentences)


def has_number_of_words(text: str, num_words: int, relation: str) -> bool:
    return holds(count_words(text), relation, num_words)


def has_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Count paragraphs between the dividers ***; only the first and the last may be empty."""
    parts = [bool(part.strip()) for part in re.split(r"\s?\*{3}\s?", text)]
    if not all(parts[1:-1]):
        return False
    outer = 1 if len(parts) == 1 else 2
    return sum(parts[1:-1]) + sum((parts[0], parts[-1])[:outer]) == num_paragraphs


def has_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Whether there are so many paragraphs between blank lines, and the nth starts with the word.

    Empty paragraphs are not counted, but they keep their place.
    """
    paragraphs = [part.strip() for part in text.split("\n\n")]
    count = sum(map(bool, paragraphs))
    if nth_paragraph > count or not paragraphs[nth_paragraph - 1]:
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"').lower()
    end = next((place for place, sign in enumerate(word) if sign in _WORD_END), len(word))
    return count == num_paragraphs and word[:end] == first_word.lower()


def has_placeholders(text: str, num_placeholders: int) -> bool:
    """Count [placeholders] within a line; they may be empty."""
    return sum(_count_brackets(line) for line in text.split("\n")) >= num_placeholders


def _count_brackets(line: str) -> int:
    count, place = 0, 0
    while (start := line.find("[", place)) >= 0 and (end := line.find("]", start)) >= 0:
        count, place = count + 1, end + 1
    return count


def has_postscript(text: str, postscript_marker: str) -> bool:
    """Whether the marker occurs anywhere; P.S. and P.P.S with optional blanks."""
    marker = postscript_marker.strip()
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(patterns.get(marker, re.escape(marker.lower())), text.lower()) is not None


def has_bullets(text: str, num_bullets: int) -> bool:
    """Whether exactly so many lines start with * (but not with **) or with -."""
    stars = re.findall(r"^[^\S\n]*\*[^*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def has_option(text: str) -> bool:
    """Whether one of the three options occurs."""
    return any(option in text for option in OPTIONS)


def has_highlights(text: str, num_highlights: int) -> bool:
    """Count *highlights* within a line; **bold** counts too, the empty ones do not."""
    single = [found for found in re.findall(r"\*[^\n*]*\*", text) if found.strip("*").strip()]
    double = [found for found in re.findall(r"\*\*[^\n*]*\*\*", text) if found.strip("*").strip()]
    return len(single) + len(double) >= num_highlights


def has_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """Count the headings "Section 1": the word, at most one blank, a number."""
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def is_json(text: str) -> bool:
    """Whether the text is JSON, which may be in a code block."""
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def has_title(text: str) -> bool:
    """Whether a line has a <<title>> that is not empty."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


def has_two_responses(text: str) -> bool:
    """Whether there are two different responses with ****** between them."""
    parts = [part.strip() for part in text.split("******")]
    responses = [part for part in parts if part]
    return all(parts[1:-1]) and len(responses) == 2 and responses[0] != responses[1]


def repeats_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def has_end(text: str, end_phrase: str) -> bool:
    """Whether the text ends with the phrase, in any case; double quotation marks around it are ignored."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def is_english_capital(text: str) -> bool:
    return text.isupper() and detect_language(text) in (None, "en")


def is_english_lowercase(text: str) -> bool:
    return text.islower() and detect_language(text) in (None, "en")


def has_capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return holds(count_capital_words(text), capital_relation, capital_frequency)


def lacks_commas(text: str) -> bool:
    """Whether there is no comma; the commas of other scripts are allowed."""
    return "," not in text


def is_quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


CHECKS: dict[str, tuple[Callable[..., bool], dict[str, type]]] = {
    "keywords:existence": (has_keywords, {"keywords": list}),
    "keywords:frequency": (has_keyword_frequency, {"keyword": str, "frequency": int, "relation": str}),
    "keywords:forbidden_words": (lacks_forbidden_words, {"forbidden_words": list}),
    "keywords:letter_frequency": (has_letter_frequency, {"letter": str, "let_frequency": int, "let_relation": str}),
    "language:response_language": (is_in_language, {"language": str}),
    "length_constraints:number_sentences": (has_number_of_sentences, {"num_sentences": int, "relation": str}),
    "length_constraints:number_paragraphs": (has_paragraphs, {"num_paragraphs": int}),
    "length_constraints:number_words": (has_number_of_words, {"num_words": int, "relation": str}),
    "length_constraints:nth_paragraph_first_word": (
        has_first_word,
        {"num_paragraphs": int, "nth_paragraph": int, "first_word": str},
    ),
    "detectable_content:number_placeholders": (has_placeholders, {"num_placeholders": int}),
    "detectable_content:postscript": (has_postscript, {"postscript_marker": str}),
    "detectable_format:number_bullet_lists": (has_bullets, {"num_bullets": int}),
    "detectable_format:constrained_response": (has_option, {}),
    "detectable_format:number_highlighted_sections": (has_highlights, {"num_highlights": int}),
    "detectable_format:multiple_sections": (has_sections, {"section_spliter": str, "num_sections": int}),
    "detectable_format:json_format": (is_json, {}),
    "detectable_format:title": (has_title, {}),
    "combination:two_responses": (has_two_responses, {}),
    "combination:repeat_prompt": (repeats_prompt, {"prompt_to_repeat": str}),
    "startend:end_checker": (has_end, {"end_phrase": str}),
    "change_case:english_capital": (is_english_capital, {}),
    "change_case:english_lowercase": (is_english_lowercase, {}),
    "change_case:capital_word_frequency": (
        has_capital_word_frequency,
        {"capital_frequency": int, "capital_relation": str},
    ),
    "punctuation:no_comma": (lacks_commas, {}),
    "startend:quotation": (is_quoted, {}),
}
"""For each kind its check, a function of the text and of these arguments."""
