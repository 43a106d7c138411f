"""Log-likelihoods: by hand, alone and in a batch, and equal to transformers."""

import gzip
import math

import pytest
import torch

from tests.problems import make_problem
from tests.tiny import GQA_TINY, tiny_model, tiny_tokenizer
from thinkstack.checkpoint.model import save_model
from thinkstack.evals.loglikelihood import (
    bits_per_byte,
    bits_per_byte_of_file,
    choice_prompt,
    choose_by_loglikelihood,
    loglikelihood,
    loglikelihoods,
    split_pair,
)
from thinkstack.tasks.benchmarks.choices import choice_problem
from thinkstack.tasks.benchmarks.prompts import MMLU_PROMPTS
from thinkstack.types import ConfigError, RequestError

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model(GQA_TINY, vocab_size=TOKENIZER.vocab_size, max_positions=256)
QUESTIONS = [
    choice_problem(
        "mmlu", f"Where is the ball {number}?", ["cup 1", "the cup 2", "under 3", "now"], number % 4, None, {}
    )
    for number in range(12)
]


def random_pairs(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 20, (count, 2), generator=generator).tolist()
    return [tuple(torch.randint(40, (size,), generator=generator).tolist() for size in pair) for pair in sizes]


def test_a_log_likelihood_is_the_sum_over_the_tokens_of_the_continuation():
    context, continuation = [1, 5, 9], [7, 3]
    with torch.no_grad():
        logprobs = MODEL(torch.tensor([[*context, *continuation]])).log_softmax(-1)[0]
    (found,) = loglikelihoods(MODEL, [(context, continuation)])
    assert found.logprob == pytest.approx(float(logprobs[2, 7] + logprobs[3, 3]), abs=1e-5)
    assert found.num_tokens == 2 and not found.is_greedy
    best = int(logprobs[2].argmax())
    assert loglikelihoods(MODEL, [(context, [best])])[0].is_greedy


def test_a_batch_of_32_gives_what_each_pair_gives_alone():
    pairs = random_pairs(64)
    together, alone = (loglikelihoods(MODEL, pairs, batch_size) for batch_size in (32, 1))
    for first, second in zip(together, alone, strict=True):
        assert first.logprob == pytest.approx(second.logprob, abs=1e-5)
        assert (first.is_greedy, first.num_tokens) == (second.is_greedy, second.num_tokens)


def test_pairs_that_differ_in_the_last_token_are_one_row(monkeypatch):
    context, letters = [1, 5, 9, 2], [[7], [3], [9]]
    alone = [loglikelihoods(MODEL, [(context, letter)])[0] for letter in letters]
    shapes, trunk = [], MODEL.trunk
    monkeypatch.setattr(MODEL, "trunk", lambda ids: shapes.append(tuple(ids.shape)) or trunk(ids))
    pairs = [*((context, letter) for letter in letters), (context[:2], [*context[2:], 4])]
    *found, split_earlier = loglikelihoods(MODEL, pairs)
    assert shapes == [(1, 4)]
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in alone], abs=1e-6)
    assert split_earlier.num_tokens == 3
    assert split_earlier.logprob == pytest.approx(loglikelihoods(MODEL, pairs[-1:])[0].logprob, abs=1e-6)


def test_a_continuation_has_its_tokens_of_running_text_and_one_bos():
    for context, continuation in (("the ball", " is under"), ("the ball ", "is under"), ("", "the ball")):
        before, after = split_pair(TOKENIZER, context, continuation)
        assert [*before, *after] == [*TOKENIZER.begin_ids, *TOKENIZER.encode(context + continuation)]
        assert TOKENIZER.decode(after).strip() == continuation.strip()
    assert loglikelihood(MODEL, TOKENIZER, "the ball ", "is") == loglikelihood(MODEL, TOKENIZER, "the ball", " is")


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(RequestError, match="has no tokens"):
        split_pair(TOKENIZER, "the ball", "")
    with pytest.raises(RequestError, match="have 300 tokens without the last; this model takes 256"):
        loglikelihoods(MODEL, [([1] * 300, [2])])
    with pytest.raises(RequestError, match="the text is empty"):
        bits_per_byte(MODEL, TOKENIZER, "")
    with pytest.raises(ConfigError, match="has no choices"):
        choose_by_loglikelihood(MODEL, TOKENIZER, [QUESTIONS[0], make_problem()])


@pytest.mark.parametrize("by_text", [False, True])
def test_the_most_likely_choice_is_chosen_and_bytes_normalize(by_text):
    found = choose_by_loglikelihood(MODEL, TOKENIZER, QUESTIONS, by_text, lambda problem: QUESTIONS[:2])
    for problem, result in zip(QUESTIONS, found, strict=True):
        choices = problem.metadata["choices"] if by_text else "ABCD"
        correct = "ABCD".index(problem.answer)
        assert result.is_correct == (max(result.logprobs) == result.logprobs[correct])
        rates = [value / len(text.encode()) for value, text in zip(result.logprobs, choices, strict=True)]
        assert result.is_correct_normalized == (max(rates) == rates[correct])
    assert 0 < sum(result.is_correct for result in found) < len(found)


def test_bits_per_byte_do_not_depend_on_how_the_file_is_stored(tmp_path):
    text = "the ball is under cup 3. Swap 3-4. Where is the ball now? 从左到右\n" * 6
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    found = bits_per_byte_of_file(MODEL, TOKENIZER, tmp_path / "a.txt", 64)
    assert found == bits_per_byte_of_file(MODEL, TOKENIZER, tmp_path / "a.txt.gz", 64)
    assert found.num_bytes == len(text.encode()) and found.num_tokens == len(TOKENIZER.encode(text))
    other = bits_per_byte(MODEL, TOKENIZER, text, 64, first_token_id=5)
    assert other.num_tokens == found.num_tokens and other.bits_per_byte != found.bits_per_byte
    ids, nats = [TOKENIZER.begin_ids[-1], *TOKENIZER.encode(text)], 0.0
    for start in range(0, len(ids) - 1, 64):
        part = torch.tensor([ids[start : start + 65]])
        with torch.no_grad():
            logprobs = MODEL(part[:, :-1]).log_softmax(-1)
        nats -= float(logprobs.gather(-1, part[:, 1:, None]).sum())
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_log_likelihoods_equal_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    save_model(tmp_path / "model", MODEL, TOKENIZER, "r1_zero")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    pairs = random_pairs(20, seed=1)
    for (context, continuation), found in zip(pairs, loglikelihoods(MODEL, pairs), strict=True):
        with torch.no_grad():
            logprobs = theirs(torch.tensor([[*context, *continuation]])).logits.log_softmax(-1)[0]
        rows = logprobs[len(context) - 1 : -1]
        assert found.logprob == pytest.approx(
            sum(float(row[id]) for row, id in zip(rows, continuation, strict=True)), abs=1e-4
        )


def test_a_description_stands_once_before_the_examples_and_a_prompt_may_be_named():
    first, second = (
        choice_problem("mmlu", f"Which {place}?", ["a", "b"], 1, None, {"subject": "us_law"}) for place in (1, 2)
    )
    letters = choice_prompt(second, by_text=False, shots=[first])
    about = "The following are multiple choice questions (with answers) about us law.\n\n"
    assert letters == f"{about}Which 1?\nA. a\nB. b\nAnswer: B\n\nWhich 2?\nA. a\nB. b\nAnswer:"
    cloze = choice_prompt(second, by_text=True, shots=[first], prompt=MMLU_PROMPTS["smollm2"])
    about = "The following are questions about us law.\n"
    assert cloze == f"{about}Question: Which 1?\nAnswer: b\n\nQuestion: Which 2?\nAnswer:"
