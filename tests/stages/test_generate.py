"""generate: one process and two give the same tokens; a conversation, a file of prompts, plain text."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import HANG_SECONDS
from tests.tiny import GQA_TINY, MLA_TINY, tiny_model, tiny_tokenizer
from thinkstack.checkpoint.model import load_model, save_model
from thinkstack.config import build
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.parallel.inference import Ranks, local_config
from thinkstack.parallel.load import load_shard
from thinkstack.stages.console import NEW
from thinkstack.stages.evaluate import EvaluateConfig
from thinkstack.stages.generate import Generator, read_prompts
from thinkstack.stages.local_chat import LocalModel
from thinkstack.types import ConfigError, Message, SamplingParams

SIZES = {
    "mla": replace(MLA_TINY, vocab_size=360, mtp_layers=0),
    "gqa": replace(GQA_TINY, vocab_size=360, tie_embeddings=True),
    "gqa with biases": replace(
        GQA_TINY, vocab_size=360, family="qwen2", attention=replace(GQA_TINY.attention, qkv_bias=True)
    ),
}


@pytest.fixture(params=SIZES.values(), ids=SIZES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_model(tmp_path / "model", tiny_model(request.param), tiny_tokenizer(), "r1_zero_short")
    return tmp_path / "model"


def generator(folder: Path, **changes: object) -> Generator:
    sampling = SamplingParams(**({"temperature": 1.0, "max_tokens": 12, "seed": 3} | changes))  # type: ignore[arg-type]
    return Generator(str(folder), sampling, Ranks(), "fp32", torch.device("cpu"))


@pytest.mark.parametrize("folder", [SIZES["mla"], SIZES["gqa with biases"]], indirect=True, ids=["mla", "gqa"])
def test_two_processes_give_the_tokens_of_one(folder: Path, tmp_path: Path):
    """Real processes under torchrun, with gloo: heads, feed-forwards and experts are shared out."""
    prompts = ["1+2?", "the ball is under cup 3"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n", encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    asked = [
        "--input-file",
        str(tmp_path / "prompts.txt"),
        "--max-new-tokens",
        "12",
        "--temperature",
        "1",
        "--seed",
        "3",
    ]
    command = [sys.executable, *launcher, "-m", "thinkstack", "generate", str(folder), *asked]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    alone = generator(folder).answers(prompts)
    assert done.stdout == "".join(f"Prompt: {p}\nCompletion: {a}\n\n" for p, a in zip(prompts, alone, strict=True))


def test_the_parts_of_all_ranks_are_the_whole(folder: Path):
    full = load_model(folder)
    parts = [load_shard(folder, Ranks(rank, 2)) for rank in range(2)]
    mine = [dict(part.named_parameters()) for part in parts]
    for name, parameter in full.named_parameters():
        here = [part[name] for part in mine]
        sizes = {tuple(part.shape) for part in here}
        assert len(sizes) == 1
        if here[0].shape == parameter.shape:
            assert all(torch.equal(part, parameter) for part in here), name
        else:
            dim = next(d for d in range(parameter.dim()) if here[0].shape[d] != parameter.shape[d])
            if "ffn.w_in" in name or "ffn.w_out" in name:
                assert dim == 0
            assert torch.equal(torch.cat(here, dim), parameter), name
    assert sum(p.numel() for p in parts[0].parameters()) < 0.8 * sum(p.numel() for p in full.parameters())


@pytest.mark.parametrize(
    ("cfg", "count", "message"),
    [
        (MLA_TINY, 4, "attention heads: 2 is not divisible by 4 processes"),
        (GQA_TINY, 4, "key/value heads: 2 is not divisible by 4 processes"),
    ],
)
def test_a_model_that_does_not_divide_is_refused(cfg, count: int, message: str):
    with pytest.raises(ConfigError, match=message):
        local_config(cfg, count)


def test_answers_to_a_file_are_those_to_each_line(folder: Path):
    together = generator(folder).answers(["1+2?", "3+4?"])
    alone = [generator(folder, seed=3 + place).answers([prompt])[0] for place, prompt in enumerate(["1+2?", "3+4?"])]
    assert together == alone


def test_a_conversation_keeps_its_turns_until_new(folder: Path):
    written: list[str] = []
    lines = iter(["1+2?", "and 3?", NEW, "1+2?", None, "never read"])
    generator(folder, temperature=0.0).converse(lambda: next(lines), lambda text, style: written.append(text))
    turns = "".join(written).split("\n")
    assert next(lines) == "never read"
    assert len(turns) >= 4
    full = "".join(written)
    first = "".join(generator(folder, temperature=0.0).answer([Message(role="user", content="1+2?")])) + "\n"
    assert full.startswith(first) and full.endswith(first)


def test_plain_text_is_continued_without_a_template(folder: Path):
    text = "".join(generator(folder).respond("the ball", raw=True))
    assert isinstance(text, str)
    again = "".join(generator(folder).respond("the ball", raw=True))
    assert text == again


def test_a_file_without_prompts_is_refused(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(ConfigError, match="has no prompts"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(ConfigError, match="cannot read the prompts"):
        read_prompts(tmp_path / "none.txt")


def test_weights_are_quantized_as_configured_in_every_generator(folder: Path):
    """For a file of prompts the answers are those of an engine on int8; chat and evaluation pass the setting on."""
    sampling, cpu = SamplingParams(temperature=0.0, max_tokens=12), torch.device("cpu")
    quantized = Generator(str(folder), sampling, Ranks(), "fp32", cpu, "int8")
    ids = quantized.chat.prompt([Message(role="user", content="1+2?")])
    how = [replace(sampling, stop_token_ids=quantized.chat.stop_token_ids)]
    engine = Engine(load_model(folder), EngineConfig(quantization="int8"))
    assert quantized.answers(["1+2?"]) == [quantized.chat.text_of(engine.generate([ids], how)[0][0].token_ids)]
    assert LocalModel(str(folder), sampling, quantization="int8").engine.cfg.quantization == "int8"
    assert build(EvaluateConfig, {"start": "base", "quantization": "int8"}).quantization == "int8"


def test_processes_that_share_a_model_cannot_pack_it(folder: Path):
    with pytest.raises(ConfigError, match="quantization='int8' does not work in several processes"):
        Generator(str(folder), SamplingParams(), Ranks(0, 2), "fp32", torch.device("cpu"), "int8")
