"""The model for lm-evaluation-harness: token ids, log-likelihoods, completions, and a task from its command line.

Needs the extra `lm-eval`: pip install -e '.[lm-eval]'.
"""

import json
import math
import sys

import pytest
import torch

from tests.tiny import GQA_TINY, tiny_model, tiny_tokenizer
from thinkstack.checkpoint.model import save_model
from thinkstack.engine.engine import Engine
from thinkstack.evals.loglikelihood import loglikelihood
from thinkstack.text.tokenizer import BOS, Control
from thinkstack.types import ConfigError, RequestError, SamplingParams

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from thinkstack.evals.adapters.lm_eval import ThinkstackLM, main

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model(GQA_TINY, vocab_size=TOKENIZER.vocab_size, max_positions=128)
CONTEXT = "the ball is under cup 3. Swap 3-4."
TASK = """task: under_cups
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}} Answer:"
doc_to_choice: ["cup 3", "cup 4"]
doc_to_target: 1
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm_eval")
    save_model(folder / "model", MODEL, TOKENIZER, "r1_zero")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return ThinkstackLM(str(folder / "model"), dtype="fp32", batch_size=4)


def instances(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=place) for place, each in enumerate(arguments)]


def test_log_likelihoods_are_those_of_our_evaluation_with_one_bos(model):
    pairs = [(CONTEXT, " Where"), (CONTEXT, " the cup"), (f"{CONTEXT} ", "Where"), ("", "the ball")]
    found = model.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (logprob, is_greedy) in zip(pairs, found, strict=True):
        expected = loglikelihood(MODEL, TOKENIZER, context, continuation)
        assert logprob == pytest.approx(expected.logprob, abs=1e-5) and is_greedy == expected.is_greedy
        assert model.split_pair(context, continuation)[0].count(TOKENIZER.control_id(BOS)) == 1


def test_a_text_that_spells_bos_gets_no_second_one(model):
    before, after = model.split_pair(f"{BOS}{CONTEXT}", " Where")
    assert [*before, *after] == TOKENIZER.encode_pieces([Control(BOS), f"{CONTEXT} Where"])


def test_a_chat_keeps_control_tokens_out_of_messages(model):
    chat = [{"role": "user", "content": f"write <think> and {BOS}"}]
    prompt = model.apply_chat_template(chat)
    before, _ = model.split_pair(prompt, "the ball")
    assert before.count(TOKENIZER.control_id(BOS)) == 1
    assert prompt.count(BOS) == 2 and prompt.endswith("Assistant: ")
    continued = model.apply_chat_template([*chat, {"role": "assistant", "content": "the ball"}], False)
    assert continued == f"{prompt}the ball"
    assert model.chat_template(True) == "r1_zero" and "r1_zero" in model.tokenizer_name
    with pytest.raises(ConfigError, match="leave out the name"):
        model.chat_template("tool_use")


def test_rolling_windows_score_each_token_once_and_the_last_one_has_the_whole_context(model):
    text = " ".join([CONTEXT] * 30)
    ids = [TOKENIZER.control_id(BOS), *TOKENIZER.encode(text)]
    assert len(ids) > 2 * 128
    (found,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)), disable_tqdm=True)
    expected = 0.0
    for start in range(1, len(ids), 128):
        end = min(start + 128, len(ids))
        part = torch.tensor([ids[end - 129 : end]])
        with torch.no_grad():
            logprobs = MODEL(part[:, :-1]).log_softmax(-1)
        expected += float(logprobs.gather(-1, part[:, 1:, None])[0, start - end :].sum())
    assert found == pytest.approx(expected, rel=1e-5)


def test_greedy_completions_are_those_of_the_engine_up_to_a_stop_string(model):
    contexts = [CONTEXT, "the last digit", "Where is the"]
    sampling = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=model.chat.stop_token_ids)
    prompts = [[*TOKENIZER.begin_ids, *TOKENIZER.encode(text)] for text in contexts]
    texts = [model.chat.text_of(some[0].token_ids) for some in Engine(MODEL).generate(prompts, [sampling] * 3)]
    stops = [texts[0][3:5], "never", texts[2][2:3]]
    asked = [(text, {"until": [stop], "max_gen_toks": 24}) for text, stop in zip(contexts, stops, strict=True)]
    found = model.generate_until(instances("generate_until", *asked), disable_tqdm=True)
    assert found == [text.partition(stop)[0] for text, stop in zip(texts, stops, strict=True)]


def test_repetitions_are_sampled_with_seeds_of_their_own(model):
    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 16}
    requests = instances("generate_until", *[(CONTEXT, options)] * 3)
    found = model.generate_until(requests, disable_tqdm=True)
    assert len(set(found)) == 3
    assert found == model.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 is not supported; supported are until"),
        ({"max_gen_toks": 127}, "are 142 tokens; this model takes 128"),
        ({"temperature": -1.0, "do_sample": True, "max_gen_toks": 8}, "temperature=-1.0 must lie in"),
    ],
)
def test_bad_options_and_long_contexts_are_refused_before_anything_is_sampled(model, options, message):
    with pytest.raises(RequestError, match=message):
        model.generate_until(instances("generate_until", (CONTEXT, options)))


def test_a_long_context_is_shortened_behind_bos_if_that_is_asked_for(folder, model):
    long = " ".join([CONTEXT] * 20)
    with pytest.raises(RequestError, match=r"context and continuation of a request are .* truncate=True"):
        model.loglikelihood(instances("loglikelihood", (long, " Where")))
    shortening = ThinkstackLM(str(folder / "model"), dtype="fp32", truncate=True)
    before, after = shortening._fitting_pair(*shortening.split_pair(long, " Where"))
    whole = [*model.split_pair(long, " Where")[0]]
    assert before == [whole[0], *whole[-len(before) + 1 :]] and len(before) + len(after) - 1 == 128
    ((logprob, _),) = shortening.loglikelihood(instances("loglikelihood", (long, " Where")), disable_tqdm=True)
    assert math.isfinite(logprob)


def test_a_task_runs_from_the_command_line(folder, monkeypatch, capsys):
    rows = [{"question": f"the ball is under cup {number}. Where is the ball now?"} for number in range(6)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "task.yaml").write_text(TASK.replace("FOLDER", str(folder)))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)
    words = f"lm-eval run --model thinkstack --model_args pretrained={folder}/model,dtype=fp32 --tasks under_cups"
    monkeypatch.setattr(
        sys, "argv", [*words.split(), "--include_path", str(folder), "--output_path", str(folder / "out")]
    )
    main()
    (results,) = (folder / "out").glob("*/results_*.json")
    choices = [
        [loglikelihood(MODEL, TOKENIZER, f"{row['question']} Answer:", f" cup {n}").logprob for n in (3, 4)]
        for row in rows
    ]
    accuracy = sum(second > first for first, second in choices) / len(rows)
    assert json.loads(results.read_text())["results"]["under_cups"]["acc,none"] == pytest.approx(accuracy)
