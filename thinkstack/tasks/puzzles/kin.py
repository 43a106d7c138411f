"""Family relations in English and Chinese: who is my father's elder brother's daughter to me?

A relation is a row of TERMS; both languages use the same rows with their own words. English does not distinguish the
sides of a family; Chinese distinguishes most of them. NEXT leaves out steps that could lead to different rows (a
father's son may be myself).
"""

import random
from collections.abc import Sequence
from functools import cache
from typing import ClassVar

from thinkstack.tasks.puzzles.puzzle import Puzzle

HOPS = {
    "father": "爸爸",
    "mother": "妈妈",
    "elder brother": "哥哥",
    "younger brother": "弟弟",
    "elder sister": "姐姐",
    "younger sister": "妹妹",
    "son": "儿子",
    "daughter": "女儿",
}
"""One step from a person to a relative, with its Chinese word."""
BROTHERS, SISTERS = ("elder brother", "younger brother"), ("elder sister", "younger sister")
SIBLINGS = BROTHERS + SISTERS

TERMS = {hop: (hop, word) for hop, word in HOPS.items()} | {
    "father's father": ("grandfather", "爷爷"),
    "father's mother": ("grandmother", "奶奶"),
    "mother's father": ("grandfather", "外公"),
    "mother's mother": ("grandmother", "外婆"),
    "father's elder brother": ("uncle", "伯父"),
    "father's younger brother": ("uncle", "叔叔"),
    "father's sister": ("aunt", "姑姑"),
    "mother's brother": ("uncle", "舅舅"),
    "mother's sister": ("aunt", "姨妈"),
    "male cousin of the name": ("cousin", "堂兄弟"),
    "female cousin of the name": ("cousin", "堂姐妹"),
    "male cousin": ("cousin", "表兄弟"),
    "female cousin": ("cousin", "表姐妹"),
    "brother's son": ("nephew", "侄子"),
    "brother's daughter": ("niece", "侄女"),
    "sister's son": ("nephew", "外甥"),
    "sister's daughter": ("niece", "外甥女"),
    "son's son": ("grandson", "孙子"),
    "son's daughter": ("granddaughter", "孙女"),
    "daughter's son": ("grandson", "外孙"),
    "daughter's daughter": ("granddaughter", "外孙女"),
    "grandfather's father": ("great-grandfather", "曾祖父"),
    "grandfather's mother": ("great-grandmother", "曾祖母"),
    "grandfather's elder brother": ("great-uncle", "伯祖父"),
    "grandfather's younger brother": ("great-uncle", "叔祖父"),
    "grandfather's sister": ("great-aunt", "姑祖母"),
    "son's son's son": ("great-grandson", "曾孙"),
    "son's son's daughter": ("great-granddaughter", "曾孙女"),
}
"""Names of each relation in English and in Chinese."""


def _siblings(brother: str, sister: str) -> dict[str, str]:
    """Map the sibling hops to two relations, regardless of age."""
    return dict.fromkeys(BROTHERS, brother) | dict.fromkeys(SISTERS, sister)


_PARENTS = {"father": "father", "mother": "mother"}
_FATHERS_SIDE = {"father": "father's father", "mother": "father's mother"}
_MOTHERS_SIDE = {"father": "mother's father", "mother": "mother's mother"}
_GREAT = {"father": "grandfather's father", "mother": "grandfather's mother"}
_SAME_NAME = {"son": "male cousin of the name", "daughter": "female cousin of the name"}
_OTHER_NAME = {"son": "male cousin", "daughter": "female cousin"}

NEXT: dict[str, dict[str, str]] = {
    "father": _FATHERS_SIDE | {hop: f"father's {hop}" for hop in BROTHERS} | dict.fromkeys(SISTERS, "father's sister"),
    "mother": _MOTHERS_SIDE | _siblings("mother's brother", "mother's sister"),
    **{hop: _PARENTS | {"son": "brother's son", "daughter": "brother's daughter"} for hop in BROTHERS},
    **{hop: _PARENTS | {"son": "sister's son", "daughter": "sister's daughter"} for hop in SISTERS},
    "son": _siblings("son", "daughter") | {"son": "son's son", "daughter": "son's daughter"},
    "daughter": _siblings("son", "daughter") | {"son": "daughter's son", "daughter": "daughter's daughter"},
    "father's father": _GREAT
    | {hop: f"grandfather's {hop}" for hop in BROTHERS}
    | dict.fromkeys(SISTERS, "grandfather's sister"),
    **{f"father's {hop}": _FATHERS_SIDE | _SAME_NAME for hop in BROTHERS},
    "father's sister": _FATHERS_SIDE | _OTHER_NAME,
    "mother's brother": _MOTHERS_SIDE | _OTHER_NAME,
    "mother's sister": _MOTHERS_SIDE | _OTHER_NAME,
    **{f"{kind} cousin of the name": _siblings(*_SAME_NAME.values()) for kind in ("male", "female")},
    **{f"{kind} cousin": _siblings(*_OTHER_NAME.values()) for kind in ("male", "female")},
    **{f"brother's {child}": _siblings("brother's son", "brother's daughter") for child in ("son", "daughter")},
    **{f"sister's {child}": _siblings("sister's son", "sister's daughter") for child in ("son", "daughter")},
    "son's son": _siblings("son's son", "son's daughter")
    | {"son": "son's son's son", "daughter": "son's son's daughter"},
    "son's daughter": _siblings("son's son", "son's daughter"),
    **{f"daughter's {child}": _siblings("daughter's son", "daughter's daughter") for child in ("son", "daughter")},
    **{f"grandfather's {hop}": _GREAT for hop in BROTHERS},
    "grandfather's sister": _GREAT,
    **{f"son's son's {child}": _siblings("son's son's son", "son's son's daughter") for child in ("son", "daughter")},
}
"""NEXT[relation][hop]: the relation after one hop from that relative. Missing pairs have no unique answer."""


@cache
def _walks(level: int) -> dict[str, list[tuple[str, ...]]]:
    """Return all walks of level + 1 hops, grouped by the English term they end at.

    Walks with two consecutive sibling hops, and walks that end at a single hop (a brother's father), are excluded.
    """
    found: list[tuple[tuple[str, ...], str]] = [((hop,), hop) for hop in HOPS]
    for _ in range(level):
        found = [
            ((*hops, hop), after)
            for hops, state in found
            for hop, after in NEXT.get(state, {}).items()
            if not (hop in SIBLINGS and hops[-1] in SIBLINGS)
        ]
    walks: dict[str, list[tuple[str, ...]]] = {}
    for hops, state in found:
        if state not in HOPS:
            walks.setdefault(TERMS[state][0], []).append(hops)
    return walks


class Kin:
    """The state is the current relation, an operation is the next hop; the level does not count the first hop."""

    name = "kin"
    levels = (1, 2, 3, 4)
    chance = 0.12
    wordings: ClassVar[dict[str, tuple[str, ...]]] = {
        "en": (
            "Who is my {walk} to me?",
            "My {walk} is my what?",
            "What do I call my {walk}?",
            "What relation to me is my {walk}?",
            "How am I to call my {walk}?",
            "Name the relation: my {walk}.",
        ),
        "zh": (
            "我{walk}是我的什么人?",
            "我应该怎么称呼我{walk}?",
            "我{walk},我叫什么?",
            "请说出我{walk}与我的关系。",
            "对我来说,我{walk}是谁?",
            "说出称呼:我{walk}。",
        ),
    }

    def generate(self, rng: random.Random, level: int) -> Puzzle:
        """Choose the English term uniformly first; otherwise half of the long walks would end at a cousin."""
        walks = _walks(level)
        hops = rng.choice(walks[rng.choice(tuple(walks))])
        return Puzzle(hops[0], hops[1:])

    def first_state(self, puzzle: Puzzle) -> str:
        return puzzle.start

    def advance(self, state: str, op: str) -> str:
        """A hop that is missing from the table leaves the state unchanged; this happens only after a wrong step."""
        return NEXT.get(state, {}).get(op, state)

    def other_states(self, state: str) -> Sequence[str]:
        """Return the relations whose names differ in both languages."""
        return [other for other, names in TERMS.items() if not set(names) & set(TERMS[state])]

    def operands(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        hops = (puzzle.start, *puzzle.ops)
        return {"walk": "'s ".join(hops) if language == "en" else "".join(f"的{HOPS[hop]}" for hop in hops)[1:]}

    def line(self, state: str, op: str, result: str, language: str) -> str:
        if language == "en":
            return f"{TERMS[state][0]}'s {op} = {TERMS[result][0]}"
        return f"{TERMS[state][1]}的{HOPS[op]}={TERMS[result][1]}"

    def answer(self, puzzle: Puzzle, state: str, language: str) -> str:
        return TERMS[state][language == "zh"]
