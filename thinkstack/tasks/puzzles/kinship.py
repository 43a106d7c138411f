"""Family relations: A is the father of B, B is the mother of C; what is A to C?

English only: Chinese kin terms depend on lineage and age, which these puzzles do not specify.
"""

import random
from collections.abc import Sequence
from typing import ClassVar

from thinkstack.tasks.puzzles.puzzle import Puzzle

TERMS = {
    "parent": ("father", "mother"),
    "child": ("son", "daughter"),
    "sibling": ("brother", "sister"),
    "grandparent": ("grandfather", "grandmother"),
    "grandchild": ("grandson", "granddaughter"),
    "pibling": ("uncle", "aunt"),
    "nibling": ("nephew", "niece"),
    "great-grandparent": ("great-grandfather", "great-grandmother"),
    "great-grandchild": ("great-grandson", "great-granddaughter"),
    "great-pibling": ("great-uncle", "great-aunt"),
    "great-nibling": ("great-nephew", "great-niece"),
    "cousin": ("cousin", "cousin"),
}
"""The word for a man and for a woman."""

COMPOSE = {
    "parent": {"parent": "grandparent", "sibling": "parent"},
    "child": {"child": "grandchild", "sibling": "nibling"},
    "sibling": {"parent": "pibling", "child": "child", "sibling": "sibling"},
    "grandparent": {"parent": "great-grandparent", "sibling": "grandparent"},
    "grandchild": {"child": "great-grandchild", "sibling": "great-nibling"},
    "pibling": {"parent": "great-pibling", "sibling": "pibling"},
    "nibling": {"parent": "cousin", "child": "grandchild"},
    "great-grandparent": {"sibling": "great-grandparent"},
    "great-nibling": {"child": "great-grandchild"},
    "great-pibling": {"sibling": "great-pibling"},
    "cousin": {"sibling": "cousin"},
}
"""COMPOSE[r][s]: what X is to Z if X is the r of Y and Y is the s of Z. Pairs without a unique name are left out."""

FACT_RELATIONS = ("parent", "child", "sibling")
MEN = ("Ben", "Dan", "Hugo", "Jack", "Leo", "Max", "Sam", "Tom")
WOMEN = ("Ann", "Eve", "Ida", "Kate", "Lucy", "Mia", "Sue", "Zoe")

RELATION = {word: relation for relation, words in TERMS.items() for word in words}
IS_WOMAN = {word: word == words[1] for words in TERMS.values() for word in words}


class Kinship:
    """The state is the term for what the first person is to the last person so far; an operation is the next fact's
    term."""

    name = "kinship"
    levels = (2, 3, 4, 5, 6)
    chance = 0.15
    wordings: ClassVar[dict[str, tuple[str, ...]]] = {
        "en": (
            "{facts} What is {first} to {last}?",
            "{facts} {first} is what to {last}?",
            "What is {first} to {last}? {facts}",
            "Find out what {first} is to {last}. {facts}",
            "Tell me what {first} is to {last}. {facts}",
            "{facts} What is {first} to {last} now?",
        )
    }

    def generate(self, rng: random.Random, level: int) -> Puzzle:
        """Walk COMPOSE at random; a walk that reaches a dead end restarts."""
        relations: list[str] = []
        while len(relations) < level + 1:
            state = rng.choice(FACT_RELATIONS)
            relations = [state]
            while len(relations) < level + 1 and COMPOSE.get(state):
                relations.append(rng.choice(tuple(COMPOSE[state])))
                state = COMPOSE[state][relations[-1]]
        people = [rng.random() < 0.5 for _ in range(level + 2)]
        men, women = iter(rng.sample(MEN, len(MEN))), iter(rng.sample(WOMEN, len(WOMEN)))
        names = tuple(next(women if is_woman else men) for is_woman in people)
        words = [TERMS[relation][is_woman] for relation, is_woman in zip(relations, people, strict=False)]
        return Puzzle(words[0], tuple(words[1:]), names)

    def first_state(self, puzzle: Puzzle) -> str:
        return puzzle.start

    def advance(self, state: str, op: str) -> str:
        """A pair that is missing from the table leaves the state unchanged; this happens only after a wrong step."""
        relation = RELATION[state]
        return TERMS[COMPOSE.get(relation, {}).get(RELATION[op], relation)][IS_WOMAN[state]]

    def other_states(self, state: str) -> Sequence[str]:
        return [word for word in RELATION if word != state]

    def operands(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        names, words = puzzle.names, (puzzle.start, *puzzle.ops)
        facts = [f"{a} is {b}'s {word}." for a, b, word in zip(names, names[1:], words, strict=False)]
        return {"facts": " ".join(facts), "first": names[0], "last": names[-1]}

    def line(self, state: str, op: str, result: str, language: str) -> str:
        return f"{state} of {op} = {result}"

    def answer(self, puzzle: Puzzle, state: str, language: str) -> str:
        return state
