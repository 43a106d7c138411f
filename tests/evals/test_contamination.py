"""Contamination: planted questions are found, a control is not; recited halves; accuracy before and after a date."""

import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.evals.test_report import record
from tests.problems import make_problem
from thinkstack.evals.contamination import (
    compare_dates,
    complete_halves,
    corpus_overlap,
    memorization,
    rouge_l,
    split_question,
)
from thinkstack.tasks.overlap import OverlapIndex, split_words
from thinkstack.tasks.table import make_task
from thinkstack.tasks.task import TaskConfig
from thinkstack.types import Completion, ConfigError

WORDS = [
    "Natalia",
    "Weng",
    "Betty",
    "Julie",
    "James",
    "has",
    "buys",
    "sells",
    "finds",
    "gives",
    "3",
    "48",
    "12",
    "7",
    "500",
    "apples",
    "pears",
    "boxes",
    "coins",
    "books",
    "and",
    "then",
    "after",
    "before",
    "each",
    "half",
    "twice",
    "more",
    "than",
    "at",
    "the",
    "corner",
    "shop",
    "school",
    "for",
    "dollars",
    "hours",
    "in",
    "a",
    "blue",
    "old",
    "big",
    "bag",
    "of",
    "her",
]


def question(rng):
    return f"{' '.join(rng.choices(WORDS, k=rng.randrange(20, 45)))}. How many {rng.choice(WORDS)} are left?"


def wrapped(text, rng):
    words = text.split()
    return "".join(word + rng.choice([" ", "\n", "  \n> "]) for word in words)


def punctuated(text, rng):
    return re.sub(r"[.?]", lambda match: rng.choice([" ;", "!!", " -- "]), text).upper().replace("A", "Á")


FORMS = [lambda text, rng: text, wrapped, punctuated]


def test_planted_questions_are_found_and_a_control_is_not():
    """20 of 500 questions are in the corpus: verbatim, with other line breaks, with other punctuation and case."""
    rng = random.Random(5)
    problems = [make_problem(question(rng), key=f"{number:016x}") for number in range(500)]
    planted = rng.sample(range(500), 20)
    control = [question(random.Random(1000 + number)) for number in range(2000)]
    texts = list(control)
    for place, number in enumerate(planted):
        texts.insert(rng.randrange(len(texts)), "Notes. " + FORMS[place % 3](problems[number].question, rng) + " End.")
    found = corpus_overlap(problems, ((f"doc {place}", text) for place, text in enumerate(texts)))
    assert set(found.contaminated) == {problems[number].key for number in planted}
    assert found.num_documents == 2020 and not found.too_short
    alone = corpus_overlap(problems, (("control", text) for text in control))
    assert alone.contaminated == []


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("THINKSTACK_DATA"), reason="THINKSTACK_DATA is not set")
def test_planted_questions_of_gsm8k_are_found_in_its_training_questions_and_none_else():
    """The corpus is GSM8K's training set, 7,473 questions of the same kind by the same writers."""
    folder = Path(os.environ["THINKSTACK_DATA"]) / "gsm8k"
    task = make_task("gsm8k", TaskConfig(data=str(folder)))
    problems = task.read(folder / "test.jsonl.gz")[:500]
    train = [problem.question for problem in task.read(folder / "train.jsonl.gz")]
    rng = random.Random(1)
    planted = rng.sample(range(500), 20)
    texts = train + [FORMS[place % 3](problems[number].question, rng) for place, number in enumerate(planted)]
    control = corpus_overlap(problems, (("", text) for text in train))
    found = corpus_overlap(problems, (("", text) for text in texts))
    assert len(set(found.contaminated) & {problems[number].key for number in planted}) >= 19
    assert control.contaminated == []


def test_words_ignore_case_punctuation_width_and_line_ends():
    assert split_words("The Café's pro-\nfit: 1,000 ＡＢ!") == ["the", "cafe", "s", "profit", "1", "000", "ab"]
    assert split_words("小明有3个苹果。") == ["小", "明", "有", "3", "个", "苹", "果"]


def test_a_question_shorter_than_a_run_is_one_run_and_a_tiny_one_is_never_found():
    index = OverlapIndex({"short": "What is the capital of France?", "tiny": "2 + 2?"})
    assert index.too_short == ["tiny"]
    assert index.find("He asked: what is the capital of France")["short"].share == 1.0
    assert index.find("What is the capital of Spain, 2 + 2?") == {}


def test_the_share_counts_runs():
    words = [f"w{number}" for number in range(12)]  # three runs of ten
    found = OverlapIndex({"one": " ".join(words)}).find(" ".join(words[:11]))
    assert found["one"].share == pytest.approx(2 / 3)
    assert found["one"].run == " ".join(words[:10])


def test_no_documents_are_refused():
    with pytest.raises(ConfigError, match="no documents"):
        corpus_overlap([make_problem()], [])


class Characters:
    begin_ids = (1,)

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_a_recited_question_differs_from_a_new_one():
    rng = random.Random(2)
    seen, unseen = make_problem(question(rng), key="a"), make_problem(question(rng), key="b")
    halves = {split_question(seen.question)[0]: split_question(seen.question)[1]}

    def generate(prompts, samplings):
        texts = [halves.get("".join(map(chr, ids[1:])), " I do not know this one, sorry.") for ids in prompts]
        assert all(sampling.temperature == 0 for sampling in samplings)
        return [
            [Completion(token_ids=tuple(map(ord, text)), logprobs=(0.0,) * len(text), finish_reason="stop",
                        weights_version=0)]
            for text in texts
        ]  # fmt: skip

    found = complete_halves(generate, Characters(), [seen, unseen, make_problem("Too short?")], ())
    assert [(one.key, one.is_exact) for one in found] == [("a", True), ("b", False)]
    assert found[0].similarity == 1.0 > found[0].chance
    assert memorization(found).mean == pytest.approx(sum(one.similarity - one.chance for one in found) / 2)
    with pytest.raises(ConfigError, match="no question has 20 words"):
        complete_halves(generate, Characters(), [make_problem("Too short?")], ())


def test_rouge_l_by_hand():
    assert rouge_l(["a", "b", "c", "d"], ["a", "c", "d", "e", "f"]) == pytest.approx(2 * 3 / 9)
    assert rouge_l([], []) == 0.0


def dated(date, correct, key):
    return replace(record(correct, task="livecodebench"), date=date, key=key)


def test_accuracy_before_and_after_a_date():
    old = [dated("2024-01-01", [True] * 4, f"o{number}") for number in range(9)] + [
        dated("2024-01-01", [False] * 4, "o9")
    ]
    new = [dated("2024-09-01", [number < 2] * 4, f"n{number}") for number in range(10)]
    found = compare_dates([*old, *new, dated("", [True] * 4, "x")], "2024-07-01")
    assert (found.num_before, found.num_after) == (10, 10)
    assert (found.before.mean, found.after.mean) == (0.9, 0.2)
    # Welch: standard errors 0.1 and 0.4 / 3, their root sum of squares 1 / 6, t of 16.7 degrees 2.113
    assert (found.low, found.high) == pytest.approx((-0.7 - 2.113 / 6, -0.7 + 2.113 / 6), abs=1e-3)
    # 11 of 20 are right; 9 or more of them on one side: 2 (C(11, 9) C(9, 1) + C(11, 10)) / C(20, 10) = 0.0055
    assert found.p_value == pytest.approx(0.0055, abs=0.002)
    few = compare_dates([*old[:2], *new[-2:]], "2024-07-01")  # 2 of 2, then 0 of 2
    assert few.difference == -1.0 and few.high == pytest.approx(0.68, abs=0.01)  # 1 - 0.025 ** (1 / 2) = 0.84 each
    assert few.p_value == pytest.approx(1 / 3, abs=0.02)
    with pytest.raises(ConfigError, match="10 problems are from before 2024-09-02 and 0 from after"):
        compare_dates(old, "2024-09-02")
