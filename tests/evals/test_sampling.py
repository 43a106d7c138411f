"""Samplers of an evaluation: prompts as records, files of answers, text measures, budgets with forced ends."""

import json
from dataclasses import replace

import pytest

from tests.evals.test_runner import CharacterChat, completion, problem, turn
from tests.problems import rows
from thinkstack.evals.budgets import force_close, forced_points
from thinkstack.evals.runner import grade_problems
from thinkstack.evals.sampling import EvalConfig, read_answers, sample_from_engine, sampling_params_for
from thinkstack.evals.text_measures import ends_in_loop, text_measures
from thinkstack.tasks.reward import Reward, RewardConfig
from thinkstack.tasks.table import make_tasks
from thinkstack.tasks.verify.pool import VerifierPool
from thinkstack.text.parse import parse_sampled, parse_turn
from thinkstack.types import Completion, ConfigError

CFG = EvalConfig(num_problems=2, samples=2, tasks=rows("chain", "cups"))
TASKS = make_tasks(CFG.tasks)
REWARD = Reward(RewardConfig(), TASKS)
PROBLEMS = [problem(), problem(answer="3", task="cups", key="01")]


class Tokenizer:
    """Tokens are characters; BOS is 1."""

    begin_ids = (1,)
    control = {}  # noqa: RUF012

    def encode(self, text):
        return [ord(letter) for letter in text]


class WithBos(CharacterChat):
    tokenizer = Tokenizer()
    num_bos = 1

    def prompt(self, messages, tools=()):
        return [1] * self.num_bos + super().prompt(messages, tools)

    def text_of(self, token_ids):
        return "".join(chr(token) for token in token_ids if token > 1)


def answer_twice(prompts, samplings):
    return [[completion(turn(5)), completion(turn(4))] for _ in prompts]


def test_a_record_has_the_prompt_its_hash_its_bos_and_its_seed():
    first, again = (
        sample_from_engine(answer_twice, WithBos(), PROBLEMS, TASKS, CFG, "think_answer_tags") for _ in range(2)
    )
    record = first[0].prompt
    assert record.token_ids == (1, *map(ord, PROBLEMS[0].question))
    assert (record.num_bos, record.num_tokens) == (1, len(record.token_ids))
    assert record.seed == sampling_params_for(PROBLEMS[0], TASKS["chain"], WithBos(), CFG).seed
    assert [one.prompt for one in first] == [one.prompt for one in again]
    assert first[0].prompt.sha256 != first[1].prompt.sha256


def test_two_bos_are_refused():
    """lm-evaluation-harness sampled with two for some templates."""
    chat = WithBos()
    chat.num_bos = 2
    with pytest.raises(ConfigError, match="begins with 2 BOS"):
        sample_from_engine(answer_twice, chat, PROBLEMS, TASKS, CFG, "think_answer_tags")


def test_a_prompt_above_the_limit_is_not_sampled_and_counts_as_wrong_and_not_scored():
    asked = []

    def generate(prompts, samplings):
        asked.extend(prompts)
        return answer_twice(prompts, samplings)

    long = replace(PROBLEMS[1], messages=(replace(PROBLEMS[1].messages[0], content="q" * 50),))
    cfg = replace(CFG, max_prompt_tokens=20)
    sampled = sample_from_engine(generate, WithBos(), [PROBLEMS[0], long], TASKS, cfg, "think_answer_tags")
    records = grade_problems(sampled, REWARD, VerifierPool())
    assert len(asked) == 1
    assert [answer.correct for answer in records[0].answers] == [True, False]
    assert {answer.unscorable for answer in records[1].answers} == {"the prompt has 51 tokens, above the limit of 20"}
    assert records[1].share_correct == 0.0


def test_the_context_limits_a_completion_and_refuses_a_prompt_that_fills_it():
    asked = []

    def generate(prompts, samplings):
        asked.extend(samplings)
        return answer_twice(prompts, samplings)

    prompt = len(WithBos().prompt(PROBLEMS[0].messages))
    cfg = replace(CFG, max_tokens=50, max_model_len=prompt + 30)
    sample_from_engine(generate, WithBos(), PROBLEMS[:1], TASKS, cfg, "think_answer_tags")
    assert asked[0].max_tokens == 30
    cfg = replace(cfg, max_model_len=prompt)
    (one,) = sample_from_engine(lambda *_: [], WithBos(), PROBLEMS[:1], TASKS, cfg, "think_answer_tags")
    assert "above the limit of" in one.refused


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_file_of_answers_is_graded_by_key_or_question(tmp_path):
    file = write(
        tmp_path / "answers.jsonl",
        {"question": PROBLEMS[1].question, "completions": [turn(3), {"text": turn(2), "num_tokens": 9}]},
        {"key": PROBLEMS[0].key, "answers": [{"text": turn(5), "truncated": False}, turn(5)], "task": "chain"},
    )
    sampled = read_answers(file, PROBLEMS, TASKS, CFG, "think_answer_tags")
    records = grade_problems(sampled, REWARD, VerifierPool())
    assert [record.task for record in records] == ["chain", "cups"]
    assert [[answer.correct for answer in record.answers] for record in records] == [[True, True], [True, False]]
    assert sampled[1].num_tokens == (0, 9)


def test_fewer_stored_completions_than_samples_are_refused(tmp_path):
    """Elsewhere 8 stored completions of the 64 that were asked for give an eighth of the accuracy."""
    file = write(tmp_path / "a.jsonl", {"key": PROBLEMS[0].key, "completions": [turn(5)] * 8})
    with pytest.raises(ConfigError, match="has 8 completions, fewer than samples=64; evaluate with samples=8"):
        read_answers(file, PROBLEMS, TASKS, replace(CFG, samples=64), "think_answer_tags")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"key": "nothing", "completions": ["a", "b"]}, "'nothing' is none of the"),
        ({"completions": ["a", "b"]}, "it needs key or question, and completions"),
        ({"key": PROBLEMS[0].key}, "completions is null"),
        ({"key": PROBLEMS[0].key, "completions": []}, "not empty"),
        ({"key": PROBLEMS[0].key, "completions": ["a", 3]}, "a completion is"),
        ({"key": PROBLEMS[0].key, "completions": ["a", {"text": "b", "num_tokens": -1}]}, "num_tokens=-1"),
        ({"key": PROBLEMS[0].key, "completions": ["a", {"text": "b", "truncated": 1}]}, "truncated=1"),
    ],
)
def test_a_wrong_row_of_answers_is_refused_with_its_place(line, reason, tmp_path):
    good = {"key": PROBLEMS[1].key, "completions": ["a", "b"]}
    with pytest.raises(ConfigError, match=rf"a\.jsonl line 2.*{reason}"):
        read_answers(write(tmp_path / "a.jsonl", good, line), PROBLEMS, TASKS, CFG, "think_answer_tags")


def test_a_problem_that_occurs_twice_is_refused(tmp_path):
    line = {"key": PROBLEMS[1].key, "completions": ["a", "b"]}
    with pytest.raises(ConfigError, match="occurs twice"):
        read_answers(write(tmp_path / "a.jsonl", line, line), PROBLEMS, TASKS, CFG, "think_answer_tags")


def test_loops_are_found_by_their_period():
    assert ends_in_loop("so " + "wait, again. " * 8)
    assert ends_in_loop("so " + ("wait, again. " * 8)[:-5])  # the last repetition is cut off
    assert not ends_in_loop("1/3 = 0." + "3" * 20)  # too short
    assert not ends_in_loop("The cat sat on the mat, and then the dog came in and sat beside the cat on the mat.")
    assert not ends_in_loop("")


def test_measures_of_a_text():
    looping = parse_sampled("<think>" + "wait, again. " * 20, "think_then_answer", is_truncated=True)
    found = text_measures(PROBLEMS[0], looping)
    assert (found["looping"], found["unclosed_thinking"]) == (1.0, 1.0)
    assert found["repeated"] > 0.9
    mixed = parse_turn("<think>one two three four</think>我们来看这个题</think>", "think_then_answer")
    assert text_measures(PROBLEMS[0], mixed)["mixed_language"] == pytest.approx(7 / 11)
    assert text_measures(PROBLEMS[0], mixed)["unclosed_thinking"] == 0.0


def thought(length, answer, reason="stop"):
    text = "<think>" + "x" * (length - 7) + ("" if answer is None else f"</think><answer>{answer}</answer>")
    ids = tuple(map(ord, text))
    return Completion(token_ids=ids, logprobs=(0.0,) * len(ids), finish_reason=reason, weights_version=0)


def test_thinking_above_the_budget_is_cut_closed_and_answered():
    def generate(prompts, samplings):
        return [[thought(10, 5), thought(100, 4)], [thought(100, None, "length"), thought(30, 3)]]

    def close(prompts, samplings):
        seen.extend(zip(prompts, samplings, strict=True))
        return [[completion(f"<answer>{answer}</answer>")] for answer in (5, 3)]

    chat, seen = WithBos(), []
    sampled = sample_from_engine(generate, chat, PROBLEMS, TASKS, CFG, "think_answer_tags")

    def forced(budget):
        def params(one):
            return sampling_params_for(one, TASKS[one.task], chat, CFG)

        return force_close(close, chat, sampled, budget, params, 16, "think_answer_tags")

    found, cuts = forced(40)
    assert cuts == [1, 1]
    prompt, sampling = seen[0]
    assert bytes(prompt[1:]).decode() == PROBLEMS[0].question + "<think>" + "x" * 33 + "</think>"
    assert (sampling.max_tokens, sampling.n) == (16, 1)
    assert seen[0][1].seed != seen[1][1].seed
    assert [one.answer for one in found[0].responses] == ["5", "5"]
    assert [one.answer for one in found[1].responses] == ["3", "3"]
    assert found[0].num_tokens[0] == sampled[0].num_tokens[0]  # untouched
    points = forced_points([40], forced, lambda part: grade_problems(part, REWARD, VerifierPool()))
    assert points["chain"][0].pass_at_1 == 1.0
    assert (points["cups"][0].forced, points["cups"][0].budget_tokens) == (0.5, 40)


def test_budgets_without_thinking_are_refused():
    sampled = sample_from_engine(
        lambda prompts, samplings: [[completion("5")] * 2] * 2, WithBos(), PROBLEMS, TASKS, CFG, "last_number"
    )
    with pytest.raises(ConfigError, match="no completion has thinking"):
        force_close(answer_twice, WithBos(), sampled, 4, lambda one: None, 16, "last_number")
