"""Counting of sentences and words of English text, as the checkers of IFEval need them.

Sentences follow the rules of Punkt (Kiss and Strunk, Computational Linguistics 32(4), 2006), which nltk implements,
with lists of common abbreviations and of words that begin sentences instead of Punkt's trained parameters. Words in
capitals follow the Penn Treebank's tokens.
"""

import re
from itertools import pairwise

_ABBREVIATIONS = (
    "mr mrs ms dr prof sen rep reps gen col lt st jr sr inc corp co ltd bros messrs jan feb aug sept sep oct nov "
    "dec fri wed vs v u.s u.k u.n a.m p.m d.c ph.d e.l mg ft ave calif conn fla ga ill kan ky mich minn n.c n.d n.h "
    "n.j n.m n.y okla ore pa r.i s.c s.a tenn va vt wis wash ariz ala u.s.a m.b.a l.a a.d j.p c d e f g h k l m n p "
    "r s t w"
)
ABBREVIATIONS = frozenset(_ABBREVIATIONS.split())
"""Words whose full stop does not end a sentence; without it, in lower case. As in Punkt's English parameters, etc.,
e.g. and i.e. are not among them, and most single letters are."""
_STARTERS = (
    "according although among both but despite even he however i if in indeed instead it many meanwhile moreover "
    "most nevertheless nonetheless nor separately similarly since so some the there these they this though thus "
    "under when while yet here which your her still please does were finally initially overall therefore unless yes "
    "wait"
)
SENTENCE_STARTERS = frozenset(_STARTERS.split())
"""Words that begin a new sentence if they have a capital after an abbreviation or an ellipsis."""
_COMMON = (
    "that those we she on at for from with by as after before then what why how who where our my his its their an "
    "all each every another other one not no only also let do did is are was will would can could should may might "
    "to of now next first second you a because once during until rather later today and or time back case step side "
    "find take use add pour assume suppose consider given using say move send need substitute subtract multiply "
    "divide"
)
COMMON_WORDS = SENTENCE_STARTERS - {"i"} | frozenset(_COMMON.split())
"""Words that are usually written in lower case, so that a capital after an initial is not that of a name."""
_PUNCTUATION = frozenset(";:,.!?")
_NON_WORD = "[)\";}\\]*:@'({\\[\u2018\u2019\u201c\u201d\xab\xbb!?]"
_MULTI = r"(?:-{2,}|\.{2,}|(?:\.\s){2,}\.)"
_TOKEN = re.compile(
    rf"{_MULTI}|(?=[^(\"`{{\[:;&#*@)}}\]\-,])\S+?(?=\s|$|{_NON_WORD}|{_MULTI}|,(?=$|\s|{_NON_WORD}|{_MULTI}))|\S"
)
_END = re.compile(rf"[.?!](?=(?P<after>{_NON_WORD}|\s+(?P<next>\S+)))")
_CLOSING = re.compile(r"[\"')\]}\u2019\u201d\xbb]+?(?:\s+|(?=--)|$)")
_INITIAL = re.compile(r"[^\W\d]\.")
_NUMBER = re.compile(r"-?[.,]?\d[\d,.-]*\.")


def count_words(text: str) -> int:
    """Return the number of runs of letters, digits and underscores."""
    return len(re.findall(r"\w+", text))


def split_sentences(text: str) -> list[str]:
    """Split text into sentences. Line breaks alone end no sentence; text without any end is one sentence."""
    ends, last = [], 0
    for context, match in _contexts(text):
        if _has_break(context):
            next_token = match.start("next") if match["next"] else match.end()
            ends.append((last, match.end()))
            last = next_token
    ends.append((last, len(text.rstrip())))
    return _with_closing_marks(text, ends)


def _contexts(text: str) -> list[tuple[str, re.Match[str]]]:
    """Possible ends of sentences, each with the word before it and what follows; one for each word."""
    found: list[tuple[str, re.Match[str]]] = []
    previous: re.Match[str] | None = None
    word_start, previous_end = 0, 0
    for match in _END.finditer(text):
        before = text[previous_end : match.start()]
        blank = max((at for at, sign in enumerate(before) if sign.isspace()), default=0)
        start = previous_end + blank + 1 if blank else word_start
        if previous is not None and previous_end <= start:
            found.append((text[word_start:previous_end] + previous[0] + previous["after"], previous))
        previous, word_start, previous_end = match, start, match.start()
    if previous is not None:
        found.append((text[word_start:previous_end] + previous[0] + previous["after"], previous))
    return found


def _has_break(context: str) -> bool:
    """Whether a sentence ends inside `context`: a word, its full stop and the beginning of the next word."""
    tokens = _TOKEN.findall(context)
    return any(_is_break(token, following) for token, following in pairwise(tokens))


def _is_break(token: str, following: str) -> bool:
    """Whether a sentence ends between two tokens."""
    if token in (".", "?", "!"):
        return True
    is_ellipsis = re.fullmatch(r"\.\.+", token) is not None
    if not token.endswith(".") or (token.endswith("..") and not is_ellipsis):
        return False
    word = token[:-1].lower()
    is_abbreviation = word in ABBREVIATIONS or word.split("-")[-1] in ABBREVIATIONS
    is_initial = _INITIAL.fullmatch(token) is not None
    if is_abbreviation or is_ellipsis:
        return not is_initial and _is_capital(following, SENTENCE_STARTERS)
    if not (is_initial or _NUMBER.fullmatch(token)):
        return True
    if following in _PUNCTUATION or following[0].islower():
        return False
    return not (is_initial and following[0].isupper() and not _is_capital(following, COMMON_WORDS))


def _is_capital(word: str, among: frozenset[str]) -> bool:
    return word[0].isupper() and word.rstrip(".").lower() in among


def _with_closing_marks(text: str, slices: list[tuple[int, int]]) -> list[str]:
    """The sentences, with closing quotation marks and brackets moved to the sentence that they close."""
    found, shift = [], 0
    for place, (start, end) in enumerate(slices):
        start += shift
        if place + 1 == len(slices):
            if text[start:end]:
                found.append(text[start:end])
            continue
        following = slices[place + 1]
        closing = _CLOSING.match(text[following[0] : following[1]])
        shift = closing.end() if closing else 0
        sentence = text[start : following[0] + len(closing[0].rstrip())] if closing else text[start:end]
        if closing or sentence:
            found.append(sentence)
    return found


_SPLIT = re.compile("[;@#$%&?!*\\[\\](){}<>\"`\xab\xbb\u2018\u2019\u201c\u201d\u201e\u2012-\u2015]|\\.{2,}|--|''")
_COMMA = re.compile(r"[:,](?!\d)")
_CLITIC = re.compile(r"(?<=[^'])('[sSmMdD]|')$")
_LONG_CLITIC = re.compile(r"(?<=[^'])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T)$")
_JOINED = re.compile(
    r"\b(can)(?=not\b)|\b(d)(?='ye\b)|\b(gim|lem)(?=me\b)|\b(gon|wan)(?=na\b)|\b(got)(?=ta\b)|\b(more)(?='n\b)",
    re.IGNORECASE,
)
"""Two words in one, which the Treebank splits: can|not, gon|na."""


def count_capital_words(text: str) -> int:
    """Return the number of tokens of the Penn Treebank that have letters, all of them capital.

    Words with a hyphen are one token; DON'T and I'M are two.
    """
    total = 0
    for word in _COMMA.sub(" ", _SPLIT.sub(" ", text)).split():
        for part in _JOINED.sub(r"\g<0> ", word).split():
            total += sum(token.isupper() for token in _split_clitics(part))
    return total


def _split_clitics(word: str) -> list[str]:
    found = []
    for pattern in (_CLITIC, _LONG_CLITIC):
        if match := pattern.search(word):
            found.append(match[0])
            word = word[: match.start()]
    return [word, *found]
