"""Measures of a sampled text that need no reference: repetition, mixed language, unclosed thinking."""

from thinkstack.tasks.reward import no_repetition_part
from thinkstack.tasks.verify.language import language_share
from thinkstack.text.tokenizer import THINK_CLOSE, THINK_OPEN
from thinkstack.types import Problem, Response

LONGEST_UNIT = 200
"""Characters of the longest unit whose repetitions are a loop."""
SHORTEST_LOOP = 40
"""Characters of the shortest loop; figures such as 0.333333 are none."""


def text_measures(problem: Problem, response: Response) -> dict[str, float]:
    """Return the measures of a response by name, each from 0 to 1.

    repeated: share of the runs of six words that occurred before. looping: whether the text ends in a loop, which is
    counted for truncated completions alone. mixed_language: share of the words that are not of the question's language;
    missing for texts of few words and for languages other than English and Chinese. unclosed_thinking: whether thinking
    was opened and never closed.
    """
    found = {
        "repeated": 1.0 - no_repetition_part(problem, response, 0.0),
        "looping": float(response.is_truncated and ends_in_loop(response.text)),
        "unclosed_thinking": float(THINK_OPEN in response.text.rpartition(THINK_CLOSE)[2]),
    }
    if problem.language in ("en", "zh"):
        share = language_share(response.text, problem.language, quoted=problem.question)
        if share is not None:
            found["mixed_language"] = 1.0 - share
    return found


def ends_in_loop(text: str) -> bool:
    """Whether the end of a text has a period: four repetitions of a unit, of which the first and last may be cut."""
    return any(
        len(text) >= size + unit and text[-size:] == text[-size - unit : -unit]
        for unit in range(1, LONGEST_UNIT + 1)
        for size in [max(3 * unit, SHORTEST_LOOP)]
    )
