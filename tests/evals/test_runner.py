from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from tests.problems import make_problem, rows
from thinkstack.evals.records import read_samples, write_samples
from thinkstack.evals.results import compute_metrics, curve_point, summarize
from thinkstack.evals.runner import (
    Evaluation,
    evaluate,
    held_out_problems,
    warn_if_no_answer_read,
)
from thinkstack.evals.sampling import EvalConfig
from thinkstack.tasks.puzzles.generated import is_worked
from thinkstack.tasks.puzzles.puzzle import split_of
from thinkstack.tasks.reward import Reward, RewardConfig
from thinkstack.tasks.table import make_tasks
from thinkstack.tasks.task import TaskConfig
from thinkstack.tasks.verify.pool import VerifierPool
from thinkstack.types import Completion, ConfigError, Score

CFG = EvalConfig(num_problems=2, samples=4, tasks=rows("chain", "cups"), seed=3)
TASKS = make_tasks(CFG.tasks)
REWARD = Reward(RewardConfig(), TASKS)
POOL = VerifierPool()
"""Starts no process: puzzles are verified in this one."""


@dataclass
class CharacterChat:
    """A chat format whose tokens are characters; 0 ends a turn."""

    name = "characters"
    prefill = ""
    stop_token_ids = (0,)
    tokenizer = SimpleNamespace(begin_ids=[])

    def prompt(self, messages, tools=()):
        return [ord(letter) for letter in messages[-1].content]

    def text_of(self, token_ids):
        return "".join(chr(token) for token in token_ids if token)


def problem(answer="5", task="chain", level=2, language="en", key="00"):
    return make_problem(f"q{key}", answer, task, language, key, level=level, wording=0)


def turn(answer, thinking="hm"):
    return f"<think>\n{thinking}\n</think>\n<answer>{answer}</answer>"


def completion(text, truncated=False):
    ids = tuple(map(ord, text)) + (() if truncated else (0,))
    reason = "length" if truncated else "stop"
    return Completion(token_ids=ids, logprobs=(0.0,) * len(ids), finish_reason=reason, weights_version=0)


def scripted_engine(*answers):
    """Return an engine that generates these texts, one tuple per prompt, for any prompt."""
    return lambda prompts, samplings: [[completion(text) for text in texts] for texts in answers]


WORKED_5 = turn(5, "1+2=3\n3+2=5")


def two_problems():
    """chain: 3 of 4 correct, two of them worked; cups: 1 of 4 correct."""
    engine = scripted_engine((WORKED_5, WORKED_5, turn(5), turn(4)), (turn(1), turn(2), turn(2), turn(3)))
    problems = [problem(), problem(answer="3", task="cups", level=3, language="zh", key="01")]
    return evaluate(engine, CharacterChat(), problems, CFG, REWARD, POOL)


def test_metrics_of_two_problems_by_hand():
    found = two_problems()
    assert (found.problems, found.samples, found.unscorable) == (2, 4, 0)
    assert found.pass_at_1 == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert found.question_error == pytest.approx(0.25)  # deviations +-1/4: sqrt(2/16 / 1 / 2)
    assert found.pass_at_k == pytest.approx({1: 0.5, 2: (1.0 + 0.5) / 2, 4: 1.0})
    assert found.cons_at_16 == 0.5  # chain votes 5, which is correct; cups votes 2, which is not
    assert found.worked_share == 2 / 8
    assert found.worked_accuracy == 1.0
    assert found.direct_accuracy == pytest.approx(2 / 6)
    assert found.format_rate == 1.0


def test_each_part_has_its_own_metrics():
    found = two_problems()
    assert {name: part.pass_at_1 for name, part in found.by_task.items()} == {"chain": 0.75, "cups": 0.25}
    assert {level: part.pass_at_1 for level, part in found.by_level.items()} == {2: 0.75, 3: 0.25}
    assert {name: part.pass_at_1 for name, part in found.by_language.items()} == {"en": 0.75, "zh": 0.25}
    assert found.by_task_level["cups"][3].pass_at_1 == 0.25
    assert found.by_task["chain"].question_error is None
    assert found.chance == {"chain": 0.1, "cups": 0.2}


def test_the_format_is_reported_separately_from_accuracy():
    loose = "so <think>x</think> well <answer>5</answer>"
    found = evaluate(scripted_engine((loose,)), CharacterChat(), [problem()], replace(CFG, samples=1), REWARD, POOL)
    assert (found.pass_at_1, found.format_rate) == (1.0, 0.0)


def test_unscorable_answers_count_as_wrong_and_both_bounds_are_known():
    """Regression: they left the denominator, so that one readable answer of eight gave an accuracy of 1."""

    class FailsOn4(type(TASKS["chain"])):
        def verify(self, problem, response):
            timed_out = Score(total=0.0, unscorable="time-out")
            return timed_out if "4" in response.text else super().verify(problem, response)

    fails_on_4 = Reward(RewardConfig(), {"chain": FailsOn4(TASKS["chain"].puzzle, TaskConfig())})
    engine = scripted_engine((turn(4), turn(4), turn(4), turn(5)), (turn(4),) * 4)
    found = evaluate(engine, CharacterChat(), [problem(), problem(key="01")], CFG, fails_on_4, POOL)
    assert (found.unscorable, found.problems) == (7, 2)
    assert (found.pass_at_1, found.pass_at_1_bound) == (1 / 8, 1.0)
    assert found.cons_at_16 == 0.0
    assert found.pass_at_k == {1: 1 / 8, 2: 0.25, 4: 0.5}


def test_means_are_over_the_completions_that_are_present():
    """Elsewhere 8 stored completions of 64 that were asked for give an eighth of the accuracy."""
    engine = scripted_engine((turn(5),) * 4, (turn(5),))
    found = evaluate(engine, CharacterChat(), [problem(), problem(key="01")], CFG, REWARD, POOL)
    assert (found.pass_at_1, found.fewest_samples, found.samples) == (1.0, 1, 4)
    assert found.pass_at_k == {1: 1.0, 2: 1.0, 4: 1.0}


def test_wordings_of_one_problem_are_one_cluster():
    engine = scripted_engine(*((turn(answer),) * 2 for answer in (5, 5, 4, 4)))
    problems = [problem(key=key, language=language) for key in ("00", "01") for language in ("en", "zh")]
    found = evaluate(engine, CharacterChat(), problems, CFG, REWARD, POOL)
    assert (found.num_clusters, found.question_error) == (2, 0.5)


def test_wrong_answers_of_one_value_vote_together():
    answers = [turn("1/2"), turn("0.5"), turn(5)]
    found = evaluate(scripted_engine(answers), CharacterChat(), [problem()], replace(CFG, samples=3), REWARD, POOL)
    assert found.cons_at_16 == 0.0


def test_truncation_comes_from_the_engine_and_tokens_include_the_end_token():
    def engine(prompts, samplings):
        return [[completion("abc", truncated=True), completion("abc")]]

    found = evaluate(engine, CharacterChat(), [problem()], replace(CFG, samples=2), REWARD, POOL)
    assert found.truncation_rate == 0.5
    assert found.mean_tokens == 3.5


def test_an_answer_that_is_too_long_does_not_vote():
    long = turn("5" * 65)
    engine = scripted_engine((long, long, turn(5)))
    found = evaluate(engine, CharacterChat(), [problem()], replace(CFG, samples=3), REWARD, POOL)
    assert found.cons_at_16 == 1.0


def test_an_evaluation_without_readable_answers_warns(caplog):
    """Regression: a stock model scored 0.0 without a warning; its answers were correct but in another format."""
    answers, cfg = scripted_engine(("4+1=5. #### 5", "I pass.")), replace(CFG, samples=2)
    found = evaluate(answers, CharacterChat(), [problem()], cfg, REWARD, POOL)
    assert (found.answer_rate, found.pass_at_1) == (0.0, 0.0)
    warn_if_no_answer_read(found, "think_answer_tags")
    assert "no answer could be read from 2 completions with thinking_format='think_answer_tags'" in caplog.text
    assert 'thinking_format = "flexible_extract"' in caplog.text
    caplog.clear()
    stock = Reward(RewardConfig(thinking_format="flexible_extract"), TASKS)
    found = evaluate(answers, CharacterChat(), [problem()], cfg, stock, POOL)
    warn_if_no_answer_read(found, "flexible_extract")
    assert (found.answer_rate, found.pass_at_1, caplog.text) == (0.5, 0.5, "")
    assert [(answer.answer, answer.rule) for answer in found.records[0].answers] == [(5, "hashes"), (None, None)]


def test_sampling_follows_the_config_with_a_seed_per_problem():
    sampling_params = []

    def engine(prompts, samplings):
        sampling_params.extend(samplings)
        return [[completion("")] * 4 for _ in prompts]

    problems = [problem(), problem(key="01"), problem(language="zh")]
    evaluate(engine, CharacterChat(), problems, CFG, REWARD, POOL)
    assert {(s.temperature, s.top_p, s.max_tokens, s.n, s.stop_token_ids) for s in sampling_params} == {
        (1.0, 1.0, 128, 4, (0,))
    }
    seeds = [s.seed for s in sampling_params]
    assert len(set(seeds)) == 3
    sampling_params.clear()
    evaluate(engine, CharacterChat(), problems[::-1], CFG, REWARD, POOL)
    assert [s.seed for s in sampling_params] == seeds[::-1]


def test_the_measure_of_worked_answers_is_the_puzzles():
    """Regression: answers to GSM8K were counted as worked by the number of their lines with an equals sign."""
    tasks = make_tasks({"chain": TaskConfig(), "gsm8k": TaskConfig(data="files")})
    engine = scripted_engine((WORKED_5,), (WORKED_5,))
    problems = [problem(), problem(task="gsm8k", key="01")]
    found = evaluate(engine, CharacterChat(), problems, replace(CFG, samples=1), Reward(RewardConfig(), tasks), POOL)
    assert [record.answers[0].worked for record in found.records] == [True, None]
    assert (found.worked_share, found.by_task["gsm8k"].worked_share) == (1.0, None)
    assert (found.worked_accuracy, found.direct_accuracy) == (1.0, None)


def test_a_task_may_sample_more_completions_than_the_others():
    sampling_params = []

    def engine(prompts, samplings):
        sampling_params.extend(samplings)
        return [[completion("")] * params.n for params in samplings]

    tasks = make_tasks({"chain": TaskConfig(num_samples=8), "cups": TaskConfig()})
    problems, reward = [problem(), problem(task="cups", key="01")], Reward(RewardConfig(), tasks)
    assert [len(r.answers) for r in evaluate(engine, CharacterChat(), problems, CFG, reward, POOL).records] == [8, 4]
    evaluate(engine, CharacterChat(), problems, replace(CFG, samples=1, temperature=0.0), reward, POOL)
    assert [params.n for params in sampling_params] == [8, 4, 1, 1]


def test_worked_means_at_least_all_steps_but_one():
    assert is_worked(problem(level=2), "6-4=2")
    assert not is_worked(problem(level=3), "6-4=2\nI guess.")
    assert is_worked(problem(level=3), "Step by step.\n1-2:1>2\n2-4:2>4")
    assert not is_worked(problem(level=2), "I just know.")


def test_an_evaluation_round_trips_through_json():
    found = two_problems()
    back = Evaluation.from_dict(found.to_dict())
    assert back == replace(found, records=())
    assert back.shown["chain"][0].text == WORKED_5
    with pytest.raises(ConfigError, match="not an evaluation"):
        Evaluation.from_dict({"problems": 1})


def test_metrics_can_be_recomputed_from_the_samples_file(tmp_path):
    found = two_problems()
    write_samples(tmp_path / "samples.jsonl", found.records)
    records = read_samples(tmp_path / "samples.jsonl")
    assert tuple(records) == found.records
    assert summarize(records, found.seconds, found.chance) == found
    assert compute_metrics(records[:1]) == found.by_task["chain"]
    (tmp_path / "bad.jsonl").write_text('{"key": 1}\n')
    with pytest.raises(ConfigError, match=r"bad\.jsonl line 1"):
        read_samples(tmp_path / "bad.jsonl")


def test_held_out_problems_are_test_problems_of_the_configured_levels_and_tasks():
    cfg = EvalConfig(num_problems=30, tasks=rows("chain", "cups", levels=(3,)), seed=1)
    problems = held_out_problems(cfg)
    assert len(problems) == 30
    assert {p.task for p in problems} == {"chain", "cups"}
    assert {p.level for p in problems} == {3}
    assert {split_of(p.key) for p in problems} == {"test"}
    assert problems == held_out_problems(cfg)
    unseen = replace(cfg, tasks=rows("chain", "cups", unseen_wordings=True))
    assert {p.wording for p in held_out_problems(unseen)} == {4, 5}


def test_several_greedy_samples_are_refused():
    with pytest.raises(ConfigError, match="samples=16 with temperature=0"):
        EvalConfig(tasks=rows("chain"), temperature=0.0)


def test_a_curve_point_contains_what_the_plots_need():
    found = two_problems()
    point = curve_point(20, found, held_out=found)
    assert point["step"] == 20
    assert point["by_task"] == {"chain": 0.75, "cups": 0.25}
    assert point["held_out_level"] == {"pass_at_1": 0.5, "question_error": pytest.approx(0.25)}
