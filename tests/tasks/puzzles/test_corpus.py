"""Contents of the pre-training corpus."""

from itertools import islice

import pytest

from tests.problems import rows, sample_problems
from thinkstack.tasks.puzzles.corpus import GUESSES, OPENINGS, SMALL_CHAT, CorpusConfig, document, documents
from thinkstack.tasks.puzzles.puzzle import problem_key, split_of, unseen_wordings
from thinkstack.tasks.table import PUZZLES, puzzle_tasks
from thinkstack.text.parse import parse_turn
from thinkstack.types import ConfigError

ALL = puzzle_tasks(rows(*PUZZLES))
DEFAULT = CorpusConfig()


def sampled(count: int, cfg: CorpusConfig = DEFAULT, seed: int = 0):
    return list(islice(documents(ALL, cfg, seed), count))


def fixed_parts(template: str) -> list[str]:
    """Return the texts between the operands of a wording."""
    parts = [""]
    for piece in template.split("{"):
        parts.append(piece.partition("}")[2] if "}" in piece else piece)
    return [part for part in parts if part]


def could_be(question: str, template: str) -> bool:
    """Whether `question` contains the fixed texts of `template` in order, from start to end."""
    place = 0
    for part in fixed_parts(template):
        place = question.find(part, place)
        if place < 0:
            return False
        place += len(part)
    begins = template.startswith("{") or question.startswith(template.partition("{")[0])
    return begins and (template.endswith("}") or question.endswith(template.rpartition("}")[2]))


def test_a_document_is_a_function_of_seed_and_index():
    assert list(islice(documents(ALL, DEFAULT, 3, start=5), 3)) == [document(ALL, DEFAULT, 3, i) for i in (5, 6, 7)]
    assert document(ALL, DEFAULT, 3, 5) != document(ALL, DEFAULT, 4, 5)


def test_unseen_wordings_are_recognized():
    for problem in sample_problems(PUZZLES, "train", 0, 200, unseen_wordings=True):
        assert could_be(problem.question, PUZZLES[problem.task].wordings[problem.language][problem.wording])


def test_the_corpus_never_uses_an_unseen_wording():
    templates = [
        task.wordings[language][wording]
        for task in ALL
        for language in task.wordings
        for wording in unseen_wordings(task, language)
    ]
    for item in sampled(3000):
        if item.question:
            matches = [template for template in templates if could_be(item.question, template)]
            assert not matches, (item.question, matches)


def test_the_corpus_uses_training_problems_only(monkeypatch):
    keys = []

    def recorded(task, puzzle, language, wording):
        keys.append(problem_key(task, puzzle))
        return real(task, puzzle, language, wording)

    import thinkstack.tasks.puzzles.corpus as corpus

    real = corpus.make_problem
    monkeypatch.setattr(corpus, "make_problem", recorded)
    sampled(3000)
    assert len(keys) > 2300
    assert {split_of(key) for key in keys} == {"train"}


def test_document_shares_match_the_config():
    """1 in 12 documents is prose, 1 in 10 a drill; 8 % of guesses have no tags."""
    items = sampled(4000)
    questions = [
        item for item in items if item.question and (item.question, item.text) not in sum(SMALL_CHAT.values(), ())
    ]
    assert len(questions) / len(items) == pytest.approx(0.82, abs=0.02)
    tagged = sum(parse_turn(item.text).is_well_formed for item in questions) / len(questions)
    assert tagged == pytest.approx(1 - 0.6 * 0.08, abs=0.02)


@pytest.mark.parametrize(("share", "expected"), [(1.0, True), (0.0, False)])
def test_a_share_of_0_or_1_is_strict(share, expected):
    cfg = CorpusConfig(prose_share=0.0, drill_share=0.0, worked_share=share, untagged_share=0.0)
    for item in sampled(300, cfg):
        lines = parse_turn(item.text).thinking.splitlines()
        assert (len(lines) >= 2) == expected


def test_a_drill_lists_correct_steps_of_one_task():
    cfg = CorpusConfig(prose_share=0.0, drill_share=1.0)
    for item in islice(documents(puzzle_tasks(rows("chain", "nested", "cups")), cfg, 0), 60):
        lines = item.text.splitlines()
        assert item.question == "" and len(lines) == 10
        for line in lines:
            if "=" in line and line[0].isdigit():
                left, right = line.split("=")
                assert eval(left) % 10 == int(right)


def test_the_most_likely_start_of_an_answer_is_a_guess():
    """Otherwise greedy decoding of the base model already reasons on every problem, and RL cannot improve it there."""
    for language in ("en", "zh"):
        guess = (1 - DEFAULT.worked_share) / len(GUESSES[language])
        assert guess > DEFAULT.worked_share / len(OPENINGS[language])
        phrases = (*GUESSES[language], *OPENINGS[language])
        starts = {words[0] if language == "zh" else words.split()[0] for words in phrases}
        assert len(starts) == len(phrases)


def test_a_corpus_without_tasks_or_with_invalid_shares_is_refused():
    with pytest.raises(ConfigError, match="at least one"):
        next(documents([], DEFAULT, 0))
    with pytest.raises(ConfigError, match="not a probability"):
        CorpusConfig(prose_share=1.2)
