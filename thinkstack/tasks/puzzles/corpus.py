"""A synthetic pre-training corpus that imitates the web: questions with guessed answers, with correct and wrong worked
solutions, and plain sentences.

A document is a function of (seed, index) and generated on demand; nothing is downloaded or stored.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from thinkstack.config import Share
from thinkstack.tasks.puzzles.puzzle import (
    PuzzleTask,
    Solution,
    digest,
    generate_puzzle,
    make_problem,
    reference_answer,
    seen_wordings,
    solve,
)
from thinkstack.types import ConfigError, Problem


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Composition of the corpus. Shares are probabilities."""

    prose_share: Share = 0.08
    """Share of documents that are plain sentences or short greetings."""
    drill_share: Share = 0.1
    """Share of documents that are lists of correct steps out of context, like a times table."""
    worked_share: Share = 0.4
    """Share of answers with a worked solution; the other answers are guesses."""
    wrong_working_share: Share = 0.45
    """Share of worked solutions with one wrong step, whose error propagates to the answer."""
    right_guess_share: Share = 0.5
    """Share of guesses that are correct."""
    untagged_share: Share = 0.08
    """Share of guesses without the think and answer tags."""

    def __post_init__(self) -> None:
        for name, share in vars(self).items():
            if not 0 <= share <= 1:
                raise ConfigError(f"corpus.{name}={share} is not a probability; use a number in 0..1")


@dataclass(frozen=True)
class Document:
    """A question with its answer, or plain text with an empty question."""

    question: str
    text: str


DRILL_LINES = 10
GUESSES = {
    "en": ("I guess.", "Easy.", "No need to work it out.", "Looks clear."),
    "zh": ("我猜的。", "很简单。", "不用算。", "看得出来。"),
}
OPENINGS = {
    "en": ("Step by step.", "Let me see.", "One at a time.", "Slowly.", "First things first.", "Work it out."),
    "zh": ("一步一步来。", "让我算算。", "先想一想。", "慢慢来。", "逐步算。", "仔细算。"),
}
"""First lines of worked solutions. There are more of them than of GUESSES, and all start with different words, so the
most likely first token of an answer starts a guess."""
UNTAGGED = {
    "en": ("It is {answer}.", "The answer is {answer}.", "{answer}"),
    "zh": ("是{answer}。", "答案是{answer}。", "{answer}"),
}


def documents(tasks: list[PuzzleTask], cfg: CorpusConfig, seed: int, start: int = 0) -> Iterator[Document]:
    """Yield the corpus from document `start` on, without end. Raises ConfigError if `tasks` is empty."""
    if not tasks:
        raise ConfigError("the corpus needs at least one task; name some in tasks")
    index = start
    while True:
        yield document(tasks, cfg, seed, index)
        index += 1


def document(tasks: list[PuzzleTask], cfg: CorpusConfig, seed: int, index: int) -> Document:
    """Generate document `index` of the corpus of `seed`."""
    rng = random.Random(digest("corpus", seed, index))
    kind = rng.random()
    if kind < cfg.prose_share:
        return prose(rng)
    task = rng.choice(tasks)
    language = rng.choice(tuple(task.wordings))
    if kind < cfg.prose_share + cfg.drill_share:
        return Document("", drill(task, rng, language, (seed, index)))
    puzzle = generate_puzzle(task, "train", rng.choice(task.levels), (seed, index))
    problem = make_problem(task, puzzle, language, rng.choice(seen_wordings(task, language)))
    if rng.random() < cfg.worked_share:
        solution = solve(task, puzzle, language, rng if rng.random() < cfg.wrong_working_share else None)
        return Document(problem.question, format_solution(solution, rng.choice(OPENINGS[language])))
    answer = reference_answer(task, puzzle, language)
    if rng.random() >= cfg.right_guess_share:
        answer = random_answer(task, rng, language)
    if rng.random() < cfg.untagged_share:
        return Document(problem.question, rng.choice(UNTAGGED[language]).replace("{answer}", answer))
    return Document(problem.question, format_turn(rng.choice(GUESSES[language]), answer))


def drill(task: PuzzleTask, rng: random.Random, language: str, seed: object) -> str:
    """Return correct steps of different problems, one per line."""
    lines = []
    for number in range(DRILL_LINES):
        puzzle = generate_puzzle(task, "train", rng.choice(task.levels), (seed, number))
        lines.append(rng.choice(solve(task, puzzle, language).lines))
    return "\n".join(lines)


def random_answer(task: PuzzleTask, rng: random.Random, language: str) -> str:
    """Return the answer to another random problem of the task."""
    return reference_answer(task, task.generate(rng, rng.choice(task.levels)), language)


def worked_example(tasks: Sequence[PuzzleTask], seed: int, index: int) -> tuple[Problem, Solution]:
    """Return training problem `index` with its correct worked solution. Tasks alternate by index."""
    task = tasks[index % len(tasks)]
    rng = random.Random(digest("worked example", seed, index))
    puzzle = generate_puzzle(task, "train", rng.choice(task.levels), ("worked example", seed, index))
    language = rng.choice(list(task.wordings))
    problem = make_problem(task, puzzle, language, rng.choice(seen_wordings(task, language)))
    return problem, solve(task, puzzle, language)


def format_turn(thinking: str, answer: str) -> str:
    """Return a well-formed assistant turn."""
    return f"<think>\n{thinking}\n</think>\n<answer>{answer}</answer>"


def format_solution(solution: Solution, opening: str) -> str:
    """Return a turn whose thinking is the opening and the lines of the solution."""
    return format_turn("\n".join((opening, *solution.lines)), solution.answer)


PEOPLE = {"en": ("Ann", "Ben", "Kate", "Leo", "Mia", "Jack"), "zh": ("小明", "小红", "小李", "小王", "老张", "阿美")}
THINGS = {
    "en": ("a red cup", "two books", "a ball", "an old map", "three apples", "a small box"),
    "zh": ("一个红杯子", "两本书", "一个球", "一张旧地图", "三个苹果", "一个小盒子"),
}
PLACES = {"en": ("the house", "the garden", "the school", "the market"), "zh": ("家里", "花园里", "学校里", "市场上")}
PROSE = {
    "en": (
        "{who} has {what} in {where}.",
        "In {where}, {who} found {what}.",
        "{who} gave {what} to {other}.",
        "{other} and {who} look for {what} in {where}.",
    ),
    "zh": (
        "{who}在{where}有{what}。",
        "{who}在{where}找到了{what}。",
        "{who}把{what}给了{other}。",
        "{other}和{who}在{where}找{what}。",
    ),
}
SMALL_CHAT = {
    "en": (
        ("Hello!", "Hello! Give me a puzzle."),
        ("Who are you?", "I am a very small model. I know a few kinds of puzzles."),
        ("What can you do?", "I can follow digits through sums, brackets and swaps of cups."),
        ("Thank you.", "You are welcome."),
    ),
    "zh": (
        ("你好!", "你好!给我一道题吧。"),
        ("你是谁?", "我是一个很小的模型,只会几种题。"),
        ("你会做什么?", "我会算个位,会拆括号,会找杯子里的球。"),
        ("谢谢。", "不客气。"),
    ),
}


def prose(rng: random.Random) -> Document:
    """Return two or three plain sentences, or a short greeting with its reply."""
    language = rng.choice(("en", "zh"))
    if rng.random() < 0.3:
        return Document(*rng.choice(SMALL_CHAT[language]))
    sentences = []
    for _ in range(rng.choice((2, 3))):
        who, other = rng.sample(PEOPLE[language], 2)
        words = {
            "who": who,
            "other": other,
            "what": rng.choice(THINGS[language]),
            "where": rng.choice(PLACES[language]),
        }
        sentences.append(rng.choice(PROSE[language]).format(**words))
    return Document("", (" " if language == "en" else "").join(sentences))
